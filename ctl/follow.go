package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/virtbackup/virtbackup/dbus"
)

// finish deals with jobs that a verb started: it follows them to their ends
// and tells how they went, or prints their ids with --no-block.
func (a *app) finish(ctx context.Context, c *dbus.Client, ids ...string) ([]dbus.JobProperties, error) {
	if a.noBlock {
		jobs := make([]dbus.JobProperties, len(ids))
		for i, id := range ids {
			var err error
			if jobs[i], err = dbus.Get[dbus.JobProperties](ctx, c, id); err != nil {
				return nil, err
			}
			a.say("%s", id)
		}
		return jobs, nil
	}
	return a.follow(ctx, c, ids)
}

// finishOne is finish for the verbs that start one job: it is their result.
func (a *app) finishOne(ctx context.Context, c *dbus.Client, id string) error {
	jobs, err := a.finish(ctx, c, id)
	return errors.Join(a.jsonJobs(jobs, false), err)
}

// finishAndTell follows a job to its end as finishOne does, and prints what its log says.
func (a *app) finishAndTell(ctx context.Context, c *dbus.Client, id string) error {
	err := a.finishOne(ctx, c, id)
	if a.noBlock || a.json != jsonOff {
		return err
	}
	messages, failed := c.JobLog(ctx, id, 0)
	for _, m := range messages {
		a.say("%s", m.Message)
	}
	return errors.Join(err, failed)
}

// jsonJobs prints jobs as the result of a verb: a list, or the one.
func (a *app) jsonJobs(jobs []dbus.JobProperties, list bool) error {
	switch {
	case a.json == jsonOff || len(jobs) == 0:
		return nil
	case list:
		return writeJSON(a.out, a.json, jobs)
	}
	return writeJSON(a.out, a.json, jobs[0])
}

// follow follows jobs to their ends, reports what they do, and tells how each
// went. It returns how they read then.
func (a *app) follow(ctx context.Context, c *dbus.Client, ids []string) ([]dbus.JobProperties, error) {
	progress := a.newReporter(len(ids))
	jobs := make([]dbus.JobProperties, len(ids))
	errs := make([]error, len(ids))
	var mu sync.Mutex
	var all sync.WaitGroup
	for i, id := range ids {
		all.Go(func() {
			jobs[i], errs[i] = watch(ctx, c, id, func(u dbus.JobUpdate) {
				mu.Lock()
				defer mu.Unlock()
				progress.update(i, u)
			})
		})
	}
	all.Wait()
	progress.close()
	if ctx.Err() != nil {
		return jobs, a.detached(ids, jobs)
	}
	for i, job := range jobs {
		if errs[i] == nil {
			errs[i] = a.outcome(ctx, c, job)
		}
	}
	return jobs, errors.Join(errs...)
}

// watch is WatchJob, and does not take it for the job's end that the daemon
// has too much to do just now.
func watch(ctx context.Context, c *dbus.Client, id string, report func(dbus.JobUpdate)) (dbus.JobProperties, error) {
	for {
		job, err := c.WatchJob(ctx, id, report)
		if !errors.Is(err, dbus.ErrLimitsExceeded) {
			return job, err
		}
		select {
		case <-ctx.Done():
			return job, ctx.Err()
		case <-time.After(time.Second):
		}
	}
}

// detached says how to go on with jobs that a person stopped following.
func (a *app) detached(ids []string, jobs []dbus.JobProperties) error {
	command := "virtbackupctl"
	if a.host != "" {
		command += " -H " + a.host
	}
	var lines []string
	for i, id := range ids {
		if !jobs[i].State.Final() {
			lines = append(lines, fmt.Sprintf("job %s goes on: follow it with %q, stop it with %q", id, command+" watch "+id, command+" cancel "+id))
		}
	}
	return &detachedError{strings.Join(lines, "\n")}
}

// outcome tells how a job went.
func (a *app) outcome(ctx context.Context, c *dbus.Client, job dbus.JobProperties) error {
	if a.json == jsonOff {
		for _, w := range job.Warnings {
			fmt.Fprintln(a.err, clean(fmt.Sprintf("%s: warning: %s", title(job), w)))
		}
	}
	if job.State != dbus.JobSucceeded {
		return &jobError{job}
	}
	if a.json != jsonOff {
		return nil
	}
	took := elapsed(job.Finished.Sub(job.Started))
	switch job.Operation {
	case dbus.OperationBackup:
		// The job is done, whatever can still be read of its backup.
		if b, err := dbus.Get[dbus.BackupProperties](ctx, c, job.Backup); err == nil {
			a.say("%s: %s backup %s, %s read, %s stored, in %s", title(job), b.Kind, b.ID, size(b.ReadBytes), size(b.StoredBytes), took)
			return nil
		}
		a.say("%s: backup %s, in %s", title(job), job.Backup, took)
	default:
		a.say("%s: done in %s", title(job), took)
	}
	return nil
}

// title names a job for people.
func title(job dbus.JobProperties) string {
	switch job.Operation {
	case dbus.OperationBackup:
		return "backup of " + job.DomainName
	case dbus.OperationRestore, dbus.OperationRestoreInPlace:
		return "restore of " + job.Backup
	case dbus.OperationVerify:
		return "verify of " + job.Backup
	case dbus.OperationValidate:
		return "validation of " + job.Backup
	case dbus.OperationRepair:
		return "repair of " + job.Backup
	case dbus.OperationCompress:
		return "compression of " + job.Backup
	case dbus.OperationDelete:
		return "delete of " + job.Backup
	case dbus.OperationGroup:
		return "group " + job.ID
	case dbus.OperationCheck:
		return "check of repository " + job.Repository
	}
	return fmt.Sprintf("%s (job %s)", job.Operation, job.ID)
}
