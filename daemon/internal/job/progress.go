package job

import (
	"math"
	"time"
)

const (
	// rateWindow is the time over which the rate is smoothed.
	rateWindow = 5 * time.Second
	// rateInterval is the shortest time over which a rate is measured: status
	// comes in bursts.
	rateInterval = 200 * time.Millisecond
)

// meter knows a phase's progress and how fast it goes.
type meter struct {
	phase       string
	done, total uint64
	rate        float64 // bytes per second; 0 when not known

	since     time.Time // of the last measurement
	sinceDone uint64

	moved time.Time // when progress was made last; zero while none is to be made
}

func (m *meter) update(now time.Time, phase string, done, total uint64) {
	if phase != m.phase || done < m.done || m.since.IsZero() {
		*m = meter{phase: phase, done: done, total: total, since: now, sinceDone: done, moved: now}
		return
	}
	if done > m.done {
		m.moved = now
	}
	m.done, m.total = done, total
	elapsed := now.Sub(m.since)
	if elapsed < rateInterval {
		return
	}
	measured := float64(done-m.sinceDone) / elapsed.Seconds()
	if m.rate == 0 {
		m.rate = measured
	} else {
		weight := 1 - math.Exp(-elapsed.Seconds()/rateWindow.Seconds())
		m.rate += weight * (measured - m.rate)
	}
	m.since, m.sinceDone = now, done
}

// wait takes the job into a phase in which no progress is made.
func (m *meter) wait(phase string) {
	*m = meter{phase: phase, done: m.done, total: m.total}
}

func (m *meter) eta() time.Duration {
	if m.rate < 1 || m.done >= m.total {
		return 0
	}
	seconds := float64(m.total-m.done) / m.rate
	if seconds > math.MaxInt64/float64(time.Second)/2 {
		return 0
	}
	return time.Duration(seconds * float64(time.Second))
}
