package nbd

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"net"
	"sync"
	"syscall"
)

// asked is a request as a client sends it.
type asked struct {
	flags, command uint16
	cookie, offset uint64
	length         uint32
}

// requestSize is the length of a request's header (chapter "Request message").
const requestSize = 28

// parseRequest takes a request's header apart.
func parseRequest(b *[requestSize]byte) (asked, error) {
	a := asked{
		flags:   binary.BigEndian.Uint16(b[4:]),
		command: binary.BigEndian.Uint16(b[6:]),
		cookie:  binary.BigEndian.Uint64(b[8:]),
		offset:  binary.BigEndian.Uint64(b[16:]),
		length:  binary.BigEndian.Uint32(b[24:]),
	}
	if magic := binary.BigEndian.Uint32(b[:]); magic != magicRequest {
		return a, fmt.Errorf("%w: request with a wrong magic number %#x", errProtocol, magic)
	}
	return a, nil
}

// check says what is wrong with a request to an export of size bytes; 0 if
// nothing is.
func (a asked) check(size uint64, structured, mapped bool) syscall.Errno {
	var allowed uint16
	if structured {
		allowed = commandFlagDF
	}
	switch a.command {
	case commandRead:
	case commandBlockStatus:
		if allowed = commandFlagOne; !mapped {
			return syscall.EINVAL
		}
	case commandWrite, commandTrim, commandWriteZeroes:
		return syscall.EPERM
	default:
		return syscall.EINVAL
	}
	switch {
	case a.flags&^allowed != 0, a.length == 0, a.offset > size, uint64(a.length) > size-a.offset:
		return syscall.EINVAL
	case a.command == commandRead && a.length > maximumSize:
		return syscall.EOVERFLOW
	}
	return 0
}

// connection is the server's side of a connection once an export is chosen.
type connection struct {
	*Server
	conn       net.Conn
	structured bool
	mapped     bool
	slots      chan struct{} // one for each request that is not answered

	writeMu sync.Mutex
}

// transmit answers requests until the client leaves, breaks the protocol, or
// ctx ends. Then cancel ends what is still being answered.
func (c *connection) transmit(ctx context.Context, r *bufio.Reader, cancel func()) {
	var requests sync.WaitGroup
	defer requests.Wait()
	defer cancel()
	for {
		var head [requestSize]byte
		if _, err := io.ReadFull(r, head[:]); err != nil {
			return
		}
		a, err := parseRequest(&head)
		if err != nil || a.command == commandDisconnect {
			return
		}
		if a.command == commandWrite && !discard(r, a.length) {
			return
		}
		weight, ok := c.admit(ctx, a)
		if !ok {
			return
		}
		requests.Go(func() {
			defer func() { <-c.slots }()
			defer c.budget.Release(weight)
			if err := c.handle(ctx, a); err != nil {
				cancel() // it may have been sent in part
			}
		})
	}
}

// discard takes what is to be written off the connection.
func discard(r *bufio.Reader, length uint32) bool {
	if length > defaultMaximum {
		return false
	}
	_, err := r.Discard(int(length))
	return err == nil
}

// admit waits until there is room for a request's answer.
func (c *connection) admit(ctx context.Context, a asked) (weight int64, ok bool) {
	select {
	case c.slots <- struct{}{}:
	case <-ctx.Done():
		return 0, false
	}
	if a.command == commandRead {
		weight = int64(min(a.length, maximumSize))
	}
	return weight, c.budget.Acquire(ctx, weight) == nil
}

// handle answers a request. An error ends the connection.
func (c *connection) handle(ctx context.Context, a asked) error {
	if errno := a.check(c.export.Size(), c.structured, c.mapped); errno != 0 {
		return c.fail(a, errno)
	}
	if a.command == commandBlockStatus {
		return c.status(ctx, a)
	}
	p := c.buffers.get(int(a.length))
	if err := c.export.ReadAt(ctx, p, a.offset); err != nil {
		return c.fail(a, errnoOf(err)) // p is not used again
	}
	defer c.buffers.put(p)
	if !c.structured {
		return c.send(simple(a.cookie, 0), p)
	}
	head := chunkHead(a.cookie, chunkOffsetData, 8+a.length)
	return c.send(binary.BigEndian.AppendUint64(head, a.offset), p)
}

// errnoOf is what a client is told: the protocol knows few numbers.
func errnoOf(err error) syscall.Errno {
	var errno syscall.Errno
	if errors.As(err, &errno) {
		switch errno {
		case syscall.EPERM, syscall.ENOMEM, syscall.EINVAL, syscall.ENOSPC:
			return errno
		}
	}
	return syscall.EIO
}

func (c *connection) fail(a asked, errno syscall.Errno) error {
	// An answer to BLOCK_STATUS is structured, and so all others then.
	if !c.structured {
		return c.send(simple(a.cookie, errno), nil)
	}
	payload := binary.BigEndian.AppendUint32(nil, uint32(errno))
	payload = binary.BigEndian.AppendUint16(payload, 0)
	return c.send(chunkHead(a.cookie, chunkError, uint32(len(payload))), payload)
}

func simple(cookie uint64, errno syscall.Errno) []byte {
	b := binary.BigEndian.AppendUint32(make([]byte, 0, 16), magicSimple)
	b = binary.BigEndian.AppendUint32(b, uint32(errno))
	return binary.BigEndian.AppendUint64(b, cookie)
}

// chunkHead begins a structured reply of a single chunk.
func chunkHead(cookie uint64, kind uint16, length uint32) []byte {
	b := binary.BigEndian.AppendUint32(make([]byte, 0, 28), magicStructured)
	b = binary.BigEndian.AppendUint16(b, chunkDone)
	b = binary.BigEndian.AppendUint16(b, kind)
	b = binary.BigEndian.AppendUint64(b, cookie)
	return binary.BigEndian.AppendUint32(b, length)
}

func (c *connection) send(head, data []byte) error {
	c.writeMu.Lock()
	defer c.writeMu.Unlock()
	_, err := (&net.Buffers{head, data}).WriteTo(c.conn)
	return err
}

// maxExtents bounds one answer to BLOCK_STATUS.
const maxExtents = 4096

var errEnough = errors.New("enough extents")

// status answers BLOCK_STATUS, for the beginning of the range at least.
func (c *connection) status(ctx context.Context, a asked) error {
	most := maxExtents
	if a.flags&commandFlagOne != 0 {
		most = 1
	}
	payload := binary.BigEndian.AppendUint32(nil, allocationID)
	count := 0
	// The negotiation has seen that it is a Mapper.
	err := c.export.(Mapper).Extents(ctx, a.offset, min(uint64(a.length), statusSpan), func(e Extent) error {
		if count == most {
			return errEnough
		}
		count++
		payload = binary.BigEndian.AppendUint32(payload, uint32(e.Length))
		payload = binary.BigEndian.AppendUint32(payload, e.Flags)
		return nil
	})
	if err != nil && !errors.Is(err, errEnough) {
		return c.fail(a, errnoOf(err))
	}
	return c.send(chunkHead(a.cookie, chunkBlockStatus, uint32(len(payload))), payload)
}

// pool keeps buffers by the power of two that they hold.
type pool [32]sync.Pool

func (p *pool) get(n int) []byte {
	class := bits.Len(uint(n - 1))
	if b, ok := p[class].Get().(*[]byte); ok {
		return (*b)[:n]
	}
	return make([]byte, n, 1<<class)
}

func (p *pool) put(b []byte) {
	b = b[:cap(b)]
	p[bits.Len(uint(len(b)-1))].Put(&b)
}
