package job

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
)

// ErrYield is the cause of a Kind's context when the job is to give way to
// another one, of its domain or for its slot, which waits for it: it is undone,
// and begun again when that one has ended.
var ErrYield = errors.New("the job gives way to another one")

// Yielder is a Kind whose jobs can give way to others.
type Yielder interface {
	// Yields says whether a job is one that nobody waits for, so that it gives way.
	Yields(j catalog.Job) bool
}

// mostYields is how often a job that runs gives way. After that it runs to its
// end: a domain that is backed up all the time is to be looked after too.
const mostYields = 10

const nameYielded = "Yielded"

// yields tells whether a job gives way.
func (e *Engine) yields(j catalog.Job) bool {
	y, can := e.kinds[j.Kind].(Yielder)
	return can && y.Yields(j)
}

// yieldPlace puts a job that gave way, and was undone, back into the queue. The
// try does not count. false: it was cancelled meanwhile.
func (e *Engine) yieldPlace(en *entry, h *Handle) bool {
	err := e.insist(func(ctx context.Context) error { return e.catalog.YieldJob(ctx, h.job.ID) })
	if errors.Is(err, ErrDetach) {
		return true // it is undone once more, after the restart
	}
	if err != nil {
		return false
	}
	h.Log(e.base, slog.LevelInfo, "gives way to another job, and is begun again after it")
	e.mu.Lock()
	defer e.mu.Unlock()
	en.job.Attempt, en.job.Yielded = h.job.Attempt-1, h.job.Yielded+1
	en.job.ErrorName, en.job.ErrorMessage = "", ""
	e.requeue(en, h.job.Backup, time.Time{})
	return true
}
