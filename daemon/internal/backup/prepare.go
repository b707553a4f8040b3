package backup

import (
	"cmp"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/chain"
	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/dbus"
	"github.com/virtbackup/virtbackup/hooks/spool"
)

// checkpointPrefix begins the names of our checkpoints, for hypervisor.OursCheckpoint.
const checkpointPrefix = "virtbackup-"

// prepare plans the backup and records it. It changes nothing but what libvirt
// knows of a checkpoint of ours.
func (r *run) prepare(ctx context.Context) error {
	f, err := r.gather(ctx)
	if err != nil {
		return err
	}
	if r.Plan, err = newPlan(f); err != nil {
		return err
	}
	r.tell(ctx, f)
	step, err := r.job.NewStep(stepPlanned, r.stepData)
	if err != nil {
		return err
	}
	err = r.Catalog.CreateBackup(ctx, r.Plan.row(r.job.Job(), time.Now()), r.Plan.Checkpoint, step)
	if errors.Is(err, catalog.ErrState) {
		return fmt.Errorf("the chain of domain %q was changed at this moment, start the backup again: %w", r.Plan.DomainName, err)
	}
	return err
}

// gather asks libvirt and the catalog all that a plan depends on.
func (r *run) gather(ctx context.Context) (f facts, err error) {
	j := r.job.Job()
	f.backup, f.checkpoint = j.Backup, checkpointPrefix+ulid.Make().String()
	if err := json.Unmarshal(j.Spec, &f.request); err != nil {
		return f, fmt.Errorf("cannot read what job %s is asked for: %w", j.ID, err)
	}
	if f.repository, err = r.Catalog.Repository(ctx, f.request.Repository); err != nil {
		return f, err
	}
	if err := r.settle(ctx, f.request); err != nil {
		return f, err
	}
	if f.domain, err = r.lookup(ctx, f.request.Domain); err != nil {
		return f, err
	}
	// Before anything else: what happens from here on leaves newer marks.
	if f.mark, f.marks, err = r.Keeper.Observe(ctx, f.domain); err != nil {
		return f, err
	}
	if f.definition, err = r.Hypervisor.BackupDefinition(ctx, f.domain.UUID); err != nil {
		return f, err
	}
	f.domain = withoutMissing(f.domain)
	f.readHeaders()
	if !f.domain.Active {
		f.offline = followBacking(ctx, f.domain, f.request.Settings)
	}
	if f.boot, err = spool.BootID(); err != nil {
		return f, err
	}
	return f, r.gatherLast(ctx, &f)
}

// gatherLast asks for the last backup, and what tells the changes since.
func (r *run) gatherLast(ctx context.Context, f *facts) error {
	head, err := r.Catalog.LatestChain(ctx, f.request.Domain, f.request.Repository)
	if err != nil && !errors.Is(err, catalog.ErrNotFound) {
		return err
	}
	if err == nil {
		f.last = &head
	}
	if f.offline != nil {
		return nil
	}
	if err := r.overlays(ctx, f); err != nil || head.Checkpoint == nil {
		return err
	}
	f.bitmaps, err = r.bitmaps(ctx, f.domain, *head.Checkpoint)
	return err
}

// lookup finds the domain, without the backup job that a dead job of ours may
// have left: jobs of a domain run one after another, so it is nobody's.
func (r *run) lookup(ctx context.Context, uuid string) (hypervisor.Domain, error) {
	d, err := r.Hypervisor.ByUUID(ctx, uuid)
	if err != nil || !d.Active || !d.Job {
		return d, err
	}
	active, err := r.Hypervisor.BackupJob(ctx, uuid)
	if err != nil || !active.Ours && !active.Beginning {
		return d, err
	}
	// Whose it is that libvirt is beginning is seen when it has begun.
	limited, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	if err := r.Hypervisor.EndBackup(limited, uuid); errors.Is(err, hypervisor.ErrForeignJob) {
		return d, nil
	} else if err != nil {
		return d, err
	}
	return r.Hypervisor.ByUUID(ctx, uuid)
}

// bitmaps tells which disks have a usable bitmap of the chain's checkpoint.
// When libvirt cannot say, none has: the next images are full.
func (r *run) bitmaps(ctx context.Context, d hypervisor.Domain, c catalog.Checkpoint) (map[string]bool, error) {
	if c.XML == "" {
		return nil, nil
	}
	var err error
	if d.Active && !slices.Contains(d.Checkpoints, c.Name) {
		err = r.Hypervisor.Redefine(ctx, d.UUID, c.XML)
	}
	var usable map[string]bool
	if err == nil {
		usable, err = r.Hypervisor.CheckpointUsable(ctx, d.UUID, c.Name)
	}
	if errors.Is(err, hypervisor.ErrUnavailable) || ctx.Err() != nil {
		return nil, err
	}
	if err != nil {
		r.job.Log(ctx, slog.LevelWarn, fmt.Sprintf("the changes since the last backup are not known: %v", err))
		return nil, nil
	}
	return usable, nil
}

