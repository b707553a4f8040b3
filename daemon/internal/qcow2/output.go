package qcow2

import (
	"fmt"
	"io"
	"sync"
)

// output writes the file in sequence, on its own goroutine.
type output struct {
	f       io.WriterAt
	queue   chan chunk
	done    chan struct{}
	staging chan []byte

	mu  sync.Mutex
	err error
}

// chunk is a run of whole clusters on its way to the file.
type chunk struct {
	offset  int64
	data    []byte
	release func()
}

func newOutput(f io.WriterAt) *output {
	o := &output{f: f, queue: make(chan chunk, 1), done: make(chan struct{}), staging: make(chan []byte, 2)}
	o.staging <- nil // two, made when first asked for: one is filled while the other is written
	o.staging <- nil
	go o.run()
	return o
}

func (o *output) run() {
	defer close(o.done)
	for c := range o.queue {
		if o.failure() == nil {
			if _, err := o.f.WriteAt(c.data, c.offset); err != nil {
				o.fail(fmt.Errorf("cannot write %d bytes at %d: %w", len(c.data), c.offset, err))
			}
		}
		c.release()
	}
}

// header writes the file's first cluster, after all else.
func (o *output) header(p []byte) error {
	if _, err := o.f.WriteAt(p, 0); err != nil {
		return fmt.Errorf("cannot write header: %w", err)
	}
	return nil
}

// close waits until all is written.
func (o *output) close() error {
	close(o.queue)
	<-o.done
	return o.failure()
}

func (o *output) fail(err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.err == nil {
		o.err = err
	}
}

func (o *output) failure() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.err
}
