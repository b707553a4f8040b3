// Package jobunit runs jobs as transient systemd services: each in a sandbox and with limits of its own, outside the
// daemon, so that a worker outlives a restart of the daemon and a share that hangs can hang a worker only.
//
// It knows systemd's D-Bus API (org.freedesktop.systemd1(5)) and nothing of what workers do.
package jobunit

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	systemd "github.com/coreos/go-systemd/v22/dbus"
	"github.com/godbus/dbus/v5"
)

// ErrExists says that a unit of this name is already known to systemd.
var ErrExists = errors.New("unit exists already")

// recheck is how often a unit is looked at although no signal came: signals are lost when the bus or the connection to it
// is restarted.
const recheck = 2 * time.Second

// Manager is a connection to systemd's manager of system units, made anew when it is lost. It is safe for concurrent use.
type Manager struct {
	ctx    context.Context // ends with Close; connections live in it
	cancel context.CancelFunc

	mu      sync.Mutex
	conn    *systemd.Conn
	changed chan struct{} // closed and replaced when any unit changed
}

// Connect connects to systemd by the system bus.
func Connect(ctx context.Context) (*Manager, error) {
	m := &Manager{changed: make(chan struct{})}
	// A connection of go-systemd ends with the context that it was made with: it must not be the caller's.
	m.ctx, m.cancel = context.WithCancel(context.WithoutCancel(ctx))
	if _, err := m.connection(); err != nil {
		m.cancel()
		return nil, err
	}
	return m, nil
}

// Close ends the connection. Units run on.
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
	if err := m.ctx.Err(); err != nil {
		return nil, fmt.Errorf("cannot reach systemd: connection is closed: %w", err)
	}
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
	updates, dropped := make(chan *systemd.PropertiesUpdate, 256), make(chan error, 1)
	conn.SetPropertiesSubscriber(updates, dropped) // before signals come: go-systemd reads it without its lock
	if err := conn.Subscribe(); err != nil {
		conn.Close()
		return nil, fmt.Errorf("cannot subscribe to systemd's signals: %w", err)
	}
	go m.notify(updates, dropped)
	m.conn = conn
	return conn, nil
}

// notify wakes everybody that waits for a unit, for each signal and also when signals were dropped. It ends with the
// manager; one is left for each lost connection, which costs nothing.
func (m *Manager) notify(updates <-chan *systemd.PropertiesUpdate, dropped <-chan error) {
	for {
		select {
		case u := <-updates:
			if _, ok := u.Changed["ActiveState"]; !ok {
				continue
			}
		case <-dropped:
		case <-m.ctx.Done():
			return
		}
		m.mu.Lock()
		close(m.changed)
		m.changed = make(chan struct{})
		m.mu.Unlock()
	}
}

func (m *Manager) change() <-chan struct{} {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.changed
}

// Start starts a unit and returns when its program is executed. The error says why it could not be; a unit that could not
// be started is forgotten. ErrExists: there is one of this name, running or failed.
func (m *Manager) Start(ctx context.Context, u Unit) error {
	if err := u.check(); err != nil {
		return fmt.Errorf("cannot start unit: %w", err)
	}
	conn, err := m.connection()
	if err != nil {
		return err
	}
	done := make(chan string, 1)
	_, err = conn.StartTransientUnitContext(ctx, u.Name, "fail", u.properties(), done)
	if errorName(err) == "org.freedesktop.systemd1.UnitExists" {
		return fmt.Errorf("cannot start unit %s: %w", u.Name, ErrExists)
	}
	if err != nil {
		return fmt.Errorf("cannot start unit %s: %w", u.Name, err)
	}
	result, err := m.awaitJob(ctx, u.Name, done)
	if err != nil {
		return fmt.Errorf("cannot start unit %s: %w", u.Name, err)
	}
	if result == "done" {
		return nil
	}
	state, err := m.State(ctx, u.Name)
	if err != nil {
		return err
	}
	if !state.Known || state.executed() {
		return nil // and has ended already, sooner than systemd saw that it was
	}
	if err := m.Forget(ctx, u.Name); err != nil {
		return err
	}
	return fmt.Errorf("cannot start unit %s: start %s: %s%s", u.Name, result, state, startHint(state.ExitStatus))
}