// readHeaders finds the qcow2 images of version 2, and internal snapshots that
// libvirt does not know (any more), by the headers of the images. What cannot be
// read is left to QEMU.
func (f *facts) readHeaders() {
	f.oldQcow2 = map[string]bool{}
	for _, k := range f.domain.Disks {
		if k.Format != "qcow2" || k.Source == "" || Skip(k, f.request.Settings, f.domain.Active) != "" {
			continue
		}
		version, snapshots, err := qcow2Header(k.Source)
		if err != nil {
			continue
		}
		if version < 3 {
			f.oldQcow2[k.Target] = true
		}
		f.snapshotted = f.snapshotted || snapshots > 0
	}
}

// qcow2Header reads the version and the number of internal snapshots in the
// header of an image (QEMU docs/interop/qcow2.txt, "Header").
func qcow2Header(path string) (version, snapshots uint32, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, 0, err
	}
	defer f.Close()
	var header [64]byte
	if _, err := f.ReadAt(header[:], 0); err != nil {
		return 0, 0, err
	}
	return binary.BigEndian.Uint32(header[4:]), binary.BigEndian.Uint32(header[60:]), nil
}

// tell writes into the job's log what people should know of the plan.
func (r *run) tell(ctx context.Context, f facts) {
	p, d := r.Plan, f.domain
	what := string(p.Kind)
	if p.Cause != "" {
		what += " (" + dbus.CauseText(string(p.Cause)) + ")"
	}
	var disks []string
	for _, k := range p.Disks {
		one := k.Target
		switch {
		case p.Kind != chain.Incremental:
		case k.Kind == chain.Full:
			one += " full (" + dbus.CauseText(string(k.Cause)) + ")"
		case k.Cause != "":
			one += " compared (" + dbus.CauseText(string(k.Cause)) + ")"
		}
		disks = append(disks, one)
	}
	r.job.Log(ctx, slog.LevelInfo, fmt.Sprintf("%s backup of domain %q, disks: %s", what, p.DomainName, strings.Join(disks, ", ")))
	for _, m := range f.marks {
		if f.last != nil && f.last.Tip != nil && m.Number > f.last.Tip.Mark && m.Detail != "" {
			r.job.Log(ctx, slog.LevelInfo, fmt.Sprintf("since the last backup, disk %s: %s (%s)", cmp.Or(m.Target, "all"), m.Detail, m.Cause))
		}
	}
	for _, s := range p.Skipped {
		level := slog.LevelInfo
		if s.Why == skipRunning {
			level = slog.LevelWarn
		}
		r.job.Log(ctx, level, fmt.Sprintf("disk %s is left out: %s", s.Target, s.Why))
	}
	if d.TPM.Version != "" && d.TPM.State == "" && d.Active {
		r.job.Log(ctx, slog.LevelWarn, "the state of the domain's TPM is not part of the backup: only what swtpm keeps in a directory can be")
	}
}

// recheck makes sure that a plan that was made before a restart still holds.
func (r *run) recheck(ctx context.Context) error {
	d, err := r.lookup(ctx, r.Plan.Domain)
	if err != nil {
		return err
	}
	if err := checkState(d); err != nil {
		return err
	}
	boot, err := spool.BootID()
	if err != nil {
		return err
	}
	return r.Plan.unchanged(boot, d)
}

// row is the plan as the catalog records it.
func (p Plan) row(j catalog.Job, created time.Time) catalog.Backup {
	b := catalog.Backup{
		ID: p.Backup, Mark: p.Mark, Domain: p.Domain, DomainName: p.DomainName, Chain: p.Chain, Parent: p.Parent, Repository: p.Repository.ID,
		Job: j.ID, UID: j.UID, Kind: p.Kind, State: chain.Running, Cause: p.Cause, Isolated: p.Isolated, Created: created,
		Offering: p.Offering, Settings: p.Settings,
	}
	for _, k := range p.Disks {
		b.Size += k.Size
		b.Images = append(b.Images, p.image(k))
	}
	return b
}

func (p Plan) image(k Disk) catalog.Image {
	return catalog.Image{
		Target: k.Target, Kind: k.Kind, Tracking: k.Tracking, Changes: k.Changes, Cause: k.Cause,
		Source: k.Own.Source, Format: k.Own.Format, Size: k.Size, Backing: k.Own.Backing, Run: p.Run, Node: k.Node,
	}
}
