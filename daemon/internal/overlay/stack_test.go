package overlay

import (
	"fmt"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
)

func id(n int) string { return fmt.Sprintf("01ARZ3NDEKTSV4RRFFQ69G5%03d", n) }

func layer(path string) hypervisor.Stacked {
	return hypervisor.Stacked{Path: path, Type: "file", Format: "qcow2"}
}

func TestOurs(t *testing.T) {
	of := Name("/d/a.raw", id(1))
	if backup, ours := Ours(layer(of)); !ours || backup != id(1) {
		t.Errorf("%s is of %q, %v", of, backup, ours)
	}
	for _, l := range []hypervisor.Stacked{
		layer("/d/a.qcow2"), layer("/d/a.virtbackup-1"), layer(of + ".old"), layer(""),
		{Path: of, Type: "block", Format: "qcow2"}, {Path: of, Type: "file", Format: "raw"},
	} {
		if _, ours := Ours(l); ours {
			t.Errorf("%+v is taken for ours", l)
		}
	}
}

func TestSplit(t *testing.T) {
	one, two, base, below := layer(Name("/d/a", id(1))), layer(Name("/d/a", id(2))), layer("/d/a"), layer("/d/template")
	for name, c := range map[string]struct {
		stack    []hypervisor.Stacked
		overlays int
	}{
		"none":             {[]hypervisor.Stacked{base, below}, 0},
		"one":              {[]hypervisor.Stacked{one, base, below}, 1},
		"two":              {[]hypervisor.Stacked{two, one, base}, 2},
		"below a foreign":  {[]hypervisor.Stacked{base, one, below}, 0},
		"all pulled into":  {[]hypervisor.Stacked{one}, 0},
		"one on a pulled":  {[]hypervisor.Stacked{two, one}, 1},
		"nothing is there": {nil, 0},
	} {
		overlays, disk := Split(c.stack)
		if len(overlays) != c.overlays || !slices.Equal(slices.Concat(overlays, disk), c.stack) {
			t.Errorf("%s: got %v and %v", name, overlays, disk)
		}
	}
}

// TestPlan draws stacks: after the commits only foreign layers and the one to
// keep are left, in their order, and nothing foreign is written to but by what
// was right on top of it.
func TestPlan(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var stack []hypervisor.Stacked
		for i := range rapid.IntRange(1, 8).Draw(t, "layers") {
			if rapid.Bool().Draw(t, "ours") {
				stack = append(stack, layer(Name("/d/a", id(i))))
			} else {
				stack = append(stack, layer(fmt.Sprintf("/d/%d", i)))
			}
		}
		keep := ""
		if rapid.Bool().Draw(t, "keep") {
			keep = rapid.SampledFrom(stack).Draw(t, "kept").Path
		}
		left := slices.Clone(stack)
		for _, c := range plan("vda", stack, keep) {
			at := slices.Index(left, c.layers[0])
			if at < 0 || !slices.Equal(left[at:at+len(c.layers)], c.layers) || left[at+len(c.layers)] != c.base {
				t.Fatalf("%v cannot be committed in %v", c, left)
			}
			if (c.above == nil) != (at == 0) || c.above != nil && *c.above != left[at-1] {
				t.Fatalf("above %v is %v in %v", c.layers, c.above, left)
			}
			left = slices.Delete(left, at, at+len(c.layers))
		}
		want := slices.Clone(stack)
		bottom := want[len(want)-1]
		want = slices.DeleteFunc(want, func(l hypervisor.Stacked) bool { return ours(l) && l.Path != keep && l != bottom })
		if !slices.Equal(left, want) {
			t.Fatalf("%v is left of %v, and not %v", left, stack, want)
		}
	})
}
