package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"sync"
)

const (
	clusterBits = 16
	clusterSize = 1 << clusterBits

	// BufferSize is the length in bytes of the buffers that GetBuffer gives.
	BufferSize = 1 << 20

	// maxThreads is how many there are when nobody says. Each takes up to 8 MiB:
	// two buffers and as much for what is compressed, and its tables.
	maxThreads = 8
)

var zeroCluster [clusterSize]byte

// WriterOptions say what image to write.
type WriterOptions struct {
	Size        uint64      // of the disk, in bytes
	ClusterSize uint32      // 0 or 65536
	Backing     string      // relative path of the parent's image, which is qcow2; "" for a full image
	Compression Compression // "" is none
	Level       int         // zstd's 1…22; 0 for its default. zlib has one level only
	Threads     int         // workers; 0 for one per CPU, 8 at most
}

// Writer writes an image from the disk's beginning to its end. Data goes
// through three stages side by side: workers find zeros and compress, one
// goroutine lays clusters out in the file's order, one writes. All of the
// file but the header, which comes last, is written in strict sequence and
// without gaps.
//
// WriteData, WriteZero and Finish must be called from one goroutine at a time.
// A Writer is ended by Finish or Abort.
type Writer struct {
	options WriterOptions
	next    uint64 // where the next call may start

	buffers chan []byte
	packs   chan []byte // for what is compressed
	work    chan *job   // to the workers
	order   chan *job   // to the layout, in the disk's order
	ended   bool
	drained sync.WaitGroup
	aborted chan struct{}

	layout *layout
	out    *output
}

// job is the data or zeroes of one call.
type job struct {
	off, length uint64
	zero        bool
	source      *os.File // copied from as it is, from host on; then there is no buffer
	host        int64
	buffer      []byte // as GetBuffer gave it; padded to whole clusters
	forms       []Form // that clusters have already
	clusters    []packed
	packed      []byte // the compressed clusters, one after the other
	err         error
	done        chan struct{}
}

// packed is what a worker made of a cluster.
type packed struct {
	zero       bool
	compressed int // bytes in job.packed; 0 if it is stored plain
}

// NewWriter starts an image in an empty file.
func NewWriter(f io.WriterAt, o WriterOptions) (*Writer, error) {
	if o.Compression == "" {
		o.Compression = CompressionNone
	}
	if o.Threads <= 0 {
		o.Threads = min(runtime.GOMAXPROCS(0), maxThreads)
	}
	if err := o.check(); err != nil {
		return nil, fmt.Errorf("cannot write image: %w", err)
	}
	buffers := 2*o.Threads + 4
	w := &Writer{
		options: o,
		buffers: make(chan []byte, buffers),
		packs:   make(chan []byte, buffers),
		work:    make(chan *job, buffers),
		order:   make(chan *job, buffers),
		aborted: make(chan struct{}),
		out:     newOutput(f),
	}
	w.layout = newLayout(o, w.out)
	for range buffers {
		w.buffers <- nil // made when first asked for
	}
	for range o.Threads {
		c, err := newCompressor(o.Compression, o.Level)
		if err != nil {
			w.Abort()
			return nil, err
		}
		w.drained.Go(func() {
			for j := range w.work {
				j.err = w.pack(j, c)
				close(j.done)
			}
		})
	}
	w.drained.Go(w.layOut)
	return w, nil
}

func (o WriterOptions) check() error {
	switch {
	case o.ClusterSize != 0 && o.ClusterSize != clusterSize:
		return fmt.Errorf("cluster size %d is not supported", o.ClusterSize)
	case l1Entries(o.Size)*8 > maxL1Bytes:
		return fmt.Errorf("a disk of %d bytes is too big", o.Size)
	case len(o.Backing) > maxBackingName:
		return errors.New("backing file's name is too long")
	case o.Level < 0 || o.Level > 22:
		return fmt.Errorf("compression level %d is not 1 to 22", o.Level)
	}
	return o.Compression.check()
}

// GetBuffer gives a buffer of BufferSize bytes for WriteData, and waits until
// one is free. When many goroutines fill buffers at once, they must be asked
// for in the order in which they will be written. Each goes to WriteData or
// PutBuffer, from its first byte on.
func (w *Writer) GetBuffer() []byte {
	select {
	case b := <-w.buffers:
		if b == nil {
			b = make([]byte, BufferSize)
		}
		return b
	case <-w.aborted:
		return make([]byte, BufferSize)
	}
}

// PutBuffer gives a buffer back that will not be written.
func (w *Writer) PutBuffer(p []byte) {
	if cap(p) < BufferSize {
		return
	}
	select {
	case w.buffers <- p[:BufferSize]:
	default: // not one of ours
	}
}

// WriteData writes p to the disk at off, which must be a multiple of the
// cluster size and not before the end of what was written; so must the end,
// but for the disk's end. p should come from GetBuffer; the writer owns it
// from now on, also when it returns an error. Clusters of zeros are found, and
// written as zeroes. Errors may come late: with another call, or with Finish.
func (w *Writer) WriteData(off uint64, p []byte) error { return w.write(off, p, nil) }

