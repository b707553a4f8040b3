package transfer

import (
	"context"
	"fmt"
	"runtime/debug"

	"golang.org/x/sync/errgroup"
)

// guarded keeps a panic in a goroutine from taking the process down before it
// has cleaned up and said what happened.
func guarded(f func() error) func() error {
	return func() (err error) {
		defer func() {
			if p := recover(); p != nil {
				err = fail(ClassInternal, "panic: %v\n%s", p, debug.Stack())
			}
		}()
		return f()
	}
}

// stages are what is done with each item: it is emitted by produce, worked on
// side by side with others, and consumed in the order of emission. An item that
// will not be consumed is dropped, once nobody works on it any more.
type stages[T any] struct {
	produce func(ctx context.Context, emit func(T) error) error
	work    func(ctx context.Context, item T) error
	consume func(item T) error
	drop    func(item T)
}

// ordered runs the stages with at most depth items between produce and consume.
// The first error ends all; nothing is running any more when it returns.
func ordered[T any](ctx context.Context, depth int, s stages[T]) error {
	type pending struct {
		item T
		done chan error
	}
	queue := make(chan pending, max(depth-2, 0)) // one more is emitted, one consumed
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	emit := func(item T) error {
		p := pending{item, make(chan error, 1)}
		select {
		case queue <- p:
		case <-ctx.Done():
			s.drop(item)
			return context.Cause(ctx)
		}
		go func() { p.done <- guarded(func() error { return s.work(ctx, item) })() }()
		return nil
	}
	go func() {
		defer close(queue)
		if err := guarded(func() error { return s.produce(ctx, emit) })(); err != nil {
			cancel(err)
		}
	}()
	for p := range queue {
		err := <-p.done
		if err != nil || ctx.Err() != nil {
			s.drop(p.item)
		} else {
			err = guarded(func() error { return s.consume(p.item) })()
		}
		if err != nil {
			cancel(err)
		}
	}
	return context.Cause(ctx) // nil if nothing ended it
}

// sideBySide runs f for 0…n-1 at once and returns the first error.
func sideBySide(ctx context.Context, n int, f func(ctx context.Context, i int) error) error {
	g, ctx := errgroup.WithContext(ctx)
	for i := range n {
		g.Go(guarded(func() error { return f(ctx, i) }))
	}
	return g.Wait()
}

// inDisk names the disk in an error.
func inDisk(target string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("disk %s: %w", target, err)
}
