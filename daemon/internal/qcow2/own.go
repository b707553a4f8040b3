package qcow2

import "fmt"

// Own calls fn for the parts of a range of the disk that this image itself
// holds, in order and without its backing file: what it leaves to that one, or
// to nobody, is left out. Neighbours of one kind are merged. It ends with the
// first error of fn.
func (i *Image) Own(off, length uint64, fn func(off, length uint64, kind Kind) error) error {
	var from, n uint64
	var kind Kind
	flush := func() error {
		if n == 0 {
			return nil
		}
		length := n
		n = 0
		return fn(from, length, kind)
	}
	err := (&Chain{images: []*Image{i}, size: i.raw.size}).Held(1, off, length, func(r Run) error {
		if n > 0 && (r.Kind != kind || r.Offset != from+n) {
			if err := flush(); err != nil {
				return err
			}
		}
		if n == 0 {
			from, kind = r.Offset, r.Kind
		}
		n += r.Length
		return nil
	})
	if err != nil {
		return err
	}
	return flush()
}

// Run is a part of the disk that one image of a chain holds in one piece.
type Run struct {
	Offset, Length uint64 // on the disk, in bytes
	Kind           Kind
	Image          int // which one, the top is 0
	// Plain says that the data lies in the image's file as it is, from Host on.
	Plain bool
	Host  int64
}

// Held calls fn for what the topmost images hold of a range of the disk, so many
// of them, in order: what they leave to those below, or to nobody, is left out.
// It ends with the first error of fn.
func (c *Chain) Held(images int, off, length uint64, fn func(Run) error) error {
	if off > c.size || length > c.size-off {
		return fmt.Errorf("cannot look up %d bytes at %d: the disk has %d", length, off, c.size)
	}
	number := map[*Image]int{}
	for n, i := range c.images[:images] {
		number[i] = n
	}
	top := &Chain{images: c.images[:images], size: c.size}
	return top.walk(off, length, func(off uint64, m mapping, image *Image) error {
		if image == nil { // in none of them
			return nil
		}
		r := Run{Offset: off, Length: m.length, Kind: Data, Image: number[image], Plain: m.state == plain, Host: m.host}
		if m.state == zero {
			r.Kind = Zero
		}
		return fn(r)
	})
}
