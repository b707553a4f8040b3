package backup

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/failure"
	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/daemon/internal/nbd"
	"github.com/virtbackup/virtbackup/daemon/internal/quiesce"
	"github.com/virtbackup/virtbackup/daemon/internal/transfer"
	"github.com/virtbackup/virtbackup/dbus"
)

// begin fixes the point in time of all disks. The guest is held no longer than
// libvirt takes to begin the backup: everything else is ready.
func (r *run) begin(ctx context.Context) error {
	// What is known of the point when nobody is left to say more: whether the
	// guest was held still at that moment is not.
	r.Point = transfer.Go{Created: time.Now().UnixMicro(), Consistency: string(quiesce.Crash), Thawed: true}
	if err := r.job.Step(ctx, stepBegin, r.stepData); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	mode := quiesce.Mode(r.Plan.Quiesce)
	if r.Plan.Paused {
		mode = quiesce.None // nobody in there could answer
	}
	at, held, err := r.hold(ctx, mode)
	switch {
	case ctx.Err() != nil:
		return errors.Join(context.Cause(ctx), err)
	case errors.Is(err, quiesce.ErrHold):
		return failure.Errorf(dbus.ErrUnavailable, "cannot quiesce domain %q (%s), see to its guest agent or back it up with quiesce=none: %w", r.Plan.DomainName, mode, err)
	case err != nil:
		return err
	}
	if mode == quiesce.Agent && held.Consistency != quiesce.Filesystem {
		r.job.Log(ctx, slog.LevelWarn, "the guest was not frozen at the point in time, because it has no filesystem to freeze or was thawed meanwhile: the backup is crash consistent")
	}
	if !held.Thawed {
		r.job.Log(ctx, slog.LevelError, "the guest is not known to be thawed yet: the watchdog goes on trying")
	}
	return r.fixed(ctx, transfer.Go{Created: at.UnixMicro(), Consistency: string(held.Consistency), Thawed: held.Thawed})
}

// hold holds the guest still while libvirt begins the backup.
func (r *run) hold(ctx context.Context, mode quiesce.Mode) (at time.Time, held quiesce.Result, err error) {
	held, err = r.Quiescer.Hold(ctx, r.Plan.Domain, mode, func(ctx context.Context) error {
		err := r.Hypervisor.BeginBackup(ctx, r.Plan.Domain, r.Plan.begin(r.Settings().ScratchDirectory))
		at = time.Now()
		return err
	})
	return at, held, err
}

// beginPoll is how often libvirt is asked what became of a call whose caller
// died: no event tells.
const beginPoll = 50 * time.Millisecond

// beginLimit bounds how long such a call is waited for. libvirt itself waits 30 s
// for another job of the domain, and longer only for a QEMU that hangs.
const beginLimit = 2 * time.Minute

// begun tells whether libvirt did begin the backup before the daemon was
// restarted. A call to libvirt takes effect as a whole, also when its caller dies.
func (r *run) begun(ctx context.Context) (bool, error) {
	if err := r.Quiescer.ThawLeftover(ctx); err != nil {
		return false, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, beginLimit,
		failure.Errorf(dbus.ErrUnavailable, "libvirt goes on beginning the backup of domain %q, see whether its QEMU hangs", r.Plan.DomainName))
	defer cancel()
	for {
		active, err := r.Hypervisor.BackupJob(ctx, r.Plan.Domain)
		if err != nil {
			return false, err
		}
		names, err := r.Hypervisor.ListOurs(ctx, r.Plan.Domain)
		if err != nil {
			return false, err
		}
		made := slices.Contains(names, r.Plan.Checkpoint)
		switch {
		case active.Beginning:
		case active.Socket == r.Plan.socket() && (made || r.Plan.Checkpoint == "") && r.exported(ctx):
			return true, nil
		case active.Socket == r.Plan.socket(): // libvirt sets it up at this moment
		case made: // its name is used up, and what has changed since is lost
			return false, failure.Errorf(dbus.ErrFailed, "the backup of domain %q ended while virtbackupd was restarted: start it again", r.Plan.DomainName)
		default:
			return false, nil
		}
		select {
		case <-ctx.Done():
			return false, context.Cause(ctx)
		case <-time.After(beginPoll):
		}
	}
}

// exported tells whether QEMU offers all disks: the last thing that libvirt
// does when it begins a backup.
func (r *run) exported(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	for _, d := range r.spec().Backup.Disks {
		c, err := nbd.Dial(ctx, d.Socket, nbd.Options{Export: d.Export})
		if err != nil {
			return false
		}
		_ = c.Close()
	}
	return true
}

// fixed records the point in time, after a look at what the domain was then:
// from now on libvirt refuses what would change its disks.
func (r *run) fixed(ctx context.Context, point transfer.Go) error {
	d, err := r.Hypervisor.ByUUID(ctx, r.Plan.Domain)
	if err != nil {
		return err
	}
	if err := r.Plan.unchanged(d); err != nil {
		return err
	}
	r.Point = point
	if err := r.job.Step(ctx, stepCopying, r.stepData); err != nil {
		return err
	}
	r.rememberCheckpoint(ctx)
	return nil
}

// rememberCheckpoint records the checkpoint's definition, without which it
// cannot be the base of an increment. Not having it costs no more than that.
func (r *run) rememberCheckpoint(ctx context.Context) {
	if r.Plan.Checkpoint == "" || r.remembered {
		return
	}
	definition, err := r.Hypervisor.CheckpointDefinition(ctx, r.Plan.Domain, r.Plan.Checkpoint)
	if err == nil {
		err = r.Catalog.SetCheckpointXML(ctx, r.Plan.Checkpoint, definition)
	}
	if err != nil && !errors.Is(err, hypervisor.ErrNoCheckpoint) {
		r.job.Logger().Warn("cannot record the checkpoint's definition", "checkpoint", r.Plan.Checkpoint, "error", err)
	}
	r.remembered = err == nil
}
