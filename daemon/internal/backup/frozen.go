package backup

import (
	"context"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/chain"
	"github.com/virtbackup/virtbackup/daemon/internal/export"
	"github.com/virtbackup/virtbackup/daemon/internal/failure"
	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/daemon/internal/overlay"
	"github.com/virtbackup/virtbackup/daemon/internal/repository"
	"github.com/virtbackup/virtbackup/daemon/internal/transfer"
	"github.com/virtbackup/virtbackup/dbus"
	"github.com/virtbackup/virtbackup/hooks/fingerprint"
)

// frozen is a domain, running or off, on whose disks new overlays are put, all
// at one point in time. What is below them does not change any more: it is
// exported and copied, and an increment is what the layer right below holds,
// which is the overlay of the backup before. When the backup is recorded that
// one is committed into what is below it (overlay.Keeper), not before: until
// then the same increment can be had again. Nothing keeps others from
// committing or writing to what is below meanwhile, so it must be as it was
// when all is copied, or the copy is not kept.
type frozen struct{ *run }

func (r frozen) id() string { return r.job.Job().ID }

func (r frozen) server() server {
	return server{socket: r.Exporter.Socket(r.id()), confirm: true}
}

// overlay is the path of the new one on a disk.
func (r frozen) overlay(k Disk) string { return overlay.Name(k.Own.Source, r.Plan.Backup) }

func (r frozen) prepare(context.Context) error {
	for _, k := range r.Plan.Disks {
		if err := checkFree(filepath.Dir(k.Own.Source), r.Settings().MinimumFreeScratch, nil); err != nil {
			return err
		}
	}
	return r.Exporter.Prepare(r.id())
}

func (r frozen) begin(ctx context.Context) error {
	r.Point = r.unknownPoint()
	if r.Plan.Run == "" {
		r.Point.Consistency, r.Point.Shortfall = repository.ConsistencyOff, ""
	}
	if err := r.job.Step(ctx, stepBegin, r.stepData); err != nil {
		return err
	}
	if err := r.record(ctx); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	point := r.Point
	if r.Plan.Run == "" {
		if err := r.putOff(ctx); err != nil {
			return err
		}
		point.Created = time.Now().UnixMicro()
	} else {
		var err error
		if point, err = r.hold(ctx, r.put); err != nil {
			return err
		}
	}
	return r.export(ctx, point)
}

// record tells the catalog of the overlays before they are made.
func (r frozen) record(ctx context.Context) error {
	var all []catalog.Overlay
	for _, k := range r.Plan.Disks {
		all = append(all, catalog.Overlay{Path: r.overlay(k), Domain: r.Plan.Domain, Backup: r.Plan.Backup, Target: k.Target})
	}
	return r.Catalog.AddOverlays(ctx, all)
}

func (r frozen) paths() map[string]string {
	all := map[string]string{}
	for _, k := range r.Plan.Disks {
		all[k.Target] = r.overlay(k)
	}
	return all
}

// put puts the overlays on the disks.
func (r frozen) put(ctx context.Context) error {
	if err := r.Hypervisor.PutOverlays(ctx, r.Plan.Domain, r.paths()); err != nil {
		return fmt.Errorf("cannot put overlays beside the disks, is there space? %w", err)
	}
	return nil
}

func (r frozen) putOff(ctx context.Context) error {
	d, err := r.Hypervisor.ByUUID(ctx, r.Plan.Domain)
	if err != nil {
		return err
	}
	if err := r.Plan.unchanged("", d); err != nil {
		return err
	}
	return r.Keeper.OwnWork(ctx, d, slices.Collect(maps.Keys(r.paths())), func() error { return r.put(ctx) })
}

