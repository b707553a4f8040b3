package share

import (
	"fmt"
	"maps"
	"testing"

	"pgregory.net/rapid"
)

func TestDivide(t *testing.T) {
	two := map[string]Worker{"a": {"nas", 0}, "b": {"nas", 0}}
	three := map[string]Worker{"a": {"nas", 0}, "b": {"nas", 0}, "c": {"tape", 0}}
	for name, test := range map[string]struct {
		rates Rates
		jobs  map[string]Worker
		want  map[string]uint64
	}{
		"nobody":                            {Rates{10, 10, 10}, nil, map[string]uint64{}},
		"no bound":                          {Rates{}, two, map[string]uint64{"a": 0, "b": 0}},
		"each its own":                      {Rates{Job: 7}, three, map[string]uint64{"a": 7, "b": 7, "c": 7}},
		"the repository's, halved":          {Rates{Repository: 10}, three, map[string]uint64{"a": 5, "b": 5, "c": 10}},
		"the host's, in three":              {Rates{Host: 12}, three, map[string]uint64{"a": 4, "b": 4, "c": 4}},
		"the job's is the least":            {Rates{Job: 3, Repository: 10, Host: 100}, three, map[string]uint64{"a": 3, "b": 3, "c": 3}},
		"what nas may not is tape's":        {Rates{Repository: 8, Host: 14}, three, map[string]uint64{"a": 4, "b": 4, "c": 6}},
		"and tape's own bound is there":     {Rates{Repository: 8, Host: 100}, three, map[string]uint64{"a": 4, "b": 4, "c": 8}},
		"what one does not want is others'": {Rates{Repository: 10}, map[string]Worker{"a": {"nas", 2}, "b": {"nas", 0}}, map[string]uint64{"a": 2, "b": 8}},
		"only one is bound":                 {Rates{}, map[string]Worker{"a": {"nas", 2}, "b": {"nas", 0}}, map[string]uint64{"a": 2, "b": 0}},
		"never nothing":                     {Rates{Host: 1}, two, map[string]uint64{"a": 1, "b": 1}},
	} {
		if got := Divide(test.rates, test.jobs); !maps.Equal(got, test.want) {
			t.Errorf("%s: %v, want %v", name, got, test.want)
		}
	}
}

// TestDivideIsFair has no bound exceeded, and nobody get less than another
// unless a bound that is used up keeps it from more.
func TestDivideIsFair(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		rate := rapid.OneOf(rapid.Just(uint64(0)), rapid.Uint64Range(1000, 1_000_000))
		r := Rates{Job: rate.Draw(t, "job"), Repository: rate.Draw(t, "repository"), Host: rate.Draw(t, "host")}
		jobs := map[string]Worker{}
		for i := range rapid.IntRange(1, 12).Draw(t, "jobs") {
			jobs[fmt.Sprint("j", i)] = Worker{rapid.SampledFrom([]string{"x", "y", "z"}).Draw(t, "in"), rate.Draw(t, "own")}
		}
		shares := Divide(r, jobs)
		if len(shares) != len(jobs) {
			t.Fatalf("%v for %v", shares, jobs)
		}
		n := uint64(len(jobs)) // what is rounded down is left, of each
		for job, share := range shares {
			if share == 0 {
				if r != (Rates{}) || jobs[job].Most > 0 {
					t.Fatalf("%s has no bound, of %+v", job, r)
				}
				continue
			}
			held := false
			for _, b := range r.bounds(jobs) {
				if !b.of(job) {
					continue
				}
				sum, greatest := uint64(0), uint64(0)
				for other, s := range shares {
					if b.of(other) {
						sum, greatest = sum+s, max(greatest, s)
					}
				}
				if sum > b.left {
					t.Fatalf("%d of %d are given: %v", sum, b.left, shares)
				}
				held = held || sum+n > b.left && share+n >= greatest
			}
			if !held {
				t.Fatalf("%s could have more than %d: %+v, %v", job, share, r, shares)
			}
		}
	})
}

func TestPromised(t *testing.T) {
	if got := Promised([]Promise{{100, 30}, {50, 80}, {0, 5}, {7, 0}}); got != 77 {
		t.Error(got)
	}
	if got := Promised(nil); got != 0 {
		t.Error(got)
	}
}
