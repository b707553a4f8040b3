package backup

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/chain"
	"github.com/virtbackup/virtbackup/daemon/internal/export"
	"github.com/virtbackup/virtbackup/daemon/internal/failure"
	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/daemon/internal/quiesce"
	"github.com/virtbackup/virtbackup/daemon/internal/repository"
	"github.com/virtbackup/virtbackup/daemon/internal/transfer"
	"github.com/virtbackup/virtbackup/dbus"
	"github.com/virtbackup/virtbackup/hooks/fingerprint"
)

// stopped is a domain that is off. Its images are exported as they are, without
// a lock, so that it can be started at any moment; when all is copied they must
// be as they were, or the copy is not kept.
//
// The bitmaps of the new checkpoint are the only thing that is written. QEMU's
// image lock, which that takes for 10 to 70 ms per disk, would make a start fail
// that opens the image just then. It does not come to that with libvirt's hook
// in place: a start waits there, at most 0.2 s, while the Keeper is at work, and
// the Keeper does not let us work on a domain whose start the hook has seen.
type stopped struct{ *run }

func (r stopped) id() string { return r.job.Job().ID }

func (r stopped) prepare(context.Context) error { return r.Exporter.Prepare(r.id()) }

func (r stopped) server() server {
	return server{socket: r.Exporter.Socket(r.id()), bitmap: func(string) string { return r.Plan.Base }, confirm: true}
}

// begun ends what an earlier life may have exported: whether the disks are still
// as they were then is not known.
func (r stopped) begun(ctx context.Context) (bool, error) { return false, r.end(ctx) }

func (r stopped) rejoin(ctx context.Context) error { return r.begin(ctx) }

func (r stopped) begin(ctx context.Context) error {
	r.listen(ctx) // before the look at the domain: no start is missed
	r.Point = transfer.Go{Created: time.Now().UnixMicro(), Consistency: repository.ConsistencyOff, Thawed: true}
	if r.Plan.Saved {
		r.Point.Consistency = repository.ConsistencyCrash
		if r.Plan.Quiesce != string(quiesce.None) {
			r.Point.Shortfall = "the domain has a saved state, which is not part of the backup"
		}
	}
	if err := r.job.Step(ctx, stepBegin, r.stepData); err != nil {
		return err
	}
	d, err := r.off(ctx)
	if err != nil {
		return err
	}
	if err := r.addBitmaps(ctx, d); err != nil {
		return err
	}
	if r.Seen, err = r.look(ctx, d); err != nil {
		return err
	}
	disks, err := r.exports(ctx, d)
	if err != nil {
		return err
	}
	if err := r.Exporter.Start(ctx, r.id(), disks, r.Errands.Limits()); err != nil {
		return r.lost(ctx, err)
	}
	return r.fixed(ctx, r.Point)
}

// off looks the domain up, which has to be off and to have the plan's disks.
func (r stopped) off(ctx context.Context) (hypervisor.Domain, error) {
	d, err := r.Hypervisor.ByUUID(ctx, r.Plan.Domain)
	switch {
	case err != nil:
		return d, err
	case d.Active:
		return d, r.started("it runs")
	}
	return d, r.Plan.unchanged("", d)
}

// started is the end of a backup whose domain did not stay as it was.
func (r stopped) started(how string) error {
	return failure.Errorf(dbus.ErrBusy, "domain %q was started, or its disks were changed, while it was being backed up (%s), and the copy was dropped: start the backup again",
		r.Plan.DomainName, how)
}

// addBitmaps makes the checkpoint. A disk on which that fails is compared by the
// next backup; what the manifest says of its tracking is what was wanted.
func (r stopped) addBitmaps(ctx context.Context, d hypervisor.Domain) error {
	var carrying []string
	for _, k := range r.Plan.Disks {
		if k.Tracking == chain.CBT {
			carrying = append(carrying, k.Target)
		}
	}
	if r.Plan.Checkpoint == "" || len(carrying) == 0 {
		return nil
	}
	definition, err := hypervisor.OfflineCheckpoint(d, r.Plan.Checkpoint, time.Now(), carrying)
	if err == nil { // first, for whoever has to remove it
		err = r.Catalog.SetCheckpointXML(ctx, r.Plan.Checkpoint, definition)
	}
	if err != nil {
		return err
	}
	for i, k := range r.Plan.Disks {
		if k.Tracking != chain.CBT {
			continue
		}
		disk, _ := d.Disk(k.Target)
		// Begun, it is carried through: what the image is then has to become known.
		err := r.Keeper.OwnWork(context.WithoutCancel(ctx), d, []string{k.Target}, func() error { return hypervisor.AddBitmap(ctx, disk, r.Plan.Checkpoint) })
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			r.job.Log(ctx, slog.LevelWarn, fmt.Sprintf("the changes of disk %s are not tracked from now on, the next backup compares it: %v", k.Target, err))
			r.Plan.Disks[i].Tracking = chain.Digest
		}
	}
	return nil
}

