package digest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// stored is a file of digests with what it must say.
type stored struct {
	file  []byte
	root  [SumSize]byte
	size  uint64
	model []sum
}

// open opens a lineage, newest first.
func open(t rapid.TB, lineage ...*stored) *Table {
	t.Helper()
	var table *Table
	for _, s := range slices.Backward(lineage) {
		var err error
		if table, err = Open(bytes.NewReader(s.file), int64(len(s.file)), s.size, s.root, table); err != nil {
			t.Fatal(err)
		}
	}
	return table
}

// zeros is what a disk without data must say.
func zeros(size uint64) []sum {
	model := make([]sum, Blocks(size))
	for i := range model {
		model[i] = zeroBlock
	}
	if len(model) > 0 {
		model[len(model)-1] = ZeroSum(Length(size, len(model)-1))
	}
	return model
}

var zeroBlock = ZeroSum(BlockSize)

// block is the digest of one with a content of its own.
func block(i int) sum { return Sum(binary.BigEndian.AppendUint64(nil, uint64(i)+1)) }

// write calls fill, and keeps the file.
func write(t rapid.TB, size uint64, parent *Table, fill func(*Writer) error) *stored {
	t.Helper()
	var file bytes.Buffer
	w, err := NewWriter(&file, size, parent)
	if err != nil {
		t.Fatal(err)
	}
	if err := fill(w); err != nil {
		t.Fatal(err)
	}
	root, err := w.Close()
	if err != nil {
		t.Fatal(err)
	}
	return &stored{file: file.Bytes(), root: root, size: size}
}

// sizes are of disks around the bounds of pages and of levels of them.
var sizes = []uint64{
	0, 1, BlockSize, BlockSize + 512, fanOut*BlockSize - 1, fanOut * BlockSize, fanOut*BlockSize + 1,
	fanOut * fanOut * BlockSize, fanOut*fanOut*BlockSize + 1, (fanOut*fanOut+fanOut+3)*BlockSize + 512,
}

// drawRun writes the next blocks in one of the ways, both to w and the model.
func drawRun(t *rapid.T, w *Writer, model []sum, none []sum, at int) (int, error) {
	n := min(rapid.SampledFrom([]int{1, 3, fanOut - 1, fanOut, fanOut + 1, fanOut * fanOut}).Draw(t, "n"), len(model)-at)
	ways := []string{"data", "zero", "zero sums"}
	if w.parent != nil {
		ways = append(ways, "parent", "parent", "same data")
	}
	way := rapid.SampledFrom(ways).Draw(t, "way")
	end := at + n
	switch way {
	case "zero":
		copy(model[at:end], none[at:])
		return end, w.AppendZero(n)
	case "parent":
		return end, w.AppendParent(n)
	}
	seed := rapid.IntRange(0, 3).Draw(t, "seed")
	for ; at < end; at++ {
		switch way {
		case "data":
			model[at] = block(at*4 + seed)
		case "zero sums":
			model[at] = none[at]
		}
		if err := w.Append(model[at]); err != nil {
			return at, err
		}
	}
	return end, nil
}

// Chains of files say what was written, in all ways of asking, and their roots
// depend on nothing but that.
func TestModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		size := rapid.SampledFrom(sizes).Draw(t, "size")
		none := zeros(size)
		var chain []*stored // newest first
		model := none
		for range rapid.IntRange(1, 5).Draw(t, "files") {
			var parent *Table
			if len(chain) > 0 {
				parent = open(t, chain...)
			}
			before := model
			model = slices.Clone(model)
			s := write(t, size, parent, func(w *Writer) error {
				for at := 0; at < len(model); {
					var err error
					if at, err = drawRun(t, w, model, none, at); err != nil {
						return err
					}
				}
				return nil
			})
			s.model = model
			chain = append([]*stored{s}, chain...)
			checkTable(t, open(t, chain...), model, before, none)
		}
		full := write(t, size, nil, func(w *Writer) error {
			for _, s := range model {
				if err := w.Append(s); err != nil {
					return err
				}
			}
			return nil
		})
		if full.root != chain[0].root {
			t.Error("the root depends on how the digests came to be")
		}
	})
}

