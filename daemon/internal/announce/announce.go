// Package announce tells the world outside what became of jobs: the journal, by
// messages that programs can wait for, and systemd, by a unit that fails with
// each backup that failed.
//
// Whether anybody listens changes nothing for the jobs. What a daemon that died
// could not tell, the next one tells: in doubt an end is told twice.
package announce

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/backup"
	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/job"
	"github.com/virtbackup/virtbackup/daemon/internal/journal"
	"github.com/virtbackup/virtbackup/dbus"
)

// Units are failed backups as systemd knows them, by their jobs.
type Units interface {
	Raise(ctx context.Context, job string) error
	Clear(ctx context.Context, job string) error
	Raised(ctx context.Context) ([]string, error)
}

// Catalog knows what jobs are about.
type Catalog interface {
	Job(ctx context.Context, id string) (catalog.Job, error)
	Domain(ctx context.Context, uuid string) (catalog.Domain, error)
	Repository(ctx context.Context, id string) (catalog.Repository, error)
	UntoldJobs(ctx context.Context) ([]catalog.Job, error)
	ToldJob(ctx context.Context, id string) error
}

// Announcer tells of jobs.
type Announcer struct {
	Catalog Catalog
	Units   Units
	Log     *slog.Logger
}

// patience is how long systemd may take. A job that ends meanwhile is told later.
const patience = 10 * time.Second

// Untold returns the jobs that ended when nobody was there to tell it.
func (a *Announcer) Untold(ctx context.Context) (all []job.Status, err error) {
	jobs, err := a.Catalog.UntoldJobs(ctx)
	for _, j := range jobs {
		all = append(all, job.Status{Job: j})
	}
	return all, err
}

// Ended tells that a job has ended. It is meant for job.Engine.Subscribe.
func (a *Announcer) Ended(ctx context.Context, st job.Status) {
	// What is known should not be lost to a shutdown.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
	defer cancel()
	a.tell(ctx, st)
	a.raise(ctx, st)
	// One that is forgotten meanwhile need not be told again either.
	if err := a.Catalog.ToldJob(context.WithoutCancel(ctx), st.ID); err != nil && !errors.Is(err, catalog.ErrNotFound) {
		a.Log.Warn("cannot record that a job was told of", journal.Job, st.ID, journal.Error, err)
	}
}

// raise has systemd know of a backup that failed, and of one that did not.
func (a *Announcer) raise(ctx context.Context, st job.Status) {
	if st.Kind != backup.KindName || st.State == catalog.JobCancelled {
		return
	}
	// One unit per domain, of its newest failure: they do not pile up.
	if err := a.clear(ctx, st.Domain); err != nil {
		a.Log.Warn("cannot clear the units of former failures", journal.Domain, st.Domain, journal.Error, err)
	}
	if st.State != catalog.JobFailed {
		return
	}
	if err := a.Units.Raise(ctx, st.ID); err != nil {
		a.Log.Warn("cannot have systemd know of a failed backup", journal.Job, st.ID, journal.Error, err)
	}
}

// clear has systemd forget former failures of a domain.
func (a *Announcer) clear(ctx context.Context, domain string) error {
	raised, err := a.Units.Raised(ctx)
	if err != nil {
		return err
	}
	for _, id := range raised {
		// One whose job is forgotten has been there for months.
		if j, err := a.Catalog.Job(ctx, id); err == nil && j.Domain != domain {
			continue
		}
		if err := a.Units.Clear(ctx, id); err != nil {
			return err
		}
	}
	return nil
}

// tell writes to the journal.
func (a *Announcer) tell(ctx context.Context, st job.Status) {
	m, level := message(st.Kind, st.State)
	about := []any{journal.MessageID, m, journal.Job, st.ID, "kind", st.Kind}
	add := func(key, value string) {
		if value != "" {
			about = append(about, key, value)
		}
	}
	text := st.Kind
	add(journal.Domain, st.Domain)
	if d, err := a.Catalog.Domain(ctx, st.Domain); err == nil {
		add(journal.DomainName, d.Name)
		text += " of domain " + d.Name
	}
	add(journal.Backup, st.Backup)
	if r, err := a.Catalog.Repository(ctx, st.Repository); err == nil {
		add(journal.Repository, r.Name)
		if st.Domain == "" {
			text += " of repository " + r.Name
		}
	}
	if st.State == catalog.JobFailed {
		add("error_name", st.ErrorName)
		add(journal.Error, st.ErrorMessage)
	}
	a.Log.Log(ctx, level, text+" "+string(st.State), about...)
}

// message is what a job's end is told as.
func message(kind string, state catalog.JobState) (journal.Message, slog.Level) {
	restore := kind == string(dbus.OperationRestore) || kind == string(dbus.OperationRestoreInPlace)
	switch {
	case state == catalog.JobCancelled:
		return journal.JobCancelled, slog.LevelInfo
	case state == catalog.JobFailed && kind == backup.KindName:
		return journal.BackupFailed, slog.LevelError
	case state == catalog.JobFailed && restore:
		return journal.RestoreFailed, slog.LevelError
	case state == catalog.JobFailed:
		return journal.JobFailed, slog.LevelError
	case kind == backup.KindName:
		return journal.BackupSucceeded, slog.LevelInfo
	case restore:
		return journal.RestoreSucceeded, slog.LevelInfo
	}
	return journal.JobSucceeded, slog.LevelInfo
}
