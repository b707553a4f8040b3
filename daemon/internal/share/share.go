// Package share divides what the workers of this host may move per second among
// them: as much for each as the bounds allow, and no more for one than for
// another that is bound by the same.
package share

import (
	"cmp"
	"maps"
	"slices"
)

// Rates are bounds in bytes per second; 0 is no bound.
type Rates struct {
	Job        uint64 // of each worker
	Repository uint64 // of all workers that use the same repository
	Host       uint64 // of all workers
}

// Worker is one of those that share.
type Worker struct {
	Repository string
	Most       uint64 // its own bound in bytes per second; 0 is none
}

// bound is what some workers may move together.
type bound struct {
	left uint64
	open int // of its workers, how many have no share yet
	of   func(job string) bool
}

// Divide returns how much each worker gets, by its job; 0 is no bound.
//
// The shares are those of "max-min fairness": the bound that leaves the least to
// each of its workers gives them that, then the next of what is left, so that
// what one worker may not use is another's.
func Divide(r Rates, workers map[string]Worker) map[string]uint64 {
	shares := make(map[string]uint64, len(workers))
	open := slices.Sorted(maps.Keys(workers))
	bounds := r.bounds(workers)
	for len(bounds) > 0 && len(open) > 0 {
		// Of two that differ by less than a byte for each, the one that gives less.
		tightest := slices.MinFunc(bounds, func(a, b *bound) int { return cmp.Compare(a.left*uint64(b.open), b.left*uint64(a.open)) })
		share := max(1, tightest.left/uint64(tightest.open)) // 0 would be no bound
		open = slices.DeleteFunc(open, func(job string) bool {
			if !tightest.of(job) {
				return false
			}
			shares[job] = share
			for _, b := range bounds {
				if b.of(job) {
					b.left -= min(share, b.left)
					b.open--
				}
			}
			return true
		})
		bounds = slices.DeleteFunc(bounds, func(b *bound) bool { return b.open == 0 })
	}
	for _, job := range open {
		shares[job] = 0
	}
	return shares
}

func (r Rates) bounds(workers map[string]Worker) []*bound {
	var all []*bound
	add := func(limit uint64, of func(job string) bool) {
		n := 0
		for job := range workers {
			if of(job) {
				n++
			}
		}
		if limit > 0 && n > 0 {
			all = append(all, &bound{limit, n, of})
		}
	}
	add(r.Host, func(string) bool { return true })
	in := map[string]bool{}
	for _, w := range workers {
		in[w.Repository] = true
	}
	for _, one := range slices.Sorted(maps.Keys(in)) {
		add(r.Repository, func(job string) bool { return workers[job].Repository == one })
	}
	for one, w := range workers {
		add(r.Job, func(job string) bool { return job == one })
		add(w.Most, func(job string) bool { return job == one })
	}
	return all
}

// Promise is what a backup that is being made is expected to take in its repository.
type Promise struct{ Expected, Written uint64 }

// Promised returns how much of what was promised is still to be written.
func Promised(all []Promise) (left uint64) {
	for _, p := range all {
		left += p.Expected - min(p.Expected, p.Written)
	}
	return left
}
