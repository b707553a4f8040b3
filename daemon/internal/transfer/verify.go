package transfer

import (
	"context"
	"errors"
	"slices"

	"github.com/virtbackup/virtbackup/daemon/internal/repository"
)

// verify reads backups and all that they stand on, and gives a verdict on each.
// A bad backup is a result and no failure of the job.
func (w *worker) verify(ctx context.Context) error {
	r, err := w.open()
	if err != nil {
		return err
	}
	defer r.Close()
	backups, err := w.withParents(r)
	if err != nil {
		return inRepository(err)
	}
	if err := w.status.enter(PhaseVerifying); err != nil {
		return err
	}
	for _, backup := range backups {
		state := BackupState{Domain: w.spec.Domain, Backup: backup}
		err := w.verifyBackup(ctx, r, &state)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		state.Error = failure(ctx, err)
		w.result.Backups = append(w.result.Backups, state)
	}
	return nil
}

// withParents returns the backups to verify, oldest first: ids ascend with time.
func (w *worker) withParents(r *repository.Repository) ([]string, error) {
	var list []string
	for _, backup := range w.spec.Backups {
		for id := backup; id != "" && !slices.Contains(list, id); {
			list = append(list, id)
			m, err := r.Manifest(w.spec.Domain, id)
			if err != nil {
				break // the verdict on it says so
			}
			id = m.Parent
		}
	}
	slices.Sort(list)
	return list, nil
}

func (w *worker) verifyBackup(ctx context.Context, r *repository.Repository, state *BackupState) error {
	var err error
	if state.Manifest, err = r.Manifest(state.Domain, state.Backup); err != nil {
		return inRepository(err)
	}
	l, err := trace(r, state.Domain, state.Backup)
	if errors.Is(err, repository.ErrNoBackup) { // it is there itself
		return fail(ClassParent, "what it builds on is gone: %w", err)
	}
	if err != nil {
		return inRepository(err)
	}
	m := state.Manifest
	for _, f := range m.Files {
		if err := w.verifyFile(r, m, f); err != nil {
			return err
		}
	}
	for _, d := range m.Disks {
		if err := w.verifyDisk(ctx, r, l, d); err != nil {
			return inDisk(d.Target, err)
		}
	}
	return nil
}

func (w *worker) verifyFile(r *repository.Repository, m *repository.Manifest, f repository.File) error {
	from, err := r.OpenImage(m.Domain.UUID, m.Backup, f.Name)
	if err != nil {
		return inRepository(err)
	}
	defer from.Close()
	return checkFile(from, f)
}

// verifyDisk compares what the backup itself holds of a disk with its digests;
// what its parents hold is compared with theirs.
func (w *worker) verifyDisk(ctx context.Context, r *repository.Repository, l lineage, d repository.Disk) error {
	s, err := openDisk(r, l, d.Target)
	if err != nil {
		return err
	}
	defer s.close()
	return s.verify(ctx, w.status.disk(d.Target))
}
