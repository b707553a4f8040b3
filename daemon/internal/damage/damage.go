// Package damage is the rule of who is hit when a part of an image is not what
// was written: all that builds on it, as far as nothing above took its place. It
// is pure: others say what is damaged and what each image holds.
package damage

import "slices"

// Range is a part of a disk, in bytes.
type Range struct {
	Offset uint64 `json:"offset"`
	Length uint64 `json:"length"`
}

// End is where it ends.
func (r Range) End() uint64 { return r.Offset + r.Length }

// Ranges are parts of a disk in ascending order, none of which touches another.
type Ranges []Range

// Add adds a part.
func (all Ranges) Add(r Range) Ranges {
	if r.Length == 0 {
		return all
	}
	first, _ := slices.BinarySearchFunc(all, r.Offset, func(a Range, at uint64) int {
		if a.End() < at {
			return -1
		}
		return 1
	})
	last := first
	for ; last < len(all) && all[last].Offset <= r.End(); last++ {
		end := max(r.End(), all[last].End())
		r.Offset = min(r.Offset, all[last].Offset)
		r.Length = end - r.Offset
	}
	return slices.Replace(all, first, last, r)
}

// Bytes is how much they are together.
func (all Ranges) Bytes() (n uint64) {
	for _, r := range all {
		n += r.Length
	}
	return n
}

// Holds calls fn for the parts of a range that an image itself holds, in order.
type Holds func(off, length uint64, fn func(off, length uint64) error) error

// Through returns what of damaged parts is seen through an image that builds on
// them: what it holds itself is not. What cannot be told is seen.
func (all Ranges) Through(holds Holds) (seen Ranges) {
	for _, r := range all {
		at := r.Offset
		var left Ranges
		err := holds(r.Offset, r.Length, func(off, length uint64) error {
			if off > at {
				left = left.Add(Range{at, off - at})
			}
			at = max(at, off+length)
			return nil
		})
		switch {
		case err != nil:
			left = Ranges{r}
		case at < r.End():
			left = left.Add(Range{at, r.End() - at})
		}
		for _, l := range left {
			seen = seen.Add(l)
		}
	}
	return seen
}

// Image is that of one disk in a backup.
type Image struct {
	Backup, Parent string
	Full           bool  // it builds on nothing
	Holds          Holds // nil if that cannot be told
}

// Spread returns by backup which parts of the disk are hit, of those that build
// on a damaged image directly or not. images are all of that disk, in any order.
func Spread(in string, damaged Ranges, images []Image) map[string]Ranges {
	hit := map[string]Ranges{}
	var up func(id string, below Ranges)
	up = func(id string, below Ranges) {
		for _, i := range images {
			if _, known := hit[i.Backup]; known || i.Parent != id || i.Full || i.Backup == in {
				continue
			}
			seen := below
			if i.Holds != nil {
				seen = below.Through(i.Holds)
			}
			if len(seen) > 0 {
				hit[i.Backup] = seen
				up(i.Backup, seen)
			}
		}
	}
	up(in, damaged)
	return hit
}