func checkTable(t rapid.TB, table *Table, model, before, none []sum) {
	t.Helper()
	for i, want := range model {
		if got, err := table.Sum(i); err != nil || got != want {
			t.Fatalf("block %d differs (error %v)", i, err)
		}
	}
	if table.parent == nil {
		before = none
	}
	// Each first block is asked for from its predecessor on, and up to all ends.
	for _, ask := range []struct {
		first func(from, to int) (int, error)
		found func(i int) bool
	}{
		{table.FirstData, func(i int) bool { return model[i] != none[i] }},
		{table.FirstZero, func(i int) bool { return model[i] == none[i] }},
		{table.FirstChange, func(i int) bool { return model[i] != before[i] }},
	} {
		for from := 0; from < len(model); {
			want := from
			for want < len(model) && !ask.found(want) {
				want++
			}
			for _, to := range []int{want, len(model)} {
				if got, err := ask.first(from, to); err != nil || got != want {
					t.Fatalf("first in [%d, %d) is %d, want %d (error %v)", from, to, got, want, err)
				}
			}
			from = want + 1
		}
	}
}

// tree is a chain of two. The first node of the increment is the parent's, the
// second changed, the third zeros, and the last has a short block.
func tree(t testing.TB) (increment, full *stored) {
	size := uint64((3*fanOut+1)*BlockSize + 1)
	full = write(t, size, nil, func(w *Writer) error {
		for i := range 2 * fanOut {
			if err := w.Append(block(i)); err != nil {
				return err
			}
		}
		return w.AppendZero(fanOut + 2)
	})
	full.model = zeros(size)
	for i := range 2 * fanOut {
		full.model[i] = block(i)
	}
	increment = write(t, size, open(t, full), func(w *Writer) error {
		return errors.Join(w.AppendParent(fanOut+1), w.Append(block(-7)), w.AppendZero(fanOut-2),
			w.AppendParent(fanOut+1), w.Append(block(-8)))
	})
	increment.model = slices.Clone(full.model)
	increment.model[fanOut+1] = block(-7)
	copy(increment.model[fanOut+2:2*fanOut], zeros(size))
	increment.model[3*fanOut+1] = block(-8)
	checkTable(t, open(t, increment, full), increment.model, full.model, zeros(size))
	return increment, full
}

// FuzzHostileFile reads a damaged increment. With the true root it says the
// truth or fails; with a root that fits it, it says something or fails.
func FuzzHostileFile(f *testing.F) {
	good, full := tree(f)
	f.Add(good.file)
	f.Add(good.file[:len(good.file)-1])
	f.Add(append(bytes.Clone(good.file[:headerSize]), good.file[len(good.file)-trailerSize:]...))
	f.Fuzz(func(t *testing.T, file []byte) {
		parent := open(t, full)
		if table, err := Open(bytes.NewReader(file), int64(len(file)), good.size, good.root, parent); err == nil {
			truthOrError(t, table, good.model)
		}
		if len(file) < trailerSize {
			return
		}
		s := newShape(good.size)
		root := s.root(sum(file[len(file)-SumSize:]))
		if table, err := Open(bytes.NewReader(file), int64(len(file)), good.size, root, parent); err == nil {
			_, _ = table.FirstData(0, len(good.model))
			_, _ = table.FirstChange(0, len(good.model))
			_, _ = table.FirstZero(0, len(good.model))
		}
	})
}

func truthOrError(t *testing.T, table *Table, model []sum) (failed bool) {
	t.Helper()
	for i := range model {
		got, err := table.Sum(i)
		switch {
		case err != nil && !errors.Is(err, ErrRead):
			t.Fatalf("block %d: %v is no ErrRead", i, err)
		case err != nil:
			failed = true
		case got != model[i]:
			t.Fatalf("block %d: not what was written", i)
		}
	}
	return failed
}

