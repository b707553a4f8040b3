package nbd

import (
	"bufio"
	"context"
	"errors"
	"net"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"
)

// Export is a disk that a Server shows. Its methods are called from many
// goroutines at once, and return soon after ctx has ended.
type Export interface {
	Size() uint64
	// ReadAt fills p from the disk at off; the range is within the disk. When it
	// fails, p may still be written to. An errno in the error is what the client
	// gets; EIO if there is none.
	ReadAt(ctx context.Context, p []byte, off uint64) error
}

// Mapper is an Export that knows what of it is zeros.
type Mapper interface {
	Export
	// Extents calls fn for a range in order and without gaps, with the flags of
	// ContextAllocation, and ends with the first error of fn.
	Extents(ctx context.Context, off, length uint64, fn func(Extent) error) error
}

const (
	// maxConnections bounds those of one server; more have to wait.
	maxConnections = 16
	// preferredSize and maximumSize are the block sizes that a server tells. Only
	// the oldest clients (EXPORT_NAME) do not hear them; they are held to them too.
	preferredSize = 64 << 10
	maximumSize   = 4 << 20
	// negotiationLimit is how long a client may take until it asks for data.
	negotiationLimit = 30 * time.Second
	// acceptPause is waited when no connection can be taken, as for want of file
	// descriptors.
	acceptPause = 100 * time.Millisecond
)

// Server serves one export, for reading only.
type Server struct {
	name    string
	export  Export
	buffers pool
	budget  *semaphore.Weighted // of the bytes of replies
}

// NewServer makes a server of an export of that name, which holds so many bytes
// of replies at the most, and one of the greatest requests at the least. A client
// may also ask for the export without a name.
func NewServer(name string, e Export, buffered int64) *Server {
	return &Server{name: name, export: e, budget: semaphore.NewWeighted(max(buffered, maximumSize))}
}

// Serve serves all who connect, until ctx ends, and closes the listener. It
// returns when no connection is left.
func (s *Server) Serve(ctx context.Context, l net.Listener) {
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	defer func() { _ = l.Close() }()
	var connections sync.WaitGroup
	defer connections.Wait()
	slots := make(chan struct{}, maxConnections)
	for {
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			return
		}
		conn, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			<-slots
			time.Sleep(acceptPause)
			continue
		}
		connections.Go(func() {
			defer func() { <-slots }()
			s.serve(ctx, conn)
		})
	}
}

// serve serves one connection to its end. How a client leaves is its own affair.
func (s *Server) serve(ctx context.Context, conn net.Conn) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(negotiationLimit))
	r := bufio.NewReaderSize(conn, 4<<10)
	o := offer{Server: s, r: r, w: conn}
	if err := o.negotiate(); err != nil {
		return
	}
	_ = conn.SetDeadline(time.Time{})
	c := &connection{Server: s, conn: conn, structured: o.structured, mapped: o.mapped, slots: make(chan struct{}, maxInFlight)}
	c.transmit(ctx, r, cancel)
}

// flags are what the export can do.
func (s *Server) flags(structured bool) uint16 {
	f := uint16(flagHasFlags | flagReadOnly | flagMultiConn)
	if structured {
		f |= flagSendDF // every reply is in one piece
	}
	return f
}
