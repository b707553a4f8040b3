package job

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
)

// Class is what kinds of jobs have in common, and a bound of their own for.
type Class string

// The classes.
const (
	ClassBackup      Class = "backup"
	ClassRestore     Class = "restore"
	ClassCompression Class = "compression"
	ClassValidation  Class = "validation"
	ClassMaintenance Class = "maintenance"
	// ClassGroup waits for other jobs and works nothing itself: it has no bound,
	// or it would take the place of those that it waits for.
	ClassGroup Class = "group"
)

// Classes are those that jobs can be held back of.
func Classes() []Class {
	return []Class{ClassBackup, ClassRestore, ClassCompression, ClassValidation, ClassMaintenance}
}

// Window says when work may begin that nobody waits for.
type Window interface {
	// Next returns when it opens next; t itself when it is open.
	Next(t time.Time) time.Time
}

// Limits bound how many jobs there are, and how long one takes. 0 is no bound.
type Limits struct {
	Concurrent              map[Class]int // running at once
	ConcurrentPerRepository int
	PerUser                 int // unfinished jobs of one user; root has no bound
	Queue                   int // waiting jobs

	Timeout map[Class]time.Duration // of one try
	// Stall ends a job that makes no progress for so long.
	Stall time.Duration
	// RetryDelay is before the second try of a job; it doubles with each. A class
	// in RetryEvery has that before each try instead.
	RetryDelay time.Duration
	RetryEvery map[Class]time.Duration
	// Window holds back jobs that no user has started; nil is always open.
	Window Window
}

// Inhibitor holds jobs back.
type Inhibitor struct {
	ID    string
	What  []Class // none: all
	Who   string
	Why   string
	UID   uint32
	Since time.Time
}

func (i Inhibitor) holds(c Class) bool { return len(i.What) == 0 || slices.Contains(i.What, c) }

// longestDelay is between two tries at most: a clock that is set back does not
// make a job wait for longer.
const longestDelay = time.Hour

// delay is before the next try of a job that was begun attempt times.
func (l Limits) delay(c Class, attempt int) time.Duration {
	if d := l.RetryEvery[c]; d > 0 {
		return d
	}
	d := l.RetryDelay
	for ; attempt > 1 && d < longestDelay; attempt-- {
		d *= 2
	}
	return min(d, longestDelay)
}

// place is a job in the queue, or at work.
type place struct {
	*catalog.Job
	class  Class
	yields bool // to others of its domain
}

// situation is all that decides which jobs start.
type situation struct {
	now        time.Time
	queue      []place // oldest first
	running    []place
	limits     Limits
	inhibitors []Inhibitor
}

// verdict is which jobs start, and why others do not.
type verdict struct {
	start   []int     // of the queue, in this order
	waiting []string  // of each of the queue; "" for those that start
	yield   []gift    // of those that run, which give way
	wake    time.Time // when it may be another without anything else happening; zero for never
}

// admit decides which jobs start. The higher priority goes first, then the older
// job. One that cannot start holds back nobody but later jobs of its domain; and
// one that is put off, to its next try, by an inhibitor or to the window, not
// even those. One that yields goes after the others of its domain, and gives way
// when it runs and alone keeps another from starting.
func (s situation) admit() verdict {
	v := verdict{waiting: make([]string, len(s.queue))}
	work := s.newWork()
	first := map[string]int{} // of each domain, the job whose turn it is
	urgency := make([]int, len(s.queue))
	urgent := map[string]int{}
	var order []int
	for i, p := range slices.Backward(s.queue) {
		reason, until := s.putOff(p)
		if reason != "" {
			v.waiting[i] = reason
			if !until.IsZero() && (v.wake.IsZero() || until.Before(v.wake)) {
				v.wake = until
			}
			continue
		}
		order = append(order, i)
		urgency[i] = p.Priority
		if p.Domain != "" {
			// It is as urgent as what has to wait for it.
			turn, any := first[p.Domain]
			if any && p.yields && !s.queue[turn].yields {
				continue // that one does not wait for it
			}
			urgency[i] = max(p.Priority, urgent[p.Domain])
			urgent[p.Domain], first[p.Domain] = urgency[i], i
		}
	}
	slices.SortFunc(order, func(a, b int) int { return cmp.Or(cmp.Compare(urgency[b], urgency[a]), cmp.Compare(a, b)) })
	for _, i := range order {
		p := s.queue[i]
		reason := work.obstacle(p)
		turn, any := first[p.Domain]
		if reason == "" && any && turn != i {
			reason = waitsFor(s.queue[turn])
		}
		if v.waiting[i] = reason; reason == "" {
			v.start = append(v.start, i)
			work.add(p)
		}
	}
	v.yield = s.giveWay(order, first, work)
	return v
}

