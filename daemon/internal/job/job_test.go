package job

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
)

// kind is a Kind of two functions.
type kind struct {
	run, undo func(ctx context.Context, h *Handle) error
}

func (k kind) Run(ctx context.Context, h *Handle) error { return k.run(ctx, h) }

func (k kind) Undo(ctx context.Context, h *Handle) error {
	if k.undo == nil {
		return errors.New("not to be undone")
	}
	return k.undo(ctx, h)
}

// waits is a kind that tells when it runs, and then waits for its context.
func waits(running chan<- string) kind {
	return kind{
		run: func(ctx context.Context, h *Handle) error {
			running <- h.Job().ID
			<-ctx.Done()
			return context.Cause(ctx)
		},
		undo: func(context.Context, *Handle) error { return nil },
	}
}

func openCatalog(t *testing.T, path string) *catalog.Catalog {
	t.Helper()
	c, err := catalog.Open(t.Context(), path)
	must(t, err)
	return c
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func options(l Limits) Options {
	return Options{Limits: l, Logger: slog.New(slog.DiscardHandler), KeepFor: time.Hour, KeepMost: 1000}
}

// start makes an engine on a catalog of its own, which end with the test.
func start(t *testing.T, l Limits, kinds map[string]Kind) *Engine {
	t.Helper()
	c := openCatalog(t, filepath.Join(t.TempDir(), "catalog.sqlite"))
	e := New(c, kinds, options(l))
	must(t, e.Start(t.Context()))
	t.Cleanup(func() {
		e.Stop()
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return e
}

func submit(t *testing.T, e *Engine, r Request) string {
	t.Helper()
	s, err := e.Submit(t.Context(), r)
	must(t, err)
	return s.ID
}

func wait(t *testing.T, e *Engine, id string) Status {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	s, err := e.Wait(ctx, id)
	must(t, err)
	return s
}

type namedFailure struct{ error }

func (namedFailure) ErrorName() string { return "RepositoryFull" }

func TestEnds(t *testing.T) {
	nothing := func(context.Context, *Handle) error { return nil }
	failure := errors.New("broken")
	for name, c := range map[string]struct {
		kind       kind
		state      catalog.JobState
		errorName  string
		errorParts []string
	}{
		"success": {kind{nothing, nil}, catalog.JobSucceeded, "", nil},
		"failure": {kind{func(context.Context, *Handle) error { return failure }, nothing}, catalog.JobFailed, "Failed", []string{"broken"}},
		"named failure": {kind{func(context.Context, *Handle) error { return namedFailure{failure} }, nothing},
			catalog.JobFailed, "RepositoryFull", []string{"broken"}},
		"failure of the clearing up": {kind{func(context.Context, *Handle) error { return failure }, nil},
			catalog.JobFailed, "Failed", []string{"broken", "not to be undone"}},
		"panic":       {kind{func(context.Context, *Handle) error { panic("oops") }, nothing}, catalog.JobFailed, "Internal", []string{"internal error: oops"}},
		"nil pointer": {kind{func(context.Context, *Handle) error { var h *Handle; h.Job(); return nil }, nothing}, catalog.JobFailed, "Internal", []string{"nil pointer"}},
		"panic in the clearing up": {kind{func(context.Context, *Handle) error { return failure }, func(context.Context, *Handle) error { panic("oops") }},
			catalog.JobFailed, "Failed", []string{"broken", "oops"}},
	} {
		t.Run(name, func(t *testing.T) {
			e := start(t, Limits{}, map[string]Kind{"k": c.kind})
			id := submit(t, e, Request{Kind: "k", UID: 7})
			s := wait(t, e, id)
			if s.State != c.state || s.ErrorName != c.errorName || s.UID != 7 || s.Finished.IsZero() {
				t.Errorf("got %+v", s)
			}
			for _, part := range c.errorParts {
				if !strings.Contains(s.ErrorMessage, part) {
					t.Errorf("%q does not say %q", s.ErrorMessage, part)
				}
			}
			if err := e.Cancel(t.Context(), id); !errors.Is(err, catalog.ErrState) {
				t.Errorf("cancelled after its end: %v", err)
			}
		})
	}
}

func TestJobTellsWhatItDid(t *testing.T) {
	e := start(t, Limits{}, map[string]Kind{"k": kind{run: func(ctx context.Context, h *Handle) error {
		var spec struct{ Full bool }
		if err := json.Unmarshal(h.Job().Spec, &spec); err != nil || !spec.Full {
			return errors.New("no spec")
		}
		h.Log(ctx, slog.LevelWarn, "agent is away")
		h.Progress("copying", 3, 4)
		return errors.Join(h.Step(ctx, "frozen", map[string]int{"n": 1}), h.SetResult("done"))
	}}})
	id := submit(t, e, Request{Kind: "k", Domain: "d", Repository: "r", Backup: "b", Spec: map[string]bool{"Full": true}})
	s := wait(t, e, id)
	if s.State != catalog.JobSucceeded || s.Phase != "copying" || s.Done != 3 || s.Total != 4 || string(s.Result) != `"done"` ||
		s.Step != "frozen" || string(s.StepData) != `{"n":1}` || s.Domain != "d" || s.Repository != "r" || s.Backup != "b" {
		t.Errorf("got %+v", s)
	}
	messages, err := e.catalog.JobMessages(t.Context(), id)
	must(t, err)
	if len(messages) != 1 || messages[0].Text != "agent is away" || messages[0].Level != slog.LevelWarn {
		t.Errorf("got %+v", messages)
	}
	if _, err := e.Submit(t.Context(), Request{Kind: "other"}); !errors.Is(err, ErrUnknownKind) {
		t.Errorf("got %v", err)
	}
	if _, err := e.Wait(t.Context(), "nothing"); !errors.Is(err, catalog.ErrNotFound) {
		t.Errorf("got %v", err)
	}
}

func TestCancel(t *testing.T) {
	running := make(chan string, 10)
	late := kind{run: func(ctx context.Context, h *Handle) error {
		running <- h.Job().ID
		<-ctx.Done()
		return h.Step(ctx, "committed", nil) // also with its context cancelled
	}}
	e := start(t, Limits{Concurrent: map[Class]int{"": 1}}, map[string]Kind{"waits": waits(running), "late": late})
	first := submit(t, e, Request{Kind: "waits"})
	queued := submit(t, e, Request{Kind: "waits"})
	third := submit(t, e, Request{Kind: "late"})
	must(t, e.Cancel(t.Context(), queued))
	if s := wait(t, e, queued); s.State != catalog.JobCancelled || !s.Started.IsZero() {
		t.Errorf("cancelled while it waited: %+v", s)
	}
	if got := <-running; got != first {
		t.Errorf("%s runs, not %s", got, first)
	}
	must(t, e.Cancel(t.Context(), first))
	if s := wait(t, e, first); s.State != catalog.JobCancelled || s.ErrorName != "Cancelled" {
		t.Errorf("cancelled while it ran: %+v", s)
	}
	if got := <-running; got != third {
		t.Errorf("%s runs, not %s", got, third)
	}
	must(t, e.Cancel(t.Context(), third))
	if s := wait(t, e, third); s.State != catalog.JobSucceeded || s.Step != "committed" {
		t.Errorf("cancelled too late: %+v", s)
	}
}

// TestRestart stops the engine at each point of a job's life, and starts another one.
func TestRestart(t *testing.T) {
	path := filepath.Join(t.TempDir(), "catalog.sqlite")
	c := openCatalog(t, path)
	defer func() { must(t, c.Close()) }()
	running, undoing := make(chan string, 10), make(chan string, 10)
	old := New(c, map[string]Kind{
		"step": kind{run: func(ctx context.Context, h *Handle) error {
			if err := h.Step(ctx, "two", 2); err != nil {
				return err
			}
			running <- h.Job().ID
			<-ctx.Done()
			return context.Cause(ctx)
		}},
		"undo": kind{run: func(context.Context, *Handle) error { return namedFailure{errors.New("broken")} },
			undo: func(ctx context.Context, h *Handle) error {
				undoing <- h.Job().ID
				<-ctx.Done()
				return context.Cause(ctx)
			}},
		"gone": waits(running),
	}, options(Limits{Concurrent: map[Class]int{"": 4}}))
	must(t, old.Start(t.Context()))
	resumed, undone := submit(t, old, Request{Kind: "step"}), submit(t, old, Request{Kind: "undo"})
	cancelled, gone := submit(t, old, Request{Kind: "step"}), submit(t, old, Request{Kind: "gone"})
	waiting, cancelledWaiting := submit(t, old, Request{Kind: "step"}), submit(t, old, Request{Kind: "step"})
	for range 3 {
		<-running
	}
	<-undoing
	old.Stop()
	// As if the daemon had been killed between the record and its effect.
	must(t, c.CancelJob(t.Context(), cancelled))
	must(t, c.CancelJob(t.Context(), cancelledWaiting))
	if _, err := old.Submit(t.Context(), Request{Kind: "step"}); !errors.Is(err, ErrDetach) {
		t.Errorf("accepted after Stop: %v", err)
	}

	var mu sync.Mutex
	steps := map[string]string{}
	e := New(c, map[string]Kind{
		"step": kind{run: func(ctx context.Context, h *Handle) error {
			mu.Lock()
			steps[h.Job().ID] = h.Job().Step
			mu.Unlock()
			return context.Cause(ctx)
		}, undo: func(context.Context, *Handle) error { return nil }},
		"undo": kind{run: func(context.Context, *Handle) error { return errors.New("run after its failure") },
			undo: func(_ context.Context, h *Handle) error {
				if h.Failure().Error() != "broken" {
					return errors.New("does not know why")
				}
				return nil
			}},
	}, options(Limits{}))
	must(t, e.Start(t.Context()))
	defer e.Stop()
	for id, want := range map[string]catalog.JobState{resumed: catalog.JobSucceeded, waiting: catalog.JobSucceeded, undone: catalog.JobFailed,
		cancelled: catalog.JobCancelled, cancelledWaiting: catalog.JobCancelled, gone: catalog.JobFailed} {
		if s := wait(t, e, id); s.State != want {
			t.Errorf("want %s, got %+v", want, s)
		}
	}
	if s := wait(t, e, undone); s.ErrorName != "RepositoryFull" || s.ErrorMessage != "broken" {
		t.Errorf("the failure was forgotten: %+v", s)
	}
	if diff := cmp.Diff(map[string]string{resumed: "two", cancelled: "two", waiting: ""}, steps); diff != "" {
		t.Error(diff)
	}
}

func TestOrder(t *testing.T) {
	running := make(chan string, 10)
	e := start(t, Limits{Concurrent: map[Class]int{"": 3}, ConcurrentPerRepository: 2}, map[string]Kind{"k": waits(running)})
	request := func(domain, repository string) string {
		return submit(t, e, Request{Kind: "k", Domain: domain, Repository: repository})
	}
	a1, b1 := request("a", "r1"), request("b", "r1")
	a2 := request("a", "r2") // waits for its domain
	c1 := request("c", "r1") // waits for its repository
	c2 := request("c", "r2") // may not overtake c1
	d1 := request("d", "r2") // may overtake all of them
	e1 := request("e", "r3") // waits: three are running
	next := func(n int, want ...string) {
		t.Helper()
		var got []string
		for range n {
			got = append(got, <-running)
		}
		slices.Sort(got)
		slices.Sort(want)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
	}
	next(3, a1, b1, d1)
	for _, step := range []struct{ ends, starts string }{{a1, a2}, {d1, c1}, {b1, e1}, {c1, c2}} {
		must(t, e.Cancel(t.Context(), step.ends))
		wait(t, e, step.ends)
		next(1, step.starts)
	}
	if len(running) != 0 || len(e.Active()) != 3 {
		t.Errorf("more is running: %d, %+v", len(running), e.Active())
	}
}

func TestTooMany(t *testing.T) {
	running := make(chan string, 10)
	e := start(t, Limits{Concurrent: map[Class]int{"": 1}, PerUser: 2, Queue: 3}, map[string]Kind{"k": waits(running)})
	refused := func(uid uint32) {
		t.Helper()
		if _, err := e.Submit(t.Context(), Request{Kind: "k", UID: uid}); !errors.Is(err, ErrTooMany) {
			t.Errorf("user %d: got %v", uid, err)
		}
	}
	first := submit(t, e, Request{Kind: "k", UID: 1})
	submit(t, e, Request{Kind: "k", UID: 1})
	refused(1)
	submit(t, e, Request{Kind: "k"})
	submit(t, e, Request{Kind: "k"}) // root has no bound but the queue
	refused(0)
	refused(2)
	must(t, e.Cancel(t.Context(), first))
	wait(t, e, first)
	submit(t, e, Request{Kind: "k", UID: 1})
}

func TestSubscribe(t *testing.T) {
	proceed := make(chan struct{})
	e := start(t, Limits{}, map[string]Kind{"k": kind{run: func(_ context.Context, h *Handle) error {
		for i := range uint64(1000) {
			h.Progress("copying", i, 1000)
		}
		<-proceed
		return nil
	}}})
	ended := make(chan []Status, 1)
	var got []Status
	cancel := e.Subscribe(func(s Status) {
		got = append(got, s)
		if s.State.Ended() {
			ended <- got
		}
		if s.Done == 999 && s.State == catalog.JobRunning {
			close(proceed)
		}
	})
	id := submit(t, e, Request{Kind: "k"})
	all := <-ended
	last := all[len(all)-1]
	if last.ID != id || last.State != catalog.JobSucceeded || last.Done != 999 || last.Phase != "copying" {
		t.Errorf("got %+v", last)
	}
	for i := 1; i < len(all); i++ {
		if all[i].Done < all[i-1].Done || all[i-1].State.Ended() {
			t.Errorf("%+v came before %+v", all[i-1], all[i])
		}
	}
	cancel()
	wait(t, e, submit(t, e, Request{Kind: "k"})) // proceed is closed
	if len(got) != len(all) {
		t.Errorf("told of %d changes after it was cancelled", len(got)-len(all))
	}
}

func TestOldJobsAreForgotten(t *testing.T) {
	c := openCatalog(t, filepath.Join(t.TempDir(), "catalog.sqlite"))
	defer func() { must(t, c.Close()) }()
	o := options(Limits{})
	o.KeepMost = 2
	e := New(c, map[string]Kind{"k": kind{run: func(context.Context, *Handle) error { return nil }}}, o)
	must(t, e.Start(t.Context()))
	var ids []string
	for range 4 {
		ids = append(ids, submit(t, e, Request{Kind: "k"}))
		wait(t, e, ids[len(ids)-1])
	}
	e.Stop()
	list, err := c.ListJobs(t.Context(), catalog.JobFilter{}, catalog.Page{})
	must(t, err)
	if len(list) != 2 || list[0].ID != ids[3] || list[1].ID != ids[2] {
		t.Errorf("of %v are left %+v", ids, list)
	}
}

func TestMeter(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	var m meter
	m.update(now, "copying", 0, 1000)
	if m.rate != 0 || m.eta() != 0 {
		t.Errorf("knows a rate at once: %+v", m)
	}
	for i := range uint64(10) { // 100 bytes/s, told in bursts
		now = now.Add(500 * time.Millisecond)
		m.update(now.Add(-time.Millisecond), "copying", (i+1)*50-1, 1000)
		m.update(now, "copying", (i+1)*50, 1000)
	}
	if m.rate < 95 || m.rate > 105 || m.eta() < 4500*time.Millisecond || m.eta() > 5500*time.Millisecond {
		t.Errorf("rate %f, ETA %v", m.rate, m.eta())
	}
	for range 100 { // stalls: the rate falls, and the ETA never overflows
		now = now.Add(time.Minute)
		m.update(now, "copying", 500, 1<<63)
		if m.rate < 0 || m.eta() < 0 {
			t.Fatalf("rate %f, ETA %v", m.rate, m.eta())
		}
	}
	m.update(now, "verifying", 0, 10)
	if m.rate != 0 || m.phase != "verifying" || m.eta() != 0 {
		t.Errorf("a new phase goes on with %+v", m)
	}
}
