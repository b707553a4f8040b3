package supervise

import (
	"context"
	"fmt"

	"github.com/virtbackup/virtbackup/daemon/internal/transfer"
)

// Serving waits until a worker that serves can be read from. onStatus gets each status. An error means that it never will
// be, see Follow; a *transfer.Failure is the worker's own.
func (w *Worker) Serving(ctx context.Context, onStatus func(transfer.Status)) error {
	result, err := w.follow(ctx, onStatus, func(s transfer.Status) bool { return s.Phase == transfer.PhaseServing })
	switch {
	case err != nil || result == nil:
		return err
	case result.Error != nil:
		return result.Error
	}
	return fmt.Errorf("worker of job %s ended before it served", w.id)
}

// Status is what the worker said last.
func (w *Worker) Status() (transfer.Status, error) { return transfer.ReadStatus(w.directory) }

// Stop tells a worker that serves that it is no longer needed. Follow waits for its end.
func (w *Worker) Stop() error {
	if err := transfer.WriteStop(w.directory); err != nil {
		return fmt.Errorf("cannot tell the worker of job %s to stop: %w", w.id, err)
	}
	return nil
}

// Ended tells whether the worker has ended, with a result or without.
func (w *Worker) Ended(ctx context.Context) (bool, error) {
	state, err := w.s.units.State(ctx, w.unit)
	return err == nil && state.Ended(), err
}
