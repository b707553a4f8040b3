package digest

import (
	"lukechampine.com/blake3"
	"lukechampine.com/blake3/guts"
)

// Sum is the digest of a block: BLAKE3-256. It works on the calling goroutine,
// where the module starts some for each block; many side by side take a third
// less time this way.
func Sum(p []byte) [SumSize]byte {
	if len(p) != BlockSize {
		return blake3.Sum256(p)
	}
	// A block is a complete tree (BLAKE3 paper, chapter 2.1) of four of the
	// units that guts hashes at once.
	const unit = guts.MaxSIMD * guts.ChunkSize
	var cv [BlockSize / unit][8]uint32
	for i := range cv {
		n := guts.CompressBuffer((*[unit]byte)(p[i*unit:]), unit, &guts.IV, uint64(i*guts.MaxSIMD), 0)
		cv[i] = guts.ChainingValue(n)
	}
	left := guts.ParentNode(cv[0], cv[1], &guts.IV, 0)
	right := guts.ParentNode(cv[2], cv[3], &guts.IV, 0)
	root := guts.ParentNode(guts.ChainingValue(left), guts.ChainingValue(right), &guts.IV, 0)
	root.Flags |= guts.FlagRoot
	sum := guts.WordsToBytes(guts.CompressNode(root))
	return [SumSize]byte(sum[:])
}
