package transfer

import (
	"context"
	"fmt"

	"github.com/virtbackup/virtbackup/daemon/internal/repository"
)

// restore reads a backup back. All that is restored appears at its destination
// once everything is complete and compared with its digests, or not at all.
func (w *worker) restore(ctx context.Context) (err error) {
	if w.spec.Restore == nil {
		return fail(ClassInternal, "the specification says nothing about the restore")
	}
	r, err := w.open()
	if err != nil {
		return err
	}
	defer r.Close()
	l, err := trace(r, w.spec.Domain, w.spec.Restore.Backup)
	if err != nil {
		return inRepository(err)
	}
	w.result.Manifest = l[0]
	var made []*destination
	defer func() {
		for _, d := range made {
			d.close(err == nil)
		}
	}()
	disks, err := w.openRestore(r, l, &made)
	defer func() {
		for _, d := range disks {
			d.from.close()
		}
	}()
	if err != nil {
		return err
	}
	if err := w.status.enter(PhaseCopying); err != nil {
		return err
	}
	if err := w.restoreFiles(r, l[0], w.spec.Restore.Files, &made); err != nil {
		return err
	}
	for _, d := range disks { // one after the other: each uses all processors
		if err := inDisk(d.from.Target, d.run(ctx)); err != nil {
			return err
		}
	}
	return w.publish(ctx, made)
}

// publish flushes what was restored and gives it its names.
func (w *worker) publish(ctx context.Context, made []*destination) error {
	if err := w.status.enter(PhaseFlushing); err != nil {
		return err
	}
	for _, d := range made {
		if err := d.flush(); err != nil {
			return classify(ClassDestination, err)
		}
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	for _, d := range made {
		if err := d.publish(); err != nil {
			return classify(ClassDestination, err)
		}
	}
	return nil
}

// openRestore opens all images and destinations before anything is copied.
func (w *worker) openRestore(r *repository.Repository, l lineage, made *[]*destination) ([]*diskRestore, error) {
	var disks []*diskRestore
	for _, spec := range w.spec.Restore.Disks {
		from, err := openDisk(r, l, spec.Target)
		if err != nil {
			return disks, err
		}
		d := &diskRestore{from: from, format: spec.Format, count: w.status.disk(spec.Target)}
		disks = append(disks, d)
		if d.format != FormatRaw && d.format != FormatQcow2 || spec.Device && d.format != FormatRaw {
			return disks, fail(ClassInternal, "disk %s: cannot restore as %q", spec.Target, spec.Format)
		}
		if d.to, err = openDestination(spec, from.Size); err != nil {
			return disks, classify(ClassDestination, inDisk(spec.Target, err))
		}
		*made = append(*made, d.to)
	}
	return disks, nil
}

func (w *worker) restoreFiles(r *repository.Repository, m *repository.Manifest, files []RestoreFile, made *[]*destination) error {
	for _, spec := range files {
		if err := w.restoreFile(r, m, spec, made); err != nil {
			return fmt.Errorf("file %s: %w", spec.Name, err)
		}
	}
	return nil
}

func (w *worker) restoreFile(r *repository.Repository, m *repository.Manifest, spec RestoreFile, made *[]*destination) error {
	for _, f := range m.Files {
		if f.Name != spec.Name {
			continue
		}
		from, err := r.OpenImage(m.Domain.UUID, m.Backup, f.Name)
		if err != nil {
			return inRepository(err)
		}
		defer from.Close()
		to, err := newFile(spec.Directory, spec.Destination, spec.Owner)
		if err != nil {
			return classify(ClassDestination, err)
		}
		*made = append(*made, to)
		copied, err := writeSummed(to.f, f.Name, from)
		if err != nil {
			return err
		}
		if copied != f {
			return fail(ClassVerification, "it is not what was written")
		}
		return nil
	}
	return fail(ClassManifest, "backup %s has no such file", m.Backup)
}

// diskRestore is one disk on its way back.
type diskRestore struct {
	from   *storedDisk
	to     *destination
	format string
	count  *counters
	sink   sink
}

// sink takes a disk's content in order.
type sink interface {
	buffer() []byte
	putBuffer(p []byte)
	data(off uint64, p []byte) error // owns p
	zero(off, length uint64) error
	finish() error
	abort() // does nothing after finish
}

func (d *diskRestore) run(ctx context.Context) (err error) {
	d.count.total.Store(d.from.Size)
	f := newWriteback(d.to.f)
	defer f.stop()
	if d.sink, err = d.openSink(f); err != nil {
		return classify(ClassDestination, err)
	}
	defer d.sink.abort()
	err = ordered(ctx, readDepth, stages[*stored]{
		produce: func(_ context.Context, emit func(*stored) error) error {
			return d.from.walk(d.sink.buffer, emit)
		},
		work:    func(_ context.Context, s *stored) error { return d.from.read(s, &d.count.read) },
		consume: d.store,
		drop:    func(s *stored) { d.sink.putBuffer(s.data) },
	})
	if err != nil {
		return err
	}
	return classify(ClassDestination, d.sink.finish())
}

func (d *diskRestore) store(s *stored) error {
	defer d.count.done.Add(s.length)
	if s.kind == spanZero {
		d.count.zero.Add(s.length)
		return classify(ClassDestination, d.sink.zero(s.off, s.length))
	}
	d.count.written.Add(s.length)
	return classify(ClassDestination, d.sink.data(s.off, s.data))
}
