package quota

import (
	"testing"

	"pgregory.net/rapid"
)

func TestForbids(t *testing.T) {
	for _, c := range []struct {
		l      Limits
		u      Use
		starts bool
		want   string
	}{
		{Limits{}, Use{Bytes: 1 << 60, Backups: 1 << 20, Chains: 1 << 20}, true, ""},
		{Limits{Bytes: 10}, Use{Bytes: 9, Backups: 3}, true, ""},
		{Limits{Bytes: 10}, Use{Bytes: 10}, false, "10 of 10 bytes are used"},
		{Limits{Backups: 2}, Use{Backups: 1}, false, ""},
		{Limits{Backups: 2}, Use{Backups: 1, Running: 1}, false, "2 of 2 backups are used"},
		{Limits{Chains: 1}, Use{Chains: 1, Backups: 5}, false, ""},
		{Limits{Chains: 1}, Use{Chains: 1}, true, "1 of 1 chains are used, and this backup would start one"},
		{Limits{Chains: 1}, Use{RunningChains: 1, Running: 1}, true, "1 of 1 chains are used, and this backup would start one"},
	} {
		if got := c.l.Forbids(c.u, c.starts); got != c.want {
			t.Errorf("%+v, %+v: %q, and not %q", c.l, c.u, got, c.want)
		}
	}
}

// TestNumbersAreNeverExceeded makes backups as long as they are allowed.
func TestNumbersAreNeverExceeded(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		l := Limits{Backups: rapid.IntRange(1, 5).Draw(t, "backups"), Chains: rapid.IntRange(1, 3).Draw(t, "chains")}
		var u Use
		for range 20 {
			starts := rapid.Bool().Draw(t, "starts")
			if l.Forbids(u, starts) == "" {
				u.Running++
				if starts {
					u.RunningChains++
				}
			}
			if u.Running > 0 && rapid.Bool().Draw(t, "done") {
				u.Backups, u.Chains = u.Backups+u.Running, u.Chains+u.RunningChains
				u.Running, u.RunningChains = 0, 0
			}
			if u.Backups+u.Running > l.Backups || u.Chains+u.RunningChains > l.Chains {
				t.Fatalf("%+v is more than %+v", u, l)
			}
		}
	})
}
