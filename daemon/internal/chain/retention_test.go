package chain

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

var noon = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// draw makes points of a drawing: "F" begins a chain, "i" goes on; a letter
// behind it marks one: h held, b the base of the next, d damaged, r running. They are a day apart.
func draw(drawing string) []Point {
	var all []Point
	for i, field := range strings.Fields(drawing) {
		b := Point{Backup: Backup{ID: fmt.Sprintf("b%d", i), State: Complete, Kind: Full}, Sequence: int64(i), Created: noon.AddDate(0, 0, i)}
		b.Chain = b.ID
		if field[0] == 'i' {
			b.Kind, b.Parent, b.Chain = Incremental, all[i-1].ID, all[i-1].Chain
		}
		switch field[1:] {
		case "h":
			b.Hold = true
		case "b":
			b.Base = true
		case "d":
			b.State = Damaged
		case "r":
			b.State = Running
		}
		all = append(all, b)
	}
	return all
}

func drawn(p RetentionPlan) string {
	var all []string
	for _, ids := range p.Delete {
		all = append(all, "delete "+strings.Join(ids, " "))
	}
	for _, m := range p.Merge {
		all = append(all, fmt.Sprintf("merge %s into %s on %q", strings.Join(m.Drop, " "), m.Into, m.Base))
	}
	return strings.Join(all, "; ")
}

func TestPlanRetention(t *testing.T) {
	for name, c := range map[string]struct {
		points string
		r      Retention
		want   string
	}{
		"nothing asked for":                {"F i i i", Retention{}, ""},
		"fewer than are kept":              {"F i i", Retention{Last: 4}, ""},
		"oldest of a chain":                {"F i i i", Retention{Last: 3}, `merge b0 into b1 on ""`},
		"several":                          {"F i i i i", Retention{Last: 2}, `merge b2 b1 b0 into b3 on ""`},
		"a whole chain":                    {"F i F i", Retention{Last: 2}, "delete b1 b0"},
		"a chain and some of the next":     {"F i F i i", Retention{Last: 2}, `delete b1 b0; merge b2 into b3 on ""`},
		"held in the middle":               {"F i ih i i", Retention{Last: 1}, `merge b1 b0 into b2 on ""; merge b3 into b4 on "b2"`},
		"held at the beginning":            {"Fh i i i", Retention{Last: 1}, `merge b2 b1 into b3 on "b0"`},
		"damaged at the end":               {"F i id F", Retention{Last: 1}, ""},
		"damaged before a chain that goes": {"Fd id F F", Retention{Last: 1}, "delete b2"},
		"running on what would go":         {"F i ir", Retention{Last: 1}, `merge b0 into b1 on ""`},
		"full ones":                        {"F F F", Retention{Last: 2}, "delete b0"},
		"the base of the next":             {"F ib F", Retention{Last: 1}, `merge b0 into b1 on ""`},
		"never the newest":                 {"F", Retention{Yearly: 1, Last: 0}, ""},
		"weekly":                           {"F i i i i i i i i i i i i i i", Retention{Weekly: 2}, `merge b6 b5 b4 b3 b2 b1 b0 into b7 on ""; merge b13 b12 b11 b10 b9 b8 into b14 on "b7"`},
	} {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(c.want, drawn(PlanRetention(draw(c.points), c.r, time.UTC))); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestRetentionOfSpansOfTime(t *testing.T) {
	var points []Point
	for i := range 24 * 40 { // an hour apart, each full
		points = append(points, Point{Backup: Backup{ID: fmt.Sprintf("b%d", i), Kind: Full, State: Complete}, Sequence: int64(i), Created: noon.Add(time.Duration(i) * time.Hour)})
	}
	p := PlanRetention(points, Retention{Last: 2, Hourly: 3, Daily: 4, Weekly: 2, Monthly: 2, Yearly: 9}, time.UTC)
	var kept []string
	for _, b := range slices.Backward(points) {
		if why := p.Keep[b.ID]; len(why) > 0 {
			kept = append(kept, b.Created.Format("01-02 15h"))
		}
	}
	want := []string{"04-10 11h", "04-10 10h", "04-10 09h", "04-09 23h", "04-08 23h", "04-07 23h", "04-05 23h", "03-31 23h"}
	if diff := cmp.Diff(want, kept); diff != "" {
		t.Error(diff)
	}
}

// What was made while the clock was wrong must not count for ever.
func TestRetentionGetsOverAWrongClock(t *testing.T) {
	var points []Point
	r, now := Retention{Daily: 5}, noon
	for i := range 30 {
		now = now.AddDate(0, 0, 1)
		at := now
		if i >= 10 && i < 15 {
			at = now.AddDate(70, 0, 0)
		}
		points = append(points, Point{Backup: Backup{ID: fmt.Sprintf("b%d", i), Kind: Full, State: Complete}, Sequence: int64(i), Created: at})
		p := PlanRetention(points, r, time.UTC)
		points = slices.DeleteFunc(points, func(b Point) bool { return len(p.Keep[b.ID]) == 0 })
		if want := min(i+1, 5); len(points) != want || points[0].Sequence != int64(i+1-want) {
			t.Fatalf("after backup %d, these are left: %v", i, points)
		}
	}
}

func TestNoJumpOfTheClockRemovesMuch(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := Retention{Last: rapid.IntRange(0, 4).Draw(t, "last"), Hourly: rapid.IntRange(0, 3).Draw(t, "hourly"), Daily: rapid.IntRange(0, 5).Draw(t, "daily"),
			Weekly: rapid.IntRange(0, 3).Draw(t, "weekly"), Monthly: rapid.IntRange(0, 3).Draw(t, "monthly"), Yearly: rapid.IntRange(0, 2).Draw(t, "yearly")}
		if (r == Retention{}) {
			r.Last = 1
		}
		now, points := noon, []Point(nil)
		for i := range 60 {
			now = now.Add(rapid.SampledFrom([]time.Duration{time.Hour, 7 * time.Hour, 24 * time.Hour}).Draw(t, "apart"))
			if i > 30 && rapid.IntRange(0, 9).Draw(t, "jump") == 0 {
				now = now.AddDate(rapid.IntRange(-30, 80).Draw(t, "years"), 0, 0)
			}
			points = append(points, Point{Backup: Backup{ID: fmt.Sprintf("b%d", i), Kind: Full, State: Complete}, Sequence: int64(i), Created: now})
			p := PlanRetention(points, r, time.UTC)
			if n := p.Removed(); n > 7 { // it is of five spans, and one of the newest; and was not there before
				t.Fatalf("backup %d makes %d go", i, n)
			}
			points = slices.DeleteFunc(points, func(b Point) bool { return len(p.Keep[b.ID]) == 0 })
			if len(points) < min(i+1, max(1, r.Last)) {
				t.Fatalf("%d are left", len(points))
			}
		}
	})
}

