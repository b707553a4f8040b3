package qcow2

import (
	"errors"
	"fmt"
	"io"
)

// Kind tells what a range of the disk holds.
type Kind int

const (
	// Zero reads as zeros: said so, or stored nowhere in the chain.
	Zero Kind = iota
	// Data is stored in one of the images.
	Data
)

// Chain is a disk made of an image and those that back it. Its methods may be
// called from many goroutines at once.
type Chain struct {
	images []*Image // top first
	size   uint64
}

// NewChain puts images together, top first. Whether each one's backing name
// means the next one is for the caller to know; that there is one is checked.
func NewChain(images ...*Image) (*Chain, error) {
	if len(images) == 0 {
		return nil, errors.New("a chain needs an image")
	}
	for n, i := range images {
		last := n == len(images)-1
		if named := i.raw.backing != ""; named == last {
			return nil, fmt.Errorf("image %d of %d: has a backing file: %t", n+1, len(images), named)
		}
	}
	return &Chain{images: images, size: images[0].raw.size}, nil
}

// Size is the disk's size in bytes: that of the top image.
func (c *Chain) Size() uint64 { return c.size }

// walk calls fn for a range in order. image is nil where nothing is stored.
func (c *Chain) walk(off, length uint64, fn func(off uint64, m mapping, image *Image) error) error {
	if off > c.size || length > c.size-off {
		return fmt.Errorf("cannot read %d bytes at %d: the disk has %d", length, off, c.size)
	}
	return c.walkFrom(0, off, length, fn)
}

// walkFrom walks an image, and what it leaves open in those below.
func (c *Chain) walkFrom(n int, off, length uint64, fn func(off uint64, m mapping, image *Image) error) error {
	for length > 0 {
		if n == len(c.images) || off >= c.images[n].raw.size {
			// A backing file may be shorter than the disk.
			return fn(off, mapping{state: zero, length: length}, nil)
		}
		i := c.images[n]
		m, err := i.lookUp(off, min(length, i.raw.size-off))
		if err != nil {
			return fmt.Errorf("image %d of %d: %w", n+1, len(c.images), err)
		}
		if m.state == unallocated {
			err = c.walkFrom(n+1, off, m.length, fn)
		} else {
			err = fn(off, m, i)
		}
		if err != nil {
			return err
		}
		off, length = off+m.length, length-m.length
	}
	return nil
}

// Extents calls fn for the whole range, in order; neighbours of one kind are
// merged. It ends with the first error of fn.
func (c *Chain) Extents(off, length uint64, fn func(off, length uint64, kind Kind) error) error {
	var (
		from, n uint64
		kind    Kind
	)
	err := c.walk(off, length, func(off uint64, m mapping, _ *Image) error {
		k := Data
		if m.state == zero {
			k = Zero
		}
		if n > 0 && k == kind {
			n += m.length
			return nil
		}
		if n > 0 {
			if err := fn(from, n, kind); err != nil {
				return err
			}
		}
		from, n, kind = off, m.length, k
		return nil
	})
	if err != nil || n == 0 {
		return err
	}
	return fn(from, n, kind)
}

// ReadAt implements io.ReaderAt on the disk. What is missing from a file, or
// cannot be unpacked, is an error.
func (c *Chain) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("cannot read at %d", off)
	}
	if uint64(off) >= c.size {
		return 0, io.EOF
	}
	n := min(uint64(len(p)), c.size-uint64(off))
	err := c.walk(uint64(off), n, func(at uint64, m mapping, image *Image) error {
		target := p[at-uint64(off):][:m.length]
		if m.state == zero {
			clear(target)
			return nil
		}
		if err := image.read(target, m); err != nil {
			return fmt.Errorf("cannot read %d bytes at %d from the image: %w", m.length, at, err)
		}
		return nil
	})
	if err != nil {
		return 0, err
	}
	if n < uint64(len(p)) {
		return int(n), io.EOF
	}
	return int(n), nil
}

// read fills p from what a mapping points to.
func (i *Image) read(p []byte, m mapping) error {
	if m.state == plain {
		return readFull(i.r, p, m.host)
	}
	_, err := i.readPacked(p, m)
	return err
}
