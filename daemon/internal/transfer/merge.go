package transfer

import (
	"context"
	"errors"
	"os"
	"slices"
	"sync"

	"github.com/virtbackup/virtbackup/daemon/internal/qcow2"
	"github.com/virtbackup/virtbackup/daemon/internal/repository"
)

// merging is a backup whose images are written anew: it takes over what those
// below it hold, or what it holds itself is to be compressed.
type merging struct {
	*backup
	*MergeSpec
	pack    bool // what lies plain in its images is compressed
	mend    *RepairSpec
	rewrite *repository.Rewrite
	lineage lineage // Into first
	base    lineage // of what stays below it; empty if nothing does
	disks   []*mergedDisk
	renewed int // of a repair, how many disks' digests were made anew
}

// mergedDisk is one disk of a merging whose image is written anew.
type mergedDisk struct {
	*diskCopy
	from   *storedDisk
	images int // of those of from, how many are merged: the first ones
	before repository.Disk

	pack        bool
	compression qcow2.Compression // of the new image

	mend    *mending // of a repair
	reading sync.Mutex
	plainly bool // data lies plain in the image
	blind   bool // the image does not tell what it holds
}

// merge makes Into stand on Base. The images are written anew beside the old
// ones, read back and compared with the digests of what the disks hold, which
// stay the same; then all are exchanged at once.
func (w *worker) merge(ctx context.Context) error {
	if w.spec.Merge == nil || len(w.spec.Merge.Drop) == 0 {
		return fail(ClassInternal, "the specification says nothing about the merge")
	}
	m := &merging{backup: &backup{worker: w, BackupSpec: &BackupSpec{}}, MergeSpec: w.spec.Merge}
	// What must stay free is for backups; removing some must be possible in what is left.
	w.spec.Repository.MinimumFree = 0
	return m.run(ctx, func(now *repository.Manifest) error {
		if now.Parent == m.Base {
			return errDone
		}
		return nil
	})
}

// errDone says that there is nothing to do, as after a run of the job that died.
var errDone = errors.New("it is as it is to be")

// run does it, unless begin, which gets the manifest as it is, refuses.
func (m *merging) run(ctx context.Context, begin func(now *repository.Manifest) error) (err error) {
	if m.repo, err = m.worker.open(); err != nil {
		return err
	}
	defer m.repo.Close()
	if m.claim, err = m.repo.Claim(m.spec.Domain, m.spec.Job); err != nil {
		return inRepository(err)
	}
	defer m.release(m.claim)
	if m.rewrite, err = m.repo.Rewrite(m.claim, m.Into); err != nil {
		return inRepository(err)
	}
	if err := begin(m.rewrite.Manifest()); errors.Is(err, errDone) {
		m.result.Manifest = m.rewrite.Manifest()
		return nil
	} else if err != nil {
		return err
	}
	defer func() {
		m.close()
		if errors.Is(err, errDone) {
			m.result.Manifest, err = m.rewrite.Manifest(), inRepository(m.rewrite.Discard())
			err = errors.Join(err, m.unrepaired())
		} else if err != nil {
			err = errors.Join(err, m.rewrite.Discard())
		}
	}()
	return m.guard(ctx, m.make)
}

func (m *merging) close() {
	for _, d := range m.disks {
		d.close()
		d.from.close()
		if d.mend != nil {
			d.mend.close()
		}
	}
}

// make takes the merge through its phases.
func (m *merging) make(ctx context.Context) error {
	if err := m.prepare(ctx); err != nil {
		return err
	}
	for _, p := range []struct {
		name string
		each func(*mergedDisk, context.Context) error
	}{
		{m.phase(), (*mergedDisk).copy},
		{PhaseFlushing, (*mergedDisk).flush},
		{PhaseVerifying, (*mergedDisk).verify},
	} {
		if err := m.status.enter(p.name); err != nil {
			return err
		}
		// One after the other: nobody waits for a merge, and guests want their storage.
		for _, d := range m.disks {
			if err := inDisk(d.spec.Target, p.each(d, ctx)); err != nil {
				return err
			}
		}
	}
	if m.pack && !m.smaller() {
		return errDone
	}
	return m.commit(ctx)
}

// phase is the one in which it is written.
func (m *merging) phase() string {
	if m.mend != nil {
		return PhaseRepairing
	}
	if m.pack {
		return PhaseCompressing
	}
	return PhaseMerging
}

