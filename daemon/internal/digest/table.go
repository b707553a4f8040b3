package digest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// ErrRead is what all errors of reading digests are, be it that the storage
// fails or that what is there is not what was written.
var ErrRead = errors.New("cannot read digests")

// Table is a file of digests, and those of its parents, open for reading. All
// that it returns is checked against the root. It must not be used by several
// goroutines at once, nor while a table that stands on it is.
type Table struct {
	shape
	file   io.ReaderAt
	end    uint64 // of the nodes in the file
	parent *Table
	top    sum
	place  uint64  // of the top node
	path   []*node // by level, the node that was asked for last
}

// node is never changed once it is in a path.
type node struct {
	index  uint64
	sums   []sum
	places []uint64 // of the children in the owner's file; none at level 1
	owner  *Table
}

// Open opens the digests of a disk of size bytes, whose root the manifest knows.
// The parent is that of an increment, and nil otherwise.
func Open(file io.ReaderAt, fileSize int64, size uint64, root [SumSize]byte, parent *Table) (*Table, error) {
	if parent != nil && parent.size != size {
		return nil, fmt.Errorf("%w: the disk has %d bytes and had %d", ErrRead, size, parent.size)
	}
	t := &Table{shape: newShape(size), file: file, parent: parent}
	t.path = make([]*node, t.shape.top+1)
	if fileSize < int64(headerSize+trailerSize) {
		return nil, fmt.Errorf("%w: a file of %d bytes is too short", ErrRead, fileSize)
	}
	t.end = uint64(fileSize) - trailerSize
	want := t.header()
	got, err := t.read(0, len(want))
	if err != nil {
		return nil, err
	}
	if string(got) != string(want) {
		return nil, fmt.Errorf("%w: the file is not that of a disk of %d bytes in version %d", ErrRead, size, version)
	}
	trailer, err := t.read(t.end, trailerSize)
	if err != nil {
		return nil, err
	}
	t.place, t.top = binary.BigEndian.Uint64(trailer), sum(trailer[placeSize:])
	if t.root(t.top) != root {
		return nil, fmt.Errorf("%w: the root is not the one that was written", ErrRead)
	}
	return t, nil
}

func (t *Table) read(at uint64, n int) ([]byte, error) {
	p := make([]byte, n)
	if got, err := t.file.ReadAt(p, int64(at)); got < n {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, fmt.Errorf("%w: %w", ErrRead, err)
	}
	return p, nil
}

// Sum returns a block's digest.
func (t *Table) Sum(block int) ([SumSize]byte, error) { return t.sum(0, uint64(block)) }

// FirstData returns the first block in [from, to) that is not all zeros, or to.
func (t *Table) FirstData(from, to int) (int, error) {
	return t.first(from, to, func(level int, index uint64) (sum, error) { return t.zero(level, index), nil })
}

// FirstZero returns the first block in [from, to) that is all zeros, or to. It
// looks at each block on the way.
func (t *Table) FirstZero(from, to int) (int, error) {
	for block := from; block < to; block++ {
		s, err := t.Sum(block)
		if err != nil {
			return 0, err
		}
		if s == t.zero(0, uint64(block)) {
			return block, nil
		}
	}
	return to, nil
}

// FirstChange returns the first block in [from, to) that is not as in the
// parent, or to. Without a parent that is the first that is not all zeros.
func (t *Table) FirstChange(from, to int) (int, error) {
	if t.parent == nil {
		return t.FirstData(from, to)
	}
	return t.first(from, to, t.parent.sum)
}

