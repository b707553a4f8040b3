package bus

import (
	"context"
	"sync"

	godbus "github.com/godbus/dbus/v5"
	"github.com/virtbackup/virtbackup/dbus"
)

// callers knows whose calls are waiting to be authorized, so that nobody is
// asked for a password on behalf of a caller that is gone.
type callers struct {
	mu sync.Mutex
	// waiting holds, for each sender, what ends the contexts of its calls.
	waiting map[string]map[*context.CancelFunc]struct{}
}

func newCallers() *callers {
	return &callers{waiting: make(map[string]map[*context.CancelFunc]struct{})}
}

// follow listens for connections that leave the bus.
func (c *callers) follow(ctx context.Context, conn *godbus.Conn) error {
	gone := make(chan *godbus.Signal, 64)
	conn.Signal(gone)
	go func() {
		for s := range gone {
			if name, ok := left(s); ok {
				c.gone(name)
			}
		}
	}()
	return conn.AddMatchSignalContext(ctx, godbus.WithMatchSender(busDaemon), godbus.WithMatchInterface(busDaemon),
		godbus.WithMatchMember("NameOwnerChanged"), godbus.WithMatchArg(2, ""))
}

const busDaemon = "org.freedesktop.DBus"

// left returns the name that a NameOwnerChanged signal says has no owner now.
func left(s *godbus.Signal) (string, bool) {
	var name, before, now string
	if s.Name != busDaemon+".NameOwnerChanged" || godbus.Store(s.Body, &name, &before, &now) != nil {
		return "", false
	}
	return name, now == ""
}

// whileThere returns a context that ends when sender leaves the bus.
func (c *callers) whileThere(ctx context.Context, sender string) (context.Context, func()) {
	ctx, cancel := context.WithCancel(ctx)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.waiting[sender] == nil {
		c.waiting[sender] = make(map[*context.CancelFunc]struct{})
	}
	c.waiting[sender][&cancel] = struct{}{}
	return ctx, func() {
		cancel()
		c.mu.Lock()
		defer c.mu.Unlock()
		if delete(c.waiting[sender], &cancel); len(c.waiting[sender]) == 0 {
			delete(c.waiting, sender)
		}
	}
}

func (c *callers) gone(sender string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for cancel := range c.waiting[sender] {
		(*cancel)()
	}
}

// uid asks the bus for the user of a connection.
func uid(ctx context.Context, conn *godbus.Conn, sender string) (uint32, error) {
	var id uint32
	err := conn.BusObject().CallWithContext(ctx, busDaemon+".GetConnectionUnixUser", 0, sender).Store(&id)
	if err != nil {
		return 0, dbus.Errorf(dbus.ErrNotAuthorized, "the bus does not know who calls: %v", err)
	}
	return id, nil
}