// prepare opens all that is merged, and makes the new manifest.
func (m *merging) prepare(ctx context.Context) error {
	var err error
	if m.lineage, err = trace(m.repo, m.spec.Domain, m.Into); err != nil {
		return inRepository(err)
	}
	kept := 1 + len(m.Drop)
	ids := make([]string, len(m.lineage))
	for i, one := range m.lineage {
		ids[i] = one.Backup
	}
	if len(ids) < kept || !slices.Equal(ids[1:kept], m.Drop) || len(ids) > kept && ids[kept] != m.Base || len(ids) == kept && m.Base != "" {
		return fail(ClassParent, "backup %s stands on %v, and not on %v and then %q", m.Into, ids[1:], m.Drop, m.Base)
	}
	m.base = m.lineage[kept:]
	m.Manifest = *m.lineage[0]
	m.Manifest.Disks = slices.Clone(m.Manifest.Disks)
	m.Manifest.Files = slices.Clone(m.Manifest.Files)
	m.Manifest.Parent = m.Base
	if m.Base == "" {
		m.Manifest.Kind = repository.KindFull
	}
	for i := range m.Manifest.Disks {
		if m.Manifest.Disks[i].Kind == repository.KindFull && !m.pack && m.mend == nil {
			continue // it stands on nothing
		}
		if m.mend != nil {
			if damaged, err := m.redigest(ctx, &m.Manifest.Disks[i]); err != nil {
				return inDisk(m.Manifest.Disks[i].Target, err)
			} else if damaged {
				continue
			}
		}
		if err := m.open(ctx, &m.Manifest.Disks[i]); err != nil {
			return inDisk(m.Manifest.Disks[i].Target, err)
		}
	}
	if (m.pack || m.mend != nil) && len(m.disks) == 0 && m.renewed == 0 || m.mend != nil && m.mend.DryRun {
		return errDone
	}
	return nil
}

// open opens a disk with all its images, and makes the files of the new one.
func (m *merging) open(ctx context.Context, entry *repository.Disk) error {
	from, err := openDisk(m.repo, m.lineage, entry.Target)
	if err != nil {
		return err
	}
	d := &mergedDisk{
		diskCopy: &diskCopy{backup: m.backup, spec: BackupDisk{Target: entry.Target, Size: entry.Size}, entry: entry, count: m.status.disk(entry.Target)},
		from:     from, images: min(1+len(m.Drop), len(from.images)), before: *entry, pack: m.pack,
	}
	if m.pack {
		plain, err := d.plain()
		if err != nil || plain == 0 {
			from.close()
			return err
		}
	}
	if m.mend != nil {
		d.plainly = m.Manifest.Offering.Compression == string(qcow2.CompressionNone)
		if todo, err := m.look(ctx, d); err != nil || !todo || m.mend.DryRun {
			from.close()
			if d.mend != nil {
				d.mend.close()
			}
			return err
		}
	}
	m.disks = append(m.disks, d)
	m.backup.disks = []*diskCopy{d.diskCopy} // one at a time has all threads
	if d.images == len(from.images) {        // the full image is among those merged
		entry.Kind, entry.Changes = repository.KindFull, ""
	} else if d.parent, err = openDisk(m.repo, m.base, entry.Target); err != nil {
		return err
	}
	d.chooseCompression()
	entry.DataBytes = 0
	if d.image, err = m.rewrite.Create(entry.File); err != nil {
		return inRepository(err)
	}
	d.digests, err = m.rewrite.Create(repository.DigestName(entry.Target))
	return inRepository(err)
}

// chooseCompression chooses that of one of the images that are merged, whose
// clusters are copied as they are. An image without compressed clusters is one
// of zlib to QEMU.
func (d *mergedDisk) chooseCompression() {
	if d.pack {
		d.compression = qcow2.Compression(d.Compression)
		return
	}
	d.compression = qcow2.CompressionZlib
	for _, image := range d.from.images[:d.images] {
		if image.Header().Compression == qcow2.CompressionZstd {
			d.compression = qcow2.CompressionZstd
		}
	}
}

// copy writes what the merged images hold into the new one.
func (d *mergedDisk) copy(ctx context.Context) error {
	if err := d.open(ctx, d.compression); err != nil {
		return err
	}
	for off := uint64(0); off < d.before.Size && !d.blind; off += windowSize {
		err := d.from.chain.Held(d.images, off, min(windowSize, d.before.Size-off), func(r qcow2.Run) error {
			if r.Kind == qcow2.Data {
				d.count.total.Add(r.Length)
			}
			return nil
		})
		if err != nil {
			return classify(ClassVerification, err)
		}
	}
	err := ordered(ctx, readDepth, stages[*merged]{
		produce: func(_ context.Context, emit func(*merged) error) error { return d.walk(emit) },
		work:    d.read,
		consume: d.take,
		drop:    func(piece *merged) { d.writer.PutBuffer(piece.data) },
	})
	if err != nil {
		return err
	}
	if err := d.end(); err != nil {
		return err
	}
	d.entry.ReadBytes = d.before.ReadBytes // from the domain's disk
	if d.entry.DigestRoot != d.before.DigestRoot {
		return fail(ClassVerification, "the merged image holds something else than those that were merged")
	}
	return nil
}

