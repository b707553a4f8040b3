package nbd

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"syscall"
	"time"
)

// request is one command on the wire. The reading goroutine owns it until
// done is closed, but for the fields that Client.mu guards.
type request struct {
	command uint16
	offset  uint64
	length  uint32

	buf     []byte // a read's target
	covered ranges // what of it has been filled

	context  uint32 // whose block status is wanted
	answered bool
	extents  []Extent

	err  error
	done chan struct{}

	// Guarded by Client.mu.
	abandoned bool          // its caller has gone, and so has buf
	filling   bool          // the reading goroutine is writing into buf
	released  chan struct{} // closed when it has let go of an abandoned buf
}

func newRequest(command uint16, offset uint64, length uint32) *request {
	return &request{command: command, offset: offset, length: length, done: make(chan struct{}), released: make(chan struct{})}
}

// replies reads the server's side of the transmission phase.
type replies struct {
	*Client
	r *bufio.Reader
}

// readReplies runs until the connection ends or the server breaks the
// protocol; all requests end with the reason.
func (c *Client) readReplies(r *bufio.Reader) {
	p := replies{Client: c, r: r}
	var err error
	for err == nil {
		err = p.next()
	}
	c.fail(fmt.Errorf("NBD connection lost: %w", err))
	c.mu.Lock()
	defer c.mu.Unlock()
	for cookie, r := range c.inFlight {
		delete(c.inFlight, cookie)
		r.err = c.err
		close(r.done)
	}
}

// chunk is the header of a structured reply chunk.
type chunk struct {
	flags, kind uint16
	length      uint32
}

// next reads and handles one reply or chunk.
func (p replies) next() error {
	var head [20]byte
	if _, err := io.ReadFull(p.r, head[:16]); err != nil {
		return err
	}
	r := p.lookUp(binary.BigEndian.Uint64(head[8:]))
	switch binary.BigEndian.Uint32(head[:]) {
	case magicSimple:
		if r == nil {
			return errors.New("reply to an unknown request")
		}
		errno := binary.BigEndian.Uint32(head[4:])
		if errno == 0 {
			return errors.New("simple reply where a structured one was due")
		}
		r.setErr(&ServerError{Errno: syscall.Errno(errno)})
		p.finish(binary.BigEndian.Uint64(head[8:]), r)
		return nil
	case magicStructured:
	default:
		return errors.New("reply with a wrong magic number")
	}
	if r == nil {
		return errors.New("reply to an unknown request")
	}
	if _, err := io.ReadFull(p.r, head[16:]); err != nil {
		return err
	}
	k := chunk{
		flags:  binary.BigEndian.Uint16(head[4:]),
		kind:   binary.BigEndian.Uint16(head[6:]),
		length: binary.BigEndian.Uint32(head[16:]),
	}
	if err := p.chunk(r, k); err != nil {
		return err
	}
	if k.flags&chunkDone != 0 {
		p.finish(binary.BigEndian.Uint64(head[8:]), r)
	}
	return nil
}

func (c *Client) lookUp(cookie uint64) *request {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.inFlight[cookie]
}

// finish ends a request after its last chunk.
func (p replies) finish(cookie uint64, r *request) {
	if r.command == commandRead && !r.covered.complete(r.length) {
		// After an error from the server that is to be expected, and not told.
		r.setErr(errors.New("server's reply leaves out a part of the range"))
	}
	p.mu.Lock()
	delete(p.inFlight, cookie)
	p.mu.Unlock()
	<-p.slots
	close(r.done)
}

// setErr keeps the first error: the others follow from it.
func (r *request) setErr(err error) {
	if r.err == nil {
		r.err = err
	}
}

func (p replies) chunk(r *request, k chunk) error {
	switch {
	case k.kind == chunkNone && k.length == 0 && k.flags&chunkDone != 0:
		return nil
	case k.kind == chunkOffsetData && r.command == commandRead:
		return p.data(r, k)
	case k.kind == chunkOffsetHole && r.command == commandRead:
		return p.hole(r, k)
	case k.kind == chunkBlockStatus && r.command == commandBlockStatus:
		return p.status(r, k)
	case k.kind&chunkErrorBit != 0:
		return p.error(r, k)
	}
	return fmt.Errorf("unexpected reply chunk of type %d, %d bytes, to command %d", k.kind, k.length, r.command)
}

// payload reads a chunk's fixed part.
func (p replies) payload(n int) ([]byte, error) {
	b := make([]byte, n)
	_, err := io.ReadFull(p.r, b)
	return b, err
}

func (p replies) data(r *request, k chunk) error {
	if k.length <= 8 || k.length-8 > r.length {
		return fmt.Errorf("data chunk of %d bytes for a read of %d", k.length, r.length)
	}
	b, err := p.payload(8)
	if err != nil {
		return err
	}
	target, err := p.claim(r, binary.BigEndian.Uint64(b), k.length-8)
	if err != nil {
		return err
	}
	n, err := io.ReadFull(p.r, target)
	if abandoned := p.release(r); abandoned && errors.Is(err, os.ErrDeadlineExceeded) {
		err = nil
	}
	if err != nil {
		return err
	}
	_, err = p.r.Discard(int(k.length-8) - n)
	return err
}

