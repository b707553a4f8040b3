package errand

import (
	"context"
	"errors"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/failure"
	"github.com/virtbackup/virtbackup/daemon/internal/job"
	"github.com/virtbackup/virtbackup/daemon/internal/supervise"
	"github.com/virtbackup/virtbackup/daemon/internal/transfer"
)

// Serving is a worker that serves the disks of a backup while its job goes on.
type Serving struct {
	sender     Sender
	worker     *supervise.Worker
	job        string
	repository string
	end        context.CancelCauseFunc // of following it
	done       chan struct{}

	// Once done is closed.
	result *transfer.Result
	err    error
}

// Serve has a worker do spec.Serve for a job, and returns when its disks can be read. A worker of the job that serves
// already, as after a restart of the daemon, is taken up, and its own spec stands: Started tells beforehand. One that has
// ended is forgotten, and another one started: what it had restored must not be in that one's way.
//
// The worker goes on when ctx ends, so that whoever reads from it can be ended first: call Stop, or in the job's Undo End.
func (s Sender) Serve(ctx context.Context, h *job.Handle, r catalog.Repository, spec transfer.Spec) (*Serving, error) {
	if err := s.forgetEnded(ctx, h.Job().ID); err != nil {
		return nil, err
	}
	spec.Operation = transfer.OperationServe
	spec, err := s.complete(ctx, h, r, spec)
	if err != nil {
		return nil, err
	}
	w, err := s.Supervisor.Start(ctx, spec, s.Limits())
	if err != nil {
		return nil, err
	}
	if err := w.Serving(ctx, func(st transfer.Status) { Progress(h, st) }); err != nil {
		if !errors.Is(err, job.ErrDetach) {
			err = errors.Join(err, s.forgetEnded(context.WithoutCancel(ctx), spec.Job))
		}
		return nil, failure.Worker(ctx, r.Name, err)
	}
	v := &Serving{sender: s, worker: w, job: spec.Job, repository: r.Name, done: make(chan struct{})}
	following, end := context.WithCancelCause(context.WithoutCancel(ctx))
	v.end = end
	unbind := context.AfterFunc(ctx, func() {
		if cause := context.Cause(ctx); errors.Is(cause, job.ErrDetach) {
			end(cause)
		}
	})
	go func() {
		defer close(v.done)
		defer unbind()
		v.result, v.err = w.Follow(following, func(transfer.Status) {})
	}()
	return v, nil
}

// Done is closed when the worker has ended, be it that Stop was called, that it was killed, or that the daemon goes down.
func (v *Serving) Done() <-chan struct{} { return v.done }

// Status is what the worker said last: of each disk what was read and what was not as written, and in Pending whether the
// repository's storage answers.
func (v *Serving) Status() (transfer.Status, error) { return v.worker.Status() }

var errStop = errors.New("the worker does not end by itself")

// Stop ends the worker and returns what came of it, see transfer.Result.Served. The error is the worker's own, with its
// result, or says how it died. When the daemon goes down (job.ErrDetach) the worker is left alone.
func (v *Serving) Stop(ctx context.Context) (*transfer.Result, error) {
	if cause := context.Cause(ctx); errors.Is(cause, job.ErrDetach) {
		return nil, cause
	}
	defer v.end(nil)
	stopped := v.worker.Stop()
	patience := time.NewTimer(v.sender.Supervisor.StopAfter)
	defer patience.Stop()
	if stopped != nil {
		v.end(errStop)
	}
	select {
	case <-v.done:
	case <-patience.C:
		v.end(errStop) // Follow then stops it whatever it takes
		<-v.done
	}
	if errors.Is(v.err, job.ErrDetach) {
		return nil, v.err
	}
	if hung(v.err) {
		return nil, failure.Worker(ctx, v.repository, v.err) // it is left to systemd, and to a later look at what is left over
	}
	if err := v.sender.Supervisor.Forget(context.WithoutCancel(ctx), v.job); err != nil {
		v.sender.Supervisor.Log.Warn("cannot clear up after a worker", "job", v.job, "error", err)
	}
	if v.err == nil && v.result.Error != nil {
		return v.result, failure.Worker(ctx, v.repository, v.result.Error)
	}
	return v.result, failure.Worker(ctx, v.repository, v.err)
}

// End ends and forgets whatever worker there is of a job: for its Undo, and for what is left over. One that hangs in the
// kernel is left to systemd, and is no error: nobody waits for it.
func (s Sender) End(ctx context.Context, jobID string) error {
	w, err := s.Supervisor.Attach(ctx, jobID)
	if errors.Is(err, supervise.ErrNoWorker) {
		return nil
	}
	if err != nil {
		return err
	}
	if _, err := w.Cancel(ctx); hung(err) {
		return nil
	}
	return s.Supervisor.Forget(context.WithoutCancel(ctx), jobID)
}

// forgetEnded forgets a worker of the job that has ended.
func (s Sender) forgetEnded(ctx context.Context, jobID string) error {
	w, err := s.Supervisor.Attach(ctx, jobID)
	if errors.Is(err, supervise.ErrNoWorker) {
		return nil
	}
	if err != nil {
		return err
	}
	ended, err := w.Ended(context.WithoutCancel(ctx))
	if err != nil || !ended {
		return err
	}
	return s.Supervisor.Forget(context.WithoutCancel(ctx), jobID)
}

func hung(err error) bool {
	killed := new(supervise.KilledError)
	return errors.As(err, &killed) && killed.Hung()
}
