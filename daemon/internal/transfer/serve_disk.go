package transfer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/virtbackup/virtbackup/daemon/internal/digest"
	"github.com/virtbackup/virtbackup/daemon/internal/nbd"
	"github.com/virtbackup/virtbackup/daemon/internal/qcow2"
)

const (
	// servedReaders bounds the threads that read from the storage at once: all
	// of them hang when it does.
	servedReaders = 16
	// cachedBlocks are held of all disks together, 16 MiB.
	cachedBlocks = 256
	// retryPause is between two tries with ServeSpec.Wait.
	retryPause = time.Second
)

// servedDisk is a disk that is served. All that a client gets has been compared
// with its digest.
type servedDisk struct {
	*storedDisk
	lineage lineage
	count   *counters
	log     *slog.Logger
	readers chan struct{}
	cache   *blockCache

	wait     bool
	patience time.Duration

	summing sync.Mutex // of digests

	mu         sync.Mutex
	damage     []Damage
	hit        map[uint64]bool // offsets of damaged blocks
	unanswered *Failure
}

var _ nbd.Mapper = (*servedDisk)(nil)

// Size implements nbd.Export.
func (d *servedDisk) Size() uint64 { return d.storedDisk.Size }

// ReadAt implements nbd.Export.
func (d *servedDisk) ReadAt(ctx context.Context, p []byte, off uint64) error {
	err := d.answer(ctx, func() error { return d.fill(p, off) })
	if err == nil {
		d.count.read.Add(uint64(len(p)))
	}
	return err
}

// Extents implements nbd.Mapper. That something is zeros is told only if the
// digests say so too; the rest has to be read, which finds what is wrong.
func (d *servedDisk) Extents(ctx context.Context, off, length uint64, fn func(nbd.Extent) error) error {
	var found []nbd.Extent
	err := d.answer(ctx, func() error {
		var err error
		found, err = d.extents(off, length)
		return err
	})
	if err != nil {
		return err
	}
	for _, e := range found {
		if err := fn(e); err != nil {
			return err
		}
	}
	return nil
}

func (d *servedDisk) extents(off, length uint64) (found []nbd.Extent, err error) {
	err = d.chain.Extents(off, length, func(off, length uint64, kind qcow2.Kind) error {
		e := nbd.Extent{Offset: off, Length: length}
		if kind == qcow2.Zero {
			zeros, err := d.zeros(off, length)
			if err != nil {
				return err
			}
			if zeros {
				e.Flags = nbd.StateHole | nbd.StateZero
			}
		}
		if n := len(found); n > 0 && found[n-1].Flags == e.Flags {
			found[n-1].Length += length
			return nil
		}
		found = append(found, e)
		return nil
	})
	if err != nil && !ofStorage(err) {
		return []nbd.Extent{{Offset: off, Length: length}}, nil
	}
	return found, err
}

// zeros tells by the digests whether a range is zeros.
func (d *servedDisk) zeros(off, length uint64) (bool, error) {
	d.summing.Lock()
	defer d.summing.Unlock()
	end := digest.Blocks(off + length)
	block, err := d.digests.FirstData(int(off/digest.BlockSize), end)
	return block == end, err
}

// errSilent is the failure of storage that does not answer.
var errSilent = errors.New("the repository's storage does not answer")

