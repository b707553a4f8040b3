package backup

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/daemon/internal/job"
	"github.com/virtbackup/virtbackup/daemon/internal/supervise"
	"github.com/virtbackup/virtbackup/daemon/internal/transfer"
)

// discardLimit bounds how long a repository may take to forget a backup that
// was not made; a repository that is away does not keep the job from ending.
const discardLimit = 2 * time.Minute

// Undo clears up after a backup that failed or was cancelled, see job.Kind.
// Everything is tried, whatever fails before; all of it may be done again.
func (k *Kind) Undo(ctx context.Context, h *job.Handle) error {
	release, err := k.claim(ctx, h.Job().Domain)
	if err != nil {
		return err
	}
	defer release()
	r, err := k.load(h)
	if err != nil {
		return err
	}
	if h.Job().Step == "" { // planned at most
		return errors.Join(ignoreGone(k.tidy(ctx, h.Job().Domain)), r.settleAfter(ctx))
	}
	left, err := r.stopWorker(ctx)
	failed := []error{err, r.source().end(ctx), r.source().remove()}
	message := "unknown"
	if h.Failure() != nil {
		message = h.Failure().Error()
	}
	// First: what the catalog has as complete must stay in the repository.
	recorded := k.Catalog.FailBackup(ctx, r.Plan.Backup, message, time.Now())
	failed = append(failed, recorded)
	if err == nil && recorded == nil {
		failed = append(failed, r.discard(ctx, left))
	}
	// Last: it deletes the checkpoint of a backup that has failed.
	failed = append(failed, ignoreGone(k.tidy(ctx, r.Plan.Domain)), r.settleAfter(ctx))
	return errors.Join(failed...)
}

func ignoreGone(err error) error {
	if errors.Is(err, hypervisor.ErrNoDomain) {
		return nil
	}
	return err
}

// leftovers says what a worker left in the repository.
type leftovers int

const (
	leftNothing leftovers = iota
	leftStaging           // it died before it could discard what it had staged
	leftBackup            // it had committed
)

// stopWorker ends the worker, if it has not ended.
func (r *run) stopWorker(ctx context.Context) (leftovers, error) {
	worker, err := r.Errands.Supervisor.Attach(ctx, r.job.Job().ID)
	if errors.Is(err, supervise.ErrNoWorker) {
		if r.job.Job().Step == stepPlanned {
			return leftNothing, nil // it was never started
		}
		return leftStaging, nil // the host was restarted
	}
	if err != nil {
		return leftNothing, err
	}
	result, err := worker.Cancel(ctx)
	var killed *supervise.KilledError
	switch {
	case errors.As(err, &killed) && killed.Hung():
		return leftNothing, err
	case err != nil: // killed, or its result cannot be read
		return leftStaging, nil
	case result.Error == nil && committed(result, r.Plan.Backup) != nil:
		return leftBackup, nil
	}
	return leftNothing, nil
}

// discard removes what the worker left in the repository, and the worker.
func (r *run) discard(ctx context.Context, left leftovers) error {
	limited, cancel := context.WithTimeout(ctx, discardLimit)
	defer cancel()
	operations := map[leftovers]transfer.Operation{leftStaging: transfer.OperationDiscard, leftBackup: transfer.OperationDelete}
	if o, any := operations[left]; any {
		if _, err := r.ask(limited, o); err != nil {
			// The repository's next check collects it.
			return fmt.Errorf("cannot remove what is left of the backup from repository %q: %w", r.Plan.Repository.Name, err)
		}
	}
	return r.Errands.Supervisor.Forget(ctx, r.job.Job().ID)
}
