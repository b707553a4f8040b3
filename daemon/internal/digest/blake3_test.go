package digest

import (
	"math/rand/v2"
	"testing"

	"lukechampine.com/blake3"
)

// The short cut gives BLAKE3 and nothing else.
func TestSumIsBLAKE3(t *testing.T) {
	random := rand.NewChaCha8([32]byte{1})
	for _, n := range []int{0, 1, BlockSize - 1, BlockSize, BlockSize, BlockSize} {
		p := make([]byte, n)
		_, _ = random.Read(p)
		if Sum(p) != blake3.Sum256(p) {
			t.Errorf("digest of %d bytes differs", n)
		}
	}
}
