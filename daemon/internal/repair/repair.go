// Package repair is the job that repairs a damaged backup, if somebody asks for
// it: a worker writes its damaged images anew with what other backups of the
// domain, or its disks as they are now, hold of the same, and exchanges them at
// once. Then they are read back.
package repair

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/chain"
	"github.com/virtbackup/virtbackup/daemon/internal/errand"
	"github.com/virtbackup/virtbackup/daemon/internal/failure"
	"github.com/virtbackup/virtbackup/daemon/internal/job"
	"github.com/virtbackup/virtbackup/daemon/internal/transfer"
	"github.com/virtbackup/virtbackup/daemon/internal/verification"
	"github.com/virtbackup/virtbackup/dbus"
)

// Request asks to repair the job's backup.
type Request struct {
	DryRun bool `json:"dry_run,omitempty"` // only tell what could be
}

// Kind is the kind of job that does it.
type Kind struct {
	Catalog *catalog.Catalog
	Errand  errand.Sender
	Live    Live
}

// Its steps: from the first on there may be files, and from the second on the
// worker that writes has done what it could.
const (
	stepRepairing = "repairing"
	stepReading   = "reading"
)

// Run has a worker repair the backup, and another one read it back.
func (k Kind) Run(ctx context.Context, h *job.Handle) error {
	var r Request
	if err := h.Request(&r); err != nil {
		return err
	}
	b, err := k.Catalog.Backup(ctx, h.Job().Backup)
	if err != nil {
		return failure.Named(err)
	}
	if b.State != chain.Complete && b.State != chain.Damaged {
		return failure.Errorf(dbus.ErrBusy, "backup %s is %s", b.ID, b.State)
	}
	repo, err := k.Catalog.Repository(ctx, b.Repository)
	if err != nil {
		return failure.Named(err)
	}
	if h.Job().Step == stepReading {
		return k.read(ctx, h, repo, b)
	}
	if err := h.Step(ctx, stepRepairing, nil); err != nil {
		return err
	}
	result, err := k.write(ctx, h, repo, b, r)
	if result == nil || result.Manifest == nil && len(result.Lost) == 0 {
		return errors.Join(err, errNothing(result, err))
	}
	tell(ctx, h, b.ID, result, r.DryRun, result.Manifest != nil)
	if r.DryRun {
		return err
	}
	if result.Manifest != nil {
		if err := k.record(ctx, b, result); err != nil {
			return err
		}
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err := h.Step(ctx, stepReading, nil); err != nil {
		return err
	}
	return errors.Join(err, k.read(ctx, h, repo, b))
}

// write has a worker do it.
func (k Kind) write(ctx context.Context, h *job.Handle, repo catalog.Repository, b catalog.Backup, r Request) (*transfer.Result, error) {
	spec := transfer.RepairSpec{Backup: b.ID, DryRun: r.DryRun}
	// A worker that a daemon before this one started has what it needs.
	started, err := k.Errand.Started(ctx, h.Job().ID)
	if err != nil {
		return nil, err
	}
	if !started {
		spec.Live = k.Live.start(ctx, h, b)
	}
	result, err := k.Errand.Run(ctx, h, repo, transfer.Spec{Operation: transfer.OperationRepair, Domain: b.Domain, Repair: &spec})
	if errors.Is(err, job.ErrDetach) {
		return nil, err
	}
	return result, errors.Join(err, k.Live.stop(ctx, h.Job().ID))
}

// errNothing is the error of a worker that neither failed nor said anything.
func errNothing(result *transfer.Result, err error) error {
	if err == nil && result != nil {
		return errors.New("the worker does not say what it did")
	}
	return nil
}

// tell says what was repaired, and from where.
func tell(ctx context.Context, h *job.Handle, backup string, result *transfer.Result, dryRun, done bool) {
	verb := "was written anew"
	if dryRun || !done {
		verb = "can be repaired"
	}
	for _, f := range result.Repaired[:min(len(result.Repaired), mostTold)] {
		if f.File != "" {
			h.Log(ctx, slog.LevelInfo, fmt.Sprintf("the digests of disk %s of backup %s: what is damaged %s from its image", f.Target, backup, verb))
			continue
		}
		if f.Donor == "" {
			h.Log(ctx, slog.LevelInfo, fmt.Sprintf("disk %s of backup %s %s: all data is there, and only what says where it is is damaged", f.Target, backup, verb))
			continue
		}
		holder := "backup " + f.Donor + " holds"
		if f.Donor == transfer.DonorLive {
			holder = "the domain's disk holds now"
		}
		h.Log(ctx, slog.LevelInfo, fmt.Sprintf("disk %s of backup %s: %d bytes at %d: %s with what %s", f.Target, backup, f.Length, f.Offset, verb, holder))
	}
	for _, f := range result.Lost[:min(len(result.Lost), mostTold)] {
		h.Log(ctx, slog.LevelWarn, fmt.Sprintf("disk %s of backup %s: %d bytes at %d are held by no other backup, nor by the domain's disk", f.Target, backup, f.Length, f.Offset))
	}
	if len(result.Repaired) == 0 && len(result.Lost) == 0 {
		h.Log(ctx, slog.LevelInfo, fmt.Sprintf("nothing of the disks of backup %s is damaged", backup))
	}
}

// mostTold bounds what is told of each kind.
const mostTold = 100

// record records how the backup is stored now. Also when the job was just
// cancelled: the repository knows already.
func (k Kind) record(ctx context.Context, b catalog.Backup, result *transfer.Result) error {
	m := result.Manifest
	if m.Backup != b.ID || m.Parent != b.Parent {
		return fmt.Errorf("the worker does not say how backup %s is stored now", b.ID)
	}
	done, err := errand.Rewritten(m)
	if err != nil {
		return err
	}
	return failure.Named(k.Catalog.RewrittenBackup(context.WithoutCancel(ctx), done))
}

// read has the backup read back, and records what is damaged now.
func (k Kind) read(ctx context.Context, h *job.Handle, repo catalog.Repository, b catalog.Backup) error {
	result, err := k.Errand.Run(ctx, h, repo, transfer.Spec{Operation: transfer.OperationVerify, Domain: b.Domain, Backups: []string{b.ID}})
	if result == nil {
		return err
	}
	if recorded := verification.Record(context.WithoutCancel(ctx), k.Catalog, h, result); recorded != nil || err != nil {
		return errors.Join(err, recorded)
	}
	i := slices.IndexFunc(result.Backups, func(s transfer.BackupState) bool { return s.Backup == b.ID })
	if i < 0 || result.Backups[i].Error == nil {
		return k.whole(context.WithoutCancel(ctx), b.ID)
	}
	return failure.Errorf(dbus.ErrDamaged, "backup %s is still damaged: %s: make a new full backup", b.ID, result.Backups[i].Error.Message)
}

// whole fails if a backup whose own files are well is hit by what it builds on.
func (k Kind) whole(ctx context.Context, id string) error {
	b, err := k.Catalog.Backup(ctx, id)
	if err != nil || b.State != chain.Damaged {
		return failure.Named(err)
	}
	parts, err := k.Catalog.Damage(ctx, id)
	if err != nil {
		return err
	}
	var images []string
	for _, p := range parts {
		if p.Image != id && !slices.Contains(images, p.Image) {
			images = append(images, p.Image)
		}
	}
	return failure.Errorf(dbus.ErrDamaged, "the files of backup %s are well, but it is hit by what it builds on: virtbackupctl repair %s", id, strings.Join(images, ", and "))
}

// Undo removes what the worker left, and finds out whether it had exchanged the
// images all the same.
func (k Kind) Undo(ctx context.Context, h *job.Handle) error {
	if h.Job().Step == "" {
		return nil
	}
	if err := k.Live.stop(ctx, h.Job().ID); err != nil {
		return err
	}
	b, err := k.Catalog.Backup(ctx, h.Job().Backup)
	if err != nil {
		return ignoreGone(err)
	}
	repo, err := k.Catalog.Repository(ctx, b.Repository)
	if err != nil {
		return ignoreGone(err)
	}
	if err := k.settle(ctx, h, repo, b); err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		h.Logger().WarnContext(ctx, "cannot tell how the backup is stored now; a check of the repository clears up", "error", err)
	}
	return nil
}

func ignoreGone(err error) error {
	if errors.Is(err, catalog.ErrNotFound) {
		return nil
	}
	return err
}

func (k Kind) settle(ctx context.Context, h *job.Handle, repo catalog.Repository, b catalog.Backup) error {
	// In the names of these there may be files and a claim.
	_, err := k.Errand.Run(ctx, h, repo, transfer.Spec{Operation: transfer.OperationDiscard, Domain: b.Domain, Backups: []string{b.ID, h.Job().ID}})
	if err != nil {
		return err
	}
	found, err := k.Errand.Run(ctx, h, repo, transfer.Spec{Operation: transfer.OperationList, Domain: b.Domain})
	if err != nil {
		return err
	}
	for _, s := range found.Backups {
		if s.Backup == b.ID && s.Error == nil && s.Manifest != nil && s.Manifest.Rewriter == h.Job().ID {
			return k.record(ctx, b, &transfer.Result{Manifest: s.Manifest})
		}
	}
	return nil
}
