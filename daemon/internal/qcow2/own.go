package qcow2

import "fmt"

// Own calls fn for the parts of a range of the disk that this image itself
// holds, in order and without its backing file: what it leaves to that one, or
// to nobody, is left out. It ends with the first error of fn.
func (i *Image) Own(off, length uint64, fn func(off, length uint64, kind Kind) error) error {
	if off > i.raw.size || length > i.raw.size-off {
		return fmt.Errorf("cannot look up %d bytes at %d: the disk has %d", length, off, i.raw.size)
	}
	for length > 0 {
		m, err := i.lookUp(off, length)
		if err != nil {
			return err
		}
		switch m.state {
		case unallocated:
		case zero:
			err = fn(off, m.length, Zero)
		default:
			err = fn(off, m.length, Data)
		}
		if err != nil {
			return err
		}
		off, length = off+m.length, length-m.length
	}
	return nil
}
