package backup

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/errand"
	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/daemon/internal/repository"
)

// callLimit bounds one thing asked of libvirt when nobody may wait for long any
// more. What is not done then is done by Reconcile.
const callLimit = 30 * time.Second

// finish records a backup that is in the repository. Whatever fails besides
// that is a warning: the backup is good.
func (r *run) finish(ctx context.Context, m *repository.Manifest) error {
	ctx, cancel := settled(ctx)
	defer cancel()
	r.job.Waits(errand.PhaseFinishing)
	r.warn(ctx, "end the export of the disks", r.source().end(ctx))
	limited, stop := context.WithTimeout(ctx, callLimit)
	defer stop()
	r.source().remember(limited)
	raw, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if err := r.commit(ctx, catalog.Commit{
		Finished: time.UnixMicro(m.Finished), Consistency: m.Consistency, Held: time.Duration(m.Held) * time.Microsecond, Shortfall: m.Shortfall,
		Manifest: raw, Images: r.Plan.images(m),
	}); err != nil {
		return err
	}
	r.warn(ctx, "remove what was made for the copy", r.source().remove())
	r.warn(ctx, "commit the overlays of the backup before", r.settleAfter(ctx))
	r.warn(ctx, "remove old checkpoints", r.tidy(ctx, r.Plan.Domain))
	r.warn(ctx, "forget the worker", r.Errands.Supervisor.Forget(ctx, r.job.Job().ID))
	return nil
}

// commit records a backup that is whole, as soon as the catalog can be written:
// to fail, and delete it, because a disk is full here would be a waste.
func (r *run) commit(ctx context.Context, done catalog.Commit) error {
	const interval = 2 * time.Second
	for {
		err := r.Catalog.CommitBackup(ctx, r.Plan.Backup, done)
		if err == nil || errors.Is(err, catalog.ErrState) || errors.Is(err, catalog.ErrNotFound) {
			return err
		}
		r.job.Logger().Error("cannot record the backup yet", "error", err)
		select {
		case <-time.After(interval):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// images is what the catalog keeps of a backup's disks.
func (p Plan) images(m *repository.Manifest) []catalog.Image {
	var all []catalog.Image
	for _, k := range p.Disks {
		i := p.image(k)
		if d, ok := m.Disk(k.Target); ok {
			i.Size, i.StoredBytes, i.DataBytes, i.ReadBytes = d.Size, d.StoredBytes, d.DataBytes, d.ReadBytes
		}
		all = append(all, i)
	}
	return all
}

func (r *run) warn(ctx context.Context, what string, err error) {
	if err != nil && ctx.Err() == nil {
		r.job.Log(ctx, slog.LevelWarn, "cannot "+what+", this is tried again later: "+err.Error())
	}
}

// tidy leaves libvirt without any checkpoint of ours: those that are not needed
// go with their bitmaps, of the current one only the metadata goes. Nobody may
// work on the domain meanwhile.
func (k *Kind) tidy(ctx context.Context, uuid string) error {
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	known, err := k.Catalog.Checkpoints(ctx, uuid, catalog.CheckpointPending, catalog.CheckpointCurrent, catalog.CheckpointObsolete)
	if err != nil {
		return err
	}
	var failed []error
	keep := map[string]catalog.Checkpoint{}
	for _, c := range known {
		if c.State != catalog.CheckpointObsolete {
			keep[c.Name] = c
			continue
		}
		err := k.delete(ctx, uuid, c.Name, c.XML)
		if err == nil || errors.Is(err, hypervisor.ErrNoDomain) {
			err = k.Catalog.RemovedCheckpoint(ctx, c.Name)
		}
		failed = append(failed, err)
	}
	left, err := k.Hypervisor.ListOurs(ctx, uuid)
	if err != nil && !errors.Is(err, hypervisor.ErrNoDomain) {
		failed = append(failed, err)
	}
	for _, name := range left {
		if c, any := keep[name]; any {
			failed = append(failed, k.forget(ctx, c))
		} else {
			failed = append(failed, k.delete(ctx, uuid, name, ""))
		}
	}
	return errors.Join(failed...)
}

// delete removes a checkpoint with its bitmaps, which is work of our own on the
// images of a domain that is off.
func (k *Kind) delete(ctx context.Context, uuid, name, definition string) error {
	d, err := k.Hypervisor.ByUUID(ctx, uuid)
	if err != nil {
		return err
	}
	work := func() error { return k.Hypervisor.Delete(ctx, uuid, name, definition) }
	if d.Active {
		return work()
	}
	// Begun, it is carried through: what the images are then has to become known.
	var targets []string
	for _, disk := range d.Disks {
		targets = append(targets, disk.Target)
	}
	return k.Keeper.OwnWork(context.WithoutCancel(ctx), d, targets, work)
}

// forget has libvirt forget a checkpoint, once its definition is in the catalog:
// without it the bitmaps could never be used, nor removed from a running domain.
func (k *Kind) forget(ctx context.Context, c catalog.Checkpoint) error {
	if c.XML == "" {
		definition, err := k.Hypervisor.CheckpointDefinition(ctx, c.Domain, c.Name)
		if err != nil {
			return err
		}
		if err := k.Catalog.SetCheckpointXML(ctx, c.Name, definition); err != nil {
			return err
		}
	}
	return k.Hypervisor.Forget(ctx, c.Domain, c.Name)
}

// dropSnapshotted has the bitmaps removed of a domain that has internal
// snapshots: they would keep it from reverting to one. Its chains go on without.
func (k *Kind) dropSnapshotted(ctx context.Context, d hypervisor.Domain) error {
	if !d.HasInternalSnapshots() {
		return nil
	}
	current, err := k.Catalog.Checkpoints(ctx, d.UUID, catalog.CheckpointCurrent)
	if err != nil {
		return err
	}
	var failed []error
	for _, c := range current {
		failed = append(failed, k.Catalog.DropCheckpoint(ctx, c.Name))
	}
	return errors.Join(failed...)
}
