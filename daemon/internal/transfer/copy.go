package transfer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"

	"github.com/virtbackup/virtbackup/daemon/internal/digest"
	"github.com/virtbackup/virtbackup/daemon/internal/nbd"
	"github.com/virtbackup/virtbackup/daemon/internal/qcow2"
	"github.com/virtbackup/virtbackup/daemon/internal/repository"
)

const (
	// readDepth is how many reads of one disk are under way, of up to 1 MiB each.
	readDepth = 12
	// threadsAtOnce bounds those that compress, of all disks together: each
	// takes up to 8 MiB, and eight outrun any export.
	threadsAtOnce = 8
)

// diskCopy is one disk of a backup in the making.
type diskCopy struct {
	*backup
	spec    BackupDisk
	entry   *repository.Disk
	count   *counters
	image   *os.File
	digests *os.File
	parent  *storedDisk // of an increment

	ahead      *writeback // of the image
	writer     *qcow2.Writer
	table      *digest.Writer
	zero       [digest.SumSize]byte // of a whole block
	digestFile repository.File
}

// changes says how the changes in an image of this kind are found; not ok if the
// disk's export does not go with it.
func (d BackupDisk) changes(kind string) (how string, ok bool) {
	var ways []string
	if d.Bitmap != "" {
		ways = append(ways, repository.ChangesCBT)
	}
	if d.Layer {
		ways = append(ways, repository.ChangesSnapshot)
	}
	if d.Compare {
		ways = append(ways, repository.ChangesDigest)
	}
	if kind != repository.KindIncremental {
		return "", len(ways) == 0
	}
	if len(ways) != 1 {
		return "", false
	}
	return ways[0], true
}

// prepare opens what the disk needs in the repository. An increment's parent is
// opened down to the full image: if that fails now, a full backup is made
// instead, and if it would fail later, this one is worth nothing.
func (d *diskCopy) prepare() error {
	if d.entry.Kind == repository.KindIncremental {
		var err error
		if d.parent, err = openDisk(d.repo, d.parents, d.spec.Target); err != nil {
			return asParent(err)
		}
		if d.parent.Size != d.spec.Size {
			return fail(ClassParent, "it had %d bytes in the parent and has %d now", d.parent.Size, d.spec.Size)
		}
	}
	var err error
	if d.image, err = d.stage.Create(d.entry.File); err != nil {
		return inRepository(err)
	}
	d.digests, err = d.stage.Create(repository.DigestName(d.spec.Target))
	return inRepository(err)
}

// asParent makes any failure of the parent's files one of the parent.
func asParent(err error) error {
	if err == nil {
		return nil
	}
	return &classed{ClassParent, fmt.Errorf("parent: %w", err)}
}

func (d *diskCopy) close() {
	if d.writer != nil {
		d.writer.Abort()
	}
	if d.ahead != nil {
		d.ahead.stop()
	}
	if d.parent != nil {
		d.parent.close()
	}
	for _, f := range []*os.File{d.image, d.digests} {
		if f != nil {
			f.Close()
		}
	}
}

// extent is a span on its way from the export to the image.
type extent struct {
	span
	data  []byte // the writer's buffer
	sums  [][digest.SumSize]byte
	forms []qcow2.Form // of a merge: as it was stored
}

func (d *diskCopy) copy(ctx context.Context) error {
	contexts := []string{nbd.ContextAllocation}
	p := planner{size: d.spec.Size}
	switch d.entry.Changes {
	case repository.ChangesCBT:
		p.changes = byBitmap(d.spec.Bitmap)
	case repository.ChangesSnapshot:
		p.changes = byLayer()
	}
	if p.changes != nil {
		contexts = append(contexts, p.changes.context)
	}
	client, err := nbd.Dial(ctx, d.spec.Socket, nbd.Options{Export: d.spec.Export, Contexts: contexts})
	if err != nil {
		return classify(ClassSource, err)
	}
	defer client.Close()
	if client.Size() != d.spec.Size {
		return fail(ClassSource, "its export has %d bytes instead of %d", client.Size(), d.spec.Size)
	}
	p.source = client
	if err := d.begin(ctx, p); err != nil {
		return err
	}
	err = ordered(ctx, readDepth, stages[*extent]{
		produce: func(ctx context.Context, emit func(*extent) error) error { return d.produce(ctx, p, emit) },
		work:    func(ctx context.Context, e *extent) error { return d.read(ctx, client, e) },
		consume: d.store,
		drop:    func(e *extent) { d.writer.PutBuffer(e.data) },
	})
	if err != nil {
		return err
	}
	return d.end()
}

