package verification

import (
	"fmt"
	"testing"
	"time"

	"pgregory.net/rapid"
)

var today = time.Date(2026, 3, 1, 1, 0, 0, 0, time.UTC)

// TestEveryChainHasItsTurn lives through many nights with chains of any size: no
// night has more than its share, and every chain has its turn.
func TestEveryChainHasItsTurn(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		days := rapid.IntRange(2, 30).Draw(t, "days")
		every := time.Duration(days) * night
		var chains []Chain
		same := rapid.Bool().Draw(t, "all made at once")
		for i := range rapid.IntRange(1, 40).Draw(t, "chains") {
			c := Chain{ID: fmt.Sprintf("c%02d", i), Bytes: uint64(rapid.IntRange(0, 1000).Draw(t, "bytes")), Last: today}
			if !same {
				c.Last = today.Add(-time.Duration(rapid.IntRange(0, 2*days).Draw(t, "age")) * night)
			}
			chains = append(chains, c)
		}
		most := uint64(0)
		if rapid.IntRange(0, 3).Draw(t, "bounded") == 0 {
			most = 200
		}
		share := most
		if most == 0 {
			share = fairShare(chains, every)
		}
		var tries []Try
		turns := map[string]int{}
		now := today
		nights := 4 * days
		for range nights {
			var used uint64
			for look := range 3 {
				for _, c := range Due(chains, tries, every, most, now.Add(time.Duration(look)*time.Hour)) {
					tries = append(tries, Try{c.ID, now})
					turns[c.ID]++
					if used += c.Bytes; used > share && used != c.Bytes {
						t.Fatalf("a night has %d bytes, and its share is %d", used, share)
					}
					for i := range chains {
						if chains[i].ID == c.ID {
							chains[i].Last = now
						}
					}
				}
			}
			now = now.Add(night)
		}
		for _, c := range chains {
			if most == 0 && now.Sub(c.Last) > 2*every+night {
				t.Fatalf("chain %s waits since %d nights of %d: it had %d turns", c.ID, now.Sub(c.Last)/night, days, turns[c.ID])
			}
			if turns[c.ID] > 8 {
				t.Fatalf("chain %s had %d turns in %d nights", c.ID, turns[c.ID], nights)
			}
		}
	})
}

// TestClockJumps has the clock be anywhere: what is begun at once is never more
// than a share, and when it is right again all go on.
func TestClockJumps(t *testing.T) {
	var chains []Chain
	for i := range 60 {
		chains = append(chains, Chain{ID: fmt.Sprint(i), Bytes: 100, Last: today})
	}
	for name, now := range map[string]time.Time{"a year on": today.AddDate(1, 0, 0), "a year back": today.AddDate(-1, 0, 0)} {
		due := Due(chains, nil, 30*night, 0, now)
		if len(due) == 0 || len(due) > 4 {
			t.Errorf("%s, %d are due at once", name, len(due))
		}
		var tries []Try
		for _, c := range due {
			tries = append(tries, Try{c.ID, now})
		}
		if again := Due(chains, tries, 30*night, 0, now.Add(time.Minute)); len(again) > 0 {
			t.Errorf("%s, a minute later %d more are due", name, len(again))
		}
		// The clock is set right: what was tried in what is the future now counts for tonight.
		if later := Due(chains, tries, 30*night, 0, today.Add(15*night)); len(later) == 0 || len(later) > 4 {
			t.Errorf("%s and back, %d are due", name, len(later))
		}
	}
}

// TestFailingChain has one that can never be verified: the others have their turns.
func TestFailingChain(t *testing.T) {
	old := today.Add(-60 * night)
	chains := []Chain{{"bad", 300, old.Add(-night)}}
	for i := range 20 {
		chains = append(chains, Chain{fmt.Sprintf("c%02d", i), 100, old})
	}
	turns := map[string]int{}
	var tries []Try
	for n := range 60 {
		now := today.Add(time.Duration(n) * night)
		for _, c := range Due(chains, tries, 30*night, 100, now) {
			tries = append(tries, Try{c.ID, now})
			turns[c.ID]++
			for i := range chains {
				if chains[i].ID == c.ID && c.ID != "bad" {
					chains[i].Last = now
				}
			}
		}
	}
	for _, c := range chains {
		if turns[c.ID] == 0 {
			t.Errorf("%s never had its turn: %v", c.ID, turns)
		}
	}
}

// TestShare has a chain that is larger than a share, and one that failed.
func TestShare(t *testing.T) {
	old := today.Add(-40 * night)
	chains := []Chain{{"large", 1000, old}, {"small", 10, old.Add(night)}, {"new", 10, today}}
	ids := func(list []Chain) (all []string) {
		for _, c := range list {
			all = append(all, c.ID)
		}
		return all
	}
	if got := ids(Due(chains, nil, 30*night, 100, today)); fmt.Sprint(got) != "[large]" {
		t.Errorf("%v", got)
	}
	if got := ids(Due(chains, []Try{{"large", today.Add(-time.Hour)}}, 30*night, 100, today)); len(got) != 0 {
		t.Errorf("in the same night, %v", got)
	}
	// It failed, and is tried again the next night: the others wait for theirs no longer than that.
	chains[0].Last = today
	if got := ids(Due(chains, []Try{{"large", today.Add(-25 * time.Hour)}}, 30*night, 100, today)); fmt.Sprint(got) != "[small]" {
		t.Errorf("the next night, %v", got)
	}
	if got := Due(nil, nil, 30*night, 0, today); len(got) != 0 {
		t.Errorf("%v of none", got)
	}
}
