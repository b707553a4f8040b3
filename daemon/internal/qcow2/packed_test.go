package qcow2

import (
	"bytes"
	"slices"
	"testing"
)

// FuzzPackedLength finds the end of a packed cluster, whatever follows it.
func FuzzPackedLength(f *testing.F) {
	f.Add([]byte("some text"), []byte("and another cluster"))
	f.Add([]byte{}, []byte{0, 0, 0})
	f.Add(bytes.Repeat([]byte{1, 2, 3, 4, 5}, 3000), []byte{0x28, 0xb5, 0x2f, 0xfd})
	f.Fuzz(func(t *testing.T, content, behind []byte) {
		plain := make([]byte, clusterSize)
		copy(plain, content)
		for _, kind := range []Compression{CompressionZlib, CompressionZstd} {
			c, err := newCompressor(kind, 0)
			if err != nil {
				t.Fatal(err)
			}
			packed, err := c.compress(nil, plain)
			if err != nil {
				t.Fatal(err)
			}
			d, err := newDecompressor(kind)
			if err != nil {
				t.Fatal(err)
			}
			got := make([]byte, clusterSize)
			n, err := d.decompress(got, slices.Concat(packed, behind))
			if err != nil || n != len(packed) || !bytes.Equal(got, plain) {
				t.Fatalf("%s: %d bytes instead of %d, %v", kind, n, len(packed), err)
			}
		}
	})
}
