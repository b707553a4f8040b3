package digest

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"

	"lukechampine.com/blake3"
	"pgregory.net/rapid"
)

// A table read back is the table written, and digests are those of the model's
// blocks.
func TestModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		disk := make([]byte, rapid.SampledFrom([]int{0, 1, 512, BlockSize, BlockSize + 1, 5*BlockSize + 512, 6 * BlockSize}).Draw(t, "size"))
		table := New(uint64(len(disk)))
		if want := (len(disk) + BlockSize - 1) / BlockSize; table.Blocks() != want {
			t.Fatalf("%d blocks, want %d", table.Blocks(), want)
		}
		if table.Blocks() > 0 {
			for _, block := range rapid.SliceOf(rapid.IntRange(0, table.Blocks()-1)).Draw(t, "blocks") {
				p := disk[block*BlockSize:][:table.BlockLength(block)]
				if rapid.Bool().Draw(t, "zero") {
					clear(p)
					table.SetZero(block)
					continue
				}
				p[rapid.IntRange(0, len(p)-1).Draw(t, "byte")]++
				table.Set(block, Sum(p))
			}
		}
		var file bytes.Buffer
		n, err := table.WriteTo(&file)
		if err != nil || n != int64(file.Len()) {
			t.Fatalf("wrote %d of %d bytes: %v", n, file.Len(), err)
		}
		if root := table.Root(); !bytes.HasSuffix(file.Bytes(), root[:]) {
			t.Error("the root is not what the file ends with")
		}
		again, err := Read(&file, n)
		if err != nil {
			t.Fatal(err)
		}
		for block := range again.Blocks() {
			p := disk[block*BlockSize:][:table.BlockLength(block)]
			if want := blake3.Sum256(p); table.Get(block) != want || again.Get(block) != want {
				t.Errorf("block %d: digest differs", block)
			}
		}
	})
}

func TestEveryDamageIsSeen(t *testing.T) {
	table := New(3*BlockSize + 1)
	table.Set(1, Sum([]byte("x")))
	var file bytes.Buffer
	if _, err := table.WriteTo(&file); err != nil {
		t.Fatal(err)
	}
	limit := int64(file.Len())
	for at := range file.Len() {
		bad := bytes.Clone(file.Bytes())
		bad[at] ^= 1 << rand.IntN(8)
		if _, err := Read(bytes.NewReader(bad), limit); err == nil {
			t.Errorf("a flipped bit in byte %d is not seen", at)
		}
		if _, err := Read(bytes.NewReader(file.Bytes()[:at]), limit); err == nil {
			t.Errorf("a file cut at %d is read", at)
		}
	}
	if _, err := Read(strings.NewReader(file.String()+"x"), limit); err == nil {
		t.Error("a file with more behind its end is read")
	}
	if _, err := Read(bytes.NewReader(file.Bytes()), limit-1); err == nil {
		t.Error("the limit is not kept")
	}
	huge := bytes.Clone(file.Bytes())
	binary.BigEndian.PutUint64(huge[16:], 1<<62)
	if _, err := Read(bytes.NewReader(huge), limit); err == nil || !strings.Contains(err.Error(), "limit") {
		t.Errorf("a huge disk gives %v", err)
	}
}

func TestParallelSet(t *testing.T) {
	table := New(4096 * BlockSize)
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for block := g; block < table.Blocks(); block += 4 {
				table.Set(block, [SumSize]byte{byte(block), 1})
			}
		})
	}
	wg.Wait()
	for block := range table.Blocks() {
		if table.Get(block) != [SumSize]byte{byte(block), 1} {
			t.Fatalf("block %d is lost", block)
		}
	}
}