// Whatever byte is changed no digest is wrong, and a file that is not complete
// is not opened.
func TestEveryDamageIsSeen(t *testing.T) {
	good, full := tree(t)
	parent := open(t, full)
	for at := range good.file {
		bad := bytes.Clone(good.file)
		bad[at] ^= 1 << (at % 8)
		table, err := Open(bytes.NewReader(bad), int64(len(bad)), good.size, good.root, parent)
		// Of zeros it does not matter where they are said to be.
		if err == nil && !truthOrError(t, table, good.model) && good.file[at] != 0 {
			t.Errorf("a changed bit in byte %d is not seen", at)
		}
		if _, err := Open(bytes.NewReader(good.file), int64(at), good.size, good.root, parent); !errors.Is(err, ErrRead) {
			t.Fatalf("a file cut at %d gives %v", at, err)
		}
	}
}

func TestMissingAndWrongParents(t *testing.T) {
	good, full := tree(t)
	if _, err := open(t, good).Sum(0); !errors.Is(err, ErrRead) || !strings.Contains(err.Error(), "missing") {
		t.Errorf("without its parent: %v", err)
	}
	other := write(t, full.size, nil, func(w *Writer) error { return w.AppendZero(len(full.model)) })
	if _, err := open(t, good, other).Sum(0); !errors.Is(err, ErrRead) {
		t.Errorf("with another parent: %v", err)
	}
	if _, err := Open(bytes.NewReader(good.file), int64(len(good.file)), good.size, good.root, open(t, write(t, 0, nil, func(*Writer) error { return nil }))); !errors.Is(err, ErrRead) {
		t.Errorf("with the parent of another disk: %v", err)
	}
	if _, err := NewWriter(&bytes.Buffer{}, good.size+1, open(t, full)); err == nil {
		t.Error("a disk that grew stands on its parent")
	}
}

func TestWriterCounts(t *testing.T) {
	w, err := NewWriter(&bytes.Buffer{}, 3*BlockSize, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.AppendParent(1); err == nil {
		t.Error("took digests from a parent that is not there")
	}
	if err := w.AppendZero(2); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Close(); err == nil {
		t.Error("ended before the disk does")
	}
	if err := w.AppendZero(2); err == nil {
		t.Error("took more zeros than there are blocks")
	}
	if err := w.Append(zeroBlock); err != nil {
		t.Fatal(err)
	}
	if err := w.Append(zeroBlock); err == nil {
		t.Error("took more digests than there are blocks")
	}
}

// Files cost what their data and their changes cost, on disks of any size.
func TestStoredSize(t *testing.T) {
	const tib = 1 << 40
	for _, test := range []struct {
		size          uint64
		blocks, every int // changed, one in every so many
		full, limit   int // bytes of the files
	}{
		{size: tib, blocks: 0, every: 1, full: 1 << 10, limit: 1 << 10},
		{size: 2 * tib, blocks: 1, every: 1, full: 16 << 10, limit: 16 << 10},
		{size: 2 * tib, blocks: 1024, every: 2 * tib / BlockSize / 1024, full: 5 << 20, limit: 5 << 20},
		{size: 2 * tib, blocks: 1024, every: 1, full: 64 << 10, limit: 64 << 10},
		{size: 64 * tib, blocks: 1, every: 1, full: 20 << 10, limit: 20 << 10},
		{size: 1 << 62, blocks: 1, every: 1, full: 32 << 10, limit: 32 << 10},
	} {
		fill := func(seed int, clean func(*Writer, int) error) func(*Writer) error {
			return func(w *Writer) error {
				for i := range test.blocks {
					if err := errors.Join(w.Append(block(i+seed)), clean(w, test.every-1)); err != nil {
						return err
					}
				}
				return clean(w, Blocks(test.size)-test.blocks*test.every)
			}
		}
		full := write(t, test.size, nil, fill(1, (*Writer).AppendZero))
		increment := write(t, test.size, open(t, full), fill(2, (*Writer).AppendParent))
		same := write(t, test.size, open(t, increment, full), fill(2, (*Writer).AppendZero))
		t.Logf("%d of %d bytes changed: %d and %d bytes of digests", test.blocks*BlockSize, test.size, len(full.file), len(increment.file))
		if len(full.file) > test.full || len(increment.file) > test.limit {
			t.Errorf("more than %d and %d bytes", test.full, test.limit)
		}
		if want := headerSize + trailerSize; len(same.file) != want || same.root != increment.root {
			t.Errorf("an increment without news has %d bytes instead of %d, or another root", len(same.file), want)
		}
	}
}
