package schedule

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/journal"
)

const (
	// lookEach is how often a run that waits is looked at although nothing was told.
	lookEach = 30 * time.Second
	// repairEach is how soon timers are set again that could not be.
	repairEach = time.Minute
)

// Run sets the timers as the catalog says, and takes care of the runs that go
// on or wait, until ctx ends.
func (k *Keeper) Run(ctx context.Context) {
	repair, look := time.NewTimer(0), time.NewTicker(lookEach)
	defer repair.Stop()
	defer look.Stop()
	k.Kick()
	for {
		select {
		case <-ctx.Done():
			return
		case <-repair.C:
			if err := k.Reconcile(ctx); err != nil && ctx.Err() == nil {
				k.log.Error("cannot set the timers of schedules; it is tried again", "error", err)
				repair.Reset(repairEach)
			}
		case <-k.kicked:
			k.settleAll(ctx)
		case <-look.C:
			k.settleAll(ctx)
		}
	}
}

// Kick says that a job has ended: a run may have, too, or what was in the way of one.
func (k *Keeper) Kick() {
	select {
	case k.kicked <- struct{}{}:
	default:
	}
}

func (k *Keeper) settleAll(ctx context.Context) {
	runs, err := k.catalog.UnfinishedRuns(ctx, "")
	for _, r := range runs {
		if err == nil {
			err = k.settleOne(ctx, r.Schedule)
		}
	}
	if err != nil && ctx.Err() == nil {
		k.log.Error("cannot tell what became of the runs of schedules; it is tried again", "error", err)
	}
}

func (k *Keeper) settleOne(ctx context.Context, id string) error {
	defer k.lock(id)()
	s, err := k.catalog.Schedule(ctx, id)
	if errors.Is(err, catalog.ErrNotFound) {
		return nil
	} else if err != nil {
		return err
	}
	_, err = k.settle(ctx, s)
	return err
}

// settle ends the run whose jobs have ended, and starts the one that waits, if
// it can. It returns the runs that still go on or wait. The schedule is locked.
func (k *Keeper) settle(ctx context.Context, s catalog.Schedule) ([]catalog.ScheduleRun, error) {
	runs, err := k.catalog.UnfinishedRuns(ctx, s.ID)
	if err != nil {
		return nil, err
	}
	if r := find(runs, catalog.RunRunning); r != nil {
		if err := k.end(ctx, s, *r); err != nil {
			return nil, err
		}
		if runs, err = k.catalog.UnfinishedRuns(ctx, s.ID); err != nil {
			return nil, err
		}
	}
	w := find(runs, catalog.RunWaiting)
	if w == nil || find(runs, catalog.RunRunning) != nil {
		return runs, nil
	}
	work, obstacle := k.backups.Prepare(ctx, s)
	switch {
	case obstacle == nil:
		_, err = k.start(ctx, s, *w, work)
	case !obstacle.Passing:
		w.State, w.Finished = catalog.RunSkipped, time.Now()
		fallthrough
	default:
		err = k.explain(ctx, s, *w, obstacle.Reason)
	}
	if err != nil {
		return nil, err
	}
	return k.catalog.UnfinishedRuns(ctx, s.ID)
}

// explain records why a run waits or is skipped, if that was not known.
func (k *Keeper) explain(ctx context.Context, s catalog.Schedule, r catalog.ScheduleRun, reason string) error {
	if r.State == catalog.RunWaiting && r.Reason == reason {
		return nil
	}
	r.Reason = reason
	if err := k.catalog.UpdateRun(ctx, r); err != nil {
		return err
	}
	k.tell(s, r)
	return nil
}

// adopt finds the jobs of a run, when the daemon went down before it recorded them.
func (k *Keeper) adopt(ctx context.Context, r *catalog.ScheduleRun) error {
	jobs, err := k.catalog.ListJobs(ctx, catalog.JobFilter{Schedule: r.Schedule, Since: r.Created}, catalog.Page{})
	for _, j := range jobs {
		if j.Parent == "" { // the others are of a group that is the run's
			r.Jobs = append(r.Jobs, j.ID)
		}
	}
	if err != nil || len(r.Jobs) == 0 {
		return err
	}
	return k.catalog.UpdateRun(ctx, *r)
}

