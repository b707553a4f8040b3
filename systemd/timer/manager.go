package timer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"sync"
	"time"

	systemd "github.com/coreos/go-systemd/v22/dbus"
	"github.com/godbus/dbus/v5"
	"github.com/google/renameio/v2"
)

// Manager keeps timers. It is safe for concurrent use.
type Manager struct {
	ctx    context.Context // ends with Close; the connection lives in it
	cancel context.CancelFunc

	changing sync.Mutex // one change at a time: reloads are dear

	mu   sync.Mutex
	conn *systemd.Conn
}

// New makes a Manager. It connects to systemd when it is first asked for something.
func New(ctx context.Context) *Manager {
	m := &Manager{}
	m.ctx, m.cancel = context.WithCancel(context.WithoutCancel(ctx))
	return m
}

// Close ends the connection. Timers run on.
func (m *Manager) Close() {
	m.cancel()
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.conn != nil {
		m.conn.Close()
		m.conn = nil
	}
}

// connection is the live connection, a new one if need be.
func (m *Manager) connection() (*systemd.Conn, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.conn != nil && m.conn.Connected() {
		return m.conn, nil
	}
	if m.conn != nil {
		m.conn.Close()
		m.conn = nil
	}
	conn, err := systemd.NewSystemConnectionContext(m.ctx)
	if err != nil {
		return nil, fmt.Errorf("cannot connect to systemd: %w", err)
	}
	m.conn = conn
	return conn, nil
}

// Set has a timer be as it is said, and run or not; what is so already is left alone. A timer that changes, or is
// stopped, begins anew: only what it misses from then on, while the host is down, is made up for.
func (m *Manager) Set(ctx context.Context, t Timer, enabled bool) error {
	if err := t.check(); err != nil {
		return fmt.Errorf("cannot set timer: %w", err)
	}
	m.changing.Lock()
	defer m.changing.Unlock()
	conn, err := m.connection()
	if err != nil {
		return err
	}
	if err := m.set(ctx, conn, t, enabled); err != nil {
		return fmt.Errorf("cannot set timer %s: %w", UnitName(t.ID), err)
	}
	return nil
}

func (m *Manager) set(ctx context.Context, conn *systemd.Conn, t Timer, enabled bool) error {
	was, err := os.ReadFile(path(t.ID))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	known, same := err == nil, bytes.Equal(was, t.file())
	if known && (!same || !enabled) {
		if err := stop(ctx, conn, t.ID); err != nil {
			return err
		}
	}
	if !same {
		if err := write(path(t.ID), t.file()); err != nil {
			return err
		}
		if err := conn.ReloadContext(ctx); err != nil {
			return fmt.Errorf("cannot have systemd read its units again: %w", err)
		}
	}
	unit := []string{UnitName(t.ID)}
	if !enabled {
		_, err := conn.DisableUnitFilesContext(ctx, unit, false)
		return err
	}
	if _, _, err := conn.EnableUnitFilesContext(ctx, unit, false, false); err != nil {
		return err
	}
	return start(ctx, conn, t.ID)
}

// write puts a file in its place, whole or not at all, also when the host goes down.
func write(to string, content []byte) error {
	if err := renameio.WriteFile(to, content, 0o644, renameio.IgnoreUmask()); err != nil {
		return err
	}
	return syncDirectory(filepath.Dir(to))
}

func syncDirectory(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// Remove stops a timer and removes all that there is of it. One that does not exist is no error.
func (m *Manager) Remove(ctx context.Context, id string) error {
	if !identifier.MatchString(id) {
		return fmt.Errorf("cannot remove timer: %q is not the id of a schedule", id)
	}
	m.changing.Lock()
	defer m.changing.Unlock()
	conn, err := m.connection()
	if err != nil {
		return err
	}
	if err := m.remove(ctx, conn, id); err != nil {
		return fmt.Errorf("cannot remove timer %s: %w", UnitName(id), err)
	}
	return nil
}

func (m *Manager) remove(ctx context.Context, conn *systemd.Conn, id string) error {
	if _, err := conn.DisableUnitFilesContext(ctx, []string{UnitName(id)}, false); err != nil && errorName(err) != noSuchUnit {
		return err
	}
	if err := stop(ctx, conn, id); err != nil {
		return err
	}
	if err := os.Remove(path(id)); errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	if err := syncDirectory(Directory); err != nil {
		return err
	}
	return conn.ReloadContext(ctx)
}

// IDs returns the schedules that have a unit file.
func (m *Manager) IDs() ([]string, error) {
	files, err := filepath.Glob(path("*"))
	if err != nil {
		return nil, fmt.Errorf("cannot list timers: %w", err)
	}
	var ids []string
	for _, f := range files {
		if id, ok := idOf(f); ok {
			ids = append(ids, id)
		}
	}
	return ids, nil
}

// State is what systemd says of a timer.
type State struct {
	Active bool
	Next   time.Time // when it elapses next, the randomized delay included; zero for never
}

// State asks systemd for a timer. One that it does not know is not active.
func (m *Manager) State(ctx context.Context, id string) (State, error) {
	if !identifier.MatchString(id) {
		return State{}, fmt.Errorf("cannot look at timer: %q is not the id of a schedule", id)
	}
	conn, err := m.connection()
	if err != nil {
		return State{}, err
	}
	active, err := conn.GetUnitPropertyContext(ctx, UnitName(id), "ActiveState")
	if err != nil {
		return State{}, fmt.Errorf("cannot look at timer %s: %w", UnitName(id), err)
	}
	if active.Value.Value() != "active" {
		return State{}, nil
	}
	next, err := conn.GetUnitTypePropertyContext(ctx, UnitName(id), "Timer", "NextElapseUSecRealtime")
	if err != nil {
		return State{}, fmt.Errorf("cannot look at timer %s: %w", UnitName(id), err)
	}
	s := State{Active: true}
	if us, ok := next.Value.Value().(uint64); ok && us > 0 && us < math.MaxInt64 {
		s.Next = time.UnixMicro(int64(us))
	}
	return s, nil
}

const (
	noSuchUnit = "org.freedesktop.systemd1.NoSuchUnit"
	// settleLimit is how long systemd may take to start or stop a timer, for which there is nothing to do but to note it.
	settleLimit = 10 * time.Second
	settleEach  = 20 * time.Millisecond
)

func start(ctx context.Context, conn *systemd.Conn, id string) error {
	if _, err := conn.StartUnitContext(ctx, UnitName(id), "replace", nil); err != nil {
		return err
	}
	return await(ctx, conn, id, "active")
}

// stop stops a timer, and has systemd forget when it elapsed last.
func stop(ctx context.Context, conn *systemd.Conn, id string) error {
	if _, err := conn.StopUnitContext(ctx, UnitName(id), "replace", nil); errorName(err) != noSuchUnit {
		if err != nil {
			return err
		}
		if err := await(ctx, conn, id, "inactive"); err != nil {
			return err
		}
	}
	if err := os.Remove(stamp(id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// await waits until systemd's job for a timer has brought it to a state.
func await(ctx context.Context, conn *systemd.Conn, id, state string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, settleLimit, fmt.Errorf("it does not become %s", state))
	defer cancel()
	for {
		p, err := conn.GetUnitPropertyContext(ctx, UnitName(id), "ActiveState")
		if err == nil && (p.Value.Value() == state || p.Value.Value() == "failed" && state == "inactive") {
			return nil
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(settleEach):
		}
	}
}

// errorName is the name of a D-Bus error, or "".
func errorName(err error) string {
	var e dbus.Error
	if errors.As(err, &e) {
		return e.Name
	}
	return ""
}
