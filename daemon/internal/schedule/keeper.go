package schedule

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/systemd/timer"
)

// Timers keeps timers of systemd.
type Timers interface {
	Set(ctx context.Context, t timer.Timer, enabled bool) error
	Remove(ctx context.Context, id string) error
	IDs() ([]string, error)
	State(ctx context.Context, id string) (timer.State, error)
}

// Backups makes the backups of schedules.
type Backups interface {
	// Prepare finds what a run would do, or why there can be none now.
	Prepare(ctx context.Context, s catalog.Schedule) (Work, *Obstacle)
	// DomainName is the name of a domain, for people.
	DomainName(ctx context.Context, uuid string) string
	// ScheduleChanged is called when something about a schedule reads differently.
	ScheduleChanged(id string)
}

// Work is what a run would do.
type Work struct {
	LeftOut []string // domains that it leaves out, and why
	// Start starts the jobs. Those that were started are told also with an error.
	Start func(ctx context.Context, run catalog.ScheduleRun) (jobs []string, err error)
}

// Keeper keeps schedules. It is safe for concurrent use.
type Keeper struct {
	catalog *catalog.Catalog
	timers  Timers
	log     *slog.Logger

	backups Backups // nil until Use

	mu    sync.Mutex
	locks map[string]*sync.Mutex // by schedule: one thing is done with it at a time
	seen  map[string]seen

	kicked chan struct{}
}

// seen is what systemd said of a timer, and when.
type seen struct {
	timer.State
	at time.Time
}

// New makes a Keeper.
func New(c *catalog.Catalog, timers Timers, log *slog.Logger) *Keeper {
	return &Keeper{catalog: c, timers: timers, log: log, locks: map[string]*sync.Mutex{}, seen: map[string]seen{}, kicked: make(chan struct{}, 1)}
}

// Use sets who makes the backups. It is called once, before all else.
func (k *Keeper) Use(b Backups) { k.backups = b }

// lock locks one schedule.
func (k *Keeper) lock(id string) (unlock func()) {
	k.mu.Lock()
	l, ok := k.locks[id]
	if !ok {
		l = &sync.Mutex{}
		k.locks[id] = l
	}
	k.mu.Unlock()
	l.Lock()
	return l.Unlock
}

func timerOf(s catalog.Schedule) timer.Timer {
	return timer.Timer{ID: s.ID, Name: s.Name, Calendars: s.Calendars, RandomizedDelay: s.RandomizedDelay, Persistent: s.Persistent}
}

// set has the timer be as the schedule says.
func (k *Keeper) set(ctx context.Context, s catalog.Schedule) error {
	k.forget(s.ID)
	return k.timers.Set(ctx, timerOf(s), s.Enabled)
}

// Create records a schedule and sets its timer; when that cannot be, there is none.
func (k *Keeper) Create(ctx context.Context, s catalog.Schedule) error {
	ctx = context.WithoutCancel(ctx)
	defer k.lock(s.ID)()
	if err := k.catalog.CreateSchedule(ctx, s); err != nil {
		return err
	}
	err := k.set(ctx, s)
	if err != nil {
		err = errors.Join(err, k.timers.Remove(ctx, s.ID), k.catalog.RemoveSchedule(ctx, s.ID))
	}
	return err
}

// Change changes a schedule and its timer; when that cannot be, it stays as it was.
func (k *Keeper) Change(ctx context.Context, id string, change func(*catalog.Schedule) error) error {
	ctx = context.WithoutCancel(ctx)
	defer k.lock(id)()
	before, err := k.catalog.Schedule(ctx, id)
	if err != nil {
		return err
	}
	after := before
	if err := change(&after); err != nil {
		return err
	}
	if err := k.catalog.UpdateSchedule(ctx, after); err != nil {
		return err
	}
	if err := k.set(ctx, after); err != nil {
		return errors.Join(err, k.catalog.UpdateSchedule(ctx, before), k.set(ctx, before))
	}
	k.backups.ScheduleChanged(id)
	if after.Enabled {
		return nil
	}
	return k.giveUp(ctx, id, "the schedule was disabled")
}

// giveUp ends the run that waits, if there is one.
func (k *Keeper) giveUp(ctx context.Context, id, reason string) error {
	unfinished, err := k.catalog.UnfinishedRuns(ctx, id)
	if err != nil {
		return err
	}
	if w := find(unfinished, catalog.RunWaiting); w != nil {
		w.State, w.Reason, w.Finished = catalog.RunCancelled, reason, time.Now()
		return k.catalog.UpdateRun(ctx, *w)
	}
	return nil
}

// Remove removes a schedule and its timer. Jobs of it go on.
func (k *Keeper) Remove(ctx context.Context, id string) error {
	ctx = context.WithoutCancel(ctx)
	defer k.lock(id)()
	if err := k.timers.Remove(ctx, id); err != nil {
		return err
	}
	k.forget(id)
	return k.catalog.RemoveSchedule(ctx, id)
}

// Reconcile has all timers be as the catalog says: missing ones are written
// again, and those of schedules that nobody knows are removed.
func (k *Keeper) Reconcile(ctx context.Context) error {
	all, err := k.catalog.Schedules(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, s := range all {
		errs = append(errs, k.reconcile(ctx, s.ID))
	}
	ids, err := k.timers.IDs()
	errs = append(errs, err)
	for _, id := range ids {
		if slices.ContainsFunc(all, func(s catalog.Schedule) bool { return s.ID == id }) {
			continue
		}
		errs = append(errs, k.removeOrphan(ctx, id))
	}
	return errors.Join(errs...)
}

func (k *Keeper) reconcile(ctx context.Context, id string) error {
	defer k.lock(id)()
	s, err := k.catalog.Schedule(ctx, id)
	if errors.Is(err, catalog.ErrNotFound) {
		return nil // removed meanwhile
	} else if err != nil {
		return err
	}
	if err := k.set(ctx, s); err != nil {
		return fmt.Errorf("schedule %s: %w", s.Name, err)
	}
	k.backups.ScheduleChanged(id)
	return nil
}

func (k *Keeper) removeOrphan(ctx context.Context, id string) error {
	defer k.lock(id)()
	if _, err := k.catalog.Schedule(ctx, id); !errors.Is(err, catalog.ErrNotFound) {
		return err // made meanwhile
	}
	k.log.Warn("removing the timer of a schedule that is not known, or not any more", "unit", timer.UnitName(id))
	return k.timers.Remove(ctx, id)
}

const (
	stateAge   = 5 * time.Second // how old what systemd said of a timer may be
	stateLimit = 2 * time.Second // how long whoever reads a property waits for systemd
)

// Timer returns what systemd says of a schedule's timer.
func (k *Keeper) Timer(ctx context.Context, id string) (timer.State, error) {
	now := time.Now()
	k.mu.Lock()
	s, ok := k.seen[id]
	k.mu.Unlock()
	if ok && now.Sub(s.at) < stateAge && s.Next.After(now) {
		return s.State, nil
	}
	ctx, cancel := context.WithTimeout(ctx, stateLimit)
	defer cancel()
	state, err := k.timers.State(ctx, id)
	if err != nil {
		return state, err
	}
	k.mu.Lock()
	k.seen[id] = seen{state, now}
	k.mu.Unlock()
	return state, nil
}

func (k *Keeper) forget(id string) {
	k.mu.Lock()
	delete(k.seen, id)
	k.mu.Unlock()
}
