package digest

import (
	"math/rand/v2"
	"testing"

	"lukechampine.com/blake3"
)

// The short cuts give BLAKE3 and nothing else.
func TestHasherIsBLAKE3(t *testing.T) {
	random := rand.NewChaCha8([32]byte{1})
	var h Hasher
	for n := range 40 {
		p := make([]byte, n*BlockSize)
		_, _ = random.Read(p)
		half := n / 2 * BlockSize
		h.Write(p[:half])
		h.Write(p[half:])
		if h.Sum() != blake3.Sum256(p) {
			t.Errorf("digest of %d blocks differs", n)
		}
	}
	for _, n := range []int{0, 1, BlockSize - 1, BlockSize} {
		p := make([]byte, n)
		_, _ = random.Read(p)
		if Sum(p) != blake3.Sum256(p) {
			t.Errorf("digest of %d bytes differs", n)
		}
	}
}
