package job

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
)

// Engine runs the jobs of one catalog. There is one per catalog.
type Engine struct {
	catalog *catalog.Catalog
	kinds   map[string]Kind
	options Options

	base   context.Context // ends, by ErrDetach, when the daemon goes down
	detach context.CancelCauseFunc
	tasks  sync.WaitGroup

	submitting sync.Mutex // one Submit at a time: jobs are queued in the order of their ids

	mu          sync.Mutex
	started     bool
	active      map[string]*entry // unfinished jobs
	queue       []*entry          // those that wait, oldest first
	limits      Limits
	inhibitors  []Inhibitor
	wake        *time.Timer // for what waits for a time; nil when nothing does
	subscribers map[*subscriber]struct{}
}

// entry is an unfinished job. The engine's mutex guards it.
type entry struct {
	job     catalog.Job
	class   Class
	meter   meter
	waiting string                  // why it does not go on; "" when it does
	cancel  context.CancelCauseFunc // of Run; nil while it waits, and while it is undone
	ended   chan struct{}           // closed when the end is recorded
}

func (en *entry) status() Status {
	s := Status{Job: en.job, Waiting: en.waiting}
	s.Rate, s.ETA = en.meter.rate, en.meter.eta()
	s.Phase, s.Done, s.Total = en.meter.phase, en.meter.done, en.meter.total
	return s
}

// New makes an engine with these kinds of jobs. It runs nothing before Start.
func New(c *catalog.Catalog, kinds map[string]Kind, o Options) *Engine {
	e := &Engine{catalog: c, kinds: kinds, options: o, limits: o.Limits, active: map[string]*entry{}, subscribers: map[*subscriber]struct{}{}}
	e.base, e.detach = context.WithCancelCause(context.Background())
	return e
}

// Start takes up the jobs that have not ended: those that ran carry on, those
// that waited wait again.
func (e *Engine) Start(ctx context.Context) error {
	jobs, err := e.catalog.UnfinishedJobs(ctx)
	if err != nil {
		return err
	}
	if err := e.prune(ctx); err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, j := range jobs {
		en := e.newEntry(j)
		switch {
		case j.State == catalog.JobQueued:
			e.queue = append(e.queue, en)
		case j.Started.IsZero(): // cancelled while it waited
			e.tasks.Go(func() { e.endCancelled(en) })
		default:
			e.run(en)
		}
	}
	e.started = true
	e.dispatch()
	return nil
}

// Stop lets go of the running jobs, which carry on after the next Start, and
// returns when all have let go. The engine cannot be started again.
func (e *Engine) Stop() {
	e.mu.Lock()
	e.started = false
	e.wakeAt(time.Time{})
	e.detach(ErrDetach) // at once: a job that is refused another one must see why
	e.mu.Unlock()
	e.tasks.Wait()
	e.mu.Lock()
	defer e.mu.Unlock()
	for s := range e.subscribers {
		s.close()
	}
	clear(e.subscribers)
}

// Submit records a job and queues it. ErrTooMany: a bound is reached.
func (e *Engine) Submit(ctx context.Context, r Request) (Status, error) {
	if _, known := e.kinds[r.Kind]; !known {
		return Status{}, fmt.Errorf("cannot start job %q: %w", r.Kind, ErrUnknownKind)
	}
	spec, err := json.Marshal(r.Spec)
	if err != nil {
		return Status{}, fmt.Errorf("cannot start job %q: %w", r.Kind, err)
	}
	e.submitting.Lock()
	defer e.submitting.Unlock()
	if err := e.admit(r); err != nil {
		return Status{}, fmt.Errorf("cannot start job %q: %w", r.Kind, err)
	}
	j := catalog.Job{ID: ulid.Make().String(), Kind: r.Kind, Domain: r.Domain, Repository: r.Repository, Backup: r.Backup,
		Spec: spec, State: catalog.JobQueued, UID: r.UID, Created: time.Now(),
		Priority: *cmp.Or(r.Priority, new(NormalPriority)), Origin: cmp.Or(r.Origin, catalog.OriginUser), Schedule: r.Schedule, Parent: r.Parent, Attempts: max(r.Attempts, 1)}
	if err := e.catalog.CreateJob(ctx, j); err != nil {
		return Status{}, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	en := e.newEntry(j)
	e.queue = append(e.queue, en)
	e.dispatch() // which knows why it waits
	e.publish(en)
	return en.status(), nil
}

// newEntry makes an entry of an unfinished job. The engine's mutex is held.
func (e *Engine) newEntry(j catalog.Job) *entry {
	en := &entry{job: j, class: e.options.Classes[j.Kind], ended: make(chan struct{})}
	e.active[j.ID] = en
	return en
}

// admit refuses a request beyond the bounds.
func (e *Engine) admit(r Request) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.started {
		return ErrDetach
	}
	class := e.options.Classes[r.Kind]
	if class != ClassGroup && e.limits.Queue > 0 && len(e.queue) >= e.limits.Queue {
		return fmt.Errorf("%w: %d are waiting", ErrTooMany, len(e.queue))
	}
	if e.limits.PerUser == 0 || r.UID == 0 {
		return nil
	}
	own := 0
	for _, en := range e.active {
		// A group must not keep its own jobs out.
		if en.job.UID == r.UID && (r.Parent == "" || en.class != ClassGroup) {
			own++
		}
	}
	if own >= e.limits.PerUser {
		return fmt.Errorf("%w: %d are yours", ErrTooMany, own)
	}
	return nil
}