// export shows what is below the overlays, and records the point in time.
func (r frozen) export(ctx context.Context, point transfer.Go) error {
	d, stacks, err := r.look(ctx)
	if err != nil {
		return err
	}
	if !d.Active != (r.Plan.Run == "") {
		return failure.Errorf(dbus.ErrBusy, "domain %q was started or stopped when its backup began: start the backup again", r.Plan.DomainName)
	}
	var disks []export.Disk
	r.Seen = nil
	for i, k := range r.Plan.Disks {
		stack := stacks[k.Target]
		if !r.covers(k, stack) {
			return failure.Errorf(dbus.ErrBusy, "the layers of disk %s of domain %q were changed when its backup began: start the backup again", k.Target, r.Plan.DomainName)
		}
		below := stack[1]
		layers, err := hypervisor.Layers(ctx, hypervisor.Disk{Target: k.Target, Source: below.Path, Format: below.Format})
		if err != nil {
			return err
		}
		disks = append(disks, export.Disk{Name: k.Target, Layers: layers, Depth: k.Changes == chain.Snapshot})
		r.Seen = append(r.Seen, r.fingerprint(ctx, k.Target, below))
		r.Plan.Disks[i].Source, r.Plan.Disks[i].Format, r.Plan.Disks[i].Node = stack[0].Path, stack[0].Format, stack[0].Node
	}
	if err := r.Exporter.Start(ctx, r.id(), disks, r.Errands.Limits()); err != nil {
		return err
	}
	return r.fixed(ctx, point)
}

func (r frozen) look(ctx context.Context) (hypervisor.Domain, map[string][]hypervisor.Stacked, error) {
	d, err := r.Hypervisor.ByUUID(ctx, r.Plan.Domain)
	if err != nil {
		return d, nil, err
	}
	stacks, err := hypervisor.Stacks(ctx, d)
	return d, stacks, err
}

// covers tells whether the new overlay is on top of just those layers that the
// disk had when the backup was planned.
func (r frozen) covers(k Disk, stack []hypervisor.Stacked) bool {
	if len(stack) != len(k.Stack)+1 || stack[0].Path != r.overlay(k) {
		return false
	}
	for i, l := range k.Stack {
		if stack[i+1] != l {
			return false
		}
	}
	return true
}

// fingerprint is of a layer and those below it. When somebody changed their
// owner or mode does not matter: libvirt does when a domain stops.
func (r frozen) fingerprint(ctx context.Context, target string, l hypervisor.Stacked) fingerprint.Disk {
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	d := fingerprint.Take(ctx, fingerprint.Source{Target: target, Type: "file", Path: l.Path, Format: l.Format})
	for i := range d.Layers {
		d.Layers[i].Changed = 0
	}
	return d
}

// begun tells whether the overlays are on the disks. libvirt puts all or none there.
func (r frozen) begun(ctx context.Context) (bool, error) {
	if err := r.Quiescer.ThawLeftover(ctx); err != nil {
		return false, err
	}
	if err := r.end(ctx); err != nil { // what an earlier life exported
		return false, err
	}
	_, stacks, err := r.look(ctx)
	if err != nil {
		return false, err
	}
	for _, k := range r.Plan.Disks {
		if stack := stacks[k.Target]; len(stack) == 0 || stack[0].Path != r.overlay(k) {
			return false, nil
		}
	}
	return true, nil
}

func (r frozen) rejoin(ctx context.Context) error {
	if r.Plan.Run != "" {
		if err := r.goodEnough(); err != nil {
			return err
		}
	}
	return r.export(ctx, r.Point)
}

// remember has nothing to do: there is no checkpoint.
func (r frozen) remember(context.Context) {}

// watch has nothing to abort for: the domain does as it likes.
func (r frozen) watch(ctx context.Context, _ context.CancelCauseFunc) { <-ctx.Done() }

func (r frozen) confirm(ctx context.Context) error {
	for _, before := range r.Seen {
		if len(before.Layers) == 0 {
			return fmt.Errorf("cannot tell whether disk %s stayed as it was", before.Target)
		}
		now := r.fingerprint(ctx, before.Target, hypervisor.Stacked{Path: before.Layers[0].Path, Format: before.Format})
		if same, why := before.Compare(now); !same {
			return failure.Errorf(dbus.ErrBusy, "the layers of disk %s of domain %q were changed while they were being copied (%s), and the copy was dropped: start the backup again",
				before.Target, r.Plan.DomainName, why)
		}
	}
	return nil
}

func (r frozen) lost(_ context.Context, cause error) error {
	return fmt.Errorf("cannot read the disks of domain %q: %w", r.Plan.DomainName, cause)
}

func (r frozen) end(ctx context.Context) error { return stopped(r).end(ctx) }

func (r frozen) remove() error { return stopped(r).remove() }
