package transfer

import (
	"context"
	"fmt"

	"github.com/virtbackup/virtbackup/daemon/internal/digest"
	"github.com/virtbackup/virtbackup/daemon/internal/qcow2"
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
	if err := w.restoreFiles(r, l[0], &made); err != nil {
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

func (w *worker) restoreFiles(r *repository.Repository, m *repository.Manifest, made *[]*destination) error {
	for _, spec := range w.spec.Restore.Files {
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

// stored is a part of the disk on its way from the images.
type stored struct {
	span
	data []byte
	sums [][digest.SumSize]byte // what it must be
}

func (d *diskRestore) run(ctx context.Context) (err error) {
	d.count.total.Store(d.from.Size)
	if d.sink, err = d.openSink(); err != nil {
		return classify(ClassDestination, err)
	}
	defer d.sink.abort()
	err = ordered(ctx, readDepth, stages[*stored]{
		produce: func(_ context.Context, emit func(*stored) error) error {
			return d.from.walk(d.sink.buffer, emit)
		},
		work:    func(_ context.Context, s *stored) error { return d.from.read(s, d.count) },
		consume: d.store,
		drop:    func(s *stored) { d.sink.putBuffer(s.data) },
	})
	if err == nil {
		err = endDigests(d.from.digests, d.from.DigestRoot)
	}
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

// walk emits the whole disk in order: what is stored in pieces with a buffer
// each, and what is zero. Each comes with the digests that it must have.
func (s *storedDisk) walk(buffer func() []byte, emit func(*stored) error) error {
	for off := uint64(0); off < s.Size; off += windowSize {
		err := s.chain.Extents(off, min(windowSize, s.Size-off), func(off, length uint64, kind qcow2.Kind) error {
			most, k := length, spanZero
			if kind == qcow2.Data {
				most, k = qcow2.BufferSize, spanData
			}
			for at := off; at < off+length; at += most {
				piece := &stored{span: span{at, min(most, off+length-at), k}}
				if err := s.expect(piece); err != nil {
					return err
				}
				if k == spanData {
					piece.data = buffer()[:piece.length]
				}
				if err := emit(piece); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return classify(ClassVerification, err)
		}
	}
	return nil
}

// expect takes the digests of a piece from the table.
func (s *storedDisk) expect(piece *stored) error {
	for i := range digest.Blocks(piece.length) {
		sum, err := s.digests.Next()
		if err != nil {
			return classify(ClassVerification, err)
		}
		if piece.kind == spanData {
			piece.sums = append(piece.sums, sum)
			continue
		}
		n := digest.Length(piece.length, i)
		if !isZero(sum, n, s.zero) {
			return fail(ClassVerification, "%w: zeros at %d", errBlock, piece.off+uint64(i)*digest.BlockSize)
		}
	}
	return nil
}

// read reads a piece from the images and compares it with its digests.
func (s *storedDisk) read(piece *stored, count *counters) error {
	if piece.kind == spanZero {
		return nil
	}
	if _, err := s.chain.ReadAt(piece.data, int64(piece.off)); err != nil {
		return fail(ClassVerification, "cannot read %d bytes at %d: %w", piece.length, piece.off, err)
	}
	count.read.Add(piece.length)
	for i, sum := range sums(piece.data) {
		if sum != piece.sums[i] {
			return fail(ClassVerification, "%w: %d bytes at %d", errBlock,
				digest.Length(piece.length, i), piece.off+uint64(i)*digest.BlockSize)
		}
	}
	return nil
}

// isZero tells by its digest that a block of n bytes is all zeros; zero is the
// digest of a whole block of them.
func isZero(sum [digest.SumSize]byte, n int, zero [digest.SumSize]byte) bool {
	if n == digest.BlockSize {
		return sum == zero
	}
	return sum == digest.ZeroSum(n)
}