// answer has a reader look at the storage for a request. An error is what the
// client gets; why is noted.
func (d *servedDisk) answer(ctx context.Context, look func() error) error {
	defer d.count.asking.begin()()
	for {
		err := d.attempt(ctx, look)
		switch {
		case err == nil:
			return nil
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case errors.Is(err, errBlock):
			return syscall.EIO
		case !d.wait:
			d.refuse(err)
			return syscall.EIO
		}
		d.log.Warn("the storage gave an error; it is asked again", "error", err)
		select {
		case <-time.After(retryPause):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// attempt has a reader look once. When that takes too long, or ctx ends, it is
// left behind, in the system call that it hangs in.
func (d *servedDisk) attempt(ctx context.Context, look func() error) error {
	var late <-chan time.Time
	if !d.wait {
		t := time.NewTimer(d.patience)
		defer t.Stop()
		late = t.C
	}
	silent := func() error { return fmt.Errorf("%w after %v", errSilent, d.patience) }
	select {
	case d.readers <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-late:
		return silent()
	}
	done := make(chan error, 1)
	go func() {
		defer func() { <-d.readers }()
		done <- guarded(look)()
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-late:
		return silent()
	}
}

// refuse notes that the storage gave no answer.
func (d *servedDisk) refuse(err error) {
	d.count.refused.Add(1)
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.unanswered == nil {
		d.unanswered = &Failure{ClassRepository, err.Error()}
		d.log.Error("the storage gives no answer", "error", err)
	}
}

// ofStorage tells whether an error is that of the storage, rather than of what
// is stored. EIO is taken for one: the bit that a disk cannot read may be read
// on its next day, and who reads a whole backup back (verify) judges more.
func ofStorage(err error) bool {
	var errno unix.Errno
	return errors.As(err, &errno)
}

// fill fills p from the disk at off: whole blocks as they are, parts of one by
// the cache.
func (d *servedDisk) fill(p []byte, off uint64) error {
	var bad error
	for len(p) > 0 {
		inside := off % digest.BlockSize
		block := off - inside
		length := min(digest.BlockSize, d.Size()-block)
		n := uint64(len(p))
		var err error
		switch {
		case inside > 0 || n < length:
			n = min(n, length-inside)
			err = d.part(p[:n], block, inside)
		default:
			if off+n < d.Size() {
				n -= n % digest.BlockSize
			}
			err = d.blocks(p[:n], off)
		}
		if err != nil && !errors.Is(err, errBlock) {
			return err
		}
		if err != nil {
			bad = err // what else is bad is to be known too
		}
		p, off = p[n:], off+n
	}
	return bad
}

// part fills p from within a block.
func (d *servedDisk) part(p []byte, block, inside uint64) error {
	content, err := d.cache.get(blockKey{d, block}, func() ([]byte, error) {
		content := make([]byte, min(digest.BlockSize, d.Size()-block))
		return content, d.blocks(content, block)
	})
	if err == nil {
		copy(p, content[inside:])
	}
	return err
}

// blocks fills p with whole blocks. Each is compared, also when one before it
// was bad.
func (d *servedDisk) blocks(p []byte, off uint64) error {
	sums, err := d.sums(off, len(p))
	if err == nil {
		_, err = d.chain.ReadAt(p, int64(off))
	}
	if err != nil && len(p) > digest.BlockSize && !ofStorage(err) {
		return d.oneByOne(p, off)
	}
	if err != nil && !ofStorage(err) {
		return d.damaged(off, uint64(len(p)), err.Error())
	}
	if err != nil {
		return fmt.Errorf("cannot read %d bytes at %d: %w", len(p), off, err)
	}
	var bad error
	for i := range sums {
		at := i * digest.BlockSize
		content := p[at:min(at+digest.BlockSize, len(p))]
		if !d.is(content, sums[i]) {
			bad = d.damaged(off+uint64(at), uint64(len(content)), "its digest is another")
		}
	}
	return bad
}

// oneByOne finds which of the blocks cannot be read.
func (d *servedDisk) oneByOne(p []byte, off uint64) error {
	var bad error
	for len(p) > 0 {
		n := min(len(p), digest.BlockSize)
		err := d.blocks(p[:n], off)
		if err != nil && !errors.Is(err, errBlock) {
			return err
		}
		if err != nil {
			bad = err
		}
		p, off = p[n:], off+uint64(n)
	}
	return bad
}

var zeroBlock [digest.BlockSize]byte

// is compares a block with its digest; zeros are found faster than digested.
func (d *servedDisk) is(content []byte, sum [digest.SumSize]byte) bool {
	if len(content) == digest.BlockSize && sum == d.zero {
		return bytes.Equal(content, zeroBlock[:])
	}
	return digest.Sum(content) == sum
}

// sums returns the digests of blocks.
func (d *servedDisk) sums(off uint64, length int) ([][digest.SumSize]byte, error) {
	d.summing.Lock()
	defer d.summing.Unlock()
	first, end := int(off/digest.BlockSize), digest.Blocks(off+uint64(length))
	list := make([][digest.SumSize]byte, 0, end-first)
	for block := first; block < end; block++ {
		sum, err := d.digests.Sum(block)
		if err != nil {
			return nil, err
		}
		list = append(list, sum)
	}
	return list, nil
}

// damaged notes a block that is not what was written.
func (d *servedDisk) damaged(off, length uint64, detail string) error {
	holder := d.lineage[d.holder(off, length)].Backup
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.hit[off] {
		if d.hit == nil {
			d.hit = map[uint64]bool{}
		}
		d.hit[off] = true
		d.count.damaged.Add(length)
		d.damage = addDamage(d.damage, Damage{Offset: off, Length: length, Backup: holder, Detail: detail})
		d.log.Error("a block is not what was written", "offset", off, "length", length, "backup", holder, "detail", detail)
	}
	return errBlock
}

// holder finds the image that holds a range, or whose tables say nonsense about
// it; the top one if none does.
func (s *storedDisk) holder(off, length uint64) int {
	for n, image := range s.images {
		held := false
		err := image.Own(off, length, func(uint64, uint64, qcow2.Kind) error {
			held = true
			return nil
		})
		if held || err != nil {
			return n
		}
	}
	return 0
}

// served is what came of it.
func (d *servedDisk) served() ServedDisk {
	d.mu.Lock()
	defer d.mu.Unlock()
	return ServedDisk{Target: d.Target, Read: d.count.read.Load(), Damage: d.damage, Unanswered: d.unanswered}
}
