package job

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
)

// mayTryAgain says whether a job is to be tried again that failed.
func (e *Engine) mayTryAgain(kind Kind, j catalog.Job, err error) bool {
	if _, can := kind.(Retrier); !can || j.Attempt >= j.Attempts {
		return false
	}
	if over := new(overdueError); errors.As(err, &over) {
		return over.passing
	}
	return e.options.Passing != nil && e.options.Passing(err)
}

// tryAgain puts a job that was undone back into the queue. false: it is to end.
func (e *Engine) tryAgain(en *entry, kind Kind, h *Handle, why failure) bool {
	retrier, can := kind.(Retrier)
	if !can {
		return false // another version's
	}
	e.mu.Lock()
	next := time.Now().Add(e.limits.delay(en.class, h.job.Attempt))
	e.mu.Unlock()
	backup := retrier.Again(h.job)
	err := e.insist(func(ctx context.Context) error { return e.catalog.RetryJob(ctx, h.job.ID, backup, next) })
	if errors.Is(err, ErrDetach) {
		return true // it is undone once more, after the restart
	}
	if err != nil {
		return false // it was cancelled meanwhile
	}
	h.Log(e.base, slog.LevelWarn, fmt.Sprintf("try %d of %d failed, the next is at %s: %v", h.job.Attempt, h.job.Attempts, moment(next), why.err))
	e.mu.Lock()
	defer e.mu.Unlock()
	en.job.ErrorName, en.job.ErrorMessage = why.name, why.err.Error()
	e.requeue(en, backup, next)
	return true
}

// requeue puts a job that was undone back into the queue. The engine's mutex is held.
func (e *Engine) requeue(en *entry, backup string, next time.Time) {
	en.cancel, en.meter = nil, meter{}
	en.job.Started, en.job.Backup, en.job.NextTry, en.job.Result = time.Time{}, backup, next, nil
	if en.job.State == catalog.JobCancelling { // just after it was put back
		e.tasks.Go(func() { e.endCancelled(en) })
		return
	}
	en.job.State = catalog.JobQueued
	at, _ := slices.BinarySearchFunc(e.queue, en.job.ID, func(other *entry, id string) int { return strings.Compare(other.job.ID, id) })
	e.queue = slices.Insert(e.queue, at, en)
	e.dispatch() // which knows why it waits
	e.publish(en)
}
