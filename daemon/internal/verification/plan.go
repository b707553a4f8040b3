package verification

import (
	"slices"
	"strings"
	"time"
)

// Chain is a chain of backups as the plan sees it.
type Chain struct {
	ID    string
	Bytes uint64    // that are read when it is verified
	Last  time.Time // when the one of its backups was read back that waits the longest
}

// Try is a verification that was begun by itself.
type Try struct {
	Chain string
	At    time.Time
}

// night is the time in which there is one share.
const night = 24 * time.Hour

// Due returns which chains are to be verified now, those that wait the longest
// first, so that each is within a time and no night has more than its share:
// most bytes, or for 0 as much as it takes for all to have their turn in that
// time. A chain that is larger than that has a night of its own. What was verified
// not half that time ago can wait, so that the nights come out even.
//
// What was tried counts for its night however it ended, and is not tried again in
// it; then it goes behind those that wait since before that. Clocks jump: what is said to be of the future may be of any time. However
// much has become due at once, the share stays what it is.
func Due(chains []Chain, tries []Try, every time.Duration, most uint64, now time.Time) []Chain {
	share, used := most, uint64(0)
	if most == 0 {
		share = fairShare(chains, every)
	}
	tried, last := map[string]bool{}, map[string]time.Time{}
	for _, t := range tries {
		if age := now.Sub(t.At); age < night && age > -night {
			tried[t.Chain] = true
		}
		if t.At.Before(now) && t.At.After(last[t.Chain]) {
			last[t.Chain] = t.At
		}
	}
	turn := func(c Chain) time.Time { // one that fails does not go before all others for ever
		if t := last[c.ID]; t.After(c.Last) {
			return t
		}
		return c.Last
	}
	var waiting []Chain
	for _, c := range chains {
		if c.Last.After(now) {
			c.Last = time.Time{}
		}
		switch {
		case tried[c.ID]:
			used += c.Bytes
		case now.Sub(c.Last) >= every/2:
			waiting = append(waiting, c)
		}
	}
	slices.SortFunc(waiting, func(a, b Chain) int {
		if n := turn(a).Compare(turn(b)); n != 0 {
			return n
		}
		return strings.Compare(a.ID, b.ID)
	})
	var due []Chain
	for _, c := range waiting {
		// In their order: a large one is not passed over night after night.
		if used > 0 && (used >= share || c.Bytes > share-used) {
			break
		}
		used += max(c.Bytes, 1)
		due = append(due, c)
	}
	return due
}

// fairShare is how much a night needs for all to have their turn.
func fairShare(chains []Chain, every time.Duration) uint64 {
	var total, largest uint64
	for _, c := range chains {
		total += max(c.Bytes, 1)
		largest = max(largest, c.Bytes)
	}
	nights := max(1, uint64(every/night))
	// A night that a chain does not fit into any more is left with less than its share.
	return total/nights + min(largest, total/nights) + 1
}
