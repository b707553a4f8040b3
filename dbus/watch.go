package dbus

import (
	"context"
	"errors"
	"fmt"

	godbus "github.com/godbus/dbus/v5"
)

// JobUpdate is one step of WatchJob.
type JobUpdate struct {
	// Job is how the job reads now, or read last.
	Job JobProperties
	// Away says that virtbackupd does not answer just now. The job's worker
	// goes on without it.
	Away bool
}

// WatchJob follows a job to its end and returns how it reads then; JobProperties.Err
// says how it went. A restart of the daemon is waited for. It returns early
// only when ctx is done, the bus is lost, or the job cannot be read.
//
// It listens before it reads, so that no change is lost between the two, and
// reads again after each signal.
func (c *Client) WatchJob(ctx context.Context, id string, report func(JobUpdate)) (JobProperties, error) {
	path := Ref{KindJob, id}.Path()
	signals := make(chan *godbus.Signal, 64)
	c.conn.Signal(signals)
	defer c.conn.RemoveSignal(signals)
	for _, rule := range [][]godbus.MatchOption{
		{godbus.WithMatchSender(BusName), godbus.WithMatchInterface(InterfaceProperties), godbus.WithMatchObjectPath(path)},
		{godbus.WithMatchSender(busDaemon), godbus.WithMatchInterface(busDaemon), godbus.WithMatchMember("NameOwnerChanged"), godbus.WithMatchArg(0, BusName)},
	} {
		if err := c.conn.AddMatchSignalContext(ctx, rule...); err != nil {
			return JobProperties{}, fmt.Errorf("cannot listen on the bus: %w", err)
		}
		defer func() { _ = c.conn.RemoveMatchSignal(rule...) }()
	}
	var update JobUpdate
	for {
		job, err := get[JobProperties](ctx, c, id, godbus.FlagNoAutoStart)
		switch {
		case err == nil:
			update = JobUpdate{Job: job}
		case errors.Is(err, ErrNoDaemon):
			update.Away = true
		default:
			return update.Job, err
		}
		report(update)
		if !update.Away && job.State.Final() {
			return job, nil
		}
		if err := nextChange(ctx, signals, path); err != nil {
			return update.Job, err
		}
	}
}

const busDaemon = "org.freedesktop.DBus"

// nextChange waits for a signal about the job at path or about the daemon, and
// takes those that wait behind it: one reading serves them all.
func nextChange(ctx context.Context, signals <-chan *godbus.Signal, path godbus.ObjectPath) error {
	relevant := false
	for !relevant || len(signals) > 0 {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case s, ok := <-signals:
			if !ok {
				return godbus.ErrClosed
			}
			relevant = relevant || s.Path == path || s.Name == busDaemon+".NameOwnerChanged"
		}
	}
	return nil
}
