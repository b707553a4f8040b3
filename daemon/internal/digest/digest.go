// Package digest keeps one BLAKE3-256 digest for each 64 KiB of a disk, so that
// what is stored of it can be checked block by block, and a later backup can be
// compared with the disk without reading images.
//
// The digests are the leaves of a Merkle tree with fanOut children to a node. A
// file holds only the nodes that are news: those of zeros are known, and those
// that an increment has in common with its parent are in the parent's file. A
// sparse disk costs what its data costs, an increment what it changes, and
// whoever knows the root needs to read only the path to what is asked for.
//
// The file, in which numbers are big endian:
//
//	header   magic, version, block size, fan-out, disk size
//	nodes    children first; at level 1, which is above the blocks, the
//	         children's sums; higher up those and where the children are
//	trailer  where the top node is, and its sum
//
// A node's sum is the BLAKE3-256 of its children's sums. Where a child is says
// its offset in this file; 0 is nowhere, because all beneath it is zeros, which
// its sum tells, or else because it is in the parent's file.
//
// The root, which the manifest vouches for, is the BLAKE3-256 of the header and
// the top node's sum: what the file says about places need not be believed, as
// what is found there is checked.
package digest

import (
	"encoding/binary"

	"lukechampine.com/blake3"
)

const (
	// BlockSize is the number of bytes that one digest stands for. Only the
	// disk's last block may be shorter; it is digested at its real length.
	BlockSize = 64 << 10
	// SumSize is the length of a digest in bytes.
	SumSize = 32

	magic       = "VBDIGEST"
	version     = 2
	headerSize  = len(magic) + 4 + 4 + 4 + 8
	placeSize   = 8
	trailerSize = placeSize + SumSize

	// A change costs a node of each level. With 64 children that is 12 KiB for
	// one block of a disk of 2 TiB, and at most 5 MiB for 1024 blocks scattered
	// over it (13 MiB with 256 children, where wider nodes take more with them;
	// 4 MiB with 32, where there are more levels). The levels above the first
	// add 2 % to the file of a disk full of data.
	fanOut     = 1 << fanOutBits
	fanOutBits = 6
)

type sum = [SumSize]byte

// ZeroSum is the digest of n zero bytes, n ≤ BlockSize.
func ZeroSum(n int) [SumSize]byte { return Sum(make([]byte, n)) }

// Blocks is the number of blocks of a disk of size bytes.
func Blocks(size uint64) int {
	n := size / BlockSize
	if size%BlockSize != 0 {
		n++
	}
	return int(n)
}

// Length is the length in bytes of a block of such a disk.
func Length(size uint64, block int) int {
	return int(min(BlockSize, size-uint64(block)*BlockSize))
}

// shape is what the disk's size says about its tree. Blocks are level 0; there
// is one node at the top level, which is 1 at least.
type shape struct {
	size   uint64
	blocks uint64
	top    int
	zeros  []zeroSums // by level
}

// zeroSums are those of a node with nothing but zeros beneath it. The last of
// a level may have fewer children, and a shorter block.
type zeroSums struct{ whole, last sum }

func newShape(size uint64) shape {
	s := shape{size: size, blocks: uint64(Blocks(size)), top: 1}
	for s.blocks > 1<<(s.top*fanOutBits) {
		s.top++
	}
	s.zeros = make([]zeroSums, s.top+1)
	s.zeros[0].whole = ZeroSum(BlockSize)
	if s.blocks > 0 {
		s.zeros[0].last = ZeroSum(Length(size, int(s.blocks)-1))
	}
	for level := 1; level <= s.top; level++ {
		below := s.zeros[level-1]
		children := make([]sum, fanOut)
		for i := range children {
			children[i] = below.whole
		}
		s.zeros[level].whole = nodeSum(children)
		children = children[:s.children(level, s.nodes(level)-1)]
		if len(children) > 0 {
			children[len(children)-1] = below.last
		}
		s.zeros[level].last = nodeSum(children)
	}
	return s
}

// nodes is the number of nodes of a level; there is always a top node.
func (s *shape) nodes(level int) uint64 {
	n := (s.blocks + 1<<(level*fanOutBits) - 1) >> (level * fanOutBits)
	if level > 0 {
		return max(1, n)
	}
	return n
}

// children is the number of children of a node.
func (s *shape) children(level int, index uint64) int {
	return int(min(fanOut, s.nodes(level-1)-index<<fanOutBits))
}

// zero is the sum that a node has if there are only zeros beneath it.
func (s *shape) zero(level int, index uint64) sum {
	if index == s.nodes(level)-1 {
		return s.zeros[level].last
	}
	return s.zeros[level].whole
}

// span returns the highest node that begins at a block and ends at or before
// another, and how many blocks are beneath it.
func (s *shape) span(from, to uint64) (level int, index, blocks uint64) {
	for level, blocks = 0, 1; level < s.top; level++ {
		above := (level + 1) * fanOutBits
		more := min(1<<above, s.blocks-from)
		if from&(1<<above-1) != 0 || more > to-from {
			break
		}
		blocks = more
	}
	return level, from >> (level * fanOutBits), blocks
}

func (s *shape) header() []byte {
	b := append(make([]byte, 0, headerSize), magic...)
	b = binary.BigEndian.AppendUint32(b, version)
	b = binary.BigEndian.AppendUint32(b, BlockSize)
	b = binary.BigEndian.AppendUint32(b, fanOut)
	return binary.BigEndian.AppendUint64(b, s.size)
}

func (s *shape) root(top sum) [SumSize]byte { return blake3.Sum256(append(s.header(), top[:]...)) }

func nodeSum(children []sum) sum {
	b := make([]byte, 0, fanOut*SumSize)
	for i := range children {
		b = append(b, children[i][:]...)
	}
	return blake3.Sum256(b)
}
