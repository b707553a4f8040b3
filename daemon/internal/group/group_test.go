package group

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/job"
)

// work is a kind whose jobs do as their specs say.
type work struct {
	mu   sync.Mutex
	runs map[string]int // by domain
	now  int
	most int // at once
}

type spec struct{ Fails, Waits bool }

func (w *work) Run(ctx context.Context, h *job.Handle) error {
	var s spec
	if err := json.Unmarshal(h.Job().Spec, &s); err != nil {
		return err
	}
	w.mu.Lock()
	if h.Job().Step == "" {
		w.runs[h.Job().Domain]++
	}
	w.now++
	w.most = max(w.most, w.now)
	w.mu.Unlock()
	defer func() {
		w.mu.Lock()
		w.now--
		w.mu.Unlock()
	}()
	if err := h.Step(ctx, "begun", nil); err != nil {
		return err
	}
	if s.Waits {
		<-ctx.Done()
		return context.Cause(ctx)
	}
	select {
	case <-time.After(time.Millisecond):
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if s.Fails {
		return errors.New("broken")
	}
	return nil
}

func (w *work) Undo(context.Context, *job.Handle) error { return nil }

type host struct {
	t       *testing.T
	path    string
	catalog *catalog.Catalog
	engine  *job.Engine
	work    *work
	limits  job.Limits
}

func newHost(t *testing.T, l job.Limits) *host {
	t.Helper()
	directory, err := os.MkdirTemp("/dev/shm", "virtbackup-group") // no kill of the host here, so no disk is needed
	if err != nil {
		t.Fatal(err)
	}
	h := &host{t: t, path: filepath.Join(directory, "catalog.sqlite"), work: &work{runs: map[string]int{}}, limits: l}
	h.start()
	t.Cleanup(func() {
		h.stop()
		h.must(os.RemoveAll(directory))
	})
	return h
}

func (h *host) must(err error) {
	h.t.Helper()
	if err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) start() {
	var err error
	h.catalog, err = catalog.Open(context.Background(), h.path)
	h.must(err)
	h.engine = job.New(h.catalog, map[string]job.Kind{"work": h.work, KindName: Kind{h.catalog}}, job.Options{
		Limits: h.limits, Classes: map[string]job.Class{"work": job.ClassBackup, KindName: job.ClassGroup},
		Logger: slog.New(slog.DiscardHandler), KeepFor: time.Hour, KeepMost: 1000,
	})
	h.must(h.engine.Start(context.Background()))
}

func (h *host) stop() {
	h.engine.Stop()
	h.must(h.catalog.Close())
}

func (h *host) submit(uid uint32, sequential bool, specs ...spec) string {
	h.t.Helper()
	r := Request{Sequential: sequential}
	for i, s := range specs {
		domain := fmt.Sprintf("d%d", i)
		m, err := NewMember(domain, job.Request{Kind: "work", Domain: domain, Spec: s})
		h.must(err)
		r.Members = append(r.Members, m)
	}
	s, err := h.engine.Submit(context.Background(), job.Request{Kind: KindName, Spec: r, UID: uid, Priority: new(70)})
	h.must(err)
	return s.ID
}

func (h *host) wait(id string) job.Status {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	s, err := h.engine.Wait(ctx, id)
	h.must(err)
	return s
}

func one(n int) job.Limits {
	return job.Limits{Concurrent: map[job.Class]int{job.ClassBackup: n}}
}

func TestGroup(t *testing.T) {
	for name, c := range map[string]struct {
		limits     job.Limits
		sequential bool
		most       int
	}{
		"parallel":               {one(3), false, 3},
		"parallel, in one slot":  {one(1), false, 1},
		"sequential":             {one(3), true, 1},
		"one job of a user":      {job.Limits{PerUser: 1}, false, 1},
		"one place in the queue": {job.Limits{Concurrent: map[job.Class]int{job.ClassBackup: 1}, Queue: 1}, false, 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t, c.limits)
			s := h.wait(h.submit(7, c.sequential, spec{}, spec{Fails: true}, spec{}))
			if s.State != catalog.JobFailed || s.ErrorMessage != "1 of 3 failed: d1: broken" || h.work.most > c.most {
				t.Errorf("%d at once: %+v", h.work.most, s)
			}
			var outcomes []Outcome
			h.must(json.Unmarshal(s.Result, &outcomes))
			children, err := h.catalog.ChildJobs(t.Context(), s.ID)
			h.must(err)
			if len(outcomes) != 3 || len(children) != 3 {
				t.Fatalf("%+v of %+v", outcomes, children)
			}
			for i, j := range children {
				if j.Parent != s.ID || j.UID != 7 || j.Priority != 70 || outcomes[i].Job != j.ID || outcomes[i].State != j.State {
					t.Errorf("%+v of %+v", outcomes[i], j)
				}
			}
		})
	}
}

func TestGroupIsCancelled(t *testing.T) {
	h := newHost(t, one(1))
	id := h.submit(0, false, spec{Waits: true}, spec{Waits: true}, spec{})
	for len(h.children(id)) < 3 {
		time.Sleep(time.Millisecond)
	}
	h.must(h.engine.Cancel(t.Context(), id))
	if s := h.wait(id); s.State != catalog.JobCancelled {
		t.Errorf("got %+v", s)
	}
	for _, j := range h.children(id) {
		if j.State != catalog.JobCancelled {
			t.Errorf("got %+v", j)
		}
	}
}

func (h *host) children(id string) []catalog.Job {
	h.t.Helper()
	all, err := h.catalog.ChildJobs(context.Background(), id)
	h.must(err)
	return all
}

// TestGroupRestarts stops the daemon at any moment, and starts it again: each
// job of a group is made once, and the group ends once all have.
func TestGroupRestarts(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		h := newHost(t, one(rapid.IntRange(1, 2).Draw(rt, "slots")))
		var specs []spec
		failing := 0
		for range rapid.IntRange(1, 4).Draw(rt, "jobs") {
			s := spec{Fails: rapid.Bool().Draw(rt, "fails")}
			if specs = append(specs, s); s.Fails {
				failing++
			}
		}
		id := h.submit(0, rapid.Bool().Draw(rt, "sequential"), specs...)
		for range rapid.IntRange(0, 3).Draw(rt, "restarts") {
			time.Sleep(time.Duration(rapid.IntRange(0, 3000).Draw(rt, "µs")) * time.Microsecond)
			h.stop()
			h.start()
		}
		s := h.wait(id)
		if (s.State == catalog.JobSucceeded) != (failing == 0) || failing > 0 && !strings.HasPrefix(s.ErrorMessage, fmt.Sprintf("%d of %d failed", failing, len(specs))) {
			rt.Errorf("got %+v", s)
		}
		children := h.children(id)
		if len(children) != len(specs) || slices.ContainsFunc(children, func(j catalog.Job) bool { return !j.State.Ended() }) {
			rt.Errorf("%+v", children)
		}
		for domain, n := range h.work.runs {
			if n != 1 {
				rt.Errorf("the job of %s began %d times", domain, n)
			}
		}
	})
}
