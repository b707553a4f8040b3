package schedule

import (
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
)

func TestDecide(t *testing.T) {
	at := time.Date(2026, 11, 28, 3, 0, 0, 0, time.Local)
	running := catalog.ScheduleRun{State: catalog.RunRunning, Created: at}
	waiting := catalog.ScheduleRun{State: catalog.RunWaiting, Created: at, Reason: "it is away"}
	away, gone := &Obstacle{"it is away", true}, &Obstacle{"it is gone", false}
	const goesOn, waits = "the run of 2026-11-28 03:00:00 still goes on", "the run of 2026-11-28 03:00:00 waits already: it is away"
	for _, c := range []struct {
		overlap    catalog.Overlap
		unfinished []catalog.ScheduleRun
		obstacle   *Obstacle
		want       catalog.RunState
		reason     string
	}{
		{catalog.OverlapSkip, nil, nil, catalog.RunRunning, ""},
		{catalog.OverlapQueue, nil, nil, catalog.RunRunning, ""},
		{catalog.OverlapSkip, nil, away, catalog.RunSkipped, "it is away"},
		{catalog.OverlapQueue, nil, away, catalog.RunWaiting, "it is away"},
		{catalog.OverlapSkip, nil, gone, catalog.RunSkipped, "it is gone"},
		{catalog.OverlapQueue, nil, gone, catalog.RunSkipped, "it is gone"},
		{catalog.OverlapSkip, []catalog.ScheduleRun{running}, nil, catalog.RunSkipped, goesOn},
		{catalog.OverlapQueue, []catalog.ScheduleRun{running}, nil, catalog.RunWaiting, goesOn},
		{catalog.OverlapQueue, []catalog.ScheduleRun{running, waiting}, nil, catalog.RunSkipped, waits},
		{catalog.OverlapQueue, []catalog.ScheduleRun{waiting}, away, catalog.RunSkipped, waits},
		{catalog.OverlapSkip, []catalog.ScheduleRun{waiting}, nil, catalog.RunSkipped, waits}, // from before the rule was changed
	} {
		if state, reason := decide(catalog.Schedule{Overlap: c.overlap}, c.unfinished, c.obstacle); state != c.want || reason != c.reason {
			t.Errorf("%s, %+v, %+v: %s (%s) instead of %s (%s)", c.overlap, c.unfinished, c.obstacle, state, reason, c.want, c.reason)
		}
	}
}

// TestNothingPilesUp decides at random: never more than one run goes on and one
// waits, none starts where something is in the way, and each that does not
// start has its reason.
func TestNothingPilesUp(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var unfinished []catalog.ScheduleRun
		for range rapid.IntRange(1, 30).Draw(t, "steps") {
			if len(unfinished) > 0 && rapid.Bool().Draw(t, "end") {
				unfinished = unfinished[1:]
				continue
			}
			s := catalog.Schedule{Overlap: rapid.SampledFrom([]catalog.Overlap{catalog.OverlapSkip, catalog.OverlapQueue}).Draw(t, "overlap")}
			o := rapid.SampledFrom([]*Obstacle{nil, {"away", true}, {"gone", false}}).Draw(t, "obstacle")
			state, reason := decide(s, unfinished, o)
			if state == catalog.RunRunning && (o != nil || len(unfinished) > 0 || reason != "") || state != catalog.RunRunning && reason == "" {
				t.Fatalf("%s (%s) of %+v, %+v", state, reason, unfinished, o)
			}
			if state.Ended() {
				continue
			}
			if find(unfinished, state) != nil || s.Overlap == catalog.OverlapSkip && state == catalog.RunWaiting {
				t.Fatalf("%s again", state)
			}
			unfinished = append(unfinished, catalog.ScheduleRun{State: state, Reason: reason})
		}
	})
}

func TestOutcome(t *testing.T) {
	job := func(domain string, state catalog.JobState, message string) catalog.Job {
		return catalog.Job{Domain: domain, State: state, ErrorMessage: message}
	}
	good, failed, cancelled := job("a", catalog.JobSucceeded, ""), job("b", catalog.JobFailed, "no space"), job("c", catalog.JobCancelled, "")
	for _, c := range []struct {
		jobs   []catalog.Job
		state  catalog.RunState
		reason string
		ended  bool
	}{
		{[]catalog.Job{good, job("d", catalog.JobQueued, "")}, catalog.RunRunning, "", false},
		{[]catalog.Job{failed, job("d", catalog.JobCancelling, "")}, catalog.RunRunning, "", false},
		{[]catalog.Job{good, good}, catalog.RunSucceeded, "", true},
		{[]catalog.Job{failed}, catalog.RunFailed, "B: no space", true},
		{[]catalog.Job{job("", catalog.JobFailed, "1 of 3 failed")}, catalog.RunFailed, "1 of 3 failed", true},
		{[]catalog.Job{cancelled, good}, catalog.RunCancelled, "1 of 2 backups were not made: C: cancelled", true},
		{[]catalog.Job{cancelled, good, failed}, catalog.RunFailed, "2 of 3 backups were not made: B: no space; C: cancelled", true},
		{[]catalog.Job{failed, failed, failed, failed, failed}, catalog.RunFailed,
			"5 of 5 backups were not made: B: no space; B: no space; B: no space; and 2 more", true},
	} {
		state, reason, ended := outcome(c.jobs, func(uuid string) string { return string(uuid[0] - 32) })
		if state != c.state || reason != c.reason || ended != c.ended {
			t.Errorf("%+v: %s (%s), %v", c.jobs, state, reason, ended)
		}
	}
}
