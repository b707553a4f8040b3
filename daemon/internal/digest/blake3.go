package digest

import (
	"lukechampine.com/blake3"
	"lukechampine.com/blake3/guts"
)

// Sum is the digest of a block.
func Sum(p []byte) [SumSize]byte {
	if len(p) != BlockSize {
		return blake3.Sum256(p)
	}
	return rootSum(subtree(p, 0))
}

// Hasher is BLAKE3-256 for input that comes in whole blocks. It works on the
// calling goroutine, where blake3.Hasher starts some for each write; many of
// both side by side take a third less time this way.
type Hasher struct {
	blocks uint64 // in the stack
	stack  [][8]uint32
	last   guts.Node // not in the stack, as it may be the root
	some   bool
}

// Write takes one or more whole blocks.
func (h *Hasher) Write(p []byte) {
	for ; len(p) > 0; p = p[BlockSize:] {
		if h.some {
			h.push()
		}
		h.last, h.some = subtree(p[:BlockSize], h.blocks*(BlockSize/guts.ChunkSize)), true
	}
}

// push puts the last block into the stack, and merges subtrees of one height.
func (h *Hasher) push() {
	cv := guts.ChainingValue(h.last)
	h.blocks++
	for n := h.blocks; n%2 == 0; n /= 2 {
		top := len(h.stack) - 1
		cv = guts.ChainingValue(guts.ParentNode(h.stack[top], cv, &guts.IV, 0))
		h.stack = h.stack[:top]
	}
	h.stack = append(h.stack, cv)
}

// Sum ends the input, and begins anew.
func (h *Hasher) Sum() [SumSize]byte {
	if !h.some {
		return blake3.Sum256(nil)
	}
	root := h.last
	for top := len(h.stack) - 1; top >= 0; top-- {
		root = guts.ParentNode(h.stack[top], guts.ChainingValue(root), &guts.IV, 0)
	}
	*h = Hasher{stack: h.stack[:0]}
	return rootSum(root)
}

// subtree hashes a whole block, which begins at a chunk of the input. A block
// is a complete subtree (BLAKE3 paper, chapter 2.1) of four of the units that
// guts hashes at once.
func subtree(p []byte, chunk uint64) guts.Node {
	const unit = guts.MaxSIMD * guts.ChunkSize
	var cv [BlockSize / unit][8]uint32
	for i := range cv {
		n := guts.CompressBuffer((*[unit]byte)(p[i*unit:]), unit, &guts.IV, chunk+uint64(i*guts.MaxSIMD), 0)
		cv[i] = guts.ChainingValue(n)
	}
	left := guts.ParentNode(cv[0], cv[1], &guts.IV, 0)
	right := guts.ParentNode(cv[2], cv[3], &guts.IV, 0)
	return guts.ParentNode(guts.ChainingValue(left), guts.ChainingValue(right), &guts.IV, 0)
}

func rootSum(root guts.Node) [SumSize]byte {
	root.Flags |= guts.FlagRoot
	sum := guts.WordsToBytes(guts.CompressNode(root))
	return [SumSize]byte(sum[:])
}