// dispatch starts the waiting jobs that may run now, and tells why others wait.
// The engine's mutex is held.
func (e *Engine) dispatch() {
	if !e.started {
		return
	}
	s := situation{now: time.Now(), limits: e.limits, inhibitors: e.inhibitors}
	waiting := map[*entry]bool{}
	for _, en := range e.queue {
		waiting[en] = true
		s.queue = append(s.queue, place{&en.job, en.class, e.yields(en.job)})
	}
	var running []*entry
	for _, en := range e.active {
		if !waiting[en] {
			running = append(running, en)
			s.running = append(s.running, place{&en.job, en.class, en.job.Yielded < mostYields && e.yields(en.job)})
		}
	}
	v := s.admit()
	for _, g := range v.yield {
		if en := running[g.from]; en.cancel != nil {
			en.cancel(ErrYield)
		}
	}
	var rest []*entry
	for i, en := range e.queue {
		if v.waiting[i] == "" {
			continue
		}
		rest = append(rest, en)
		if en.waiting != v.waiting[i] {
			en.waiting = v.waiting[i]
			e.publish(en)
		}
	}
	for _, i := range v.start {
		en := e.queue[i]
		en.waiting = ""
		e.run(en)
	}
	e.queue = rest
	e.wakeAt(v.wake)
}

// wakeAgain bounds for how long a time is believed to be as far away as the clock says.
const wakeAgain = time.Minute

// wakeAt has the queue looked at again at a time; zero for not at all. The
// engine's mutex is held.
func (e *Engine) wakeAt(t time.Time) {
	if e.wake != nil {
		e.wake.Stop()
		e.wake = nil
	}
	if t.IsZero() {
		return
	}
	e.wake = time.AfterFunc(min(time.Until(t), wakeAgain), func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		e.dispatch()
	})
}

// SetLimits puts other limits in force, also for the jobs that run.
func (e *Engine) SetLimits(l Limits) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.limits = l
	e.dispatch()
}

// Inhibit holds jobs back until release is called. Those that run go on.
func (e *Engine) Inhibit(i Inhibitor) (release func()) {
	i.ID, i.Since = ulid.Make().String(), time.Now()
	e.mu.Lock()
	defer e.mu.Unlock()
	e.inhibitors = append(e.inhibitors, i)
	e.dispatch()
	return func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		e.inhibitors = slices.DeleteFunc(e.inhibitors, func(other Inhibitor) bool { return other.ID == i.ID })
		e.dispatch()
	}
}

// Inhibitors returns what holds jobs back, oldest first.
func (e *Engine) Inhibitors() []Inhibitor {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.inhibitors)
}

// Cancel asks a job to end. The request is on disk when it returns; the job
// ends later, as cancelled or, when it was too late, otherwise. ErrState: it
// has ended.
func (e *Engine) Cancel(ctx context.Context, id string) error {
	if err := e.catalog.CancelJob(ctx, id); err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	en, ok := e.active[id]
	if !ok || !e.started {
		return nil // ended meanwhile, or seen by the next Start
	}
	en.job.State, en.waiting = catalog.JobCancelling, ""
	e.publish(en)
	for i, waiting := range e.queue {
		if waiting == en {
			e.queue = append(e.queue[:i], e.queue[i+1:]...)
			e.tasks.Go(func() { e.endCancelled(en) })
			return nil
		}
	}
	if en.cancel != nil {
		en.cancel(ErrCancelled)
	}
	return nil
}

// Wait returns a job once it has ended, or with ctx's error.
func (e *Engine) Wait(ctx context.Context, id string) (Status, error) {
	e.mu.Lock()
	en, ok := e.active[id]
	e.mu.Unlock()
	if ok {
		select {
		case <-en.ended:
		case <-ctx.Done():
			return Status{}, context.Cause(ctx)
		case <-e.base.Done():
			return Status{}, ErrDetach
		}
	}
	return e.Job(ctx, id)
}

// Job returns one job, running or ended.
func (e *Engine) Job(ctx context.Context, id string) (Status, error) {
	e.mu.Lock()
	en, ok := e.active[id]
	if ok {
		defer e.mu.Unlock()
		return en.status(), nil
	}
	e.mu.Unlock()
	j, err := e.catalog.Job(ctx, id)
	return Status{Job: j}, err
}

// Active returns the jobs that have not ended, in no order.
func (e *Engine) Active() []Status {
	e.mu.Lock()
	defer e.mu.Unlock()
	all := make([]Status, 0, len(e.active))
	for _, en := range e.active {
		all = append(all, en.status())
	}
	return all
}

func (e *Engine) progress(en *entry, change func(*meter, time.Time)) {
	e.mu.Lock()
	defer e.mu.Unlock()
	change(&en.meter, time.Now())
	e.publish(en)
}

func (e *Engine) setResult(en *entry, result json.RawMessage) {
	e.mu.Lock()
	defer e.mu.Unlock()
	en.job.Result = result
}

func (e *Engine) prune(ctx context.Context) error {
	if e.options.KeepMost == 0 {
		return errors.New("cannot forget old jobs: no bound was given")
	}
	return e.catalog.PruneJobs(ctx, time.Now().Add(-e.options.KeepFor), e.options.KeepMost)
}
