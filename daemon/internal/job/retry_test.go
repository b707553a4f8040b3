package job

import (
	"context"
	"errors"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
)

// retried is a kind whose jobs can be tried again.
type retried struct{ kind }

func (retried) Again(j catalog.Job) string { return j.Backup + "'" }

// starting is start with what it takes to try jobs again.
func starting(t *testing.T, l Limits, kinds map[string]Kind) *Engine {
	t.Helper()
	c := openCatalog(t, filepath.Join(t.TempDir(), "catalog.sqlite"))
	o := options(l)
	o.Passing = func(err error) bool { return errors.Is(err, errPassing) }
	e := New(c, kinds, o)
	must(t, e.Start(t.Context()))
	t.Cleanup(func() {
		e.Stop()
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return e
}

func nothing(context.Context, *Handle) error { return nil }

func TestRetry(t *testing.T) {
	var tries atomic.Int32
	failing := func(times int32, err error) kind {
		return kind{run: func(context.Context, *Handle) error {
			if tries.Add(1) <= times {
				return err
			}
			return nil
		}, undo: nothing}
	}
	for name, c := range map[string]struct {
		kind  Kind
		state catalog.JobState
		tries int
	}{
		"passes":                {retried{failing(2, errPassing)}, catalog.JobSucceeded, 3},
		"does not pass":         {retried{failing(9, errPassing)}, catalog.JobFailed, 3},
		"is not to pass":        {retried{failing(2, errStep)}, catalog.JobFailed, 1},
		"cannot be tried again": {failing(2, errPassing), catalog.JobFailed, 1},
		"cannot be undone":      {retried{kind{run: failing(2, errPassing).run}}, catalog.JobFailed, 1},
	} {
		t.Run(name, func(t *testing.T) {
			tries.Store(0)
			e := starting(t, Limits{RetryDelay: time.Millisecond}, map[string]Kind{"k": c.kind})
			s := wait(t, e, submit(t, e, Request{Kind: "k", Backup: "b", Attempts: 3}))
			if s.State != c.state || s.Attempt != c.tries || int(tries.Load()) != c.tries || s.Backup != "b"+strings.Repeat("'", c.tries-1) ||
				(s.ErrorMessage == "") != (c.state == catalog.JobSucceeded) {
				t.Errorf("after %d tries: %+v", tries.Load(), s)
			}
			recorded, err := e.catalog.Job(t.Context(), s.ID)
			if err != nil || recorded.State != s.State || recorded.Attempt != s.Attempt || recorded.Backup != s.Backup {
				t.Errorf("recorded as %+v, %v", recorded, err)
			}
		})
	}
}

// TestRetryWaits cancels a job that waits for its next try, and lets others of
// its domain go before it meanwhile.
func TestRetryWaits(t *testing.T) {
	e := starting(t, Limits{RetryDelay: time.Hour}, map[string]Kind{
		"k":     retried{kind{run: func(context.Context, *Handle) error { return errPassing }, undo: nothing}},
		"other": kind{run: nothing},
	})
	id := submit(t, e, Request{Kind: "k", Domain: "d", Attempts: 2})
	told := make(chan Status, 100)
	defer e.Subscribe(func(s Status) { told <- s })()
	s, err := e.Job(t.Context(), id)
	for must(t, err); s.State != catalog.JobQueued || s.Attempt == 0; {
		s = <-told
	}
	if !strings.Contains(s.Waiting, "try 2 of 2 is at ") || !strings.Contains(s.Waiting, "after: "+errPassing.Error()) || !s.Started.IsZero() {
		t.Errorf("waits as %+v", s)
	}
	if s := wait(t, e, submit(t, e, Request{Kind: "other", Domain: "d"})); s.State != catalog.JobSucceeded {
		t.Errorf("got %+v", s)
	}
	must(t, e.Cancel(t.Context(), id))
	if s := wait(t, e, id); s.State != catalog.JobCancelled || s.ErrorName != nameCancelled || s.Waiting != "" {
		t.Errorf("got %+v", s)
	}
}

func TestOverdue(t *testing.T) {
	busy := func(ctx context.Context, h *Handle) error { // it makes progress
		for i := uint64(1); ctx.Err() == nil; i++ {
			h.Progress("copying", i, 1000)
			time.Sleep(time.Millisecond)
		}
		return errors.New("interrupted")
	}
	hangs := func(ctx context.Context, h *Handle) error {
		h.Progress("copying", 1, 2)
		<-ctx.Done()
		return errors.New("interrupted")
	}
	waits := func(ctx context.Context, h *Handle) error { // for something else
		h.Progress("copying", 1, 2)
		h.Waits("ready")
		select {
		case <-ctx.Done():
			return errors.New("interrupted")
		case <-time.After(4 * overseeEach):
			return nil
		}
	}
	const short, long = 2 * overseeEach, time.Hour
	for name, c := range map[string]struct {
		run       func(context.Context, *Handle) error
		limits    Limits
		state     catalog.JobState
		errorName string
		says      string
		attempt   int
	}{
		"progress, too slow": {busy, Limits{Stall: short, Timeout: map[Class]time.Duration{"": 4 * overseeEach}}, catalog.JobFailed, "TimedOut", "not done within 1s", 1},
		"no progress":        {hangs, Limits{Stall: short, RetryDelay: time.Millisecond, Timeout: map[Class]time.Duration{"": long}}, catalog.JobFailed, "Stalled", `no progress for 500ms (jobs.stall_limit) in phase "copying"`, 2},
		"waits":              {waits, Limits{Stall: short, Timeout: map[Class]time.Duration{"": long}}, catalog.JobSucceeded, "", "", 1},
		"no limit":           {waits, Limits{}, catalog.JobSucceeded, "", "", 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e := starting(t, c.limits, map[string]Kind{"k": retried{kind{run: c.run, undo: nothing}}})
			var named atomic.Bool
			stop := e.Subscribe(func(s Status) {
				if strings.Contains(s.Waiting, "makes no progress since") && s.State == catalog.JobRunning {
					named.Store(true)
				}
			})
			s := wait(t, e, submit(t, e, Request{Kind: "k", Attempts: 2}))
			stop()
			if s.State != c.state || s.ErrorName != c.errorName || !strings.Contains(s.ErrorMessage, c.says) || s.Attempt != c.attempt {
				t.Errorf("got %+v", s)
			}
			if named.Load() != (c.errorName == "Stalled") {
				t.Errorf("told that it makes no progress: %v", named.Load())
			}
		})
	}
}

// TestLive changes what holds jobs back while they wait.
func TestLive(t *testing.T) {
	running := make(chan string, 10)
	one := Limits{Concurrent: map[Class]int{"": 1}}
	e := start(t, one, map[string]Kind{"k": waits(running)})
	release := e.Inhibit(Inhibitor{Who: "apt", Why: "an upgrade"})
	if all := e.Inhibitors(); len(all) != 1 || all[0].Why != "an upgrade" || all[0].ID == "" || all[0].Since.IsZero() {
		t.Errorf("got %+v", all)
	}
	first, second := submit(t, e, Request{Kind: "k"}), submit(t, e, Request{Kind: "k", Priority: new(0)})
	third := submit(t, e, Request{Kind: "k", Origin: catalog.OriginSchedule})
	says := func(id, part string) {
		t.Helper()
		if s, err := e.Job(t.Context(), id); err != nil || !strings.Contains(s.Waiting, part) || (part == "") != (s.Waiting == "") {
			t.Errorf("waits as %q instead of %q, %v", s.Waiting, part, err)
		}
	}
	says(first, "held back by apt: an upgrade")
	release()
	release()
	says(second, "slot: 1 of 1 are taken")
	two := one
	two.Concurrent, two.Window = map[Class]int{"": 5}, opens(time.Now().Add(time.Hour))
	e.SetLimits(two)
	got := map[string]bool{<-running: true, <-running: true}
	if !got[first] || !got[second] || len(running) > 0 {
		t.Errorf("%v run", got)
	}
	says(third, "waits for the maintenance window")
	two.Window = opens(time.Now().Add(50 * time.Millisecond))
	e.SetLimits(two)
	if id := <-running; id != third {
		t.Errorf("%s runs", id)
	}
	says(third, "")
}