// merged is a part of a disk on its way to the new image. What lies in an
// image's file as it is, is not read, but copied from file to file: that it is
// what it must be is seen when the new image is read back. What is compressed is
// read, and stays as it was compressed.
type merged struct {
	*stored
	from  *os.File // nil: it is read
	host  int64
	donor donor // nil: it is in the images
}

func (d *mergedDisk) read(ctx context.Context, piece *merged) error {
	if piece.from != nil || piece.kind != spanData {
		return nil
	}
	if piece.donor != nil {
		return d.readMended(ctx, piece)
	}
	if d.pack {
		if err := d.throttle.reads.wait(ctx, len(piece.data)); err != nil {
			return err
		}
	}
	var err error
	piece.forms, err = d.from.chain.ReadForms(piece.data, piece.off, d.compression)
	for i := range piece.forms {
		piece.forms[i].Plain = piece.forms[i].Plain && !d.pack
	}
	return d.from.compare(piece.stored, &d.count.done, err)
}

// take takes the next piece into the new image.
func (d *mergedDisk) take(piece *merged) error {
	e := &extent{piece.span, piece.data, piece.sums, piece.forms}
	if piece.from == nil {
		return d.put(e)
	}
	if err := d.digest(e); err != nil {
		return err
	}
	d.count.done.Add(piece.length)
	return classify(ClassRepository, d.writer.CopyData(piece.off, piece.length, piece.from, piece.host))
}

// emit emits a run of data or zeroes of one of the images.
func (d *mergedDisk) emit(r qcow2.Run, emit func(*merged) error) error {
	var whole uint64 // bytes that are copied as they are
	if !d.pack && r.Plain && r.Offset%clusterSize == 0 && r.Host%clusterSize == 0 {
		whole = r.Length / clusterSize * clusterSize
	}
	for at := uint64(0); at < whole; at += copiedAtOnce {
		piece := &stored{span: span{r.Offset + at, min(copiedAtOnce, whole-at), spanData}}
		if err := d.from.expect(piece); err != nil {
			return err
		}
		if err := emit(&merged{stored: piece, from: d.from.files[r.Image], host: r.Host + int64(at)}); err != nil {
			return err
		}
	}
	if whole == r.Length {
		return nil
	}
	return d.from.emit(r.Offset+whole, r.Length-whole, r.Kind, d.writer.GetBuffer, func(piece *stored) error { return emit(&merged{stored: piece}) })
}

// copiedAtOnce is how much is copied from file to file at a time, in bytes.
const copiedAtOnce = 32 << 20

// walk emits the whole disk in order: what the merged images hold, and between
// that what they leave to those below; or what reads as zeros, if there are none.
func (d *mergedDisk) walk(emit func(*merged) error) error {
	rest := spanZero
	if d.parent != nil {
		rest = spanClean
	}
	at := uint64(0)
	gap := func(to uint64) error {
		from := at
		at = max(at, to)
		return d.around(from, to, emit, func(off, end uint64) error {
			return emit(&merged{stored: &stored{span: span{off, end - off, rest}}})
		})
	}
	for off := uint64(0); off < d.before.Size && !d.blind; off += windowSize {
		err := d.from.chain.Held(d.images, off, min(windowSize, d.before.Size-off), func(r qcow2.Run) error {
			if err := gap(r.Offset); err != nil {
				return err
			}
			at = r.Offset + r.Length
			return d.around(r.Offset, at, emit, func(off, end uint64) error {
				part := r
				part.Offset, part.Length, part.Host = off, end-off, r.Host+int64(off-r.Offset)
				return d.emit(part, emit)
			})
		})
		if err != nil {
			return classify(ClassVerification, err)
		}
	}
	return gap(d.before.Size)
}

// commit exchanges the files.
func (m *merging) commit(ctx context.Context) error {
	if err := m.status.enter(PhaseCommitting); err != nil {
		return err
	}
	for _, d := range m.disks {
		i := slices.IndexFunc(m.Manifest.Files, func(f repository.File) bool { return f.Name == d.digestFile.Name })
		if i < 0 {
			return fail(ClassInternal, "the digests of disk %s are not in the manifest", d.spec.Target)
		}
		m.Manifest.Files[i] = d.digestFile
		// Closed before they are renamed: not every network storage can otherwise.
		if err := closeAll(&d.image, &d.digests); err != nil {
			return inDisk(d.spec.Target, classify(ClassRepository, err))
		}
	}
	if err := m.rewrite.Commit(ctx, &m.Manifest); err != nil {
		return inRepository(err)
	}
	m.result.Manifest = &m.Manifest
	return m.unrepaired()
}

func closeAll(files ...**os.File) error {
	var errs []error
	for _, f := range files {
		errs = append(errs, (*f).Close())
		*f = nil
	}
	return errors.Join(errs...)
}
