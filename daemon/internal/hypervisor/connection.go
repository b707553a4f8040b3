package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"libvirt.org/go/libvirt"
)

const (
	minimumBackOff = 100 * time.Millisecond
	maximumBackOff = 10 * time.Second
	probeInterval  = 5 * time.Second
	probeLimit     = 20 * time.Second
)

// connection is one connection to libvirtd, with the events registered on it.
type connection struct {
	*libvirt.Connect
	callbacks []int
}

// Connect connects to libvirt at uri ("qemu:///system") and fails when that is
// not possible now. From then on a lost connection is made again in the
// background; calls wait for it as long as their context allows. ctx bounds
// only this call. Close ends the connection.
func Connect(ctx context.Context, uri string, log *slog.Logger) (*Hypervisor, error) {
	if err := runEventLoop(); err != nil {
		return nil, err
	}
	h := &Hypervisor{uri: uri, log: log, changed: make(chan struct{}), done: make(chan struct{})}
	lost := make(chan string, 1)
	conn, err := h.dial(ctx, lost)
	if err != nil {
		return nil, err
	}
	h.set(conn)
	keep, stop := context.WithCancel(context.WithoutCancel(ctx))
	h.stop = stop
	go h.keep(keep, lost)
	go func() {
		if err := h.watchSnapshots(keep, snapshotDirectory); err != nil {
			log.Warn("snapshots are not seen at once, but later", "error", err)
		}
	}()
	return h, nil
}

// Close ends the connection; subscriptions end too.
func (h *Hypervisor) Close() {
	h.stop()
	<-h.done
}

// keep watches the connection and makes a new one when it is lost.
func (h *Hypervisor) keep(ctx context.Context, lost chan string) {
	defer close(h.done)
	defer h.subs.close()
	for {
		probing, endProbe := context.WithCancel(ctx)
		go h.probe(probing, lost)
		select {
		case <-ctx.Done():
			endProbe()
			h.set(nil)
			return
		case reason := <-lost:
			endProbe()
			h.log.Warn("lost the connection to libvirt", "uri", h.uri, "reason", reason)
			h.set(nil)
		}
		lost = make(chan string, 1)
		if !h.reconnect(ctx, lost) {
			return
		}
		h.log.Info("connected to libvirt again", "uri", h.uri)
		h.subs.publish(Event{Kind: EventMissed})
	}
}

// reconnect tries until it succeeds, or until ctx ends, and tells which.
func (h *Hypervisor) reconnect(ctx context.Context, lost chan string) bool {
	for wait := minimumBackOff; ; wait = min(2*wait, maximumBackOff) {
		select {
		case <-ctx.Done():
			return false
		case <-time.After(wait):
		}
		limited, cancel := context.WithTimeout(ctx, probeLimit)
		conn, err := h.dial(limited, lost)
		cancel()
		if err == nil {
			h.set(conn)
			return true
		}
		h.log.Debug("cannot connect to libvirt yet", "uri", h.uri, "error", err)
	}
}

// dial opens a connection and registers the events on it. lost gets one word
// when the connection breaks.
func (h *Hypervisor) dial(ctx context.Context, lost chan<- string) (*connection, error) {
	plain, err := open(ctx, h.uri)
	if err != nil {
		return nil, err
	}
	conn := &connection{Connect: plain}
	err = conn.RegisterCloseCallback(func(_ *libvirt.Connect, reason libvirt.ConnectCloseReason) {
		report(lost, closeReason(reason))
	})
	// The test driver has no close callback, and needs none: it is in this process.
	if err != nil && !isCode(err, libvirt.ERR_NO_SUPPORT) {
		release(plain)
		return nil, fmt.Errorf("cannot watch the connection to libvirt: %w", classify(err))
	}
	conn.callbacks, err = h.subs.register(plain)
	if err != nil {
		go conn.end()
		return nil, err
	}
	return conn, nil
}

// end takes back what dial set up. It may block on a hung libvirtd. Each
// registered event holds a reference to the connection, so all must go.
func (c *connection) end() {
	for _, id := range c.callbacks {
		_ = c.DomainEventDeregister(id)
	}
	_ = c.UnregisterCloseCallback()
	release(c.Connect)
}

// open makes a plain connection, without callbacks.
func open(ctx context.Context, uri string) (*libvirt.Connect, error) {
	type answer struct {
		conn *libvirt.Connect
		err  error
	}
	ch := make(chan answer)
	go func() {
		conn, err := libvirt.NewConnect(uri)
		select {
		case ch <- answer{conn, err}:
		case <-ctx.Done():
			if err == nil {
				release(conn)
			}
		}
	}()
	select {
	case a := <-ch:
		if a.err != nil {
			return nil, fmt.Errorf("cannot connect to libvirt at %s: %w: %w", uri, ErrUnavailable, classify(a.err))
		}
		return a.conn, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("cannot connect to libvirt at %s: %w: %w", uri, ErrUnavailable, context.Cause(ctx))
	}
}

// probe asks libvirtd for its version now and then, and reports the main
// connection as lost when no answer comes. It uses a connection of its own:
// the keep-alive protocol of libvirt 9.0's client gives up on a healthy
// connection that has two calls in flight.
func (h *Hypervisor) probe(ctx context.Context, lost chan<- string) {
	conn, err := open(ctx, h.uri)
	if err != nil {
		if ctx.Err() == nil {
			report(lost, "the probe cannot connect")
		}
		return
	}
	defer func() { go release(conn) }() // closing waits for a call in flight
	tick := time.NewTicker(probeInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		answered := make(chan error, 1)
		go func() {
			_, err := conn.GetLibVersion()
			answered <- err
		}()
		select {
		case <-ctx.Done():
			return
		case err := <-answered:
			if err != nil {
				report(lost, "the probe failed: "+err.Error())
				return
			}
		case <-time.After(probeLimit):
			report(lost, "the probe got no answer")
			return
		}
	}
}

func report(lost chan<- string, reason string) {
	select {
	case lost <- reason:
	default: // it is being replaced already
	}
}

// set makes conn the current connection, and lets go of the one before.
func (h *Hypervisor) set(conn *connection) {
	h.mu.Lock()
	old := h.current
	h.current = conn
	close(h.changed)
	h.changed = make(chan struct{})
	h.mu.Unlock()
	if old != nil {
		go old.end() // a hung libvirtd must not hold us
	}
}

// acquire returns the current connection with a reference for the caller, and
// waits for one while there is none.
func (h *Hypervisor) acquire(ctx context.Context) (*libvirt.Connect, error) {
	for {
		h.mu.Lock()
		conn, changed := h.current, h.changed
		var err error
		if conn != nil {
			err = conn.Ref()
		}
		h.mu.Unlock()
		if conn != nil {
			return conn.Connect, err
		}
		select {
		case <-changed:
		case <-h.done:
			return nil, errors.New("the connection to libvirt was closed")
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: %w", ErrDisconnected, context.Cause(ctx))
		}
	}
}

func release(c *libvirt.Connect) { _, _ = c.Close() }

func closeReason(r libvirt.ConnectCloseReason) string {
	switch r {
	case libvirt.CONNECT_CLOSE_REASON_EOF:
		return "libvirtd closed it"
	case libvirt.CONNECT_CLOSE_REASON_KEEPALIVE:
		return "keep-alive timed out"
	case libvirt.CONNECT_CLOSE_REASON_CLIENT:
		return "closed by us"
	default:
		return "error"
	}
}