// startHint names the two usual causes, systemd.exec(5) "Process Exit Codes".
func startHint(status int) string {
	switch status {
	case 203:
		return " (EXEC: the program cannot be executed)"
	case 226:
		return " (NAMESPACE: the sandbox cannot be set up, is a path of the job missing?)"
	}
	return ""
}

// awaitJob waits for the end of systemd's job (start, stop) for a unit. The result is systemd's ("done", "failed",
// "canceled", "timeout", …), or "done" when the job has ended and its signal was lost: what became of the unit is then
// seen by whoever looks at it next.
func (m *Manager) awaitJob(ctx context.Context, name string, done <-chan string) (string, error) {
	tick := time.NewTicker(recheck)
	defer tick.Stop()
	for {
		select {
		case result := <-done:
			return result, nil
		case <-ctx.Done():
			return "", context.Cause(ctx)
		case <-tick.C:
		}
		state, err := m.State(ctx, name)
		if err != nil || state.pending {
			continue // an error may be the bus being restarted
		}
		select {
		case result := <-done:
			return result, nil
		default:
			return "done", nil
		}
	}
}

// Wait waits until a unit has ended, and gives its last state.
func (m *Manager) Wait(ctx context.Context, name string) (State, error) {
	tick := time.NewTicker(recheck)
	defer tick.Stop()
	for {
		changed := m.change() // before looking, so that no change is missed
		state, err := m.State(ctx, name)
		if err == nil && state.Ended() {
			return state, nil
		}
		select {
		case <-changed:
		case <-tick.C:
		case <-ctx.Done():
			return state, context.Cause(ctx)
		}
	}
}

// Stop asks the unit to end (SIGTERM to its main process), kills it when it has not after the unit's StopAfter, and
// returns when systemd has done with it. A unit that is not known has ended: no error.
func (m *Manager) Stop(ctx context.Context, name string) error {
	conn, err := m.connection()
	if err != nil {
		return err
	}
	done := make(chan string, 1)
	_, err = conn.StopUnitContext(ctx, name, "replace", done)
	if errorName(err) == noSuchUnit {
		return nil
	}
	if err == nil {
		_, err = m.awaitJob(ctx, name, done)
	}
	if err != nil {
		return fmt.Errorf("cannot stop unit %s: %w", name, err)
	}
	return nil
}

// Kill kills all processes of a unit at once. A unit that is not known has ended: no error.
func (m *Manager) Kill(ctx context.Context, name string) error {
	conn, err := m.connection()
	if err != nil {
		return err
	}
	err = conn.KillUnitWithTarget(ctx, name, systemd.All, int32(9))
	if err != nil && errorName(err) != noSuchUnit {
		return fmt.Errorf("cannot kill unit %s: %w", name, err)
	}
	return nil
}

// SetLimits changes the limits of a unit that runs. A unit that is not known has ended: no error.
func (m *Manager) SetLimits(ctx context.Context, name string, l Limits) error {
	conn, err := m.connection()
	if err != nil {
		return err
	}
	err = conn.SetUnitPropertiesContext(ctx, name, true, l.changed()...)
	if err != nil && errorName(err) != noSuchUnit {
		return fmt.Errorf("cannot change the limits of unit %s: %w", name, err)
	}
	return nil
}

// Forget lets systemd drop a failed unit. A unit that is not known is no error.
func (m *Manager) Forget(ctx context.Context, name string) error {
	conn, err := m.connection()
	if err != nil {
		return err
	}
	err = conn.ResetFailedUnitContext(ctx, name)
	if err != nil && errorName(err) != noSuchUnit {
		return fmt.Errorf("cannot forget unit %s: %w", name, err)
	}
	return nil
}

const noSuchUnit = "org.freedesktop.systemd1.NoSuchUnit"

// errorName is the name of a D-Bus error, or "".
func errorName(err error) string {
	var e dbus.Error
	if errors.As(err, &e) {
		return e.Name
	}
	return ""
}
