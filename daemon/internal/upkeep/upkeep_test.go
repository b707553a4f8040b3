package upkeep

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/job"
)

func TestMissing(t *testing.T) {
	active := func(kind, backup string, origin catalog.JobOrigin) job.Status {
		return job.Status{Job: catalog.Job{Kind: kind, Domain: "d", Repository: "r", Backup: backup, Origin: origin}}
	}
	due := func(kind, backup string) job.Request {
		return job.Request{Kind: kind, Domain: "d", Repository: "r", Backup: backup}
	}
	got := missing([]job.Request{due("compress", "1"), due("compress", "2"), due("compress", "2"), due("validate", "1")},
		[]job.Status{active("compress", "1", catalog.OriginUser), active("verify", "1", catalog.OriginSystem)})
	if len(got) != 2 || got[0].Backup != "2" || got[1].Kind != "validate" || got[0].Origin != catalog.OriginSystem || *got[0].Priority != priority {
		t.Errorf("submits %+v", got)
	}
	var many []job.Request
	for i := range 2 * most {
		many = append(many, due("compress", fmt.Sprint(i)))
	}
	if got := missing(many, []job.Status{active("compress", "x", catalog.OriginSystem), active("compress", "y", catalog.OriginUser)}); len(got) != most-1 {
		t.Errorf("submits %d", len(got))
	}
}

// engine counts what it is asked for.
type engine struct {
	submitted atomic.Int32
	refuse    atomic.Bool
	told      func(job.Status)
}

func (e *engine) Submit(context.Context, job.Request) (job.Status, error) {
	if e.refuse.Load() {
		return job.Status{}, errors.New("full")
	}
	e.submitted.Add(1)
	return job.Status{}, nil
}
func (e *engine) Active() []job.Status { return nil }
func (e *engine) Subscribe(fn func(job.Status)) func() {
	e.told = fn
	return func() {}
}

// chore is asked, and has one thing to do each time.
type chore struct {
	asked atomic.Int32
	err   error
}

func (c *chore) Name() string { return "test" }
func (c *chore) Due(context.Context, time.Time) ([]job.Request, error) {
	return []job.Request{{Kind: "compress", Backup: fmt.Sprint(c.asked.Add(1))}}, c.err
}

func TestRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, failing, good := &engine{}, &chore{err: errors.New("no")}, &chore{}
		k := &Keeper{Chores: []Chore{failing, good}, Jobs: e, Log: slog.New(slog.DiscardHandler)}
		ctx, cancel := context.WithCancel(t.Context())
		go k.Run(ctx)
		at := func(d time.Duration, asked, submitted int32) {
			t.Helper()
			time.Sleep(d)
			synctest.Wait()
			if failing.asked.Load() != asked || good.asked.Load() != asked || e.submitted.Load() != submitted {
				t.Errorf("asked %d and %d times, submitted %d; should be %d, %d", failing.asked.Load(), good.asked.Load(), e.submitted.Load(), asked, submitted)
			}
		}
		at(2*soon, 1, 1)
		e.told(job.Status{Job: catalog.Job{State: catalog.JobRunning}})
		at(2*soon, 1, 1)
		for range 10 { // many that end ask once
			e.told(job.Status{Job: catalog.Job{State: catalog.JobFailed}})
		}
		at(2*soon, 2, 2)
		at(every, 3, 3)
		e.refuse.Store(true)
		at(every, 4, 3)
		cancel()
		synctest.Wait()
	})
}
