package job

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"strings"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
)

// retryInterval is how long to wait before writing to the catalog again after
// that failed: the disk may be full, and a job's end must not be lost.
const retryInterval = 2 * time.Second

// undoLimit bounds how long it takes to clear up after a job, as on storage that
// does not answer any more. What is left is collected later.
const undoLimit = time.Hour

// failure is why a job does not succeed.
type failure struct {
	name  string
	err   error
	again bool // it is to be tried again
}

// run starts a job's goroutine. The engine's mutex is held.
func (e *Engine) run(en *entry) {
	ctx, cancel := context.WithCancelCause(e.base)
	if en.job.State == catalog.JobCancelling {
		cancel(ErrCancelled)
	}
	en.cancel = cancel
	e.tasks.Go(func() {
		defer cancel(nil)
		e.execute(ctx, cancel, en)
	})
}

// execute takes a job from where it is to its end, or until the daemon goes down.
func (e *Engine) execute(ctx context.Context, cancel context.CancelCauseFunc, en *entry) {
	h, err := e.begin(en)
	if errors.Is(err, ErrCancelled) {
		e.endCancelled(en)
		return
	}
	if err != nil {
		return // the daemon goes down
	}
	kind, known := e.kinds[h.job.Kind]
	if !known { // another version's
		kind = unknownKind{}
	}
	why := failure{h.job.ErrorName, recordedError{h.job.ErrorName, h.job.ErrorMessage}, h.job.Again}
	if !h.job.Undoing {
		if why.err = e.attempt(ctx, cancel, h, kind); why.err == nil {
			e.end(en, catalog.JobSucceeded, failure{})
			return
		}
		if e.base.Err() != nil {
			return // it carries on after the restart
		}
		why = e.reason(ctx, h, kind, why.err)
		// On disk before anything is undone: Run must not meet what Undo has begun to remove.
		if e.insist(func(ctx context.Context) error {
			return e.catalog.FailingJob(ctx, h.job.ID, why.name, why.err.Error(), why.again)
		}) != nil {
			return
		}
	}
	e.undo(en, kind, why)
}

// attempt runs a job, and looks that it does not take too long.
func (e *Engine) attempt(ctx context.Context, cancel context.CancelCauseFunc, h *Handle, kind Kind) error {
	over := make(chan struct{})
	defer close(over)
	e.tasks.Go(func() { e.oversee(ctx, cancel, h.entry, over) })
	return guard(h, func() error { return kind.Run(ctx, h) })
}

// undo clears up after a job that failed or was cancelled, and ends it, or has
// it tried again.
func (e *Engine) undo(en *entry, kind Kind, why failure) {
	h, err := e.reload(en)
	if err != nil {
		return
	}
	h.failure = why.err
	e.mu.Lock()
	en.waiting, en.meter.moved = "", time.Time{}
	e.mu.Unlock()
	ctx, cancel := context.WithTimeoutCause(e.base, undoLimit, fmt.Errorf("not done within %v", undoLimit))
	defer cancel()
	err = guard(h, func() error { return kind.Undo(ctx, h) })
	if err != nil && e.base.Err() != nil {
		return
	}
	if err != nil {
		h.logger.Error("cannot clear up after the job", "error", err)
		why.err = fmt.Errorf("%w; cannot clear up: %w", why.err, err)
	}
	switch {
	case err != nil || !why.again:
	case why.name == nameYielded:
		if e.yieldPlace(en, h) {
			return
		}
		e.withdrawn(en) // meanwhile
		why = failure{name: nameCancelled, err: ErrCancelled}
	case e.tryAgain(en, kind, h, why):
		return
	}
	state := catalog.JobFailed
	if why.name == nameCancelled {
		state = catalog.JobCancelled
	}
	e.end(en, state, why)
}

