package backup

import (
	"context"
	"errors"
	"fmt"

	"github.com/virtbackup/virtbackup/daemon/internal/failure"
	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/dbus"
)

// live is a running domain. libvirt's backup job in pull mode fixes the point
// in time of all disks, makes the checkpoint and has QEMU export the disks; what
// the guest overwrites meanwhile is saved to scratch images.
type live struct{ *run }

func (r live) server() server {
	return server{socket: r.Plan.socket(), bitmap: func(target string) string { return "backup-" + target }} // as libvirt names it by default
}

// confirm is not asked: libvirt keeps the point in time.
func (r live) confirm(context.Context) error { return nil }

// watch aborts the copy when it has made the guest stop: QEMU pauses a domain
// whose old data it cannot save, because the scratch space is full.
func (r live) watch(ctx context.Context, abort context.CancelCauseFunc) {
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

// lost says why the export went away, if the domain tells.
func (r live) lost(ctx context.Context, cause error) error {
	state, reason, err := r.Hypervisor.State(ctx, r.Plan.Domain)
	switch {
	case errors.Is(err, hypervisor.ErrNoDomain):
		return failure.Errorf(dbus.ErrFailed, "domain %q ended while it was being backed up: %w", r.Plan.DomainName, cause)
	case err == nil && (state == hypervisor.StateShutoff || state == hypervisor.StateCrashed || state == hypervisor.StateShutdown):
		return failure.Errorf(dbus.ErrFailed, "domain %q stopped (%s) while it was being backed up, start it and back it up again: %w", r.Plan.DomainName, reason, cause)
	}
	return fmt.Errorf("cannot read the disks of domain %q: %w", r.Plan.DomainName, cause)
}

func (r live) end(ctx context.Context) error {
	limited, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	err := r.Hypervisor.EndBackup(limited, r.Plan.Domain)
	if errors.Is(err, hypervisor.ErrForeignJob) {
		return nil // ours is gone, then
	}
	return err
}