// look takes the fingerprints of the plan's disks.
func (r stopped) look(ctx context.Context, d hypervisor.Domain) ([]fingerprint.Disk, error) {
	sources, err := fingerprint.Sources([]byte(d.XML))
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	var planned []fingerprint.Source
	for _, k := range r.Plan.Disks {
		for _, s := range sources {
			if s.Target == k.Target {
				planned = append(planned, s)
			}
		}
	}
	return fingerprint.TakeAll(ctx, planned), nil
}

func (r stopped) exports(ctx context.Context, d hypervisor.Domain) ([]export.Disk, error) {
	var all []export.Disk
	for _, k := range r.Plan.Disks {
		disk, _ := d.Disk(k.Target)
		if k.Container != "" {
			disk = container(disk)
		}
		layers, err := hypervisor.Layers(ctx, disk)
		if err != nil {
			return nil, err
		}
		one := export.Disk{Name: k.Target, Layers: layers}
		if k.Changes == chain.CBT {
			one.Bitmap = r.Plan.Base
		}
		all = append(all, one)
	}
	return all, nil
}

// remember has nothing to do: addBitmaps did.
func (r stopped) remember(context.Context) {}

// watch aborts the copy of a domain that was started: it would not be kept.
func (r stopped) watch(ctx context.Context, abort context.CancelCauseFunc) {
	events := r.Hypervisor.Subscribe(ctx)
	for {
		state, _, err := r.Hypervisor.State(ctx, r.Plan.Domain)
		if err == nil && state != hypervisor.StateShutoff {
			abort(r.started("it is " + state))
			return
		}
		if !r.awaitEvent(events) {
			return
		}
	}
}

func (r stopped) confirm(ctx context.Context) error {
	d, err := r.off(ctx)
	if err != nil {
		return err
	}
	now, err := r.look(ctx, d)
	if err != nil {
		return err
	}
	if len(now) != len(r.Seen) {
		return r.started("it has other disks")
	}
	for i, before := range r.Seen {
		same, why := before.Compare(now[i])
		if why == fingerprint.Opaque {
			same, why = r.quiet(), "whether something wrote to a block device is not known"
		}
		if !same {
			return r.started(fmt.Sprintf("disk %s: %s", before.Target, why))
		}
	}
	return nil
}

// listen notes from now on whether libvirt tells of anything that the domain
// does. Events are taken as they come: a copy may take longer than it takes
// other domains to fill a queue.
func (r stopped) listen(ctx context.Context) {
	events, heard := r.Hypervisor.Subscribe(ctx), new(atomic.Bool)
	r.heard = heard
	go func() {
		for e := range events {
			if e.Kind == hypervisor.EventMissed || e.UUID == r.Plan.Domain && e.Kind == hypervisor.EventLifecycle {
				heard.Store(true)
			}
		}
		heard.Store(true) // there is nobody to tell any more
	}()
}

// quiet tells whether libvirt told of nothing that the domain did since before
// the point in time.
func (r stopped) quiet() bool { return r.heard != nil && !r.heard.Load() }

func (r stopped) lost(ctx context.Context, cause error) error {
	if ctx.Err() != nil {
		return cause
	}
	if _, err := r.off(ctx); err != nil {
		return errors.Join(err, cause)
	}
	return fmt.Errorf("cannot read the disks of domain %q: %w", r.Plan.DomainName, cause)
}

func (r stopped) end(ctx context.Context) error {
	limited, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	return r.Exporter.Stop(limited, r.id())
}

func (r stopped) remove() error { return r.Exporter.Remove(r.id()) }

// followBacking fills in what is below the images of a stopped domain.
func followBacking(ctx context.Context, d hypervisor.Domain, s catalog.Settings) error {
	for i, k := range d.Disks {
		if Skip(k, s, d.Active) != "" {
			continue
		}
		layers, err := hypervisor.Layers(ctx, k)
		if errors.Is(err, hypervisor.ErrLayer) {
			return failure.Errorf(dbus.ErrUnsupported, "domain %q is off, and disk %s can be read by its QEMU only, start it first: %w", d.Name, k.Target, err)
		}
		if err != nil {
			return fmt.Errorf("cannot read disk %s of domain %q: %w", k.Target, d.Name, err)
		}
		if k.Encrypted && len(layers) > 1 {
			return failure.Errorf(dbus.ErrUnsupported, "disk %s of domain %q is encrypted, and not in one file alone: only what is in one file can be backed up as it is", k.Target, d.Name)
		}
		for _, l := range layers[1:] {
			d.Disks[i].Backing = append(d.Disks[i].Backing, l.Path)
		}
	}
	return nil
}
