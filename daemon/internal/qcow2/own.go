package qcow2

import "fmt"

// Own calls fn for the parts of a range of the disk that this image itself
// holds, in order and without its backing file: what it leaves to that one, or
// to nobody, is left out. Neighbours of one kind are merged. It ends with the
// first error of fn.
func (i *Image) Own(off, length uint64, fn func(off, length uint64, kind Kind) error) error {
	return (&Chain{images: []*Image{i}, size: i.raw.size}).Own(1, off, length, fn)
}

// Own calls fn for what the topmost images hold, so many of them, as Image.Own
// does for one: what they leave to those below is left out.
func (c *Chain) Own(images int, off, length uint64, fn func(off, length uint64, kind Kind) error) error {
	if off > c.size || length > c.size-off {
		return fmt.Errorf("cannot look up %d bytes at %d: the disk has %d", length, off, c.size)
	}
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
	top := &Chain{images: c.images[:images], size: c.size}
	err := top.walk(off, length, func(off uint64, m mapping, image *Image) error {
		if image == nil { // in none of them
			return flush()
		}
		k := Data
		if m.state == zero {
			k = Zero
		}
		if n > 0 && k != kind {
			if err := flush(); err != nil {
				return err
			}
		}
		if n == 0 {
			from, kind = off, k
		}
		n += m.length
		return nil
	})
	if err != nil {
		return err
	}
	return flush()
}
