// Package quiesce holds a guest still while a point in time is fixed, and lets
// it go on again, whatever happens to the daemon meanwhile.
//
// A freeze that timed out may still happen later, libvirt never thaws by
// itself, and a frozen guest looks healthy from outside while it hangs. So a
// marker file is written before the freeze, and an independent process, the
// thaw watchdog (virtbackup-thaw, in a unit of its own), is ready before it
// too. The daemon holds a lock on the marker. The watchdog lets the guest go
// on when the limit passes, or when the lock is free and the marker is still
// there: then the daemon has died, or has given up with the guest not known to
// be thawed. Only when the guest was seen thawed is the marker removed.
package quiesce

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
)

// Mode is how a guest is held still.
type Mode string

// The modes.
const (
	None    Mode = "none"
	Agent   Mode = "agent"   // the guest agent freezes the filesystems
	Suspend Mode = "suspend" // the domain is paused
)

// Consistency is what a point in time is worth.
type Consistency string

// What a restore finds: filesystems that were written out, or what a power
// failure would have left.
const (
	Filesystem Consistency = "filesystem"
	Crash      Consistency = "crash"
)

// ErrHold says that the guest could not be held still; point was not called.
var ErrHold = errors.New("the guest could not be held still")

// Guest is what the package needs of a hypervisor.
type Guest interface {
	State(ctx context.Context, uuid string) (name, reason string, err error)
	FSStatus(ctx context.Context, uuid string) (hypervisor.FilesystemStatus, error)
	Freeze(ctx context.Context, uuid string) error
	Thaw(ctx context.Context, uuid string) error
	Suspend(ctx context.Context, uuid string) error
	Resume(ctx context.Context, uuid string) error
}

// Watchdog starts the thaw watchdog for a marker. It returns when the watchdog
// is ready to act.
type Watchdog interface {
	Start(ctx context.Context, marker string) error
}

// Options of a Quiescer.
type Options struct {
	Directory string        // of the markers; "" = /run/virtbackup/frozen
	Limit     time.Duration // longest hold; 0 = 10 s
	Log       *slog.Logger
}

// Quiescer holds guests still.
type Quiescer struct {
	guest     Guest
	watchdog  Watchdog
	directory string
	limit     time.Duration
	log       *slog.Logger
}

const (
	defaultDirectory = "/run/virtbackup/frozen"
	defaultLimit     = 10 * time.Second
	askLimit         = 5 * time.Second // for one question to the agent
	busyLimit        = settle + 2*askLimit
)

// New returns a Quiescer.
func New(guest Guest, watchdog Watchdog, o Options) *Quiescer {
	q := &Quiescer{guest: guest, watchdog: watchdog, directory: o.Directory, limit: o.Limit, log: o.Log}
	if q.directory == "" {
		q.directory = defaultDirectory
	}
	if q.limit == 0 {
		q.limit = defaultLimit
	}
	return q
}

// Result of a hold.
type Result struct {
	Consistency Consistency
	HeldFor     time.Duration // how long the guest was held, by our clock; 0 when we did not hold it
	Thawed      bool          // the guest goes on as before; false = the watchdog is still at it
}

// Hold holds the guest still, calls point, and lets the guest go on. When it
// returns, the guest goes on as before, or the watchdog sees to it. The error
// is point's own, or wraps ErrHold when the guest could not be held. point's
// context ends when the limit of the hold passes.
//
// A guest that is already paused or frozen by somebody else is left as it is.
func (q *Quiescer) Hold(ctx context.Context, uuid string, mode Mode, point func(context.Context) error) (Result, error) {
	switch mode {
	case None:
		return Result{Consistency: Crash, Thawed: true}, point(ctx)
	case Agent, Suspend:
	default:
		return Result{}, fmt.Errorf("%w: unknown mode %q", ErrHold, mode)
	}
	already, err := q.already(ctx, uuid, mode)
	if err != nil {
		return Result{}, fmt.Errorf("%w: %w", ErrHold, err)
	}
	if already != "" {
		return Result{Consistency: already, Thawed: true}, point(ctx)
	}
	m, err := q.mark(ctx, uuid, mode)
	if err != nil {
		return Result{}, fmt.Errorf("%w: %w", ErrHold, err)
	}
	defer m.unlock()
	if err := q.watchdog.Start(ctx, m.path); err != nil {
		return Result{}, errors.Join(fmt.Errorf("%w: cannot start the thaw watchdog: %w", ErrHold, err), m.remove())
	}
	return q.hold(ctx, m, point)
}

// mark makes the marker, and waits while the guest is being thawed from before.
func (q *Quiescer) mark(ctx context.Context, uuid string, mode Mode) (*heldMarker, error) {
	for give := time.Now().Add(busyLimit); ; {
		m, err := createMarker(q.directory, Marker{UUID: uuid, Mode: mode, Deadline: time.Now().Add(q.limit)})
		if !errors.Is(err, errBusy) || time.Now().After(give) {
			return m, err
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(err, context.Cause(ctx))
		case <-time.After(minimumRetry):
		}
	}
}

