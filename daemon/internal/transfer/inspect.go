package transfer

import (
	"context"
	"errors"

	"github.com/virtbackup/virtbackup/daemon/internal/repository"
)

// inspect looks at all backups of all domains, and gives a verdict on each. A
// bad backup is a result and no failure of the job.
func (w *worker) inspect(ctx context.Context) error {
	r, err := w.open()
	if err != nil {
		return err
	}
	defer r.Close()
	domains, err := r.Domains()
	if err != nil {
		return inRepository(err)
	}
	if err := w.status.enter(PhaseVerifying); err != nil {
		return err
	}
	for _, domain := range domains {
		backups, err := r.Backups(domain)
		if err != nil {
			return inRepository(err)
		}
		for _, backup := range backups {
			state := BackupState{Domain: domain, Backup: backup}
			err := w.inspectSettled(ctx, r, &state)
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if errors.Is(err, repository.ErrNoBackup) && state.Manifest == nil {
				continue // a job has just deleted it
			}
			state.Error = failure(ctx, inRepository(err))
			w.result.Backups = append(w.result.Backups, state)
		}
		if err := w.whoIsHit(ctx, r, domain); err != nil {
			return err
		}
	}
	return nil
}

// inspectSettled looks at a backup again if something is wrong with it, and a job
// has merged or deleted what it stands on meanwhile.
func (w *worker) inspectSettled(ctx context.Context, r *repository.Repository, state *BackupState) error {
	if w.spec.Depth == DepthManifests {
		return w.inspectBackup(ctx, r, state)
	}
	stands := func() string {
		l, err := trace(r, state.Domain, state.Backup)
		if err != nil {
			return err.Error()
		}
		var all string
		for _, m := range l {
			all += m.Backup + " " + m.HMAC + " "
		}
		return all
	}
	for {
		before := stands()
		err := w.inspectBackup(ctx, r, state)
		if err == nil || ctx.Err() != nil || stands() == before {
			return err
		}
	}
}

func (w *worker) inspectBackup(ctx context.Context, r *repository.Repository, state *BackupState) error {
	var err error
	state.Manifest, err = r.Whole(state.Domain, state.Backup)
	if errors.Is(err, repository.ErrForeignManifest) {
		state.Manifest, state.Pin, err = r.Foreign(state.Domain, state.Backup)
		if err == nil {
			err = r.Check(state.Manifest)
		}
		return err // what it holds is looked at once it is trusted
	}
	if err != nil || w.spec.Depth == DepthManifests {
		return err
	}
	if w.spec.Depth == DepthDigests {
		return w.verifyBackup(ctx, r, state)
	}
	l, err := trace(r, state.Domain, state.Backup)
	if errors.Is(err, repository.ErrNoBackup) {
		return fail(ClassParent, "what it builds on is gone: %w", err)
	}
	if err != nil {
		return err
	}
	for _, d := range state.Manifest.Disks {
		if err := inDisk(d.Target, w.openOnce(ctx, r, l, d)); err != nil {
			return err
		}
	}
	return nil
}

// openOnce opens a disk of a backup, and looks at the structure of its image.
func (w *worker) openOnce(ctx context.Context, r *repository.Repository, l lineage, d repository.Disk) error {
	s, err := openDisk(r, l, d.Target)
	if err != nil {
		return err
	}
	defer s.close()
	return s.checkStructure(ctx)
}
