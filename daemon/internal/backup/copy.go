package backup

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/virtbackup/virtbackup/daemon/internal/failure"
	"github.com/virtbackup/virtbackup/daemon/internal/repository"
	"github.com/virtbackup/virtbackup/daemon/internal/supervise"
	"github.com/virtbackup/virtbackup/daemon/internal/transfer"
)

// copy lets the worker copy and commit, and returns the manifest that is in the
// repository then.
func (r *run) copy(ctx context.Context) (*repository.Manifest, error) {
	worker, err := r.Errands.Supervisor.Attach(ctx, r.job.Job().ID)
	if errors.Is(err, supervise.ErrNoWorker) {
		return r.lookForManifest(ctx, fmt.Errorf("the backup was cut off, was the host restarted? start it again: %w", err))
	}
	if err != nil {
		return nil, err
	}
	if err := worker.Go(r.Point); err != nil {
		return nil, err
	}
	result, err := r.follow(ctx, worker)
	var killed *supervise.KilledError
	if errors.As(err, &killed) && !killed.Hung() && ctx.Err() == nil {
		return r.lookForManifest(ctx, err)
	}
	if err != nil {
		return nil, err
	}
	if m := committed(result, r.Plan.Backup); m != nil {
		return m, nil
	}
	return nil, fmt.Errorf("the worker of backup %s ended without having made it", r.Plan.Backup)
}

// committed is the backup's manifest, if the result says that it is in the repository.
func committed(result *transfer.Result, backup string) *repository.Manifest {
	if m := result.Manifest; m != nil && m.Backup == backup {
		return m
	}
	for _, b := range result.Backups {
		if b.Backup == backup && b.Error == nil {
			return b.Manifest
		}
	}
	return nil
}

// follow follows the worker to its end. As soon as it has copied, the exports
// are ended: the guest's writes are not slowed any longer.
func (r *run) follow(ctx context.Context, worker *supervise.Worker) (*transfer.Result, error) {
	var tasks sync.WaitGroup
	defer tasks.Wait()
	following, abort := context.WithCancelCause(ctx)
	defer abort(nil)
	copying, done := context.WithCancel(following)
	defer done()
	tasks.Go(func() { r.source().watch(copying, abort) })
	end := sync.OnceFunc(func() {
		done()
		// An error here is met again when the backup is finished or undone.
		tasks.Go(func() { _ = r.source().end(following) })
	})
	var confirmed atomic.Bool
	confirm := sync.OnceFunc(func() {
		tasks.Go(func() {
			err := r.source().confirm(following)
			if err == nil {
				err = worker.Confirm()
			}
			confirmed.Store(err == nil)
			if err != nil {
				abort(err)
			}
		})
	})
	result, err := worker.Follow(following, func(s transfer.Status) {
		if s.Phase == transfer.PhaseConfirming && !confirmed.Load() {
			r.job.Waits(s.Phase) // for us
		} else {
			r.job.Progress(s.Phase, s.Done, s.Total)
		}
		if copied(s) {
			end()
		}
		if s.Phase == transfer.PhaseConfirming {
			confirm()
		}
	})
	switch {
	case err != nil && context.Cause(ctx) == nil && context.Cause(following) != nil:
		return nil, context.Cause(following) // it had to be killed
	case err != nil || result.Error == nil:
		return result, err
	case result.Error.Class == transfer.ClassSource:
		return nil, r.source().lost(ctx, result.Error)
	}
	return nil, failure.Worker(following, r.Plan.Repository.Name, result.Error)
}

// lookForManifest finds out whether a worker that is gone had committed the
// backup, by asking the repository. lost says how it was lost.
func (r *run) lookForManifest(ctx context.Context, lost error) (*repository.Manifest, error) {
	result, err := r.ask(ctx, transfer.OperationList)
	if err != nil {
		return nil, errors.Join(lost, err)
	}
	if m := committed(result, r.Plan.Backup); m != nil {
		return m, nil
	}
	return nil, lost
}

// ask has another worker do something for the job, whose own worker has ended.
func (r *run) ask(ctx context.Context, o transfer.Operation) (*transfer.Result, error) {
	if err := r.Errands.Supervisor.Forget(ctx, r.job.Job().ID); err != nil {
		return nil, err
	}
	return r.Errands.Run(ctx, r.job, r.Plan.Repository, transfer.Spec{
		Operation: o, Domain: r.Plan.Domain, Backups: []string{r.Plan.Backup},
	})
}