func (p replies) hole(r *request, k chunk) error {
	if k.length != 12 {
		return fmt.Errorf("hole chunk of %d bytes", k.length)
	}
	b, err := p.payload(12)
	if err != nil {
		return err
	}
	target, err := p.claim(r, binary.BigEndian.Uint64(b), binary.BigEndian.Uint32(b[8:]))
	if err != nil {
		return err
	}
	clear(target)
	p.release(r)
	return nil
}

// claim returns the part of the request's buffer that a chunk is for, to be
// filled until release; nil when the caller has gone.
func (p replies) claim(r *request, offset uint64, length uint32) ([]byte, error) {
	if offset < r.offset || offset-r.offset > uint64(r.length) || uint64(length) > uint64(r.length)-(offset-r.offset) {
		return nil, fmt.Errorf("chunk at %d of %d bytes is outside the range that was asked for", offset, length)
	}
	from := uint32(offset - r.offset)
	if !r.covered.add(from, from+length) {
		return nil, fmt.Errorf("chunk at %d of %d bytes is empty, or overlaps another", offset, length)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if r.abandoned {
		return nil, nil
	}
	r.filling = true
	return r.buf[from : from+length], nil
}

// release ends a claim, and tells whether the caller has gone.
func (p replies) release(r *request) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if r.filling && r.abandoned {
		_ = p.conn.SetReadDeadline(time.Time{})
		close(r.released)
	}
	r.filling = false
	return r.abandoned
}

func (p replies) status(r *request, k chunk) error {
	if k.length < 12 || k.length%8 != 4 || k.length > maxStatusPayload {
		return fmt.Errorf("block status chunk of %d bytes", k.length)
	}
	b, err := p.payload(4)
	if err != nil {
		return err
	}
	if binary.BigEndian.Uint32(b) != r.context {
		_, err := p.r.Discard(int(k.length - 4))
		return err
	}
	if r.answered {
		return errors.New("second block status for one metadata context")
	}
	r.answered = true
	// Descriptors are read one by one, so that a length alone makes us hold nothing.
	at, end := r.offset, r.offset+uint64(r.length)
	for range (k.length - 4) / 8 {
		if b, err = p.payload(8); err != nil {
			return err
		}
		length := uint64(binary.BigEndian.Uint32(b))
		if length == 0 || at >= end {
			return errors.New("block status with an empty extent, or one behind the range")
		}
		r.extents = append(r.extents, Extent{Offset: at, Length: length, Flags: binary.BigEndian.Uint32(b[4:])})
		at += length
	}
	return nil
}

// error reads an error chunk (NBD_REPLY_TYPE_ERROR, …_ERROR_OFFSET, or a kind
// that is not known yet, of which the protocol fixes the beginning).
func (p replies) error(r *request, k chunk) error {
	if k.length < 6 || k.length > 6+maxString+8 {
		return fmt.Errorf("error chunk of %d bytes", k.length)
	}
	b, err := p.payload(int(k.length))
	if err != nil {
		return err
	}
	errno, n := binary.BigEndian.Uint32(b), int(binary.BigEndian.Uint16(b[4:]))
	if errno == 0 || errno > math.MaxInt32 || n > len(b)-6 {
		return errors.New("malformed error chunk")
	}
	message := string(b[6 : 6+n])
	if k.kind == chunkErrorOffset && len(b) == 6+n+8 {
		message = fmt.Sprintf("%s, at %d", message, binary.BigEndian.Uint64(b[6+n:]))
	}
	r.setErr(&ServerError{Errno: syscall.Errno(errno), Message: message})
	return nil
}

// ranges is what of a buffer has been filled: sorted, disjoint, merged.
type ranges []struct{ from, to uint32 }

// add refuses a range that is empty or overlaps what is there.
func (s *ranges) add(from, to uint32) bool {
	i, _ := slices.BinarySearchFunc(*s, from, func(e struct{ from, to uint32 }, from uint32) int {
		if e.from < from {
			return -1
		}
		return 1
	})
	if from >= to || i > 0 && (*s)[i-1].to > from || i < len(*s) && (*s)[i].from < to {
		return false
	}
	before := i > 0 && (*s)[i-1].to == from
	after := i < len(*s) && (*s)[i].from == to
	switch {
	case before && after:
		(*s)[i-1].to = (*s)[i].to
		*s = slices.Delete(*s, i, i+1)
	case before:
		(*s)[i-1].to = to
	case after:
		(*s)[i].from = from
	default:
		*s = slices.Insert(*s, i, struct{ from, to uint32 }{from, to})
	}
	return true
}

func (s ranges) complete(length uint32) bool {
	return len(s) == 1 && s[0].from == 0 && s[0].to == length
}
