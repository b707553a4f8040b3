package transfer

import (
	"slices"

	"github.com/virtbackup/virtbackup/daemon/internal/digest"
)

// compare puts those blocks of the next extent into the image that are not as
// in the parent, by its digests. It is part of the last stage, which alone uses
// the parent's table: the new one stands on it.
func (d *diskCopy) compare(e *extent) error {
	stored := false // all of the extent, with its buffer
	defer func() {
		if !stored {
			d.writer.PutBuffer(e.data)
		}
	}()
	first, end := int(e.off/digest.BlockSize), digest.Blocks(e.end())
	for at := first; at < end; {
		from, to, err := d.change(e, first, at, end)
		if err != nil {
			return asParent(err)
		}
		if at < from {
			if err := d.put(e.clean(at-first, from-first)); err != nil {
				return err
			}
		}
		if from < to {
			part := e
			if stored = from == first && to == end; !stored {
				part = e.part(from-first, to-first)
			}
			d.count.dirty.Add(part.length)
			if err := d.put(part); err != nil {
				return err
			}
		}
		at = to
	}
	return nil
}

// change returns the first run of blocks in [at, end) that are not as in the
// parent. first is the extent's first block.
func (d *diskCopy) change(e *extent, first, at, end int) (from, to int, err error) {
	before := d.parent.digests
	if e.kind == spanZero {
		if from, err = before.FirstData(at, end); err == nil {
			to, err = before.FirstZero(from, end)
		}
		return from, to, err
	}
	same := func(block int) bool {
		var was [digest.SumSize]byte
		if was, err = before.Sum(block); err != nil {
			return false
		}
		return was == e.sums[block-first]
	}
	for from = at; from < end && same(from); {
		from++
	}
	for to = from; to < end && err == nil && !same(to); {
		to++
	}
	return from, to, err
}

// part is a copy of the extent's blocks in [from, to), as the buffer of all of
// them can be written, and given back, only as a whole.
func (e *extent) part(from, to int) *extent {
	p := e.clean(from, to)
	p.kind = e.kind
	if e.kind == spanData {
		at := p.off - e.off
		p.data, p.sums = slices.Clone(e.data[at:at+p.length]), e.sums[from:to]
	}
	return p
}

// clean says of the extent's blocks in [from, to) that they are as in the parent.
func (e *extent) clean(from, to int) *extent {
	off := e.off + uint64(from)*digest.BlockSize
	return &extent{span: span{off, min(uint64(to-from)*digest.BlockSize, e.end()-off), spanClean}}
}
