package backup

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/virtbackup/virtbackup/daemon/internal/failure"
	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/daemon/internal/repository"
	"github.com/virtbackup/virtbackup/daemon/internal/supervise"
	"github.com/virtbackup/virtbackup/daemon/internal/transfer"
	"github.com/virtbackup/virtbackup/dbus"
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

// follow follows the worker to its end. As soon as it has copied, libvirt's
// backup is ended: the guest's writes are not slowed any longer.
func (r *run) follow(ctx context.Context, worker *supervise.Worker) (*transfer.Result, error) {
	var tasks sync.WaitGroup
	defer tasks.Wait()
	following, abort := context.WithCancelCause(ctx)
	defer abort(nil)
	copying, copied := context.WithCancel(following)
	defer copied()
	tasks.Go(func() { r.watch(copying, abort) })
	end := sync.OnceFunc(func() {
		copied()
		// An error here is met again when the backup is finished or undone.
		tasks.Go(func() { _ = r.Hypervisor.EndBackup(following, r.Plan.Domain) })
	})
	result, err := worker.Follow(following, func(s transfer.Status) {
		r.progress(s)
		switch s.Phase {
		case transfer.PhaseFlushing, transfer.PhaseVerifying, transfer.PhaseCommitting:
			end()
		}
	})
	switch {
	case err != nil && context.Cause(ctx) == nil && context.Cause(following) != nil:
		return nil, context.Cause(following) // it had to be killed
	case err != nil || result.Error == nil:
		return result, err
	case result.Error.Class == transfer.ClassSource:
		return nil, r.sourceFailed(ctx, result.Error)
	}
	return nil, failure.Worker(following, r.Plan.Repository.Name, result.Error)
}

// watch aborts the copy when it has made the guest stop: QEMU pauses a domain
// whose old data it cannot save, because the scratch space is full.
func (r *run) watch(ctx context.Context, abort context.CancelCauseFunc) {
	events := r.Hypervisor.Subscribe(ctx)
	for {
		state, reason, err := r.Hypervisor.State(ctx, r.Plan.Domain)
		if err == nil && state == hypervisor.StatePaused && reason == hypervisor.ReasonIOError {
			abort(failure.Errorf(dbus.ErrLimitsExceeded, "domain %q was paused by an I/O error while it was being backed up, and the backup was ended: is there space below %s?",
				r.Plan.DomainName, r.Settings().ScratchDirectory))
			// Now, and not when the worker has stopped: the guest does not wait for a repository that hangs.
			// An error here is met again when the backup is undone.
			limited, cancel := context.WithTimeout(context.WithoutCancel(ctx), callLimit)
			defer cancel()
			_ = r.Hypervisor.EndBackup(limited, r.Plan.Domain)
			return
		}
		if !r.awaitEvent(events) {
			return
		}
	}
}

// awaitEvent waits for an event after which the domain may be paused; false:
// there will be none.
func (r *run) awaitEvent(events <-chan hypervisor.Event) bool {
	for e := range events {
		if e.Kind == hypervisor.EventMissed || e.UUID == r.Plan.Domain && (e.Kind == hypervisor.EventLifecycle || e.Kind == hypervisor.EventIOError) {
			return true
		}
	}
	return false
}

// sourceFailed says why the export went away, if the domain tells.
func (r *run) sourceFailed(ctx context.Context, cause error) error {
	state, reason, err := r.Hypervisor.State(ctx, r.Plan.Domain)
	switch {
	case errors.Is(err, hypervisor.ErrNoDomain):
		return failure.Errorf(dbus.ErrFailed, "domain %q ended while it was being backed up: %w", r.Plan.DomainName, cause)
	case err == nil && (state == hypervisor.StateShutoff || state == hypervisor.StateCrashed || state == hypervisor.StateShutdown):
		return failure.Errorf(dbus.ErrFailed, "domain %q stopped (%s) while it was being backed up, start it and back it up again: %w", r.Plan.DomainName, reason, cause)
	}
	return fmt.Errorf("cannot read the disks of domain %q: %w", r.Plan.DomainName, cause)
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
