package qcow2

import "fmt"

// Own calls fn for the parts of a range of the disk that this image itself
// holds, in order and without its backing file: what it leaves to that one, or
// to nobody, is left out. Neighbours of one kind are merged. It ends with the
// first error of fn.
func (i *Image) Own(off, length uint64, fn func(off, length uint64, kind Kind) error) error {
	if off > i.raw.size || length > i.raw.size-off {
		return fmt.Errorf("cannot look up %d bytes at %d: the disk has %d", length, off, i.raw.size)
	}
	var from, n uint64
	var kind Kind
	for end := off + length; off < end; {
		m, err := i.lookUp(off, end-off)
		if err != nil {
			return err
		}
		k := Data
		if m.state == zero {
			k = Zero
		}
		if n > 0 && (m.state == unallocated || k != kind) {
			if err := fn(from, n, kind); err != nil {
				return err
			}
			n = 0
		}
		if m.state != unallocated {
			if n == 0 {
				from, kind = off, k
			}
			n += m.length
		}
		off += m.length
	}
	if n == 0 {
		return nil
	}
	return fn(from, n, kind)
}
