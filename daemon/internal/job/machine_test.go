package job

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"pgregory.net/rapid"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
)

// TestRestartsAtAnyPoint does at random what callers and the host do to the
// engine: jobs are submitted, go on by a step, fail, are cancelled; the daemon
// is stopped, or killed, and started again. In the end each job that was
// accepted has exactly one end, which fits what was done for it.
func TestRestartsAtAnyPoint(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		directory, err := os.MkdirTemp("/dev/shm", "virtbackup-jobs") // no kill of the host here, so no disk is needed
		must(t, err)
		defer func() { must(t, os.RemoveAll(directory)) }()
		m := &machine{t: t, path: filepath.Join(directory, "catalog.sqlite"), world: &world{jobs: map[string]*effects{}, domains: map[string]string{}}}
		m.start()
		rt.Repeat(map[string]func(*rapid.T){
			"submit":  m.submit,
			"proceed": m.proceed,
			"fail":    m.fail,
			"cancel":  m.cancel,
			"restart": func(*rapid.T) { m.stop(false); m.start() },
			"kill":    func(*rapid.T) { m.stop(true); m.start() },
		})
		m.finish(rt)
	})
}

const steps = 3

// world is what jobs did outside of the catalog; it survives restarts.
type world struct {
	mu      sync.Mutex
	jobs    map[string]*effects
	domains map[string]string // which job works on it
	wrong   []string          // what must not have happened
}

type effects struct {
	tokens    chan bool // lets it go on by a step: well, or by failing
	done      int       // steps
	undoing   bool
	undone    bool
	cancelled bool // Cancel returned
}

func (w *world) of(id string) *effects {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.jobs[id] == nil {
		w.jobs[id] = &effects{tokens: make(chan bool, 1000)}
	}
	return w.jobs[id]
}

// enter and leave watch that one job at a time works on a domain.
func (w *world) enter(domain, id string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if other := w.domains[domain]; domain != "" && other != "" {
		w.wrong = append(w.wrong, fmt.Sprintf("%s works on %s while %s does", id, domain, other))
	}
	w.domains[domain] = id
}

func (w *world) leave(domain string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.domains[domain] = ""
}

var errStep = errors.New("the step failed")

// Run does the steps that are left, one for each token.
func (w *world) Run(ctx context.Context, h *Handle) error {
	id, ef := h.Job().ID, w.of(h.Job().ID)
	w.enter(h.Job().Domain, id)
	defer w.leave(h.Job().Domain)
	for {
		w.mu.Lock()
		if ef.undoing {
			w.wrong = append(w.wrong, id+" runs after it began to be undone")
		}
		n := ef.done
		w.mu.Unlock()
		if n == steps {
			return nil
		}
		if err := h.Step(ctx, fmt.Sprint(n), n); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case well := <-ef.tokens:
			if !well {
				return errStep
			}
		}
		w.mu.Lock()
		ef.done++
		w.mu.Unlock()
	}
}

func (w *world) Undo(ctx context.Context, h *Handle) error {
	id, ef := h.Job().ID, w.of(h.Job().ID)
	w.enter(h.Job().Domain, id)
	defer w.leave(h.Job().Domain)
	w.mu.Lock()
	ef.undoing = true
	w.mu.Unlock()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-ef.tokens:
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	ef.undone = true
	return nil
}

type machine struct {
	t       *testing.T
	path    string
	catalog *catalog.Catalog
	engine  *Engine
	world   *world
	ids     []string
}

func (m *machine) start() {
	m.catalog = openCatalog(m.t, m.path)
	m.engine = New(m.catalog, map[string]Kind{"work": m.world}, options(Limits{Concurrent: 3, ConcurrentPerRepository: 2}))
	must(m.t, m.engine.Start(m.t.Context()))
}

// stop ends the engine; when it is killed, nothing that it would still do is recorded.
func (m *machine) stop(killed bool) {
	if killed {
		must(m.t, m.catalog.Close())
	}
	m.engine.Stop()
	if !killed {
		must(m.t, m.catalog.Close())
	}
}

func (m *machine) submit(t *rapid.T) {
	r := Request{Kind: "work", Domain: rapid.SampledFrom([]string{"", "d1", "d2"}).Draw(t, "domain"),
		Repository: rapid.SampledFrom([]string{"", "r1"}).Draw(t, "repository")}
	s, err := m.engine.Submit(m.t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	m.ids = append(m.ids, s.ID)
}

func (m *machine) any(t *rapid.T) (string, bool) {
	if len(m.ids) == 0 {
		return "", false
	}
	return rapid.SampledFrom(m.ids).Draw(t, "job"), true
}

func (m *machine) proceed(t *rapid.T) {
	if id, ok := m.any(t); ok {
		m.world.of(id).tokens <- true
	}
}

func (m *machine) fail(t *rapid.T) {
	if id, ok := m.any(t); ok {
		m.world.of(id).tokens <- false
	}
}

func (m *machine) cancel(t *rapid.T) {
	id, ok := m.any(t)
	if !ok {
		return
	}
	err := m.engine.Cancel(m.t.Context(), id)
	if err != nil && !errors.Is(err, catalog.ErrState) {
		t.Fatal(err)
	}
	if err == nil {
		ef := m.world.of(id)
		m.world.mu.Lock()
		ef.cancelled = true
		m.world.mu.Unlock()
	}
}

// finish lets all jobs go on to their end, and looks at it.
func (m *machine) finish(t *rapid.T) {
	defer m.stop(false)
	for _, id := range m.ids {
		for range steps + 1 {
			m.world.of(id).tokens <- true
		}
	}
	for _, id := range m.ids {
		s := wait(m.t, m.engine, id)
		ef := m.world.of(id)
		m.world.mu.Lock()
		fits := map[catalog.JobState]bool{
			catalog.JobSucceeded: ef.done == steps && !ef.undoing,
			catalog.JobFailed:    ef.undone && ef.done < steps,
			catalog.JobCancelled: ef.cancelled && (ef.undone || s.Started.IsZero() && !ef.undoing),
		}
		if !fits[s.State] {
			t.Errorf("job %+v ended so after %+v", s, ef)
		}
		m.world.mu.Unlock()
	}
	unfinished, err := m.catalog.UnfinishedJobs(m.t.Context())
	if err != nil || len(unfinished) > 0 || len(m.engine.Active()) > 0 {
		t.Errorf("not ended: %v, %v", unfinished, err)
	}
	list, err := m.catalog.ListJobs(m.t.Context(), catalog.JobFilter{}, catalog.Page{})
	if err != nil || len(list) != len(m.ids) || slices.ContainsFunc(list, func(j catalog.Job) bool { return !slices.Contains(m.ids, j.ID) }) {
		t.Errorf("%d jobs were accepted, %d are there, %v", len(m.ids), len(list), err)
	}
	for _, wrong := range m.world.wrong {
		t.Error(wrong)
	}
}
