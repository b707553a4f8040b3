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
//
// Whether a guest that cannot be held still spoils the point in time is the
// caller's word, see Policy.
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

// Policy is what is to be done when the guest cannot be held as it is asked for.
type Policy string

// The policies.
const (
	Require Policy = "require" // fail
	Prefer  Policy = "prefer"  // go on without, and say so
)

// Wish is how a guest is to be held. A Policy of "" is Require.
type Wish struct {
	Mode   Mode
	Policy Policy
}

// Consistency is what a point in time is worth.
type Consistency string

// What a restore finds: filesystems that were written out, what a guest that
// was paused had on its disks, or what a power failure would have left.
const (
	Filesystem Consistency = "filesystem"
	Suspended  Consistency = "suspended"
	Crash      Consistency = "crash"
)

// ErrHold says that the guest could not be held still, or was not until the
// point in time was fixed.
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
	Held        time.Duration // from the return of the call that held the guest to that of the one that let it go; 0 when we did not hold it
	Shortfall   string        // for people: why the point in time is worth less than was asked for; "" when it is not
	Thawed      bool          // the guest goes on as before; false = the watchdog is still at it
}

// Hold holds the guest still, calls point, and lets the guest go on. When it
// returns, the guest goes on as before, or the watchdog sees to it. The error
// is point's own, or wraps ErrHold when the guest could not be held as the wish
// requires; point may have been called then. point's context ends when the limit
// of the hold passes.
//
// A guest that is already paused or frozen by somebody else is left as it is.
// One that has no filesystem to freeze is as it was required, with a Shortfall.
func (q *Quiescer) Hold(ctx context.Context, uuid string, w Wish, point func(context.Context) error) (Result, error) {
	switch w.Mode {
	case None:
		return Result{Consistency: Crash, Thawed: true}, point(ctx)
	case Agent, Suspend:
	default:
		return Result{}, fmt.Errorf("%w: unknown mode %q", ErrHold, w.Mode)
	}
	res, err := q.try(ctx, uuid, w.Mode, point)
	switch {
	case w.Policy == Prefer && errors.Is(err, ErrHold) && ctx.Err() == nil:
		// Also when a freeze may still come: it takes nothing from a point that
		// counts as a crash, and the watchdog, which has the marker's lock by
		// now, thaws the guest whatever we do. A guest whose agent hangs needs
		// its backup no less than others.
		limited, cancel := context.WithTimeout(ctx, q.limit)
		defer cancel()
		res.Consistency, res.Shortfall = Crash, shortfall(err)
		return res, point(limited)
	case w.Policy != Prefer && err == nil && res.Shortfall != "" && res.Shortfall != nothingToFreeze:
		return res, fmt.Errorf("%w: %s", ErrHold, res.Shortfall)
	}
	return res, err
}

