package schedule

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/systemd/timer"
)

// host is systemd, and who makes backups, for a Keeper with a real catalog. The
// real systemd is in daemon/labtest.
type host struct {
	*Keeper
	t *testing.T

	mu       sync.Mutex
	timers   map[string]bool // by id of the schedule: whether it runs
	broken   error           // what systemd fails with
	obstacle *Obstacle
	leftOut  []string
	refused  error
	started  int
}

func newHost(t *testing.T) *host {
	t.Helper()
	c, err := catalog.Open(t.Context(), filepath.Join(t.TempDir(), "catalog"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	h := &host{t: t, timers: map[string]bool{}}
	h.Keeper = New(c, systemd{h}, slog.New(slog.DiscardHandler))
	h.Use(h)
	return h
}

func (h *host) Set(_ context.Context, t timer.Timer, enabled bool) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.broken == nil {
		h.timers[t.ID] = enabled
	}
	return h.broken
}

func (h *host) IDs() ([]string, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Collect(maps.Keys(h.timers)), h.broken
}

func (h *host) State(_ context.Context, id string) (timer.State, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return timer.State{Active: h.timers[id], Next: time.Now().Add(time.Hour)}, h.broken
}

// systemd is a host's Timers: Keeper has a Remove of its own.
type systemd struct{ *host }

func (s systemd) Remove(_ context.Context, id string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.broken == nil {
		delete(s.timers, id)
	}
	return s.broken
}

func (h *host) Prepare(context.Context, catalog.Schedule) (Work, *Obstacle) {
	if h.obstacle != nil {
		return Work{}, h.obstacle
	}
	return Work{LeftOut: h.leftOut, Start: h.begin}, nil
}

// begin starts two jobs.
func (h *host) begin(ctx context.Context, r catalog.ScheduleRun) (jobs []string, err error) {
	if h.refused != nil {
		return nil, h.refused
	}
	for range 2 {
		h.started++
		id := fmt.Sprintf("J%d", h.started)
		if err := h.catalog.CreateJob(ctx, catalog.Job{ID: id, Kind: "backup", Domain: "web", Schedule: r.Schedule, Created: time.Now()}); err != nil {
			h.t.Fatal(err)
		}
		jobs = append(jobs, id)
	}
	return jobs, nil
}

func (h *host) DomainName(_ context.Context, uuid string) string { return uuid }
func (h *host) ScheduleChanged(string)                           {}

// schedule makes a schedule.
func (h *host) schedule(id string, overlap catalog.Overlap) {
	h.t.Helper()
	s := catalog.Schedule{ID: id, Name: id, Domain: "web", Calendars: []string{"daily"}, Overlap: overlap, Enabled: true, Created: time.Now()}
	if err := h.Create(h.t.Context(), s); err != nil {
		h.t.Fatal(err)
	}
}

// trigger triggers a schedule, and expects what becomes of that.
func (h *host) trigger(id string, want catalog.RunState, reason string) catalog.ScheduleRun {
	h.t.Helper()
	r, err := h.Trigger(h.t.Context(), id, Trigger{Timer: true})
	if err != nil || r.State != want || !strings.Contains(r.Reason, reason) {
		h.t.Errorf("%+v, %v instead of %s (%s)", r, err, want, reason)
	}
	return r
}

// end ends jobs, and has the keeper see it.
func (h *host) end(state catalog.JobState, jobs ...string) {
	h.t.Helper()
	for _, id := range jobs {
		if err := h.catalog.EndJob(h.t.Context(), id, catalog.JobEnd{State: state, ErrorMessage: "no", Finished: time.Now()}); err != nil {
			h.t.Fatal(err)
		}
	}
	h.settleAll(h.t.Context())
}

// states are those of a schedule's runs, newest first.
func (h *host) states(id string) string {
	h.t.Helper()
	runs, err := h.catalog.Runs(h.t.Context(), id, 100)
	if err != nil {
		h.t.Fatal(err)
	}
	var all []string
	for _, r := range runs {
		all = append(all, string(r.State))
		if r.State.Ended() == r.Finished.IsZero() {
			h.t.Errorf("%+v", r)
		}
	}
	return strings.Join(all, " ")
}

func (h *host) expect(id, want string) {
	h.t.Helper()
	if got := h.states(id); got != want {
		h.t.Errorf("the runs are %q instead of %q", got, want)
	}
}

func TestRunsOfASchedule(t *testing.T) {
	h := newHost(t)
	h.schedule("s", catalog.OverlapQueue)
	h.leftOut = []string{"mail is gone"}
	first := h.trigger("s", catalog.RunRunning, "mail is gone")
	h.trigger("s", catalog.RunWaiting, "still goes on")
	h.trigger("s", catalog.RunSkipped, "waits already")
	h.end(catalog.JobSucceeded, first.Jobs[0])
	h.expect("s", "skipped waiting running")
	h.end(catalog.JobFailed, first.Jobs[1])
	h.expect("s", "skipped running failed")
	runs, err := h.catalog.Runs(t.Context(), "s", 3)
	if err != nil || runs[2].Reason != "1 of 2 backups were not made: web: no; mail is gone" || runs[1].Reason != "mail is gone" {
		t.Errorf("%+v, %v", runs, err)
	}
	h.end(catalog.JobSucceeded, runs[1].Jobs...)
	h.expect("s", "skipped succeeded failed")

	// What is in the way, and goes.
	h.obstacle = &Obstacle{"it is away", true}
	h.trigger("s", catalog.RunWaiting, "it is away")
	h.obstacle = &Obstacle{"it is still away", true}
	h.settleAll(t.Context())
	h.trigger("s", catalog.RunSkipped, "it is still away")
	h.obstacle = nil
	h.settleAll(t.Context())
	h.expect("s", "skipped running skipped succeeded failed")
	h.end(catalog.JobCancelled, "J5", "J6")
	h.obstacle = &Obstacle{"it is away", true}
	h.trigger("s", catalog.RunWaiting, "it is away")
	h.obstacle = &Obstacle{"it is gone", false}
	h.settleAll(t.Context())
	h.expect("s", "skipped skipped cancelled skipped succeeded failed")
	h.obstacle, h.refused = nil, errors.New("too many jobs")
	h.trigger("s", catalog.RunFailed, "too many jobs; mail is gone")
	if h.started != 6 {
		t.Errorf("%d jobs were started", h.started)
	}
}

// TestRunsAfterACrash has the daemon die before it recorded which jobs it started.
func TestRunsAfterACrash(t *testing.T) {
	h := newHost(t)
	h.schedule("s", catalog.OverlapSkip)
	if err := h.catalog.AddRun(t.Context(), catalog.ScheduleRun{ID: "00", Schedule: "s", State: catalog.RunRunning, Created: time.Now()}); err != nil {
		t.Fatal(err)
	}
	started := h.trigger("s", catalog.RunRunning, "")
	h.expect("s", "running failed")

	// The jobs were started, and only that was not recorded.
	started.Jobs = nil
	if err := h.catalog.UpdateRun(t.Context(), started); err != nil {
		t.Fatal(err)
	}
	h.settleAll(t.Context())
	h.expect("s", "running failed")
	h.end(catalog.JobSucceeded, "J1", "J2")
	h.expect("s", "succeeded failed")
}

func TestDisabledScheduleDoesNotRun(t *testing.T) {
	h := newHost(t)
	h.schedule("s", catalog.OverlapQueue)
	h.obstacle = &Obstacle{"it is away", true}
	h.trigger("s", catalog.RunWaiting, "it is away")
	if err := h.Change(t.Context(), "s", func(s *catalog.Schedule) error { s.Enabled = false; return nil }); err != nil {
		t.Fatal(err)
	}
	h.obstacle = nil
	h.settleAll(t.Context())
	h.trigger("s", catalog.RunSkipped, "disabled")
	h.expect("s", "skipped cancelled")
	if r, err := h.Trigger(t.Context(), "s", Trigger{UID: 7}); err != nil || r.State != catalog.RunRunning || r.UID != 7 {
		t.Errorf("a person's: %+v, %v", r, err)
	}
}

// TestScheduleIsAsItsTimer has systemd fail: nothing is kept of which there is no timer.
func TestScheduleIsAsItsTimer(t *testing.T) {
	h := newHost(t)
	h.schedule("s", catalog.OverlapSkip)
	h.broken = errors.New("systemd is away")
	s := catalog.Schedule{ID: "t", Name: "t", Domain: "web", Overlap: catalog.OverlapSkip, Enabled: true}
	if err := h.Create(t.Context(), s); !errors.Is(err, h.broken) {
		t.Error(err)
	}
	if err := h.Change(t.Context(), "s", func(s *catalog.Schedule) error { s.Calendars = []string{"weekly"}; return nil }); !errors.Is(err, h.broken) {
		t.Error(err)
	}
	if err := h.Remove(t.Context(), "s"); !errors.Is(err, h.broken) {
		t.Error(err)
	}
	if all, err := h.catalog.Schedules(t.Context()); err != nil || len(all) != 1 || all[0].Calendars[0] != "daily" {
		t.Errorf("%+v, %v", all, err)
	}
	if err := h.Reconcile(t.Context()); !errors.Is(err, h.broken) {
		t.Error(err)
	}
	h.broken = nil
	h.timers = map[string]bool{"orphan": true}
	if err := h.Reconcile(t.Context()); err != nil || !maps.Equal(h.timers, map[string]bool{"s": true}) {
		t.Errorf("%v, %v", h.timers, err)
	}
	if err := h.Remove(t.Context(), "s"); err != nil || len(h.timers) != 0 {
		t.Errorf("%v, %v", h.timers, err)
	}
}
