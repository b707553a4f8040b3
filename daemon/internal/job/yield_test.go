package job

import (
	"context"
	"sync/atomic"
	"testing"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
)

// yielding is a kind whose jobs give way.
type yielding struct{ kind }

func (yielding) Yields(j catalog.Job) bool { return j.Origin == catalog.OriginSystem }

// TestYield has jobs of the daemon's own give way to one that a user asked for,
// to no other, and not for ever.
func TestYield(t *testing.T) {
	var began, undone, others atomic.Int32
	release := make(chan struct{})
	e := starting(t, Limits{}, map[string]Kind{
		"own": yielding{kind{
			run: func(ctx context.Context, _ *Handle) error {
				began.Add(1)
				select {
				case <-ctx.Done():
					return context.Cause(ctx)
				case <-release:
					return nil
				}
			},
			undo: func(context.Context, *Handle) error { undone.Add(1); return nil },
		}},
		"asked": kind{run: func(context.Context, *Handle) error { others.Add(1); return nil }, undo: nothing},
	})
	own := submit(t, e, Request{Kind: "own", Domain: "a", Origin: catalog.OriginSystem, Attempts: 2})
	for i := range mostYields {
		until(t, func() bool { return int(began.Load()) == i+1 })
		// Another domain's does not disturb it.
		wait(t, e, submit(t, e, Request{Kind: "asked", Domain: "b"}))
		if undone.Load() != int32(i) {
			t.Fatalf("it was undone %d times after it gave way %d times", undone.Load(), i)
		}
		if s := wait(t, e, submit(t, e, Request{Kind: "asked", Domain: "a"})); s.State != catalog.JobSucceeded {
			t.Fatalf("%+v", s)
		}
	}
	until(t, func() bool { return int(began.Load()) == mostYields+1 })
	last := submit(t, e, Request{Kind: "asked", Domain: "a"})
	time.Sleep(50 * time.Millisecond)
	if s, err := e.Job(t.Context(), last); err != nil || s.State != catalog.JobQueued {
		t.Fatalf("it gives way for ever: %+v, %v", s, err)
	}
	close(release)
	s := wait(t, e, own)
	if s.State != catalog.JobSucceeded || s.Attempt != 1 || s.Yielded != mostYields || s.ErrorMessage != "" {
		t.Errorf("%+v", s)
	}
	recorded, err := e.catalog.Job(t.Context(), own)
	if err != nil || recorded.Attempt != 1 || recorded.Yielded != mostYields || recorded.State != catalog.JobSucceeded {
		t.Errorf("recorded as %+v, %v", recorded, err)
	}
	wait(t, e, last)
}

// TestYieldIsCancelled cancels a job that gave way and waits.
func TestYieldIsCancelled(t *testing.T) {
	hold := make(chan struct{})
	e := starting(t, Limits{}, map[string]Kind{
		"own":   yielding{kind{run: func(ctx context.Context, _ *Handle) error { <-ctx.Done(); return context.Cause(ctx) }, undo: nothing}},
		"asked": kind{run: func(context.Context, *Handle) error { <-hold; return nil }, undo: nothing},
	})
	own := submit(t, e, Request{Kind: "own", Domain: "a", Origin: catalog.OriginSystem})
	asked := submit(t, e, Request{Kind: "asked", Domain: "a"})
	until(t, func() bool { s, err := e.Job(t.Context(), asked); return err == nil && s.State == catalog.JobRunning })
	if err := e.Cancel(t.Context(), own); err != nil {
		t.Fatal(err)
	}
	if s := wait(t, e, own); s.State != catalog.JobCancelled {
		t.Errorf("%+v", s)
	}
	close(hold)
	wait(t, e, asked)
}

func until(t *testing.T, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it does not come to that")
		}
	}
}
