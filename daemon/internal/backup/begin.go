package backup

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/chain"
	"github.com/virtbackup/virtbackup/daemon/internal/failure"
	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/daemon/internal/lifecycle"
	"github.com/virtbackup/virtbackup/daemon/internal/nbd"
	"github.com/virtbackup/virtbackup/daemon/internal/quiesce"
	"github.com/virtbackup/virtbackup/daemon/internal/transfer"
	"github.com/virtbackup/virtbackup/dbus"
	"github.com/virtbackup/virtbackup/hooks/spool"
)

// begin fixes the point in time of all disks. The guest is held no longer than
// libvirt takes to begin the backup: everything else is ready.
func (r live) begin(ctx context.Context) error {
	// What is known of the point when nobody is left to say more.
	r.Point = transfer.Go{Created: time.Now().UnixMicro(), Consistency: string(quiesce.Crash), Thawed: true}
	if r.quiesces() {
		r.Point.Shortfall = "virtbackupd ended at the point in time, and whether the guest was held still is not known"
	}
	if err := r.job.Step(ctx, stepBegin, r.stepData); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	at, held, err := r.hold(ctx)
	switch {
	case ctx.Err() != nil:
		return errors.Join(context.Cause(ctx), err)
	case errors.Is(err, hypervisor.ErrNotRunning):
		return failure.Errorf(dbus.ErrBusy, "domain %q was stopped while its backup was being prepared: start the backup again: %w", r.Plan.DomainName, err)
	case errors.Is(err, quiesce.ErrHold):
		return failure.Errorf(dbus.ErrUnavailable, "cannot quiesce domain %q (%s), see to its guest agent, or back it up with quiesce=none or the policy prefer: %w",
			r.Plan.DomainName, r.Plan.Quiesce, err)
	case err != nil:
		return err
	}
	if held.Shortfall != "" {
		r.job.Log(ctx, slog.LevelWarn, fmt.Sprintf("the backup is %s consistent only: %s", held.Consistency, held.Shortfall))
	}
	if !held.Thawed {
		r.job.Log(ctx, slog.LevelError, "the guest is not known to be thawed yet: the watchdog goes on trying")
	}
	return r.fixed(ctx, transfer.Go{Created: at.UnixMicro(), Consistency: string(held.Consistency), Thawed: held.Thawed,
		Held: held.Held.Microseconds(), Shortfall: held.Shortfall})
}

// quiesces tells whether the guest is to be held still.
func (r live) quiesces() bool { return r.Plan.Quiesce != string(quiesce.None) }

// hold holds the guest still while libvirt begins the backup.
func (r live) hold(ctx context.Context) (at time.Time, held quiesce.Result, err error) {
	w := quiesce.Wish{Mode: quiesce.Mode(r.Plan.Quiesce), Policy: quiesce.Policy(r.Plan.QuiescePolicy)}
	held, err = r.Quiescer.Hold(ctx, r.Plan.Domain, w, func(ctx context.Context) error {
		err := r.Hypervisor.BeginBackup(ctx, r.Plan.Domain, r.Plan.begin(r.Settings().ScratchDirectory))
		at = time.Now()
		return err
	})
	return at, held, err
}

// rejoin goes on with a point in time that libvirt fixed while virtbackupd was
// restarted, if one of which less is known is good enough.
func (r live) rejoin(ctx context.Context) error {
	if r.quiesces() && r.Plan.QuiescePolicy != string(quiesce.Prefer) {
		return failure.Errorf(dbus.ErrFailed, "cannot quiesce domain %q (%s) as is required: %s: start the backup again",
			r.Plan.DomainName, r.Plan.Quiesce, r.Point.Shortfall)
	}
	return r.fixed(ctx, r.Point)
}

// beginPoll is how often libvirt is asked what became of a call whose caller
// died: no event tells.
const beginPoll = 50 * time.Millisecond

// beginLimit bounds how long such a call is waited for. libvirt itself waits 30 s
// for another job of the domain, and longer only for a QEMU that hangs.
const beginLimit = 2 * time.Minute

// begun tells whether libvirt did begin the backup before the daemon was
// restarted. A call to libvirt takes effect as a whole, also when its caller dies.
func (r live) begun(ctx context.Context) (bool, error) {
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
func (r live) exported(ctx context.Context) bool {
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
	boot, err := spool.BootID()
	if err != nil {
		return err
	}
	if err := r.Plan.unchanged(boot, d); err != nil {
		return err
	}
	if err := r.stillWatched(ctx, d); err != nil {
		return err
	}
	r.Point = point
	if err := r.job.Step(ctx, stepCopying, r.stepData); err != nil {
		return err
	}
	r.source().remember(ctx)
	return nil
}

// stillWatched says whether the disks whose bitmaps are to be used were watched
// from the plan to the point in time.
func (r *run) stillWatched(ctx context.Context, d hypervisor.Domain) error {
	_, marks, err := r.Keeper.Observe(ctx, d)
	if err != nil {
		return err
	}
	for _, k := range r.Plan.Disks {
		if m, unseen := lifecycle.Unseen(marks, k.Target, r.Plan.Mark); unseen && (k.Changes == chain.CBT || k.Changes == chain.Snapshot) {
			return failure.Errorf(dbus.ErrBusy, "something happened to disk %s of domain %q (%s) while its backup was being prepared: start the backup again",
				k.Target, r.Plan.DomainName, m.Cause)
		}
	}
	return nil
}

// remember records the checkpoint's definition, without which it
// cannot be the base of an increment. Not having it costs no more than that.
func (r live) remember(ctx context.Context) {
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
