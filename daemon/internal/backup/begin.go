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
	"github.com/virtbackup/virtbackup/daemon/internal/journal"
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
	r.Point = r.unknownPoint()
	if err := r.job.Step(ctx, stepBegin, r.stepData); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	point, err := r.hold(ctx, func(ctx context.Context) error {
		return r.Hypervisor.BeginBackup(ctx, r.Plan.Domain, r.Plan.begin(r.Settings().ScratchDirectory))
	})
	if err != nil {
		return err
	}
	return r.fixed(ctx, point)
}

// quiesces tells whether the guest is to be held still.
func (r *run) quiesces() bool { return r.Plan.Quiesce != string(quiesce.None) }

// unknownPoint is what is known of a running domain's point in time when nobody
// is left to say more.
func (r *run) unknownPoint() transfer.Go {
	point := transfer.Go{Created: time.Now().UnixMicro(), Consistency: string(quiesce.Crash), Thawed: true}
	if r.quiesces() {
		point.Shortfall = "virtbackupd ended at the point in time, and whether the guest was held still is not known"
	}
	return point
}

// goodEnough says whether a point in time of which less is known is what was
// asked for.
func (r *run) goodEnough() error {
	if r.quiesces() && r.Plan.QuiescePolicy != string(quiesce.Prefer) {
		return failure.Errorf(dbus.ErrFailed, "cannot quiesce domain %q (%s) as is required: %s: start the backup again",
			r.Plan.DomainName, r.Plan.Quiesce, r.Point.Shortfall)
	}
	return nil
}

// hold holds the guest still while fix fixes the point in time.
func (r *run) hold(ctx context.Context, fix func(context.Context) error) (transfer.Go, error) {
	var at time.Time
	w := quiesce.Wish{Mode: quiesce.Mode(r.Plan.Quiesce), Policy: quiesce.Policy(r.Plan.QuiescePolicy)}
	held, err := r.Quiescer.Hold(ctx, r.Plan.Domain, w, func(ctx context.Context) error {
		err := fix(ctx)
		at = time.Now()
		return err
	})
	switch {
	case ctx.Err() != nil:
		return transfer.Go{}, errors.Join(context.Cause(ctx), err)
	case errors.Is(err, hypervisor.ErrNotRunning):
		return transfer.Go{}, failure.Errorf(dbus.ErrBusy, "domain %q was stopped while its backup was being prepared: start the backup again: %w", r.Plan.DomainName, err)
	case errors.Is(err, quiesce.ErrHold):
		return transfer.Go{}, failure.Errorf(dbus.ErrUnavailable, "cannot quiesce domain %q (%s), see to its guest agent, or back it up with quiesce=none or the policy prefer: %w",
			r.Plan.DomainName, r.Plan.Quiesce, err)
	case err != nil:
		return transfer.Go{}, err
	}
	if held.Shortfall != "" {
		r.job.Log(ctx, slog.LevelWarn, fmt.Sprintf("the backup is %s consistent only: %s", held.Consistency, held.Shortfall))
	}
	if !held.Thawed {
		r.job.Log(ctx, slog.LevelError, "the guest is not known to be thawed yet: the watchdog goes on trying",
			journal.MessageID, journal.GuestHeld, journal.DomainName, r.Plan.DomainName)
	}
	return transfer.Go{Created: at.UnixMicro(), Consistency: string(held.Consistency), Thawed: held.Thawed,
		Held: held.Held.Microseconds(), Shortfall: held.Shortfall}, nil
}

// rejoin goes on with a point in time that libvirt fixed while virtbackupd was
// restarted, if one of which less is known is good enough.
func (r live) rejoin(ctx context.Context) error {
	if err := r.goodEnough(); err != nil {
		return err
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
