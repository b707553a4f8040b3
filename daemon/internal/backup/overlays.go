package backup

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/chain"
	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/daemon/internal/overlay"
)

// Overlays keeps the overlays that tracking by snapshot puts on disks, see overlay.Keeper.
type Overlays interface {
	Settle(ctx context.Context, uuid string) error
	Drop(ctx context.Context, uuid string) error
}

// settleLimit bounds how long the commit of overlays may take when a backup
// waits for it; it is as long as a disk takes to write what changed in between.
const settleLimit = 10 * time.Minute

// own is a disk as it is without overlays of ours: that is what backups know it by.
type own struct {
	Source  string
	Format  string
	Backing []string // paths of the layers below, top first
}

// stacked are a disk's overlays and what is below them.
type stacked struct {
	own   own
	top   string               // path of the overlay that is the top layer; "" if none is
	stack []hypervisor.Stacked // all layers, the top one first
}

// settle brings the overlays of the domain to what the next backup can go on
// with. What cannot be done now costs it a comparison, and is done later.
func (r *run) settle(ctx context.Context, request Request) error {
	ctx, cancel := context.WithTimeout(ctx, settleLimit)
	defer cancel()
	work := r.Overlays.Settle
	if request.Tracking != chain.Snapshot && !request.Isolated {
		kept, err := r.Catalog.KeptOverlays(ctx, request.Domain)
		if err != nil {
			return err
		}
		head, err := r.Catalog.LatestChain(ctx, request.Domain, request.Repository)
		if err != nil && !errors.Is(err, catalog.ErrNotFound) {
			return err
		}
		if len(kept) > 0 && head.Tip != nil && kept[0].Backup == head.Tip.ID { // the chain goes on in another way
			work = r.Overlays.Drop
		}
	}
	if err := heldIsFine(work(ctx, request.Domain), r.job.Logger()); err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		r.job.Log(ctx, slog.LevelWarn, fmt.Sprintf("overlays of former backups stay on the domain's disks for now: %v", err))
	}
	return nil
}

// settleAfter brings the overlays to what they are to be after a backup.
func (r *run) settleAfter(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, settleLimit)
	defer cancel()
	return heldIsFine(r.Overlays.Settle(ctx, r.job.Job().Domain), r.job.Logger())
}

// reconcileOverlays does what jobs could not do.
func (k *Kind) reconcileOverlays(ctx context.Context, d hypervisor.Domain) error {
	ctx, cancel := context.WithTimeout(ctx, settleLimit)
	defer cancel()
	return heldIsFine(k.Overlays.Settle(ctx, d.UUID), k.Log.With("domain", d.Name))
}

// heldIsFine says of overlays that have to stay for now only why.
func heldIsFine(err error, log *slog.Logger) error {
	if errors.Is(err, overlay.ErrHeld) {
		log.Info("an overlay stays on its disk for now", "why", err)
		return nil
	}
	return err
}

// overlays looks at the layers of the domain's disks.
func (r *run) overlays(ctx context.Context, f *facts) error {
	if f.request.Tracking != chain.Snapshot && !overlay.Concerned(f.domain) {
		return nil
	}
	stacks, err := hypervisor.Stacks(ctx, f.domain)
	if err != nil {
		return err
	}
	f.stacked, f.made = map[string]stacked{}, map[string]string{}
	bare := map[string]hypervisor.Stacked{}
	for target, stack := range stacks {
		overlays, disk := overlay.Split(stack)
		one := stacked{own: own{Source: disk[0].Path, Format: disk[0].Format}, stack: stack}
		for _, l := range disk[1:] {
			one.own.Backing = append(one.own.Backing, l.Path)
		}
		if len(overlays) > 0 {
			one.top, bare[target] = overlays[0].Path, disk[0]
		}
		f.stacked[target] = one
	}
	if f.definition, err = hypervisor.WithoutOverlays(f.definition, bare); err != nil {
		return err
	}
	known, err := r.Catalog.Overlays(ctx, f.domain.UUID)
	if err != nil || f.last == nil || f.last.Tip == nil {
		return err
	}
	for _, o := range known {
		if o.Backup == f.last.Tip.ID && !o.Committing {
			f.made[o.Target] = o.Path
		}
	}
	return nil
}

// bear tells whether overlays may be put on the disks. A transient domain
// forgets them when it ends. A saved state, and the snapshots that libvirt
// knows, name the layers that were there when they were made.
func (f facts) bear(disks []hypervisor.Disk) bool {
	d := f.domain
	if !d.Persistent || len(d.Snapshots) > 0 || d.HasManagedSave || overlay.Saved(d) {
		return false
	}
	for _, k := range disks {
		s, known := f.stacked[k.Target]
		if !known || k.SourceType != "file" || k.Encrypted || s.own.Source == "" || s.own.Format != "qcow2" && s.own.Format != "raw" {
			return false
		}
		for _, l := range s.stack {
			if l.Type != "file" { // only QEMU can read it, or nobody sees who writes to it
				return false
			}
		}
	}
	return true
}

// own is how the disk is recorded.
func (f facts) own(k hypervisor.Disk) own {
	if s, known := f.stacked[k.Target]; known && s.top != "" {
		return s.own
	}
	return own{Source: k.Source, Format: k.Format, Backing: k.Backing}
}

// foreseen takes overlays for what their names say, without a look at the disks.
func (f *facts) foreseen() {
	f.stacked, f.made = map[string]stacked{}, map[string]string{}
	for _, k := range f.domain.Disks {
		one := stacked{own: own{Source: k.Source, Format: k.Format, Backing: k.Backing}}
		backup, ours := overlay.Ours(hypervisor.Stacked{Path: k.Source, Type: k.SourceType, Format: k.Format})
		if ours && f.last != nil && f.last.Tip != nil && f.last.Tip.ID == backup {
			one.top, f.made[k.Target] = k.Source, k.Source
			for _, i := range f.last.Tip.Images {
				if i.Target == k.Target {
					one.own = own{Source: i.Source, Format: i.Format, Backing: i.Backing}
				}
			}
		}
		f.stacked[k.Target] = one
	}
}