// try holds the guest still and calls point. When its error wraps ErrHold, point
// was not called.
func (q *Quiescer) try(ctx context.Context, uuid string, mode Mode, point func(context.Context) error) (Result, error) {
	res := Result{Consistency: Crash, Thawed: true}
	already, err := q.already(ctx, uuid, mode)
	if err != nil {
		return res, fmt.Errorf("%w: %w", ErrHold, err)
	}
	if already {
		err := point(ctx)
		if err == nil {
			res.judge(q.still(ctx, uuid, mode), mode)
		}
		return res, err
	}
	m, err := q.mark(ctx, uuid, mode)
	if err != nil {
		return res, fmt.Errorf("%w: %w", ErrHold, err)
	}
	defer m.unlock()
	if err := q.watchdog.Start(ctx, m.path); err != nil {
		return res, errors.Join(fmt.Errorf("%w: %w: %w", ErrHold, errWatchdog, err), m.remove())
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

// already tells whether somebody else holds the guest as it is asked for. The
// error says why it cannot be held.
func (q *Quiescer) already(ctx context.Context, uuid string, mode Mode) (bool, error) {
	state, reason, err := q.guest.State(ctx, uuid)
	if err != nil {
		return false, err
	}
	switch {
	case mode == Suspend && (state == hypervisor.StatePaused || state == hypervisor.StateSuspended):
		return true, nil
	case state != hypervisor.StateRunning:
		return false, &notRunningError{state, reason}
	case mode == Suspend:
		return false, nil
	}
	ask, cancel := context.WithTimeout(ctx, askLimit)
	defer cancel()
	status, err := q.guest.FSStatus(ask, uuid)
	return status == hypervisor.Frozen, err
}

// hold is try once the marker and the watchdog are there.
func (q *Quiescer) hold(ctx context.Context, m *heldMarker, point func(context.Context) error) (Result, error) {
	limited, cancel := context.WithDeadline(ctx, m.Deadline)
	defer cancel()
	res := Result{Consistency: Crash}
	since, err := q.stop(limited, m)
	late := errors.Is(err, hypervisor.ErrUnavailable) // it may still take effect
	if err == nil {
		err = q.during(limited, m.Marker, &res, point)
	} else {
		err = fmt.Errorf("%w: %w", ErrHold, err)
	}
	// Going on must not depend on a context that may have ended.
	last, cancelLast := context.WithTimeout(context.WithoutCancel(ctx), askLimit)
	defer cancelLast()
	until, goOn := GoOn(last, q.guest, m.Marker, q.log)
	res.Thawed = goOn == nil
	if !since.IsZero() && res.Shortfall != nothingToFreeze {
		res.Held = until.Sub(since)
	}
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

// stop holds the guest. It gets half of the time that is left, and returns when
// the guest was held.
func (q *Quiescer) stop(ctx context.Context, m *heldMarker) (since time.Time, err error) {
	limited, cancel := context.WithTimeout(ctx, time.Until(m.Deadline)/2)
	defer cancel()
	call := q.guest.Freeze
	if m.Mode == Suspend {
		call = q.guest.Suspend
	}
	if err := call(limited, m.UUID); err != nil {
		return time.Time{}, err
	}
	since = time.Now()
	return since, m.markHeld()
}

// during calls point while the guest is held.
func (q *Quiescer) during(ctx context.Context, m Marker, res *Result, point func(context.Context) error) error {
	frozen := true
	if m.Mode == Agent {
		// An agent that finds nothing to freeze has done what it was asked.
		status, err := q.guest.FSStatus(ctx, m.UUID)
		if err != nil {
			return fmt.Errorf("%w: %w", ErrHold, err)
		}
		frozen = status == hypervisor.Frozen
	}
	if err := point(ctx); err != nil {
		return err
	}
	if !frozen {
		res.Shortfall = nothingToFreeze
		return nil
	}
	res.judge(q.still(ctx, m.UUID, m.Mode), m.Mode)
	return nil
}

// still returns an error unless the guest is held now, and so was all the time:
// neither the watchdog at its limit nor the admin has let it go on meanwhile.
func (q *Quiescer) still(ctx context.Context, uuid string, mode Mode) error {
	if mode == Suspend {
		state, _, err := q.guest.State(ctx, uuid)
		if err == nil && state != hypervisor.StatePaused && state != hypervisor.StateSuspended {
			err = errLetGo
		}
		return err
	}
	status, err := q.guest.FSStatus(ctx, uuid)
	if err == nil && status != hypervisor.Frozen {
		err = errLetGo
	}
	return err
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
	if _, err := GoOn(limited, q.guest, m.Marker, q.log); err != nil || !m.Held {
		// It does not answer, or a freeze may still come.
		q.log.Warn("a guest may still be held from before; starting the watchdog", "domain", m.UUID, "mode", m.Mode, "error", err)
		return q.watchdog.Start(ctx, path)
	}
	q.log.Info("a guest that was held from before goes on", "domain", m.UUID, "mode", m.Mode)
	return m.remove()
}
