package digest

import (
	"bytes"
	"errors"
	"io"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// TestStreamIsTheTable writes a table as a stream and reads it back.
func TestStreamIsTheTable(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		size := rapid.Uint64Range(0, 3*pageBlocks*BlockSize).Draw(t, "size")
		table := New(size)
		var got bytes.Buffer
		w, err := NewWriter(&got, size)
		if err != nil {
			t.Fatal(err)
		}
		data := rapid.SliceOfNDistinct(rapid.IntRange(0, max(0, Blocks(size)-1)), 0, 20, rapid.ID[int]).Draw(t, "data")
		for i := range Blocks(size) {
			if slices.Contains(data, i) {
				sum := Sum(intBytes([]int{i}))
				table.Set(i, sum)
				err = w.Append(sum)
			} else {
				err = w.AppendZero()
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		root, err := w.Close()
		var want bytes.Buffer
		if _, err := table.WriteTo(&want); err != nil {
			t.Fatal(err)
		}
		if err != nil || root != table.Root() || !bytes.Equal(want.Bytes(), got.Bytes()) {
			t.Fatalf("the stream of %d bytes is not the table of %d (error %v)", got.Len(), want.Len(), err)
		}
		checkReader(t, got.Bytes(), table)
		cut := rapid.IntRange(0, got.Len()-1).Draw(t, "cut")
		flipped := bytes.Clone(got.Bytes())
		flipped[cut] ^= 4
		for _, bad := range [][]byte{got.Bytes()[:cut], flipped, append(bytes.Clone(got.Bytes()), 0)} {
			r, err := NewReader(bytes.NewReader(bad), size)
			if err == nil {
				_, err = r.Close()
			}
			if err == nil {
				t.Fatalf("a file damaged at %d was accepted", cut)
			}
		}
	})
}

func checkReader(t *rapid.T, file []byte, table *Table) {
	r, err := NewReader(bytes.NewReader(file), table.Size())
	if err != nil {
		t.Fatal(err)
	}
	for i := range table.Blocks() {
		if sum, err := r.Next(); err != nil || sum != table.Get(i) {
			t.Fatalf("block %d differs (error %v)", i, err)
		}
	}
	if _, err := r.Next(); !errors.Is(err, io.EOF) {
		t.Fatalf("behind the end: %v", err)
	}
	if root, err := r.Close(); err != nil || root != table.Root() {
		t.Fatalf("the root differs (error %v)", err)
	}
}

func intBytes(list []int) []byte {
	b := []byte{255}
	for _, v := range list {
		b = append(b, byte(v>>16), byte(v>>8), byte(v), 255)
	}
	return b
}
