package qcow2

import (
	"fmt"
	"io"
	"os"
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
	source  *os.File // in place of data: so many bytes from host on
	host    int64
	length  int64
	release func()
}

// Copier is what a file of a Writer may be besides: it takes data from another
// file without reading it, where the file system can.
type Copier interface {
	CopyAt(from *os.File, host, off, length int64) error
}

// write brings a chunk to the file.
func (o *output) write(c chunk) error {
	switch to, ok := o.f.(Copier); {
	case c.source == nil:
		if _, err := o.f.WriteAt(c.data, c.offset); err != nil {
			return fmt.Errorf("cannot write %d bytes at %d: %w", len(c.data), c.offset, err)
		}
		return nil
	case ok:
		if err := to.CopyAt(c.source, c.host, c.offset, c.length); err != nil {
			return fmt.Errorf("cannot copy %d bytes to %d: %w", c.length, c.offset, err)
		}
		return nil
	}
	_, err := io.Copy(io.NewOffsetWriter(o.f, c.offset), io.NewSectionReader(c.source, c.host, c.length))
	if err != nil {
		return fmt.Errorf("cannot copy %d bytes to %d: %w", c.length, c.offset, err)
	}
	return nil
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
			if err := o.write(c); err != nil {
				o.fail(err)
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
