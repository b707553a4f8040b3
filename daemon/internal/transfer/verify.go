package transfer

import (
	"context"
	"slices"

	"github.com/virtbackup/virtbackup/daemon/internal/qcow2"
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

// verifyDisk checks the structure of the image and compares every block of the
// disk with its digest.
func (w *worker) verifyDisk(ctx context.Context, r *repository.Repository, l lineage, d repository.Disk) error {
	s, err := openDisk(r, l, d.Target)
	if err != nil {
		return err
	}
	defer s.close()
	image, err := checkImage(s.files[0], d, l[0].Backing(d), qcow2.Limits{Size: d.Size})
	if err != nil {
		return err
	}
	if err := image.Check(ctx); err != nil {
		return classify(ClassVerification, err)
	}
	count := w.status.disk(d.Target)
	count.total.Store(d.Size)
	buffers := &rawSink{buffers: make(chan []byte, readDepth)}
	for range readDepth {
		buffers.buffers <- nil
	}
	err = ordered(ctx, readDepth, stages[*stored]{
		produce: func(_ context.Context, emit func(*stored) error) error { return s.walk(buffers.buffer, emit) },
		work:    func(_ context.Context, piece *stored) error { return s.read(piece, count) },
		consume: func(piece *stored) error {
			buffers.putBuffer(piece.data)
			count.done.Add(piece.length)
			return nil
		},
		drop: func(piece *stored) { buffers.putBuffer(piece.data) },
	})
	if err != nil {
		return err
	}
	return endDigests(s.digests, d.DigestRoot)
}
