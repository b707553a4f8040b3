package transfer

import (
	"context"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"
)

const statusInterval = 500 * time.Millisecond

// counters of one disk; bytes. Done and total belong to one phase.
type counters struct {
	target                     string
	done, total                atomic.Uint64
	read, written, dirty, zero atomic.Uint64

	// Of a disk that is served.
	asking           requests
	damaged, refused atomic.Uint64
}

func (c *counters) status() DiskStatus {
	return DiskStatus{
		Target: c.target, Done: c.done.Load(), Total: c.total.Load(), Read: c.read.Load(),
		Written: c.written.Load(), Dirty: c.dirty.Load(), Zero: c.zero.Load(),
		Pending: c.asking.oldest().Microseconds(), Waited: c.asking.waited().Microseconds(), Damaged: c.damaged.Load(), Refused: c.refused.Load(),
	}
}

// reporter keeps status.json up to date.
type reporter struct {
	path  string
	mu    sync.Mutex
	phase string
	disks []*counters
}

func newReporter(directory string) *reporter {
	return &reporter{path: filepath.Join(directory, StatusFile), phase: PhaseOpening}
}

// enter begins a phase, in which each disk has so many bytes to go.
func (r *reporter) enter(phase string) error {
	r.mu.Lock()
	r.phase = phase
	for _, d := range r.disks {
		d.done.Store(0)
		d.total.Store(0)
	}
	r.mu.Unlock()
	return r.write()
}

// disk adds a disk to the status.
func (r *reporter) disk(target string) *counters {
	c := &counters{target: target}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.disks = append(r.disks, c)
	return c
}

func (r *reporter) snapshot() []DiskStatus {
	var disks []DiskStatus
	for _, d := range r.disks {
		disks = append(disks, d.status())
	}
	return disks
}

func (r *reporter) write() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := Status{Phase: r.phase, Disks: r.snapshot(), Updated: time.Now().UnixMicro()}
	for _, d := range s.Disks {
		s.Done += d.Done
		s.Total += d.Total
	}
	return classify(ClassInternal, writeJSON(r.path, s))
}

// run writes the status until the context ends. That it can't be written is
// no reason to fail the job: the next phase says so.
func (r *reporter) run(ctx context.Context) {
	tick := time.NewTicker(statusInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			_ = r.write()
		}
	}
}

// requests are those that wait for their answers.
type requests struct {
	mu    sync.Mutex
	next  uint64
	since map[uint64]time.Time
	began time.Time     // when there came to be any
	spent time.Duration // in which there were some, before that
}

// begin notes a request until the function that it returns is called.
func (r *requests) begin() (end func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.since == nil {
		r.since = map[uint64]time.Time{}
	}
	if len(r.since) == 0 {
		r.began = time.Now()
	}
	r.next++
	id := r.next
	r.since[id] = time.Now()
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.since, id)
		if len(r.since) == 0 {
			r.spent += time.Since(r.began)
		}
	}
}

// waited is for how long in all somebody waited for an answer.
func (r *requests) waited() time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.since) > 0 {
		return r.spent + time.Since(r.began)
	}
	return r.spent
}

// oldest is how long the oldest one has waited.
func (r *requests) oldest() (d time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, t := range r.since {
		d = max(d, time.Since(t))
	}
	return d
}
