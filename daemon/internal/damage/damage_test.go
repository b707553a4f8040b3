package damage

import (
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

const blocks = 24

// TestSpreadIsWhatIsSeen compares the rule with disks of a few blocks, in which
// each image says of each block whether it holds it.
func TestSpreadIsWhatIsSeen(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(2, 7).Draw(t, "backups")
		holds := make([][]bool, n)
		images := make([]Image, n)
		for i := range n {
			holds[i] = rapid.SliceOfN(rapid.Bool(), blocks, blocks).Draw(t, "holds")
			images[i] = Image{Backup: fmt.Sprint(i), Full: i == 0 || rapid.IntRange(0, 5).Draw(t, "full") == 0, Holds: heldBy(holds[i])}
			if i > 0 {
				images[i].Parent = fmt.Sprint(i - 1)
			}
		}
		in := rapid.IntRange(0, n-1).Draw(t, "in")
		bad := rapid.SliceOfN(rapid.Bool(), blocks, blocks).Draw(t, "bad")
		var damaged Ranges
		for b := range blocks {
			if bad[b] {
				damaged = damaged.Add(Range{uint64(b), 1})
			}
		}
		want := map[string]Ranges{}
		for top := in + 1; top < n; top++ {
			var seen Ranges
			for b := range blocks {
				at := top
				for at > in && !images[at].Full && !holds[at][b] {
					at--
				}
				if at == in && bad[b] {
					seen = seen.Add(Range{uint64(b), 1})
				}
			}
			if len(seen) > 0 {
				want[fmt.Sprint(top)] = seen
			}
		}
		if diff := cmp.Diff(want, Spread(fmt.Sprint(in), damaged, rapid.Permutation(images).Draw(t, "order"))); diff != "" {
			t.Fatal(diff)
		}
	})
}

func heldBy(blocks []bool) Holds {
	return func(off, length uint64, fn func(off, length uint64) error) error {
		for b := off; b < off+length; b++ {
			if blocks[b] {
				if err := fn(b, 1); err != nil {
					return err
				}
			}
		}
		return nil
	}
}

// TestWhatCannotBeToldIsHit has images that cannot be read.
func TestWhatCannotBeToldIsHit(t *testing.T) {
	damaged := Ranges{{4, 2}}
	fails := func(off, length uint64, fn func(off, length uint64) error) error {
		return fmt.Errorf("cannot read: %w", fn(off, 1))
	}
	got := Spread("a", damaged, []Image{{Backup: "a"}, {Backup: "b", Parent: "a"}, {Backup: "c", Parent: "b", Holds: fails}, {Backup: "d", Parent: "c", Full: true}})
	if diff := cmp.Diff(map[string]Ranges{"b": damaged, "c": damaged}, got); diff != "" {
		t.Error(diff)
	}
}

// TestAdd adds parts in any order.
func TestAdd(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var all Ranges
		var is [blocks + 8]bool
		for range rapid.IntRange(0, 9).Draw(t, "parts") {
			r := Range{uint64(rapid.IntRange(0, blocks).Draw(t, "offset")), uint64(rapid.IntRange(0, 7).Draw(t, "length"))}
			all = all.Add(r)
			for b := r.Offset; b < r.End(); b++ {
				is[b] = true
			}
		}
		var want Ranges
		for b := 0; b < len(is); b++ {
			from := b
			for b < len(is) && is[b] {
				b++
			}
			if b > from {
				want = append(want, Range{uint64(from), uint64(b - from)})
			}
		}
		if diff := cmp.Diff(want, all); diff != "" {
			t.Fatal(diff)
		}
	})
}
