package supervise

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/job"
	"github.com/virtbackup/virtbackup/daemon/internal/transfer"
	"github.com/virtbackup/virtbackup/systemd/jobunit"
)

// poll is how often status.json is looked at. It is a small file in memory, written twice a second.
const poll = 200 * time.Millisecond

// Go lets a backup go on, when its point in time is fixed and its exports are there. Doing it again changes nothing.
func (w *Worker) Go(g transfer.Go) error {
	if w.has(transfer.GoFile) {
		return nil
	}
	if err := transfer.WriteGo(w.directory, g); err != nil {
		return fmt.Errorf("cannot tell the worker of job %s to go on: %w", w.id, err)
	}
	return nil
}

// Gone says whether Go was called, by whatever daemon.
func (w *Worker) Gone() bool { return w.has(transfer.GoFile) }

// Confirm lets a backup that waits in transfer.PhaseConfirming be kept. Doing it again changes nothing.
func (w *Worker) Confirm() error {
	if err := transfer.WriteConfirm(w.directory); err != nil {
		return fmt.Errorf("cannot tell the worker of job %s to keep its copy: %w", w.id, err)
	}
	return nil
}

// Ready waits until a backup's worker has its repository open and is ready for Go; also when it is past that. onStatus
// gets each status. An error means that it never will be, see Follow; a *transfer.Failure is the worker's own.
func (w *Worker) Ready(ctx context.Context, onStatus func(transfer.Status)) error {
	ready := func(s transfer.Status) bool { return s.Phase == transfer.PhaseReady || w.Gone() }
	result, err := w.follow(ctx, onStatus, ready)
	switch {
	case err != nil || result == nil:
		return err
	case result.Error != nil:
		return result.Error
	case !w.Gone():
		return fmt.Errorf("worker of job %s ended before it was ready", w.id)
	}
	return nil
}

// Follow waits for the end of the worker and gives its result, which tells also of its failures. onStatus gets each new
// status. When the context is cancelled, the worker is asked to end, killed when it does not, and its result is still the
// answer: a worker that has committed meanwhile has succeeded. When the cause is the daemon's going down (job.ErrDetach), the
// worker is left alone.
//
// An error means that there is no result: job.ErrDetach, *KilledError, or a result that cannot be read.
func (w *Worker) Follow(ctx context.Context, onStatus func(transfer.Status)) (*transfer.Result, error) {
	return w.follow(ctx, onStatus, func(transfer.Status) bool { return false })
}

// Cancel ends a worker that nobody follows, as Follow does when its context is cancelled.
func (w *Worker) Cancel(ctx context.Context) (*transfer.Result, error) {
	state, err := w.stop(ctx)
	if err != nil {
		return nil, err
	}
	return w.result(state)
}

// follow waits until a status satisfies until (then there is no result), or for the worker's end.
func (w *Worker) follow(ctx context.Context, onStatus func(transfer.Status), until func(transfer.Status) bool) (*transfer.Result, error) {
	// Waiting for the unit's end goes on when ctx is cancelled: the unit is then stopped, and its end is what we wait for.
	waiting, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	ended := make(chan jobunit.State, 1)
	go func() {
		if state, err := w.s.units.Wait(waiting, w.unit); err == nil {
			ended <- state
		}
	}()
	tick := time.NewTicker(poll)
	defer tick.Stop()
	var last transfer.Status
	for {
		status, err := transfer.ReadStatus(w.directory)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		if err == nil && (status.Updated != last.Updated || status.Phase != last.Phase) {
			last = status
			onStatus(status)
		}
		if err == nil && until(status) {
			return nil, nil
		}
		select {
		case <-tick.C:
		case state := <-ended:
			return w.result(state)
		case <-ctx.Done():
			if cause := context.Cause(ctx); errors.Is(cause, job.ErrDetach) {
				return nil, cause
			}
			return w.Cancel(ctx)
		}
	}
}

// result is that of a worker which has ended, or was given up.
func (w *Worker) result(state jobunit.State) (*transfer.Result, error) {
	result, err := transfer.ReadResult(w.directory)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, &KilledError{w.id, state}
	}
	if err != nil {
		return nil, fmt.Errorf("worker of job %s: %w", w.id, err)
	}
	return result, nil
}

// stop ends the unit whatever it takes: SIGTERM, after StopAfter SIGKILL, and after StopAfter once more systemd gives it
// up. The state tells whether a process was left, hanging in the kernel.
func (w *Worker) stop(ctx context.Context) (jobunit.State, error) {
	const grace = 30 * time.Second // for systemd itself
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*w.s.StopAfter+grace)
	defer cancel()
	w.s.Log.Info("stopping worker", "job", w.id, "unit", w.unit)
	stopped := w.s.units.Stop(ctx, w.unit)
	if stopped != nil && !errors.Is(stopped, context.DeadlineExceeded) {
		return jobunit.State{}, stopped
	}
	state, err := w.s.units.State(context.WithoutCancel(ctx), w.unit)
	if err != nil {
		return jobunit.State{}, errors.Join(stopped, err)
	}
	if state.Processes || !state.Ended() {
		w.s.Log.Warn("worker cannot be killed and is left to systemd", "job", w.id, "unit", w.unit, "state", state.String())
	}
	return state, nil
}
