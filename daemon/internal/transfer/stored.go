package transfer

import (
	"context"
	"sync"
	"sync/atomic"

	"github.com/virtbackup/virtbackup/daemon/internal/damage"
	"github.com/virtbackup/virtbackup/daemon/internal/digest"
	"github.com/virtbackup/virtbackup/daemon/internal/qcow2"
)

// stored is a part of a disk on its way from the images.
type stored struct {
	span
	data  []byte
	sums  [][digest.SumSize]byte // what it must be
	forms []qcow2.Form           // of a merge: as it is stored
}

// walk emits the whole disk in order: what is stored in pieces with a buffer
// each, and what is zero. Each comes with the digests that it must have.
func (s *storedDisk) walk(buffer func() []byte, emit func(*stored) error) error {
	for off := uint64(0); off < s.Size; off += windowSize {
		err := s.chain.Extents(off, min(windowSize, s.Size-off), func(off, length uint64, kind qcow2.Kind) error {
			return s.emit(off, length, kind, buffer, emit)
		})
		if err != nil {
			return classify(ClassVerification, err)
		}
	}
	return nil
}

// walkOwn emits only what the top image itself holds. Of all else the digests
// must be those of the parent, which it is left to.
func (s *storedDisk) walkOwn(buffer func() []byte, emit func(*stored) error) error {
	at := uint64(0)
	for off := uint64(0); off < s.Size; off += windowSize {
		err := s.images[0].Own(off, min(windowSize, s.Size-off), func(off, length uint64, kind qcow2.Kind) error {
			if err := s.inherit(at, off); err != nil {
				return err
			}
			at = off + length
			return s.emit(off, length, kind, buffer, emit)
		})
		if err != nil {
			return classify(ClassVerification, err)
		}
	}
	return s.inherit(at, s.Size)
}

func (s *storedDisk) emit(off, length uint64, kind qcow2.Kind, buffer func() []byte, emit func(*stored) error) error {
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
}

// inherit checks the digests of a range that the top image does not hold: those
// of the parent, or of zeros if there is none.
func (s *storedDisk) inherit(from, to uint64) error {
	return s.all(from, to, "nothing is stored", s.digests.FirstChange)
}

// all checks that first finds no block in a range.
func (s *storedDisk) all(from, to uint64, what string, first func(from, to int) (int, error)) error {
	for at, end := digest.Blocks(from), digest.Blocks(to); ; {
		block, err := first(at, end)
		if err != nil {
			return classify(ClassVerification, err)
		}
		if block >= end {
			return nil
		}
		if s.found == nil {
			return fail(ClassVerification, "%w: %s at %d", errBlock, what, uint64(block)*digest.BlockSize)
		}
		s.found.note(uint64(block)*digest.BlockSize, uint64(digest.Length(s.Size, block)))
		at = block + 1
	}
}

// finder finds all that is damaged, where otherwise the first is an error.
type finder struct {
	mu     sync.Mutex
	ranges damage.Ranges
}

func (f *finder) note(off, length uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ranges = f.ranges.Add(damage.Range{Offset: off, Length: length})
}

// expect gives a piece the digests that it must have.
func (s *storedDisk) expect(piece *stored) error {
	if piece.kind == spanZero {
		return s.all(piece.off, piece.end(), "zeros", s.digests.FirstData)
	}
	for block := int(piece.off / digest.BlockSize); block < digest.Blocks(piece.end()); block++ {
		sum, err := s.digests.Sum(block)
		if err != nil {
			return classify(ClassVerification, err)
		}
		piece.sums = append(piece.sums, sum)
	}
	return nil
}

// read reads a piece from the images and compares it with its digests.
func (s *storedDisk) read(piece *stored, count *atomic.Uint64) error {
	if piece.kind == spanZero {
		return nil
	}
	_, err := s.chain.ReadAt(piece.data, int64(piece.off))
	if err != nil && s.found != nil && !unreachable(err) {
		return s.readBlocks(piece, count)
	}
	return s.compare(piece, count, err)
}

// readBlocks reads a piece block by block, to find which cannot be read.
func (s *storedDisk) readBlocks(piece *stored, count *atomic.Uint64) error {
	for i, sum := range piece.sums {
		at := uint64(i) * digest.BlockSize
		one := piece.data[at:min(piece.length, at+digest.BlockSize)]
		_, err := s.chain.ReadAt(one, int64(piece.off+at))
		if unreachable(err) {
			return fail(ClassVerification, "cannot read %d bytes at %d: %w", len(one), piece.off+at, err)
		}
		if err != nil || digest.Sum(one) != sum {
			s.found.note(piece.off+at, uint64(len(one)))
		}
	}
	count.Add(piece.length)
	return nil
}

// compare compares a piece that was read with its digests.
func (s *storedDisk) compare(piece *stored, count *atomic.Uint64, err error) error {
	if err != nil {
		return fail(ClassVerification, "cannot read %d bytes at %d: %w", piece.length, piece.off, err)
	}
	count.Add(piece.length)
	for i, sum := range sums(piece.data) {
		if sum == piece.sums[i] {
			continue
		}
		n, at := digest.Length(piece.length, i), piece.off+uint64(i)*digest.BlockSize
		if s.found == nil {
			return fail(ClassVerification, "%w: %d bytes at %d", errBlock, n, at)
		}
		s.found.note(at, uint64(n))
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

// verify checks the top image: its structure, and every block of the disk that
// it holds. That the rest is right follows from the same check of the parent.
func (s *storedDisk) verify(ctx context.Context, count *counters) error {
	count.total.Store(s.DataBytes)
	if err := s.checkStructure(ctx); err != nil {
		return err
	}
	return s.verifyContent(ctx, count)
}

func (s *storedDisk) verifyContent(ctx context.Context, count *counters) error {
	buffers := newBuffers(readDepth)
	return ordered(ctx, readDepth, stages[*stored]{
		produce: func(_ context.Context, emit func(*stored) error) error { return s.walkOwn(buffers.get, emit) },
		work: func(ctx context.Context, piece *stored) error {
			if s.reads != nil {
				if err := s.reads.wait(ctx, len(piece.data)); err != nil {
					return err
				}
			}
			return s.read(piece, &count.done)
		},
		consume: func(piece *stored) error {
			buffers.put(piece.data)
			return nil
		},
		drop: func(piece *stored) { buffers.put(piece.data) },
	})
}

// checkStructure opens the image apart from the chain, with room for the maps
// that checking needs.
func (s *storedDisk) checkStructure(ctx context.Context) error {
	image, err := checkImage(s.files[0], s.Disk, s.images[0].Header().Backing, qcow2.Limits{Size: s.Size})
	if err != nil {
		return err
	}
	if err := image.Check(ctx); err != nil {
		return fail(ClassVerification, "image %s: %w", s.File, err)
	}
	return nil
}

// buffers bounds how much is read ahead; they are asked for in the order in
// which they are given back.
type buffers chan []byte

func newBuffers(n int) buffers {
	b := make(buffers, n)
	for range n {
		b <- nil // made when first asked for
	}
	return b
}

func (b buffers) get() []byte {
	if p := <-b; p != nil {
		return p
	}
	return make([]byte, qcow2.BufferSize)
}

func (b buffers) put(p []byte) {
	if p != nil {
		b <- p[:qcow2.BufferSize]
	}
}