// gift is a running job that gives way, and the queued one that it gives way to.
type gift struct{ from, to int }

// giveWay returns which of those that run give way: each to a job that it alone
// keeps from starting, by its domain or its slot, beside what runs, what starts,
// and what others give way to.
func (s situation) giveWay(order []int, first map[string]int, after *work) (all []gift) {
	for more := true; more; { // what gives way to one may have been in the way of an earlier one too
		more = false
		for _, i := range order {
			p := s.queue[i]
			if turn, any := first[p.Domain]; p.yields || any && turn != i || after.has(p) || after.obstacle(p) == "" {
				continue // the last: what gives way to others makes room for it as well
			}
			from := slices.IndexFunc(s.running, func(r place) bool {
				return r.yields && after.has(r) && after.without(r).obstacle(p) == ""
			})
			if from >= 0 {
				after = after.without(s.running[from])
				after.add(p)
				all, more = append(all, gift{from, i}), true
			}
		}
	}
	return all
}

// putOff says why a job is not to start now, whatever else runs, and until when
// that is known to be so.
func (s situation) putOff(p place) (reason string, until time.Time) {
	if wait := p.NextTry.Sub(s.now); wait > 0 && wait <= max(longestDelay, s.limits.RetryEvery[p.class]) {
		return fmt.Sprintf("try %d of %d is at %s, after: %s", p.Attempt+1, p.Attempts, moment(p.NextTry), p.ErrorMessage), p.NextTry
	}
	if p.class == ClassGroup {
		return "", time.Time{} // its jobs are put off
	}
	for _, i := range s.inhibitors {
		if i.holds(p.class) {
			return fmt.Sprintf("held back by %s: %s", i.Who, i.Why), time.Time{}
		}
	}
	if s.limits.Window == nil || p.Origin == catalog.OriginUser {
		return "", time.Time{}
	}
	if opens := s.limits.Window.Next(s.now); opens.After(s.now) {
		return "waits for the maintenance window, which opens " + opens.Local().Format("Mon 2006-01-02 15:04"), opens
	}
	return "", time.Time{}
}

func moment(t time.Time) string { return t.Local().Format(time.DateTime) }

// work is what runs.
type work struct {
	limits       Limits
	ofClass      map[Class]int
	ofRepository map[string]int
	yielding     map[string]int // of those of each repository
	ofDomain     map[string]place
	jobs         map[string]bool
}

// has tells whether a job is among it.
func (w *work) has(p place) bool { return w.jobs[p.ID] }

func (s situation) newWork() *work {
	w := &work{limits: s.limits, ofClass: map[Class]int{}, ofRepository: map[string]int{}, yielding: map[string]int{}, ofDomain: map[string]place{}, jobs: map[string]bool{}}
	for _, p := range s.running {
		w.add(p)
	}
	return w
}

func (w *work) add(p place) {
	w.ofClass[p.class]++
	w.ofRepository[p.Repository]++
	if p.yields {
		w.yielding[p.Repository]++
	}
	w.ofDomain[p.Domain] = p
	w.jobs[p.ID] = true
}

// obstacle says what keeps a job from starting; "" for nothing.
func (w *work) obstacle(p place) string {
	if other, busy := w.ofDomain[p.Domain]; p.Domain != "" && busy {
		return waitsFor(other)
	}
	return w.full(p)
}

// without is what is left when one has ended.
func (w *work) without(p place) *work {
	left := &work{limits: w.limits, ofClass: maps.Clone(w.ofClass), ofRepository: maps.Clone(w.ofRepository),
		yielding: maps.Clone(w.yielding), ofDomain: maps.Clone(w.ofDomain), jobs: maps.Clone(w.jobs)}
	left.ofClass[p.class]--
	left.ofRepository[p.Repository]--
	if p.yields {
		left.yielding[p.Repository]--
	}
	delete(left.ofDomain, p.Domain)
	delete(left.jobs, p.ID)
	return left
}

// full says which bound keeps a job from starting; "" for none.
func (w *work) full(p place) string {
	if most, taken := w.limits.Concurrent[p.class], w.ofClass[p.class]; most > 0 && taken >= most {
		return fmt.Sprintf("waits for a free %s slot: %d of %d are taken", p.class, taken, most)
	}
	taken := w.ofRepository[p.Repository]
	if !p.yields { // what nobody waits for keeps nobody from a repository
		taken -= w.yielding[p.Repository]
	}
	if most := w.limits.ConcurrentPerRepository; p.Repository != "" && most > 0 && taken >= most {
		return fmt.Sprintf("waits for its repository: %d jobs of at most %d use it", taken, most)
	}
	return ""
}

func waitsFor(p place) string {
	return fmt.Sprintf("waits for job %s of its domain (%s)", p.ID, p.Kind)
}