// begin counts what is to be done, and starts the image and the digests.
func (d *diskCopy) begin(ctx context.Context, p planner) error {
	total, err := p.total(ctx)
	if err != nil {
		return err
	}
	d.count.total.Store(total)
	if p.changes != nil {
		d.count.dirty.Store(total)
	}
	return d.open(ctx, qcow2.Compression(d.Compression))
}

// open starts the image and the digests. The context is that of the copy.
func (d *diskCopy) open(ctx context.Context, compression qcow2.Compression) error {
	var err error
	d.ahead = newWriteback(d.image)
	to := throttledFile{countingFile{d.ahead, d.image, d.count}, ctx, d.throttle.writes}
	d.writer, err = qcow2.NewWriter(to, qcow2.WriterOptions{
		Size: d.spec.Size, ClusterSize: clusterSize, Backing: d.Manifest.Backing(*d.entry),
		Compression: compression, Level: d.Level, Threads: d.threads(),
	})
	if err != nil {
		return classify(ClassInternal, err)
	}
	d.zero = digest.ZeroSum(digest.BlockSize)
	var before *digest.Table
	if d.parent != nil {
		before = d.parent.digests
	}
	d.table, err = digest.NewWriter(d.digests, d.spec.Size, before)
	return classify(ClassRepository, err)
}

// threads is how many compress this disk.
func (b *backup) threads() int {
	all := b.Threads
	if all == 0 {
		all = runtime.GOMAXPROCS(0)
	}
	return max(1, min(all, threadsAtOnce)/min(len(b.disks), disksAtOnce))
}

func (d *diskCopy) produce(ctx context.Context, p planner, emit func(*extent) error) error {
	return p.plan(ctx, func(s span) error {
		if s.kind != spanData {
			return emit(&extent{span: s})
		}
		for at := s.off; at < s.end(); at += qcow2.BufferSize {
			n := min(qcow2.BufferSize, s.end()-at)
			e := &extent{span: span{at, n, spanData}, data: d.writer.GetBuffer()[:n]}
			if err := emit(e); err != nil {
				return err
			}
		}
		return nil
	})
}

func (d *diskCopy) read(ctx context.Context, from source, e *extent) error {
	if e.kind != spanData {
		return nil
	}
	if err := d.throttle.reads.wait(ctx, len(e.data)); err != nil {
		return err
	}
	if err := from.ReadAt(ctx, e.data, e.off); err != nil {
		return fail(ClassSource, "cannot read %d bytes at %d: %w", e.length, e.off, err)
	}
	d.count.read.Add(e.length)
	e.sums = sums(e.data)
	return nil
}

// sums returns the digest of each block of data that begins at a block's bound.
func sums(data []byte) [][digest.SumSize]byte {
	list := make([][digest.SumSize]byte, 0, len(data)/digest.BlockSize+1)
	for len(data) > 0 {
		n := min(len(data), digest.BlockSize)
		list = append(list, digest.Sum(data[:n]))
		data = data[n:]
	}
	return list
}

// store takes the next extent into the backup.
func (d *diskCopy) store(e *extent) error {
	put := d.put
	if d.entry.Changes == repository.ChangesDigest {
		put = d.compare
	}
	if err := put(e); err != nil {
		return err
	}
	if e.kind != spanClean {
		d.count.done.Add(e.length)
	}
	return nil
}