func (w *Writer) write(off uint64, p []byte, forms []Form) error {
	if err := w.advance(off, uint64(len(p))); err != nil {
		w.PutBuffer(p)
		return err
	}
	if len(p) == 0 {
		w.PutBuffer(p)
		return nil
	}
	j := &job{off: off, length: uint64(len(p)), buffer: pad(p), forms: forms, done: make(chan struct{})}
	w.work <- j
	w.order <- j
	return nil
}

// pad fills the last cluster up with zeros.
func pad(p []byte) []byte {
	n, whole := len(p), int(roundUp(uint64(len(p)), clusterSize))
	if whole > cap(p) {
		return append(make([]byte, 0, whole), p...)[:whole]
	}
	clear(p[n:whole])
	return p[:whole]
}

// CopyData writes whole clusters of data that lie as they are in another file,
// from host on, to the disk at off, as WriteData does; the file system may share
// them between the files. That they are what is meant is for the caller to see.
func (w *Writer) CopyData(off, length uint64, from *os.File, host int64) error {
	if err := w.advance(off, length); err != nil {
		return err
	}
	if length%clusterSize != 0 || host%clusterSize != 0 {
		return fmt.Errorf("cannot copy %d bytes from %d on to %d: not whole clusters", length, host, off)
	}
	for length > 0 { // the clusters of one table at a time
		n := min(length, l2Entries*clusterSize-off%(l2Entries*clusterSize), copySize)
		w.order <- &job{off: off, length: n, source: from, host: host}
		off, length, host = off+n, length-n, host+int64(n)
	}
	return nil
}

// copySize is the most that is copied at a time.
const copySize = 64 << 20

// WriteZero makes a range read as zeros, whatever a backing file has there.
// The range must be as WriteData wants it.
func (w *Writer) WriteZero(off, length uint64) error {
	if err := w.advance(off, length); err != nil || length == 0 {
		return err
	}
	if w.options.Backing != "" {
		w.order <- &job{off: off, length: length, zero: true}
	}
	return nil
}

func (w *Writer) advance(off, length uint64) error {
	size := w.options.Size
	switch {
	case w.ended:
		return errors.New("cannot write to an image that is finished")
	case off > size || length > size-off:
		return fmt.Errorf("cannot write %d bytes at %d: the disk has %d", length, off, size)
	case off%clusterSize != 0 || (off+length)%clusterSize != 0 && off+length != size:
		return fmt.Errorf("cannot write %d bytes at %d: not whole clusters", length, off)
	case off < w.next:
		return fmt.Errorf("cannot write at %d: written up to %d already", off, w.next)
	}
	w.next = off + length
	return w.out.failure()
}

// pack is a worker's part: finds zeros, compresses.
func (w *Writer) pack(j *job, c compressor) error {
	count := len(j.buffer) / clusterSize
	j.clusters = make([]packed, count)
	if c != nil {
		select {
		case j.packed = <-w.packs:
		default:
			j.packed = make([]byte, 0, BufferSize+clusterSize)
		}
	}
	for i := range count {
		from := i * clusterSize
		plain := j.buffer[from : from+clusterSize]
		zero := bytes.Equal(plain, zeroCluster[:])
		j.clusters[i].zero = zero
		var form Form
		if i < len(j.forms) {
			form = j.forms[i]
		}
		if zero || c == nil || form.Plain {
			continue
		}
		if form.Packed != nil {
			j.packed, j.clusters[i].compressed = append(j.packed, form.Packed...), len(form.Packed)
			continue
		}
		before := len(j.packed)
		var err error
		if j.packed, err = c.compress(j.packed, plain); err != nil {
			return fmt.Errorf("cannot compress the cluster at %d: %w", j.off+uint64(from), err)
		}
		n := len(j.packed) - before
		if n >= clusterSize-sectorSize {
			j.packed, n = j.packed[:before], 0
		}
		j.clusters[i].compressed = n
	}
	return nil
}

// layOut takes jobs in the disk's order until there are no more.
func (w *Writer) layOut() {
	for j := range w.order {
		if j.done != nil {
			<-j.done
		}
		kept := false
		switch {
		case j.err != nil:
			w.out.fail(j.err)
		case w.out.failure() == nil:
			kept = w.layout.add(j, w.PutBuffer)
		}
		if !kept {
			w.PutBuffer(j.buffer)
		}
		if j.packed != nil {
			select {
			case w.packs <- j.packed[:0]:
			default:
			}
		}
	}
}

// end lets the goroutines run dry.
func (w *Writer) end() {
	if w.ended {
		return
	}
	w.ended = true
	close(w.work)
	close(w.order)
	w.drained.Wait()
}

// Finish writes the tables, and the header last. The file is not synced.
func (w *Writer) Finish() error {
	if w.ended {
		return errors.New("cannot finish an image twice")
	}
	w.end()
	header := w.layout.finish()
	err := w.out.close()
	if err == nil {
		err = w.out.header(header)
	}
	close(w.aborted)
	if err != nil {
		return fmt.Errorf("cannot write image: %w", err)
	}
	return nil
}

// Abort ends the writer without finishing the image. It does nothing after
// Finish.
func (w *Writer) Abort() {
	if w.ended {
		return
	}
	w.out.fail(errors.New("cannot write image: aborted"))
	w.end()
	_ = w.out.close()
	close(w.aborted)
}
