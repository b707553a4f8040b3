// Package nbd reads disks over the NBD protocol (fixed newstyle, structured
// replies) from a unix socket, and serves them so.
//
// The client exists because a backup needs block status with several metadata
// contexts (allocation and dirty bitmap) and pipelined reads, both without cgo.
// The server exists so that QEMU gets at the disks of a backup without opening
// a file of it. Neither trusts its peer: what that sends is bounded and checked.
package nbd

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

// ContextAllocation is the metadata context that tells holes and zeroes.
// QEMU's dirty bitmaps are "qemu:dirty-bitmap:NAME".
const ContextAllocation = "base:allocation"

// Flags of an Extent. StateHole and StateZero belong to ContextAllocation,
// StateDirty to a dirty bitmap's context.
const (
	StateHole  = 1
	StateZero  = 2
	StateDirty = 1
)

// Extent is a range of the disk, in bytes, with one state.
type Extent struct {
	Offset, Length uint64
	Flags          uint32 // of the one context asked for
}

// Options say what to open.
type Options struct {
	Export   string
	Contexts []string // metadata contexts that must be offered
}

// Client is a connection to one export. All methods may be called from many
// goroutines at once; requests are pipelined over the connection.
type Client struct {
	conn     net.Conn
	export   export
	slots    chan struct{} // one token for each request on the wire
	readDone chan struct{} // closed when the reading goroutine has ended

	writeMu sync.Mutex

	mu       sync.Mutex
	inFlight map[uint64]*request
	cookie   uint64
	err      error // why the connection is dead
}

// export is what negotiation found out.
type export struct {
	size                        uint64
	minimum, preferred, maximum uint32
	contexts                    map[string]uint32
}

// Dial connects to the server at a unix socket and negotiates the export. It
// fails when a context asked for is not offered. ctx bounds the negotiation.
func Dial(ctx context.Context, socket string, o Options) (*Client, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, fmt.Errorf("cannot connect to NBD server: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	r := bufio.NewReaderSize(conn, 16<<10)
	e, err := negotiate(r, conn, o)
	if !stop() {
		err = context.Cause(ctx)
	}
	if err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("cannot open NBD export %q at %s: %w", o.Export, socket, err)
	}
	return newClient(conn, r, e), nil
}

func newClient(conn net.Conn, r *bufio.Reader, e export) *Client {
	c := &Client{
		conn:     conn,
		export:   e,
		slots:    make(chan struct{}, maxInFlight),
		readDone: make(chan struct{}),
		inFlight: map[uint64]*request{},
	}
	go func() {
		defer close(c.readDone)
		c.readReplies(r)
	}()
	return c
}

// Size is the disk's size in bytes.
func (c *Client) Size() uint64 { return c.export.size }

// BlockSize returns the server's block sizes in bytes (NBD_INFO_BLOCK_SIZE).
// Requests of any size and alignment may be made all the same.
func (c *Client) BlockSize() (minimum, preferred, maximum uint32) {
	return c.export.minimum, c.export.preferred, c.export.maximum
}

// Close ends the connection and every call that is still waiting on it.
func (c *Client) Close() error {
	c.fail(net.ErrClosed)
	<-c.readDone
	return nil
}

// fail marks the connection as dead and ends all requests, once.
func (c *Client) fail(err error) {
	c.mu.Lock()
	first := c.err == nil
	if first {
		c.err = err
	}
	c.mu.Unlock()
	if !first {
		return
	}
	if errors.Is(err, net.ErrClosed) {
		// A server that does not read any more must not hold us up.
		_ = c.conn.SetWriteDeadline(time.Now().Add(time.Second))
		_ = c.write(commandDisconnect, 0, 0, 0)
	}
	_ = c.conn.Close()
}

// write sends a request's header (chapter "Request message").
func (c *Client) write(command uint16, cookie, offset uint64, length uint32) error {
	b := make([]byte, 0, 28)
	b = binary.BigEndian.AppendUint32(b, magicRequest)
	b = binary.BigEndian.AppendUint16(b, 0)
	b = binary.BigEndian.AppendUint16(b, command)
	b = binary.BigEndian.AppendUint64(b, cookie)
	b = binary.BigEndian.AppendUint64(b, offset)
	b = binary.BigEndian.AppendUint32(b, length)
	c.writeMu.Lock()
	defer c.writeMu.Unlock()
	_, err := c.conn.Write(b)
	return err
}

// start puts a request on the wire.
func (c *Client) start(ctx context.Context, r *request) error {
	select {
	case c.slots <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-c.readDone:
		return c.deadErr()
	}
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		<-c.slots
		return c.deadErr()
	}
	c.cookie++
	cookie := c.cookie
	c.inFlight[cookie] = r
	c.mu.Unlock()
	if err := c.write(r.command, cookie, r.offset, r.length); err != nil {
		// The stream is in an unknown state; the request ends with the rest.
		c.fail(fmt.Errorf("NBD connection lost: cannot send a request: %w", err))
	}
	return nil
}

func (c *Client) deadErr() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// wait waits for the request's end. After it has returned nothing touches the
// request's buffer any more.
func (c *Client) wait(ctx context.Context, r *request) error {
	select {
	case <-r.done:
		return r.err
	case <-ctx.Done():
	}
	c.mu.Lock()
	r.abandoned = true
	filling := r.filling
	if filling {
		// Wake the reading goroutine, which lets go of the buffer and goes on
		// with the connection.
		_ = c.conn.SetReadDeadline(time.Unix(1, 0))
	}
	c.mu.Unlock()
	if filling {
		<-r.released
	}
	return context.Cause(ctx)
}

// ReadAt fills p from the disk at off, or fails. Requests bigger than the
// server's maximum are split, and sent at once. When ctx ends the call returns
// its cause at once; the connection stays usable.
func (c *Client) ReadAt(ctx context.Context, p []byte, off uint64) error {
	length := uint64(len(p))
	if length == 0 {
		return nil
	}
	if err := c.checkRange(off, length); err != nil {
		return err
	}
	start, end := c.align(off, length)
	if start == off && end == off+length {
		return c.readAligned(ctx, p, off)
	}
	bounce := make([]byte, end-start)
	if err := c.readAligned(ctx, bounce, start); err != nil {
		return err
	}
	copy(p, bounce[off-start:])
	return nil
}

func (c *Client) checkRange(off, length uint64) error {
	if off > c.export.size || length > c.export.size-off {
		return fmt.Errorf("range at %d of %d bytes is beyond the disk's end at %d", off, length, c.export.size)
	}
	return nil
}

// align widens a range to the server's minimum block size, but not beyond the
// disk's end, which need not be a multiple of it.
func (c *Client) align(off, length uint64) (start, end uint64) {
	m := uint64(c.export.minimum)
	start = off - off%m
	end = off + length
	if rest := end % m; rest != 0 {
		end = min(end+m-rest, c.export.size)
	}
	return start, end
}

func (c *Client) readAligned(ctx context.Context, p []byte, off uint64) error {
	var (
		requests []*request
		first    error
	)
	for len(p) > 0 {
		n := min(len(p), int(c.export.maximum))
		r := newRequest(commandRead, off, uint32(n))
		r.buf = p[:n]
		if first = c.start(ctx, r); first != nil {
			break
		}
		requests = append(requests, r)
		p, off = p[n:], off+uint64(n)
	}
	for _, r := range requests {
		if err := c.wait(ctx, r); err != nil && first == nil {
			first = fmt.Errorf("cannot read %d bytes at %d: %w", r.length, r.offset, err)
		}
	}
	return first
}
