package health

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/journal"
	"github.com/virtbackup/virtbackup/daemon/internal/repository"
	"github.com/virtbackup/virtbackup/daemon/internal/supervise"
	"github.com/virtbackup/virtbackup/daemon/internal/transfer"
	"github.com/virtbackup/virtbackup/systemd/jobunit"
)

// UnitPrefix begins the names of the units of probes; a repository's id follows.
const UnitPrefix = "virtbackup-probe-"

// atOnce bounds the probes that run. One that hangs counts no longer than until
// that is known.
const atOnce = 4

// Options of a Watcher.
type Options struct {
	Catalog  *catalog.Catalog
	Probes   *supervise.Supervisor // of workers called after repositories, apart from those of jobs
	Storage  Storage
	Settings func() Settings
	Limits   func() jobunit.Limits
	KeyFile  string
	Busy     func(repository string) bool // whether a job that runs may use it
	Changed  func(repository string)      // is told after each look
	Log      *slog.Logger
}

// Storage has a repository's storage mounted for a look at it.
type Storage interface {
	Visit(ctx context.Context, r catalog.Repository) (fresh bool, err error)
}

// Watcher looks at repositories. It is safe for concurrent use.
type Watcher struct {
	Options
	mu      sync.Mutex
	looking map[string]chan struct{} // by repository; closed when the look has ended
}

// New makes a Watcher.
func New(o Options) *Watcher { return &Watcher{Options: o, looking: map[string]chan struct{}{}} }

// Run looks at every repository from time to time, until ctx ends.
func (w *Watcher) Run(ctx context.Context) {
	const shortest, longest = 200 * time.Millisecond, 15 * time.Second
	var all sync.WaitGroup
	defer all.Wait()
	free := make(chan struct{}, atOnce)
	for {
		list, err := w.Catalog.Repositories(ctx)
		if err != nil && ctx.Err() == nil {
			w.Log.Warn("cannot tell which repositories to look at", "error", err)
		}
		for _, r := range list {
			if r.Checked.IsZero() { // the job that adds it is at it
				continue
			}
			if !due(time.Now(), r.Checked, State(r.State), w.Busy(r.ID), w.Settings()) || w.underWay(r.ID) {
				continue
			}
			all.Go(func() {
				select {
				case free <- struct{}{}:
					defer func() { <-free }()
					w.Look(ctx, r)
				case <-ctx.Done():
				}
			})
		}
		select {
		case <-time.After(min(max(w.Settings().Every/4, shortest), longest)):
		case <-ctx.Done():
			return
		}
	}
}

func (w *Watcher) underWay(id string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	_, there := w.looking[id]
	return there
}

// Look looks at a repository now, records what it finds, and returns it. A look
// that is under way is waited for.
func (w *Watcher) Look(ctx context.Context, r catalog.Repository) State {
	w.mu.Lock()
	done, there := w.looking[r.ID]
	if !there {
		done = make(chan struct{})
		w.looking[r.ID] = done
	}
	w.mu.Unlock()
	if there {
		select {
		case <-done:
		case <-ctx.Done():
		}
		now, err := w.Catalog.Repository(context.WithoutCancel(ctx), r.ID)
		if err != nil {
			return Unknown
		}
		return State(now.State)
	}
	defer func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		delete(w.looking, r.ID)
		close(done)
	}()
	look, found := w.look(ctx, r)
	if ctx.Err() != nil {
		return Unknown // the daemon goes down: that is no answer
	}
	state, problem := Judge(look)
	found.State, found.Problem, found.Checked = string(state), problem, time.Now()
	err := w.Catalog.FoundRepository(ctx, r.ID, found)
	switch {
	case errors.Is(err, catalog.ErrNotFound): // it was removed meanwhile
		return state
	case err != nil:
		w.Log.Warn("cannot record the state of a repository", "repository", r.Name, "error", err)
	case string(state) != r.State:
		w.tell(ctx, r, state, problem)
	}
	w.Changed(r.ID)
	return state
}

func (w *Watcher) tell(ctx context.Context, r catalog.Repository, state State, problem string) {
	level, message := slog.LevelWarn, journal.RepositoryUnhealthy
	if state == Online {
		level, message = slog.LevelInfo, journal.RepositoryHealthy
	}
	w.Log.Log(ctx, level, fmt.Sprintf("repository %q is %s", r.Name, state), journal.MessageID, message,
		journal.Repository, r.Name, "state", string(state), "before", r.State, "problem", problem)
}

// ErrHung says that a repository's storage does not answer.
var ErrHung = errors.New("its storage does not answer")

const stillHung = "its storage still does not answer"

// look has a probe look. What could not be found out stays as it was.
func (w *Watcher) look(ctx context.Context, r catalog.Repository) (Look, catalog.Finding) {
	found := catalog.Finding{Identity: r.Identity, Total: r.Total, Free: r.Free}
	look := Look{MinimumFree: r.MinimumFree, Slow: w.Settings().Slow}
	// The last probe may be there still, hanging in the kernel.
	if err := w.Probes.Forget(ctx, r.ID); err != nil {
		look.Hung, look.Problem = true, stillHung
		return look, found
	}
	if _, err := w.Storage.Visit(ctx, r); err != nil {
		look.Problem = err.Error()
		look.Hung = errors.Is(err, ErrHung)
		look.Gone = !look.Hung
		return look, found
	}
	limit := w.Settings().Limit
	late := fmt.Errorf("its storage did not answer for %s", limit)
	limited, cancel := context.WithTimeoutCause(ctx, limit, late)
	defer cancel()
	result, err := w.Probes.Run(limited, w.spec(r), w.Limits(), func(transfer.Status) {})
	failed, killed := new(transfer.Failure), new(supervise.KilledError)
	switch {
	case limited.Err() != nil:
		look.Hung, look.Problem = true, late.Error()
	case errors.As(err, &killed) && killed.Hung(): // one of before, that could not be forgotten
		look.Hung, look.Problem = true, stillHung
	case errors.As(err, &failed):
		look.Gone, look.Problem = failed.Class == transfer.ClassGone, failed.Message
	case err != nil:
		look.Problem = err.Error()
	case result.Repository == nil:
		look.Problem = "the probe said nothing of it"
	default:
		s := result.Repository
		found = catalog.Finding{Identity: string(s.ID), Total: s.Total, Free: s.Free}
		look.ReadOnly, look.NoSpace, look.Free, look.Took = s.ReadOnly, s.NoSpace, s.Free, time.Duration(s.Took)*time.Microsecond
	}
	return look, found
}

func (w *Watcher) spec(r catalog.Repository) transfer.Spec {
	return transfer.Spec{
		Job: r.ID, Operation: transfer.OperationProbe, Try: true,
		Repository: transfer.RepositorySpec{Path: r.Path, ID: repository.ID(r.Identity), Name: r.Name, KeyFile: w.KeyFile, MinimumFree: r.MinimumFree},
	}
}
