package job

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
)

var noon = time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC)

// opens is a window that opens at a time.
type opens time.Time

func (o opens) Next(t time.Time) time.Time {
	if t.After(time.Time(o)) {
		return t
	}
	return time.Time(o)
}

func TestReasons(t *testing.T) {
	in := func(class Class, j catalog.Job) place {
		j.Kind = string(class)
		return place{&j, class, false}
	}
	s := situation{
		now:     noon,
		running: []place{in(ClassBackup, catalog.Job{ID: "R1", Domain: "a", Repository: "r1"}), in(ClassValidation, catalog.Job{ID: "R2", Domain: "b"})},
		limits: Limits{Concurrent: map[Class]int{ClassBackup: 2, ClassValidation: 1}, ConcurrentPerRepository: 1,
			Window: opens(noon.Add(time.Hour))},
		inhibitors: []Inhibitor{{What: []Class{ClassRestore}, Who: "apt", Why: "an upgrade"}},
	}
	for _, c := range []struct {
		place
		want string
	}{
		{in(ClassBackup, catalog.Job{ID: "Q1", Domain: "a"}), "waits for job R1 of its domain (backup)"},
		{in(ClassBackup, catalog.Job{ID: "Q2", Domain: "a", Priority: 99}), "waits for job R1 of its domain (backup)"},
		{in(ClassBackup, catalog.Job{ID: "Q3", Domain: "c", Repository: "r1"}), "waits for its repository: 1 jobs of at most 1 use it"},
		{in(ClassBackup, catalog.Job{ID: "Q4", Domain: "c"}), "waits for job Q3 of its domain (backup)"},
		{in(ClassValidation, catalog.Job{ID: "Q5"}), "waits for a free validation slot: 1 of 1 are taken"},
		{in(ClassRestore, catalog.Job{ID: "Q6"}), "held back by apt: an upgrade"},
		{in(ClassMaintenance, catalog.Job{ID: "Q7", Origin: catalog.OriginSystem}), "waits for the maintenance window, which opens " + noon.Add(time.Hour).Local().Format("Mon 2006-01-02 15:04")},
		{in(ClassBackup, catalog.Job{ID: "Q8", Domain: "d", Origin: catalog.OriginUser, Attempt: 1, Attempts: 3, NextTry: noon.Add(time.Minute), ErrorMessage: "it is away"}),
			"try 2 of 3 is at " + moment(noon.Add(time.Minute)) + ", after: it is away"},
		{in(ClassBackup, catalog.Job{ID: "Q9", Domain: "d", Origin: catalog.OriginUser}), ""},
		{in(ClassBackup, catalog.Job{ID: "QA", Domain: "e", Origin: catalog.OriginUser, Priority: 1}), "waits for a free backup slot: 2 of 2 are taken"},
		{in(ClassGroup, catalog.Job{ID: "QB", Origin: catalog.OriginSchedule}), ""},
	} {
		if c.Origin == "" {
			c.Origin = catalog.OriginUser
		}
		if c.ID == "Q9" {
			c.Priority = 2 // before QA
		}
		s.queue = append(s.queue, c.place)
		v := s.admit()
		if got := v.waiting[len(s.queue)-1]; got != c.want {
			t.Errorf("%s: %q instead of %q", c.ID, got, c.want)
		}
	}
	if v := s.admit(); !v.wake.Equal(noon.Add(time.Minute)) {
		t.Errorf("looks again at %v", v.wake)
	}
}

func TestDelay(t *testing.T) {
	l := Limits{RetryDelay: time.Minute}
	for attempt, want := range map[int]time.Duration{1: time.Minute, 2: 2 * time.Minute, 4: 8 * time.Minute, 7: time.Hour, 1000000: time.Hour} {
		if got := l.delay(ClassBackup, attempt); got != want {
			t.Errorf("after %d tries: %v instead of %v", attempt, got, want)
		}
	}
}

// TestAdmission holds for any situation: what starts is within all bounds, what
// waits has a reason that is so, and nothing waits that could start.
func TestAdmission(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		s := drawSituation(rt)
		v := s.admit()
		work := s.newWork()
		for _, i := range v.start {
			if reason, _ := s.putOff(s.queue[i]); reason != "" || work.obstacle(s.queue[i]) != "" || v.waiting[i] != "" {
				rt.Fatalf("%s starts although it %s%s", s.queue[i].ID, reason, work.obstacle(s.queue[i]))
			}
			work.add(s.queue[i])
		}
		for i, p := range s.queue {
			starts := slices.Contains(v.start, i)
			if starts == (v.waiting[i] != "") {
				rt.Fatalf("%s starts: %v, waits: %q", p.ID, starts, v.waiting[i])
			}
			putOff, until := s.putOff(p)
			if !until.IsZero() && v.wake.After(until) {
				rt.Fatalf("looks again at %v, too late for %s", v.wake, p.ID)
			}
			before := false
			for j, other := range s.queue {
				reason, _ := s.putOff(other)
				earlier := j < i && (!other.yields || p.yields) || p.yields && !other.yields
				before = before || j != i && earlier && p.Domain != "" && other.Domain == p.Domain && reason == ""
			}
			if starts && before {
				rt.Fatalf("%s overtakes a job of its domain", p.ID)
			}
			if !starts && putOff == "" && work.obstacle(p) == "" && !before {
				rt.Fatalf("%s could start, and waits: %s", p.ID, v.waiting[i])
			}
			if starts || putOff != "" || before || !strings.Contains(v.waiting[i], "slot") && !strings.Contains(v.waiting[i], "repository") {
				continue
			}
			for _, j := range v.start { // none that is less urgent took its place
				o := s.queue[j]
				inherits := slices.ContainsFunc(s.queue, func(later place) bool {
					reason, _ := s.putOff(later)
					return o.Domain != "" && later.Domain == o.Domain && reason == "" && later.Priority >= p.Priority
				})
				sameBounds := o.class == p.class && o.Repository == p.Repository && (o.yields || !p.yields)
				if sameBounds && o.Priority < p.Priority && !inherits {
					rt.Fatalf("%s goes before %s", o.ID, p.ID)
				}
			}
		}
		checkYields(rt, s, v)
	})
}