// already tells what a point in time is worth without our doing, "" when the
// guest runs on its own.
func (q *Quiescer) already(ctx context.Context, uuid string, mode Mode) (Consistency, error) {
	state, reason, err := q.guest.State(ctx, uuid)
	if err != nil {
		return "", err
	}
	switch {
	case state == hypervisor.StatePaused && mode == Suspend:
		return Crash, nil
	case state != hypervisor.StateRunning:
		return "", fmt.Errorf("the domain is %s (%s)", state, reason)
	case mode == Suspend:
		return "", nil
	}
	ask, cancel := context.WithTimeout(ctx, askLimit)
	defer cancel()
	status, err := q.guest.FSStatus(ask, uuid)
	if err != nil {
		return "", err
	}
	if status == hypervisor.Frozen {
		return Filesystem, nil
	}
	return "", nil
}

// hold is Hold once the marker and the watchdog are there.
func (q *Quiescer) hold(ctx context.Context, m *heldMarker, point func(context.Context) error) (Result, error) {
	start := time.Now()
	limited, cancel := context.WithDeadline(ctx, m.Deadline)
	defer cancel()
	res := Result{Consistency: Crash}
	err := q.stop(limited, m)
	late := errors.Is(err, hypervisor.ErrUnavailable) // it may still take effect
	if err != nil {
		err = fmt.Errorf("%w: %w", ErrHold, err)
	} else if err = point(limited); err == nil && q.stillFrozen(limited, m.Marker) {
		res.Consistency = Filesystem
	}
	// Going on must not depend on a context that may have ended.
	last, cancelLast := context.WithTimeout(context.WithoutCancel(ctx), askLimit)
	defer cancelLast()
	goOn := GoOn(last, q.guest, m.Marker, q.log)
	res.HeldFor, res.Thawed = time.Since(start), goOn == nil
	if goOn != nil || late {
		// The marker stays and its lock goes: the watchdog takes over.
		q.log.Error("the guest may still be held; the watchdog goes on trying", "domain", m.UUID, "mode", m.Mode, "error", errors.Join(err, goOn))
		return res, err
	}
	if removed := m.remove(); removed != nil {
		q.log.Warn("cannot remove a marker; the watchdog will look at the guest again", "domain", m.UUID, "error", removed)
	}
	return res, err
}

// stop holds the guest. It gets half of the time that is left.
func (q *Quiescer) stop(ctx context.Context, m *heldMarker) error {
	limited, cancel := context.WithTimeout(ctx, time.Until(m.Deadline)/2)
	defer cancel()
	call := q.guest.Freeze
	if m.Mode == Suspend {
		call = q.guest.Suspend
	}
	if err := call(limited, m.UUID); err != nil {
		return err
	}
	return m.markHeld()
}

// stillFrozen tells whether the agent froze the guest and nobody, neither the
// watchdog at its limit nor the admin, has thawed it meanwhile: what is frozen
// now was frozen all the time.
func (q *Quiescer) stillFrozen(ctx context.Context, m Marker) bool {
	if m.Mode != Agent {
		return false
	}
	status, err := q.guest.FSStatus(ctx, m.UUID)
	return err == nil && status == hypervisor.Frozen
}

// ThawLeftover sees to every marker that an earlier life of the daemon left: a
// guest that answers is let go on at once, for others the watchdog is started.
// Markers that a watchdog is at work on are left to it.
func (q *Quiescer) ThawLeftover(ctx context.Context) error {
	paths, err := markers(q.directory)
	if err != nil {
		return err
	}
	var failed []error
	for _, path := range paths {
		if err := q.leftover(ctx, path); err != nil {
			failed = append(failed, fmt.Errorf("marker %s: %w", path, err))
		}
	}
	return errors.Join(failed...)
}

func (q *Quiescer) leftover(ctx context.Context, path string) error {
	m, err := openMarker(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer m.unlock()
	if locked, err := m.tryLock(); err != nil || !locked {
		return err
	}
	if !m.present() {
		return nil
	}
	m.reread()
	limited, cancel := context.WithTimeout(ctx, askLimit)
	defer cancel()
	if err := GoOn(limited, q.guest, m.Marker, q.log); err != nil || !m.Held {
		// It does not answer, or a freeze may still come.
		q.log.Warn("a guest may still be held from before; starting the watchdog", "domain", m.UUID, "mode", m.Mode, "error", err)
		return q.watchdog.Start(ctx, path)
	}
	q.log.Info("a guest that was held from before goes on", "domain", m.UUID, "mode", m.Mode)
	return m.remove()
}
