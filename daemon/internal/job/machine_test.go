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
	"time"

	"pgregory.net/rapid"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
)

// TestRestartsAtAnyPoint does at random what callers and the host do to the
// engine: jobs are submitted, go on by a step, fail, for good or so that they are
// tried again, are held back, are cancelled; limits change; the daemon is
// stopped, or killed, and started again. In the end each job that was accepted
// has exactly one end, which fits what was done for it.
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
			"falter":  m.falter,
			"cancel":  m.cancel,
			"inhibit": m.inhibit,
			"limit":   m.limit,
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
	tokens    chan error // lets it go on by a step: well, or by failing
	attempt   int        // that is being made, or was made last
	passing   bool       // it failed so that it is to be tried again
	done      int        // steps
	undoing   bool
	undone    bool
	cancelled bool // Cancel returned
}

func (w *world) of(id string) *effects {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.jobs[id] == nil {
		w.jobs[id] = &effects{tokens: make(chan error, 1000)}
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

var (
	errStep    = errors.New("the step failed")
	errPassing = errors.New("the step failed, and may not fail again")
)

// Run does the steps that are left, one for each token.
func (w *world) Run(ctx context.Context, h *Handle) error {
	id, ef := h.Job().ID, w.of(h.Job().ID)
	w.enter(h.Job().Domain, id)
	defer w.leave(h.Job().Domain)
	w.begin(h.Job(), ef)
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
		case err := <-ef.tokens:
			if err != nil {
				w.mu.Lock()
				ef.passing = errors.Is(err, errPassing)
				w.mu.Unlock()
				return err
			}
		}
		w.mu.Lock()
		ef.done++
		w.mu.Unlock()
	}
}

// begin takes note of another try, which begins with nothing.
func (w *world) begin(j catalog.Job, ef *effects) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if j.Attempt == ef.attempt {
		return // it goes on
	}
	if j.Attempt != ef.attempt+1 || j.Attempt > j.Attempts || ef.attempt > 0 && !ef.undone || j.Step != "" || j.Backup != fmt.Sprint("b", ef.attempt) {
		w.wrong = append(w.wrong, fmt.Sprintf("try %+v begins after %+v", j, ef))
	}
	ef.attempt, ef.done, ef.undoing, ef.undone, ef.passing = j.Attempt, 0, false, false, false
}

func (w *world) Again(j catalog.Job) string { return fmt.Sprint("b", j.Attempt) }

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
	release func() // of the inhibitor, if there is one
}

func (m *machine) start() {
	m.catalog = openCatalog(m.t, m.path)
	o := options(Limits{Concurrent: map[Class]int{"": 3}, ConcurrentPerRepository: 2, RetryDelay: time.Millisecond})
	o.Passing = func(err error) bool { return errors.Is(err, errPassing) }
	m.engine, m.release = New(m.catalog, map[string]Kind{"work": m.world}, o), nil
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
		Repository: rapid.SampledFrom([]string{"", "r1"}).Draw(t, "repository"), Backup: "b0",
		Priority: new(rapid.IntRange(0, 99).Draw(t, "priority")), Attempts: rapid.IntRange(1, 3).Draw(t, "attempts")}
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
		m.world.of(id).tokens <- nil
	}
}

func (m *machine) fail(t *rapid.T) {
	if id, ok := m.any(t); ok {
		m.world.of(id).tokens <- errStep
	}
}

func (m *machine) falter(t *rapid.T) {
	if id, ok := m.any(t); ok {
		m.world.of(id).tokens <- errPassing
	}
}

func (m *machine) inhibit(*rapid.T) {
	if m.release == nil {
		m.release = m.engine.Inhibit(Inhibitor{Who: "a test", Why: "to see"})
		return
	}
	m.release()
	m.release = nil
}

func (m *machine) limit(t *rapid.T) {
	m.engine.SetLimits(Limits{Concurrent: map[Class]int{"": rapid.IntRange(1, 4).Draw(t, "at once")}, RetryDelay: time.Millisecond})
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
	if m.release != nil {
		m.release()
	}
	for _, id := range m.ids {
		for range 4 * (steps + 1) {
			m.world.of(id).tokens <- nil
		}
	}
	for _, id := range m.ids {
		s := wait(m.t, m.engine, id)
		ef := m.world.of(id)
		m.world.mu.Lock()
		fits := map[catalog.JobState]bool{
			catalog.JobSucceeded: ef.done == steps && !ef.undoing,
			catalog.JobFailed:    ef.undone && ef.done < steps && (!ef.passing || ef.attempt == s.Attempts || ef.cancelled),
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
