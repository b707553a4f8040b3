package metrics

import (
	"sync"
	"time"
)

// Counter counts jobs that end. The zero value has counted none.
type Counter struct {
	mu  sync.Mutex
	all map[outcome]*Ended
}

type outcome struct{ operation, result string }

// Count counts a job that has ended, and took so long.
func (c *Counter) Count(operation, result string, took time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.all == nil {
		c.all = map[outcome]*Ended{}
	}
	of := outcome{operation, result}
	if c.all[of] == nil {
		c.all[of] = &Ended{Operation: operation, Result: result}
	}
	c.all[of].Jobs++
	c.all[of].Took += max(0, took) // the clock may have been set back
}

// Ended returns what was counted, in no order.
func (c *Counter) Ended() []Ended {
	c.mu.Lock()
	defer c.mu.Unlock()
	var all []Ended
	for _, e := range c.all {
		all = append(all, *e)
	}
	return all
}
