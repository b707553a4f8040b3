// Package upkeep has finished backups looked after without anybody asking: it
// asks from time to time what is due, such as to compress, validate or verify
// one, and submits that as jobs of the daemon's own. What is due, each chore
// knows by itself; how many of these jobs run when, the job engine's limits say.
package upkeep

import (
	"context"
	"log/slog"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/job"
)

const (
	// every is how often it is asked what is due.
	every = time.Minute
	// soon is after a job ended: what it made may be due, and others may have ended beside it.
	soon = time.Second
	// most is how many unfinished jobs a chore may have: the queue is for people, too.
	most = 20
	// priority lets everything else go first.
	priority = 10
)

// Chore knows what is due of one kind of work.
type Chore interface {
	Name() string
	// Due returns the jobs that are due, the most urgent first. It is asked again
	// while a job waits, runs, and after it ended however: so what failed must be
	// due again only when it is to be tried again.
	Due(ctx context.Context, now time.Time) ([]job.Request, error)
}

// Jobs is the engine.
type Jobs interface {
	Submit(ctx context.Context, r job.Request) (job.Status, error)
	Active() []job.Status
	Subscribe(fn func(job.Status)) (cancel func())
}

// Keeper does the chores.
type Keeper struct {
	Chores []Chore
	Jobs   Jobs
	Log    *slog.Logger
}

// Run asks what is due, and has it done, until the context ends.
func (k *Keeper) Run(ctx context.Context) {
	ended := make(chan struct{}, 1)
	cancel := k.Jobs.Subscribe(func(s job.Status) {
		if s.State.Ended() {
			select {
			case ended <- struct{}{}:
			default:
			}
		}
	})
	defer cancel()
	timer := time.NewTimer(soon)
	defer timer.Stop()
	for at := time.Now().Add(soon); ; {
		select {
		case <-ctx.Done():
			return
		case <-ended:
			if time.Until(at) > soon {
				at = time.Now().Add(soon)
				timer.Reset(soon)
			}
		case <-timer.C:
			k.look(ctx, time.Now())
			at = time.Now().Add(every)
			timer.Reset(every)
		}
	}
}

// look submits what is due now.
func (k *Keeper) look(ctx context.Context, now time.Time) {
	for _, c := range k.Chores {
		active := k.Jobs.Active() // before: what ends meanwhile is no longer due, or is next time
		due, err := c.Due(ctx, now)
		if err != nil {
			if ctx.Err() == nil {
				k.Log.WarnContext(ctx, "cannot tell what is due; it is tried again", "chore", c.Name(), "error", err)
			}
			continue
		}
		for _, r := range missing(due, active) {
			if _, err := k.Jobs.Submit(ctx, r); err != nil {
				if ctx.Err() == nil {
					k.Log.WarnContext(ctx, "cannot start what is due; it is tried again", "chore", c.Name(), "error", err)
				}
				break // the queue is full, or nothing can be recorded: so it is for the next one
			}
		}
	}
}

// about is what a job of a kind is about.
type about struct{ kind, domain, repository, backup string }

// missing returns those of the jobs that are due that there are none of yet, no
// more than there may be of each kind.
func missing(due []job.Request, active []job.Status) []job.Request {
	known, count := map[about]bool{}, map[string]int{}
	for _, s := range active {
		known[about{s.Kind, s.Domain, s.Repository, s.Backup}] = true
		if s.Origin == catalog.OriginSystem && s.NextTry.IsZero() { // one that waits for its next try holds up nobody
			count[s.Kind]++
		}
	}
	var list []job.Request
	for _, r := range due {
		what := about{r.Kind, r.Domain, r.Repository, r.Backup}
		if known[what] || count[r.Kind] >= most {
			continue
		}
		known[what] = true
		count[r.Kind]++
		r.Origin = catalog.OriginSystem
		if r.Priority == nil {
			r.Priority = new(priority)
		}
		list = append(list, r)
	}
	return list
}