// end records how a run ended, if all its jobs have.
func (k *Keeper) end(ctx context.Context, s catalog.Schedule, r catalog.ScheduleRun) error {
	if len(r.Jobs) == 0 {
		if err := k.adopt(ctx, &r); err != nil {
			return err
		}
	}
	var jobs []catalog.Job
	for _, id := range r.Jobs {
		j, err := k.catalog.Job(ctx, id)
		if errors.Is(err, catalog.ErrNotFound) {
			continue // it ended so long ago that it was forgotten
		} else if err != nil {
			return err
		}
		jobs = append(jobs, j)
	}
	state, reason, ended := outcome(jobs, func(uuid string) string { return k.backups.DomainName(ctx, uuid) })
	if !ended {
		return nil
	}
	if len(r.Jobs) == 0 {
		state, reason = catalog.RunFailed, "virtbackupd went down while it was begun"
	}
	r.State, r.Reason, r.Finished = state, reasons(reason, r.Reason), time.Now()
	if err := k.catalog.UpdateRun(ctx, r); err != nil {
		return err
	}
	k.tell(s, r)
	return nil
}

// Trigger is who has a schedule run.
type Trigger struct {
	Timer bool // its timer is due
	UID   uint32
}

// Trigger has a schedule run now, and returns what became of that.
func (k *Keeper) Trigger(ctx context.Context, id string, by Trigger) (catalog.ScheduleRun, error) {
	ctx = context.WithoutCancel(ctx) // what was begun is recorded
	defer k.lock(id)()
	s, err := k.catalog.Schedule(ctx, id)
	if err != nil {
		return catalog.ScheduleRun{}, err
	}
	k.forget(id) // the timer is at its next time now
	run := catalog.ScheduleRun{ID: ulid.Make().String(), Schedule: id, Timer: by.Timer, UID: by.UID, Created: time.Now()}
	if by.Timer && !s.Enabled {
		run.State, run.Reason = catalog.RunSkipped, "the schedule is disabled"
		return k.add(ctx, s, run)
	}
	unfinished, err := k.settle(ctx, s)
	if err != nil {
		return run, err
	}
	var work Work
	var obstacle *Obstacle
	if len(unfinished) == 0 {
		work, obstacle = k.backups.Prepare(ctx, s)
	}
	run.State, run.Reason = decide(s, unfinished, obstacle)
	if run.State != catalog.RunRunning {
		return k.add(ctx, s, run)
	}
	if err := k.catalog.AddRun(ctx, run); err != nil {
		return run, err
	}
	return k.start(ctx, s, run, work)
}

// add records a run that does not start.
func (k *Keeper) add(ctx context.Context, s catalog.Schedule, r catalog.ScheduleRun) (catalog.ScheduleRun, error) {
	if r.State.Ended() {
		r.Finished = r.Created
	}
	if err := k.catalog.AddRun(ctx, r); err != nil {
		return r, err
	}
	k.tell(s, r)
	return r, nil
}

// start starts a run that is recorded.
func (k *Keeper) start(ctx context.Context, s catalog.Schedule, r catalog.ScheduleRun, work Work) (catalog.ScheduleRun, error) {
	// Recorded before anything is started: a daemon that dies now does not start it twice.
	r.State, r.Reason = catalog.RunRunning, strings.Join(work.LeftOut, "; ")
	if err := k.catalog.UpdateRun(ctx, r); err != nil {
		return r, err
	}
	jobs, err := work.Start(ctx, r)
	r.Jobs = jobs
	if err != nil {
		r.Reason = reasons(err.Error(), r.Reason)
	}
	if len(jobs) == 0 {
		r.State, r.Finished = catalog.RunFailed, time.Now()
	}
	if err := k.catalog.UpdateRun(ctx, r); err != nil {
		return r, err
	}
	k.tell(s, r)
	k.Kick() // a job may have ended before its id was recorded
	return r, nil
}

// tell tells the journal, and those who listen, what became of a run.
func (k *Keeper) tell(s catalog.Schedule, r catalog.ScheduleRun) {
	about := []any{journal.Schedule, s.Name, "run", r.ID, "state", string(r.State)}
	if len(r.Jobs) > 0 {
		about = append(about, "jobs", strings.Join(r.Jobs, " "))
	}
	if r.Reason != "" {
		about = append(about, journal.Error, r.Reason)
	}
	message := fmt.Sprintf("schedule %s: the run of %s is %s", s.Name, moment(r.Created), r.State)
	switch {
	case r.State == catalog.RunRunning, r.State == catalog.RunSucceeded:
		k.log.Info(message, about...)
	case len(r.Jobs) == 0 && r.State.Ended():
		k.log.Warn(message, append(about, journal.MessageID, journal.ScheduleSkipped)...)
	default:
		k.log.Warn(message, about...)
	}
	k.backups.ScheduleChanged(s.ID)
}
