package digest

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// Writer writes a file of digests in the order of the disk. It holds one node
// of each level, however big the disk is.
type Writer struct {
	shape
	parent *Table
	b      *bufio.Writer
	offset uint64 // in the file
	next   uint64 // block
	open   []node // by level; those that wait for more children
	top    sum
	place  uint64 // of the top node
}

// NewWriter begins the file of a disk of size bytes. The parent is that of an
// increment, and nil otherwise.
func NewWriter(w io.Writer, size uint64, parent *Table) (*Writer, error) {
	if parent != nil && parent.size != size {
		return nil, fmt.Errorf("cannot write digests: the disk has %d bytes and had %d", size, parent.size)
	}
	d := &Writer{shape: newShape(size), parent: parent, b: bufio.NewWriterSize(w, 64<<10)}
	d.open = make([]node, d.shape.top+1)
	d.top = d.zero(d.shape.top, 0) // all of a disk of 0 bytes
	return d, d.write(d.header())
}

// Append adds the digest of the next block.
func (d *Writer) Append(sum [SumSize]byte) error {
	if d.next == d.blocks {
		return errTooMany
	}
	d.next++
	return d.put(0, sum)
}

var errTooMany = errors.New("cannot write digests: there are more than the disk has blocks")

// AppendZero says that the next n blocks are all zeros.
func (d *Writer) AppendZero(n int) error {
	return d.fill(uint64(n), func(level int, index uint64) (sum, error) { return d.zero(level, index), nil })
}

// AppendParent says that the next n blocks are as in the parent. Errors of
// reading that are ErrRead, as with the other methods.
func (d *Writer) AppendParent(n int) error {
	if d.parent == nil {
		return errors.New("cannot write digests: there is no parent")
	}
	return d.fill(uint64(n), d.parent.sum)
}

// fill adds n blocks by the sums of the highest nodes above them.
func (d *Writer) fill(n uint64, of func(level int, index uint64) (sum, error)) error {
	if n > d.blocks-d.next {
		return errTooMany
	}
	for end := d.next + n; d.next < end; {
		level, index, blocks := d.span(d.next, end)
		s, err := of(level, index)
		if err != nil {
			return err
		}
		d.next += blocks
		if err := d.put(level, s); err != nil {
			return err
		}
	}
	return nil
}

// put adds the sum of a node that is not stored here, or of a block, to the
// node above, and completes that if it is the last child.
func (d *Writer) put(level int, s sum) error {
	var place uint64
	for level < d.shape.top {
		level++
		n := &d.open[level]
		n.sums = append(n.sums, s)
		n.places = append(n.places, place)
		index := (d.next - 1) >> (level * fanOutBits)
		if len(n.sums) < d.children(level, index) {
			return nil
		}
		var err error
		s = nodeSum(n.sums)
		if place, err = d.store(level, index, s); err != nil {
			return err
		}
		n.sums, n.places = n.sums[:0], n.places[:0]
	}
	d.top, d.place = s, place
	return nil
}

// store writes a complete node if it is news, and returns its place or 0.
func (d *Writer) store(level int, index uint64, s sum) (place uint64, err error) {
	if s == d.zero(level, index) {
		return 0, nil
	}
	if d.parent != nil {
		before, err := d.parent.sum(level, index)
		if err != nil || s == before {
			return 0, err
		}
	}
	place = d.offset
	return place, d.write(d.open[level].encode(level))
}

// Close ends the file and returns the root. It does not close the file.
func (d *Writer) Close() (root [SumSize]byte, err error) {
	if d.next != d.blocks {
		return root, fmt.Errorf("cannot write digests: those of %d blocks are missing", d.blocks-d.next)
	}
	if err := d.write(append(binary.BigEndian.AppendUint64(nil, d.place), d.top[:]...)); err != nil {
		return root, err
	}
	return d.root(d.top), wrapWrite(d.b.Flush())
}

func (d *Writer) write(p []byte) error {
	n, err := d.b.Write(p)
	d.offset += uint64(n)
	return wrapWrite(err)
}

func wrapWrite(err error) error {
	if err != nil {
		return fmt.Errorf("cannot write digests: %w", err)
	}
	return nil
}
