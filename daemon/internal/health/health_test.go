package health

import (
	"testing"
	"time"
)

func TestJudge(t *testing.T) {
	good := Look{Free: 10, MinimumFree: 10, Took: time.Millisecond, Slow: time.Second}
	for _, c := range []struct {
		what    string
		change  func(*Look)
		want    State
		problem bool
	}{
		{"good", func(*Look) {}, Online, false},
		{"slow", func(l *Look) { l.Took = time.Second }, Slow, true},
		{"nothing is slow", func(l *Look) { l.Took, l.Slow = time.Hour, 0 }, Online, false},
		{"less free than must stay", func(l *Look) { l.Free = 9 }, Full, true},
		{"no space, whatever it says is free", func(l *Look) { l.NoSpace = true }, Full, true},
		{"full and slow", func(l *Look) { l.NoSpace, l.Took = true, time.Hour }, Full, true},
		{"read-only and full", func(l *Look) { l.ReadOnly, l.NoSpace = true, true }, ReadOnly, true},
		{"another repository", func(l *Look) { l.Problem, l.ReadOnly = "x", true }, Unavailable, true},
		{"gone", func(l *Look) { l.Gone, l.Problem, l.Free = true, "x", 0 }, Gone, true},
		{"hung", func(l *Look) { l.Hung, l.Gone, l.Problem = true, true, "x" }, Hung, true},
	} {
		l := good
		c.change(&l)
		if state, problem := Judge(l); state != c.want || (problem != "") != c.problem {
			t.Errorf("%s: %s (%q)", c.what, state, problem)
		}
	}
}

func TestDue(t *testing.T) {
	now := time.Now()
	set := Settings{Every: time.Minute, Idle: 10 * time.Minute}
	for _, c := range []struct {
		what  string
		ago   time.Duration
		state State
		busy  bool
		want  bool
	}{
		{"idle and online", 5 * time.Minute, Online, false, false},
		{"idle and online for long", 10 * time.Minute, Online, false, true},
		{"in use", time.Minute, Online, true, true},
		{"in use, just looked at", 50 * time.Second, Online, true, false},
		{"hung", time.Minute, Hung, false, true},
		{"gone, just looked at", time.Second, Gone, false, false},
		{"in the future", -time.Hour, Online, false, true},
	} {
		if got := due(now, now.Add(-c.ago), c.state, c.busy, set); got != c.want {
			t.Errorf("%s: %v", c.what, got)
		}
	}
	if !due(now, time.Time{}, Unknown, false, set) {
		t.Error("one that nobody has looked at is not due")
	}
}