// checkYields holds what gives way against the rule: a job that nobody waits
// for gives way to one that could start then, and not otherwise.
func checkYields(rt *rapid.T, s situation, v verdict) {
	after := s.newWork()
	for _, i := range v.start {
		after.add(s.queue[i])
	}
	given := map[int]bool{}
	for _, g := range v.yield {
		r, p := s.running[g.from], s.queue[g.to]
		reason, _ := s.putOff(p)
		if !r.yields || p.yields || reason != "" || given[g.from] || slices.Contains(v.start, g.to) {
			rt.Fatalf("%s gives way to %s: %s", r.ID, p.ID, reason)
		}
		if after.obstacle(p) == "" {
			rt.Fatalf("%s gives way to %s, which could start without", r.ID, p.ID)
		}
		given[g.from] = true
		if after = after.without(r); after.obstacle(p) != "" {
			rt.Fatalf("%s gives way to %s, which cannot start: %s", r.ID, p.ID, after.obstacle(p))
		}
		after.add(p)
	}
	for i, r := range s.running {
		for j, p := range s.queue {
			putOff, _ := s.putOff(p)
			if r.yields && !p.yields && r.Domain != "" && p.Domain == r.Domain && putOff == "" &&
				!given[i] && after.without(r).obstacle(p) == "" && !slices.ContainsFunc(s.queue[:j], func(o place) bool {
				reason, _ := s.putOff(o)
				return o.Domain == p.Domain && !o.yields && reason == ""
			}) {
				rt.Fatalf("%s does not give way to %s", r.ID, p.ID)
			}
		}
	}
}

func drawSituation(rt *rapid.T) situation {
	classes := append(Classes(), ClassGroup)
	s := situation{now: noon, limits: Limits{
		ConcurrentPerRepository: rapid.IntRange(0, 2).Draw(rt, "per repository"),
		Concurrent:              map[Class]int{ClassBackup: rapid.IntRange(0, 3).Draw(rt, "backups"), ClassRestore: 1, ClassValidation: 1},
	}}
	if rapid.Bool().Draw(rt, "window") {
		s.limits.Window = opens(noon.Add(time.Duration(rapid.IntRange(-1, 1).Draw(rt, "opens")) * time.Hour))
	}
	for i := range rapid.IntRange(0, 2).Draw(rt, "inhibitors") {
		s.inhibitors = append(s.inhibitors, Inhibitor{ID: fmt.Sprint(i), What: rapid.SliceOfN(rapid.SampledFrom(classes), 1, 2).Draw(rt, "what"), Why: "x"})
	}
	domains := []string{"", "a", "b", "c"}
	busy := map[string]bool{}
	for i := range rapid.IntRange(0, 14).Draw(rt, "jobs") {
		p := place{&catalog.Job{
			ID:         fmt.Sprintf("J%02d", i),
			Domain:     rapid.SampledFrom(domains).Draw(rt, "domain"),
			Repository: rapid.SampledFrom([]string{"", "r", "s"}).Draw(rt, "repository"),
			Priority:   rapid.SampledFrom([]int{0, 50, 99}).Draw(rt, "priority"),
			Origin:     rapid.SampledFrom([]catalog.JobOrigin{catalog.OriginUser, catalog.OriginSchedule}).Draw(rt, "origin"),
			Attempts:   3,
		}, rapid.SampledFrom(classes).Draw(rt, "class"), rapid.IntRange(0, 2).Draw(rt, "yields") == 0}
		if rapid.IntRange(0, 3).Draw(rt, "running") == 0 && (p.Domain == "" || !busy[p.Domain]) {
			busy[p.Domain] = true
			s.running = append(s.running, p)
			continue
		}
		if rapid.IntRange(0, 3).Draw(rt, "retry") == 0 {
			p.NextTry, p.Attempt = noon.Add(time.Duration(rapid.IntRange(-90, 90).Draw(rt, "next"))*time.Minute), 1
		}
		s.queue = append(s.queue, p)
	}
	return s
}