// first returns the first block whose sum is another one, or to. It goes down
// only beneath nodes that differ.
func (t *Table) first(from, to int, other func(level int, index uint64) (sum, error)) (int, error) {
	differs := func(level int, index uint64) (bool, error) {
		a, err := t.sum(level, index)
		if err != nil {
			return false, err
		}
		b, err := other(level, index)
		return a != b, err
	}
	for next, end := uint64(from), uint64(to); next < end; {
		level, index, blocks := t.span(next, end)
		found, err := differs(level, index)
		for ; found && err == nil && level > 0; level-- {
			index <<= fanOutBits
			for found = false; !found && err == nil; {
				if found, err = differs(level-1, index); !found {
					index++
				}
			}
		}
		switch {
		case err != nil:
			return 0, err
		case found:
			return int(index), nil
		}
		next += blocks
	}
	return to, nil
}

// sum returns the sum of a node, or of a block.
func (t *Table) sum(level int, index uint64) (sum, error) {
	if level == t.shape.top {
		return t.top, nil
	}
	n, err := t.node(level+1, index>>fanOutBits)
	if err != nil {
		return sum{}, err
	}
	return n.sums[index%fanOut], nil
}

// node returns a node from wherever it is.
func (t *Table) node(level int, index uint64) (*node, error) {
	if n := t.path[level]; n != nil && n.index == index {
		return n, nil
	}
	want, place, owner := t.top, t.place, t
	if level < t.shape.top {
		above, err := t.node(level+1, index>>fanOutBits)
		if err != nil {
			return nil, err
		}
		want, place, owner = above.sums[index%fanOut], above.places[index%fanOut], above.owner
	}
	n, err := owner.load(level, index, want, place)
	if err != nil {
		return nil, err
	}
	t.path[level] = n
	return n, nil
}

// load gets a node of this file, or one that it leaves out.
func (t *Table) load(level int, index uint64, want sum, place uint64) (*node, error) {
	if want == t.zero(level, index) {
		return t.zeroNode(level, index), nil
	}
	if place != 0 {
		return t.loadStored(level, index, want, place)
	}
	if t.parent == nil {
		return nil, fmt.Errorf("%w: those of the blocks from %d on are missing", ErrRead, index<<(level*fanOutBits))
	}
	before, err := t.parent.sum(level, index)
	if err != nil {
		return nil, err
	}
	if before != want {
		return nil, differ(level, index)
	}
	return t.parent.node(level, index)
}

func (t *Table) loadStored(level int, index uint64, want sum, place uint64) (*node, error) {
	n := &node{index: index, sums: make([]sum, t.children(level, index)), owner: t}
	length := len(n.sums) * SumSize
	if level > 1 {
		length += len(n.sums) * placeSize
	}
	if place < uint64(headerSize) || place > t.end || uint64(length) > t.end-place {
		return nil, fmt.Errorf("%w: %d bytes at %d are outside the file's nodes", ErrRead, length, place)
	}
	p, err := t.read(place, length)
	if err != nil {
		return nil, err
	}
	for i := range n.sums {
		n.sums[i] = sum(p[i*SumSize:])
	}
	if nodeSum(n.sums) != want {
		return nil, differ(level, index)
	}
	for p = p[len(n.sums)*SumSize:]; len(p) > 0; p = p[placeSize:] {
		n.places = append(n.places, binary.BigEndian.Uint64(p))
	}
	return n, nil
}

func differ(level int, index uint64) error {
	return fmt.Errorf("%w: those of the blocks from %d on are not the ones that were written", ErrRead, index<<(level*fanOutBits))
}

func (t *Table) zeroNode(level int, index uint64) *node {
	n := &node{index: index, sums: make([]sum, t.children(level, index)), owner: t}
	for i := range n.sums {
		n.sums[i] = t.zero(level-1, index<<fanOutBits+uint64(i))
	}
	n.places = make([]uint64, len(n.sums))
	return n
}

// encode returns the node as it is stored.
func (n *node) encode(level int) []byte {
	b := make([]byte, 0, len(n.sums)*(SumSize+placeSize))
	for i := range n.sums {
		b = append(b, n.sums[i][:]...)
	}
	if level > 1 {
		for _, at := range n.places {
			b = binary.BigEndian.AppendUint64(b, at)
		}
	}
	return b
}
