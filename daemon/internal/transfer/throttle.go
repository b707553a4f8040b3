package transfer

import (
	"context"
	"io"
	"time"

	"golang.org/x/time/rate"
)

const (
	// throttleStep is how much is waited for at once: little, so that another
	// rate is soon felt.
	throttleStep = 256 << 10
	// throttleBurst is how much may be moved at once after a pause.
	throttleBurst = 1 << 20
	// throttleInterval is how often the worker looks for another rate.
	throttleInterval = 500 * time.Millisecond
)

// throttle bounds what is read from the guest's disks, and what is written to
// the repository, each to the worker's share.
type throttle struct{ reads, writes *valve }

func newThrottle() *throttle { return &throttle{newValve(), newValve()} }

// look takes over the rate that the daemon says. One that cannot be read changes nothing.
func (t *throttle) look(directory string) error {
	r, err := ReadRate(directory)
	if err != nil {
		return err
	}
	limit := rate.Inf
	if r.Bytes > 0 {
		limit = rate.Limit(r.Bytes)
	}
	for _, v := range []*valve{t.reads, t.writes} {
		if v.limiter.Limit() != limit {
			v.limiter.SetLimit(limit)
		}
	}
	return nil
}

// run looks from time to time, until the context ends.
func (t *throttle) run(ctx context.Context, directory string) {
	tick := time.NewTicker(throttleInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			_ = t.look(directory) // the next one is whole
		}
	}
}

// valve lets bytes pass at a rate.
type valve struct {
	limiter *rate.Limiter
	turn    chan struct{} // one waits at the limiter, which keeps to what it promised when the rate changes
}

func newValve() *valve {
	return &valve{rate.NewLimiter(rate.Inf, throttleBurst), make(chan struct{}, 1)}
}

// wait waits until so many bytes may pass.
func (v *valve) wait(ctx context.Context, bytes int) error {
	for bytes > 0 && v.limiter.Limit() != rate.Inf {
		n := min(bytes, throttleStep)
		select {
		case v.turn <- struct{}{}:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		err := v.limiter.WaitN(ctx, n)
		<-v.turn
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			return fail(ClassInternal, "cannot wait for the worker's share: %w", err)
		}
		bytes -= n
	}
	return nil
}

// throttledFile has writes wait for the worker's share.
type throttledFile struct {
	io.WriterAt
	ctx   context.Context // of the copy: io.WriterAt takes none
	valve *valve
}

func (f throttledFile) WriteAt(p []byte, off int64) (int, error) {
	if err := f.valve.wait(f.ctx, len(p)); err != nil {
		return 0, err
	}
	return f.WriterAt.WriteAt(p, off)
}