// put puts the next extent into the image and its digests into the table.
func (d *diskCopy) put(e *extent) error {
	if err := d.digest(e); err != nil {
		d.writer.PutBuffer(e.data)
		return err
	}
	var err error
	switch e.kind {
	case spanZero:
		d.count.zero.Add(e.length)
		err = d.writer.WriteZero(e.off, e.length)
	case spanData:
		err = d.writer.WriteForms(e.off, e.data, e.forms)
	}
	return classify(ClassRepository, err)
}

func (d *diskCopy) digest(e *extent) error {
	var err error
	switch e.kind {
	case spanClean:
		err = d.table.AppendParent(digest.Blocks(e.length))
	case spanZero:
		err = d.table.AppendZero(digest.Blocks(e.length))
	case spanData:
		for i := 0; i < len(e.sums) && err == nil; i++ {
			n := digest.Length(e.length, i)
			if isZero(e.sums[i], n, d.zero) {
				d.count.zero.Add(uint64(n))
			} else {
				d.entry.DataBytes += uint64(n)
			}
			err = d.table.Append(e.sums[i])
		}
	}
	if errors.Is(err, digest.ErrRead) {
		return asParent(err)
	}
	return classify(ClassRepository, err)
}

// end completes image and digests.
func (d *diskCopy) end() error {
	if err := d.writer.Finish(); err != nil {
		return classify(ClassRepository, err)
	}
	root, err := d.table.Close()
	if err != nil {
		return classify(ClassRepository, err)
	}
	d.entry.DigestRoot = fmt.Sprintf("%x", root)
	info, err := d.image.Stat()
	if err != nil {
		return classify(ClassRepository, err)
	}
	d.entry.StoredBytes, d.entry.ReadBytes = uint64(info.Size()), d.count.read.Load()
	// Their memory is for the disks that are still being copied.
	d.writer, d.table = nil, nil
	return nil
}

// flush makes image and digests durable.
func (d *diskCopy) flush(context.Context) error {
	return classify(ClassRepository, errors.Join(d.image.Sync(), d.digests.Sync()))
}

// verify reads back all that was written, as any later reader will: the digests
// first, which must be those that were computed from the source, and with them
// the image. What the kernel has in memory is dropped before, as far as the file
// system lets it go.
func (d *diskCopy) verify(ctx context.Context) error {
	if err := errors.Join(forget(d.image), forget(d.digests)); err != nil {
		return err
	}
	image, err := checkImage(d.image, *d.entry, d.Manifest.Backing(*d.entry), qcow2.Limits{Size: d.entry.Size})
	if err != nil {
		return err
	}
	s := &storedDisk{Disk: *d.entry, images: []*qcow2.Image{image}, zero: d.zero, files: []*os.File{d.image}}
	if d.parent != nil {
		s.images = append(s.images, d.parent.images...)
		s.digests = d.parent.digests
	}
	if s.digests, err = openDigests(d.digests, *d.entry, s.digests); err != nil {
		return err
	}
	if s.chain, err = qcow2.NewChain(s.images...); err != nil {
		return classify(ClassVerification, err)
	}
	if err := s.verify(ctx, d.count); err != nil {
		return err
	}
	d.digestFile.Name = repository.DigestName(d.spec.Target)
	d.digestFile.BLAKE3, d.digestFile.Size, err = sumFile(io.NewSectionReader(d.digests, 0, 1<<62))
	return classify(ClassVerification, err)
}

// countingFile counts what is written to an image.
type countingFile struct {
	f     io.WriterAt
	to    *os.File // what f writes to
	count *counters
}

// CopyAt implements qcow2.Copier.
func (c countingFile) CopyAt(from *os.File, host, off, length int64) error {
	if err := copyRange(c.to, off, from, host, length); err != nil {
		return err
	}
	c.count.written.Add(uint64(length))
	return nil
}

func (c countingFile) WriteAt(p []byte, off int64) (int, error) {
	n, err := c.f.WriteAt(p, off)
	c.count.written.Add(uint64(n))
	return n, err
}