// begin marks a job as running. ErrCancelled: it was cancelled while it waited.
func (e *Engine) begin(en *entry) (*Handle, error) {
	h, err := e.reload(en)
	if err != nil {
		return nil, err
	}
	if h.job.Started.IsZero() {
		h.job.Started = time.Now()
		err := e.insist(func(ctx context.Context) error { return e.catalog.StartJob(ctx, h.job.ID, h.job.Started) })
		if errors.Is(err, catalog.ErrState) {
			return nil, ErrCancelled
		}
		if err != nil {
			return nil, err
		}
		h.job.State = catalog.JobRunning
		h.job.Attempt++
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	en.job.Started, en.job.Attempt, en.job.NextTry = h.job.Started, h.job.Attempt, time.Time{}
	if en.job.State != catalog.JobCancelling { // Cancel may have been faster
		en.job.State = h.job.State
	}
	e.publish(en)
	return h, nil
}

// reload makes a handle of the job as it is recorded now.
func (e *Engine) reload(en *entry) (*Handle, error) {
	var j catalog.Job
	err := e.insist(func(ctx context.Context) (err error) {
		j, err = e.catalog.Job(ctx, en.job.ID) // an id never changes: no lock needed
		return err
	})
	if err != nil {
		return nil, err
	}
	logger := e.options.Logger.With("job", j.ID, "kind", j.Kind)
	if j.Domain != "" {
		logger = logger.With("domain", j.Domain)
	}
	if j.Backup != "" {
		logger = logger.With("backup", j.Backup)
	}
	return &Handle{engine: e, entry: en, job: j, logger: logger}, nil
}

func (e *Engine) endCancelled(en *entry) {
	e.withdrawn(en)
	e.end(en, catalog.JobCancelled, failure{name: nameCancelled, err: ErrCancelled})
}

// withdrawn tells a job's kind that it was cancelled while it waited.
func (e *Engine) withdrawn(en *entry) {
	h, err := e.reload(en)
	if err != nil {
		return // the daemon goes down, and it is ended after the restart
	}
	w, wants := e.kinds[h.job.Kind].(Withdrawer)
	if !wants {
		return
	}
	if err := guard(h, func() error { return w.Withdrawn(context.WithoutCancel(e.base), h.job) }); err != nil {
		h.logger.Error("cannot take note that the job was cancelled", "error", err)
	}
}

// end records a job's end, and lets others run.
func (e *Engine) end(en *entry, state catalog.JobState, why failure) {
	e.mu.Lock()
	end := catalog.JobEnd{State: state, Result: en.job.Result, Finished: time.Now(),
		Phase: en.meter.phase, Done: en.meter.done, Total: en.meter.total}
	e.mu.Unlock()
	if why.err != nil {
		end.ErrorName, end.ErrorMessage = why.name, why.err.Error()
	}
	// ErrState: a try before this one was recorded, although it told of an error.
	if err := e.insist(func(ctx context.Context) error { return e.catalog.EndJob(ctx, en.job.ID, end) }); errors.Is(err, ErrDetach) {
		return
	}
	e.mu.Lock()
	en.job.State, en.job.Finished, en.waiting = end.State, end.Finished, ""
	en.job.ErrorName, en.job.ErrorMessage = end.ErrorName, end.ErrorMessage
	delete(e.active, en.job.ID)
	e.publish(en)
	e.dispatch()
	e.mu.Unlock()
	close(en.ended)
	if err := e.prune(context.WithoutCancel(e.base)); err != nil {
		e.options.Logger.Warn("cannot forget old jobs", "error", err)
	}
}

// insist calls fn until it succeeds, or cannot succeed, or the daemon goes down.
// It is tried at least once: what is known should not be lost to a shutdown.
func (e *Engine) insist(fn func(context.Context) error) error {
	for {
		err := fn(context.WithoutCancel(e.base))
		if err == nil || errors.Is(err, catalog.ErrState) || errors.Is(err, catalog.ErrNotFound) {
			return err
		}
		e.options.Logger.Error("cannot use the catalog, will try again", "error", err)
		select {
		case <-time.After(retryInterval):
		case <-e.base.Done():
			return ErrDetach
		}
	}
}

// reason is why a job does not succeed: because of its error, or, once it was
// cancelled, gave way or took too long, because of that, whatever came up then.
func (e *Engine) reason(ctx context.Context, h *Handle, kind Kind, err error) failure {
	cause := context.Cause(ctx)
	if errors.Is(cause, ErrCancelled) {
		h.logger.Debug("the job was interrupted", "error", err)
		return failure{name: nameCancelled, err: ErrCancelled}
	}
	if errors.Is(cause, ErrYield) {
		h.logger.Debug("the job was interrupted", "error", err)
		return failure{name: nameYielded, err: ErrYield, again: true}
	}
	why := failure{name: nameFailed, err: err}
	if over := new(overdueError); errors.As(cause, &over) {
		h.logger.Debug("the job was interrupted", "error", err)
		why.err = over
	}
	var n NamedError
	if errors.As(why.err, &n) {
		why.name = n.ErrorName()
	}
	why.again = e.mayTryAgain(kind, h.job, why.err)
	return why
}

// recordedError is a failure of a job as it was recorded before a restart.
type recordedError struct{ name, message string }

func (r recordedError) Error() string     { return r.message }
func (r recordedError) ErrorName() string { return r.name }

// Is tells of the errors of the bus by their names, and of a cancel.
func (r recordedError) Is(target error) bool {
	return r.name == nameCancelled && target == ErrCancelled || r.name != "" && strings.HasSuffix(target.Error(), ".Error."+r.name)
}

// panicError is a panic of a kind: a mistake of ours, which must not take the other jobs down.
type panicError struct{ value any }

func (p panicError) Error() string     { return fmt.Sprintf("internal error: %v", p.value) }
func (p panicError) ErrorName() string { return nameInternal }

// guard calls fn and makes an error of its panic. Where that was is for the
// journal, not for those who read the job.
func guard(h *Handle, fn func() error) (err error) {
	defer func() {
		if v := recover(); v != nil {
			h.logger.Error("the job panicked", "error", v, "stack", string(debug.Stack()))
			err = panicError{v}
		}
	}()
	return fn()
}

// unknownKind stands for a kind that this version does not have.
type unknownKind struct{}

func (unknownKind) Run(context.Context, *Handle) error  { return ErrUnknownKind }
func (unknownKind) Undo(context.Context, *Handle) error { return nil }
