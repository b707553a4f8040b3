package transfer

import (
	"context"

	"github.com/virtbackup/virtbackup/daemon/internal/digest"
	"github.com/virtbackup/virtbackup/daemon/internal/nbd"
)

const (
	// clusterSize is that of the images, and of the blocks of digests.
	clusterSize = digest.BlockSize
	// windowSize is how much of a disk is planned at a time: a disk of any size
	// and any fragmentation takes no more memory than one of this size.
	windowSize = 1 << 30
)

// span is a range of the disk that is treated alike. It begins at a cluster's
// bound and ends at one, or at the disk's end.
type span struct {
	off, length uint64
	kind        spanKind
}

type spanKind int

const (
	spanClean spanKind = iota // as in the parent
	spanData                  // to be read
	spanZero                  // reads as zeros
)

func (s span) end() uint64 { return s.off + s.length }

// source is the NBD client, as far as it is asked here.
type source interface {
	Extents(ctx context.Context, context string, off, length uint64, fn func(nbd.Extent) error) error
	ReadAt(ctx context.Context, p []byte, off uint64) error
}

// changes is what tells which ranges are not as in the parent: those whose flags
// in a metadata context say so.
type changes struct {
	context string
	changed func(flags uint32) bool
}

// byBitmap finds what a dirty bitmap saw change.
func byBitmap(context string) *changes {
	return &changes{context, func(flags uint32) bool { return flags&nbd.StateDirty != 0 }}
}

// byLayer finds what the export's top image holds itself, be it data or zeroes.
// The flags of this context are how deep in the chain of images a range is
// allocated: 1 is the top, 0 nowhere (QEMU's docs/interop/nbd.txt).
func byLayer() *changes {
	return &changes{"qemu:allocation-depth", func(depth uint32) bool { return depth == 1 }}
}

// planner says what to do with each cluster of a disk.
type planner struct {
	source  source
	size    uint64
	changes *changes // nil plans the whole disk
}

// plan calls fn with the spans of the whole disk, in order, without gaps.
func (p planner) plan(ctx context.Context, fn func(span) error) error {
	for off := uint64(0); off < p.size; off += windowSize {
		window := span{off: off, length: min(windowSize, p.size-off), kind: spanData}
		dirty := []span{window}
		if p.changes != nil {
			var err error
			if dirty, err = p.dirty(ctx, window); err != nil {
				return err
			}
		}
		at := window.off
		for _, d := range dirty {
			if err := emitSpan(fn, at, d.off, spanClean); err != nil {
				return err
			}
			if err := p.allocation(ctx, d, fn); err != nil {
				return err
			}
			at = d.end()
		}
		if err := emitSpan(fn, at, window.end(), spanClean); err != nil {
			return err
		}
	}
	return nil
}

// total is how many bytes of the disk are not clean.
func (p planner) total(ctx context.Context) (uint64, error) {
	if p.changes == nil {
		return p.size, nil
	}
	var total uint64
	for off := uint64(0); off < p.size; off += windowSize {
		dirty, err := p.dirty(ctx, span{off: off, length: min(windowSize, p.size-off)})
		if err != nil {
			return 0, err
		}
		for _, d := range dirty {
			total += d.length
		}
	}
	return total, nil
}

func emitSpan(fn func(span) error, from, to uint64, kind spanKind) error {
	if from >= to {
		return nil
	}
	return fn(span{from, to - from, kind})
}

// dirty returns the ranges of a window with a changed byte, rounded outward to
// clusters: what they then hold besides is read from the export too, which
// shows the whole disk as it was at the point in time.
func (p planner) dirty(ctx context.Context, window span) ([]span, error) {
	var dirty []span
	err := p.source.Extents(ctx, p.changes.context, window.off, window.length, func(e nbd.Extent) error {
		if !p.changes.changed(e.Flags) || e.Length == 0 {
			return nil
		}
		from := e.Offset / clusterSize * clusterSize
		to := min(roundUp(e.Offset+e.Length), window.end())
		if n := len(dirty); n > 0 && dirty[n-1].end() >= from {
			dirty[n-1].length = max(dirty[n-1].end(), to) - dirty[n-1].off
			return nil
		}
		dirty = append(dirty, span{from, to - from, spanData})
		return nil
	})
	return dirty, classify(ClassSource, err)
}

func roundUp(n uint64) uint64 { return (n + clusterSize - 1) / clusterSize * clusterSize }

// allocation splits a dirty range in data and zeros. Zero extents are rounded
// inward: a cluster is zero only if all of it is.
func (p planner) allocation(ctx context.Context, d span, fn func(span) error) error {
	at := d.off // up to here all is emitted
	zeroFrom, zeroTo := d.off, d.off
	flush := func() error {
		from, to := roundUp(zeroFrom), zeroTo
		if to != p.size {
			to = to / clusterSize * clusterSize
		}
		if from >= to {
			return nil
		}
		if err := emitSpan(fn, at, from, spanData); err != nil {
			return err
		}
		at = to
		return emitSpan(fn, from, to, spanZero)
	}
	err := p.source.Extents(ctx, nbd.ContextAllocation, d.off, d.length, func(e nbd.Extent) error {
		if e.Flags&nbd.StateZero == 0 {
			return nil
		}
		if e.Offset == zeroTo && zeroTo > zeroFrom { // a hole beside allocated zeros
			zeroTo += e.Length
			return nil
		}
		if err := flush(); err != nil {
			return err
		}
		zeroFrom, zeroTo = e.Offset, e.Offset+e.Length
		return nil
	})
	if err != nil {
		return classify(ClassSource, err)
	}
	if err := flush(); err != nil {
		return err
	}
	return emitSpan(fn, at, d.end(), spanData)
}
