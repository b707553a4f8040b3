package catalog

import (
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestSchedules(t *testing.T) {
	c, ctx := openNew(t), t.Context()
	fixture(t, c)
	s := Schedule{ID: "s1", Name: "gold", Offering: "daily", Repository: "r2", Calendars: []string{"daily", "Mon *-*-* 03:00"},
		RandomizedDelay: 90 * time.Second, Persistent: true, Overlap: OverlapQueue, Enabled: true, UID: 7, Created: epoch}
	must(t, c.CreateSchedule(ctx, s))
	other := Schedule{ID: "s2", Name: "gold", Domain: "d1", Calendars: []string{"hourly"}, Overlap: OverlapSkip, Created: epoch}
	mustBe(t, ErrExists, c.CreateSchedule(ctx, other))
	other.Name, other.Repository = "web", "none"
	mustBe(t, ErrNotFound, c.CreateSchedule(ctx, other))
	other.Repository = ""
	must(t, c.CreateSchedule(ctx, other))
	mustBe(t, ErrInUse, c.RemoveRepository(ctx, "r2"))

	s.Repository, s.Calendars, s.Overlap, s.Enabled, s.Isolated, s.Quiesce = "", []string{"weekly"}, OverlapSkip, false, true, "agent"
	must(t, c.UpdateSchedule(ctx, s))
	must(t, c.RemoveRepository(ctx, "r2"))
	all, err := c.Schedules(ctx)
	must(t, err)
	if diff := cmp.Diff([]Schedule{s, other}, all); diff != "" {
		t.Error(diff)
	}
	named, err := c.ScheduleByName(ctx, "gold")
	if err != nil || named.ID != "s1" {
		t.Errorf("%+v, %v", named, err)
	}
	must(t, c.AddRun(ctx, ScheduleRun{ID: "1", Schedule: "s1", State: RunWaiting, Created: epoch}))
	must(t, c.RemoveSchedule(ctx, "s1"))
	mustBe(t, ErrNotFound, c.RemoveSchedule(ctx, "s1"))
	_, err = c.Schedule(ctx, "s1")
	mustBe(t, ErrNotFound, err)
	mustBe(t, ErrNotFound, c.UpdateRun(ctx, ScheduleRun{ID: "1", Schedule: "s1", State: RunSkipped}))
}

// TestRuns has no two runs of a schedule wait, or go on, at once, whatever the
// daemon does, and old ones forgotten.
func TestRuns(t *testing.T) {
	c, ctx := openNew(t), t.Context()
	fixture(t, c)
	for _, id := range []string{"s1", "s2"} {
		must(t, c.CreateSchedule(ctx, Schedule{ID: id, Name: id, Domain: "d1", Overlap: OverlapSkip, Created: epoch}))
	}
	run := func(id, schedule string, state RunState) ScheduleRun {
		return ScheduleRun{ID: id, Schedule: schedule, State: state, Created: epoch}
	}
	first := run("000", "s1", RunRunning)
	must(t, c.AddRun(ctx, first))
	mustBe(t, ErrExists, c.AddRun(ctx, run("001", "s1", RunRunning)))
	must(t, c.AddRun(ctx, run("002", "s1", RunWaiting)))
	mustBe(t, ErrExists, c.AddRun(ctx, run("003", "s1", RunWaiting)))
	must(t, c.AddRun(ctx, run("004", "s2", RunRunning)))
	mustBe(t, ErrExists, c.UpdateRun(ctx, run("002", "s1", RunRunning)))

	first.State, first.Jobs, first.Reason, first.Finished = RunFailed, []string{"j"}, "no", epoch.Add(time.Minute)
	must(t, c.UpdateRun(ctx, first))
	mustBe(t, ErrNotFound, c.UpdateRun(ctx, first))
	must(t, c.UpdateRun(ctx, run("002", "s1", RunRunning)))
	got, err := c.Runs(ctx, "s1", 10)
	must(t, err)
	second := run("002", "s1", RunRunning)
	second.Jobs = []string{}
	if diff := cmp.Diff([]ScheduleRun{second, first}, got); diff != "" {
		t.Error(diff)
	}
	for i := range keptRuns {
		skipped := run(fmt.Sprintf("1%03d", i), "s1", RunSkipped)
		skipped.Finished = epoch
		must(t, c.AddRun(ctx, skipped))
	}
	if got, err = c.Runs(ctx, "s1", 1000); err != nil || len(got) != keptRuns+1 || got[keptRuns].ID != "002" {
		t.Errorf("%d runs are kept, %v", len(got), err)
	}
	done := run("005", "s2", RunSucceeded)
	done.Finished = epoch
	must(t, c.AddRun(ctx, done))
	must(t, c.AddRun(ctx, run("006", "s2", RunWaiting)))
	for schedule, want := range map[string][]string{"s1": {"1099", "002"}, "s2": {"006", "005", "004"}, "": {"1099", "006", "005", "004", "002"}} {
		last, err := c.LastRuns(ctx, schedule)
		must(t, err)
		var ids []string
		for _, r := range last {
			ids = append(ids, r.ID)
		}
		if diff := cmp.Diff(want, ids); diff != "" {
			t.Errorf("the last of %q: %s", schedule, diff)
		}
	}
	must(t, c.UpdateRun(ctx, ScheduleRun{ID: "006", Schedule: "s2", State: RunSkipped, Finished: epoch}))
	unfinished, err := c.UnfinishedRuns(ctx, "")
	if err != nil || len(unfinished) != 2 || unfinished[0].ID != "002" || unfinished[1].ID != "004" {
		t.Errorf("%+v, %v", unfinished, err)
	}
}