// TestRetentionPlansFit plays plans on random chains: each backup either stays
// or goes exactly once, and what stays has what it builds on.
func TestRetentionPlansFit(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		words := rapid.SliceOfN(rapid.SampledFrom([]string{"F", "i", "i", "i", "ih", "Fh", "id"}), 1, 25).Draw(t, "points")
		words[0] = "F"
		for i := 1; i < len(words); i++ { // what builds on a damaged one is damaged
			if words[i-1] == "id" && words[i][0] == 'i' {
				words[i] = "id"
			}
		}
		points := draw(strings.Join(words, " "))
		r := Retention{Last: rapid.IntRange(0, 6).Draw(t, "last"), Weekly: rapid.IntRange(0, 3).Draw(t, "weekly")}
		p := PlanRetention(points, r, time.UTC)
		gone, parent := map[string]int{}, map[string]string{}
		for _, b := range points {
			parent[b.ID] = b.Parent
		}
		for _, m := range p.Merge {
			at := parent[m.Into]
			for _, id := range m.Drop {
				if at != id {
					t.Fatalf("%+v: the one below is %q and not %q", m, at, id)
				}
				at = parent[id]
				gone[id]++
			}
			if at != m.Base {
				t.Fatalf("%+v: what is below is %q", m, at)
			}
			parent[m.Into] = m.Base
		}
		for _, ids := range p.Delete {
			for _, id := range ids {
				gone[id]++
			}
		}
		for _, b := range points {
			kept := len(p.Keep[b.ID]) > 0
			if kept == (gone[b.ID] > 0) || gone[b.ID] > 1 {
				t.Fatalf("%s: kept for %v, goes %d times", b.ID, p.Keep[b.ID], gone[b.ID])
			}
			if !kept && (b.Hold || b.State != Complete) {
				t.Fatalf("%s goes: %+v", b.ID, b)
			}
			if kept && parent[b.ID] != "" && gone[parent[b.ID]] > 0 {
				t.Fatalf("%s builds on %s, which goes", b.ID, parent[b.ID])
			}
		}
		if least := p.AtMost(1); p.Removed() > 0 && least.Removed() == 0 {
			t.Fatalf("nothing is left of %s", drawn(p))
		}
	})
}

// Two backups that build on one, as after a catalog was lost in the middle of a
// merge: what both stand on stays.
func TestRetentionKeepsWhatSeveralBuildOn(t *testing.T) {
	points := draw("F i i i i")
	points[3].Parent = points[1].ID // beside points[2]
	p := PlanRetention(points, Retention{Last: 3}, time.UTC)
	if len(p.Keep["b1"]) == 0 || drawn(p) != `merge b0 into b1 on ""` {
		t.Errorf("%s, kept %v", drawn(p), p.Keep)
	}
}
