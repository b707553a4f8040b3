package job

import (
	"context"
	"fmt"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/journal"
)

// overseeEach is how often a job that runs is looked at.
const overseeEach = 250 * time.Millisecond

// overdueError ends a job that takes too long.
type overdueError struct {
	name    string
	message string
	passing bool // it may not come again
}

func (o *overdueError) Error() string     { return o.message }
func (o *overdueError) ErrorName() string { return o.name }

var _ NamedError = (*overdueError)(nil)

// oversee names a job that makes no progress, and ends it when it does not go on
// or is not done in time, until the try is over. Limits that change meanwhile count.
func (e *Engine) oversee(ctx context.Context, cancel context.CancelCauseFunc, en *entry, over <-chan struct{}) {
	tick := time.NewTicker(overseeEach)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-over:
			return
		case now := <-tick.C:
			named, overdue := e.look(en, now)
			if named != "" {
				e.options.Logger.Warn("a job makes no progress", journal.MessageID, journal.JobStalled,
					journal.Job, en.job.ID, "kind", en.job.Kind, "phase", named)
			}
			if overdue != nil {
				cancel(overdue)
				return
			}
		}
	}
}

// look returns the phase of a job that has just been found to make no progress,
// and what is to end it.
func (e *Engine) look(en *entry, now time.Time) (named string, overdue error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if most := e.limits.Timeout[en.class]; most > 0 && now.Sub(en.job.Started) > most {
		return "", &overdueError{name: "TimedOut", message: fmt.Sprintf("not done within %v (limits.%s_timeout)", most, en.class)}
	}
	waiting := ""
	if stall := e.limits.Stall; stall > 0 && !en.meter.moved.IsZero() {
		switch idle := now.Sub(en.meter.moved); {
		case idle > stall:
			return "", &overdueError{name: "Stalled", passing: true, message: fmt.Sprintf("no progress for %v (jobs.stall_limit) in phase %q", stall, en.meter.phase)}
		case idle > stall/2:
			waiting = fmt.Sprintf("makes no progress since %s; it is ended at %s if that stays so", moment(en.meter.moved), moment(en.meter.moved.Add(stall)))
		}
	}
	if waiting != en.waiting {
		if en.waiting = waiting; waiting != "" {
			named = en.meter.phase
		}
		e.publish(en)
	}
	return named, nil
}
