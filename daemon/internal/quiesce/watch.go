package quiesce

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
)

const (
	minimumRetry = 200 * time.Millisecond
	maximumRetry = 5 * time.Second
)

// GoOn lets a guest that we may be holding go on, and returns no error once it
// is seen to: retried until then, or until ctx ends. A guest that is not running
// any more needs nothing. A guest that somebody else paused stays so. It returns
// when the guest went on, or until when it is not known to have.
func GoOn(ctx context.Context, guest Guest, m Marker, log *slog.Logger) (since time.Time, err error) {
	for wait := minimumRetry; ; wait = min(2*wait, maximumRetry) {
		since, done, err := goOnOnce(ctx, guest, m)
		if done {
			return since, nil
		}
		log.Debug("the guest does not go on yet", "domain", m.UUID, "mode", m.Mode, "error", err)
		select {
		case <-ctx.Done():
			return time.Now(), fmt.Errorf("cannot let domain %s go on: %w", m.UUID, errors.Join(err, context.Cause(ctx)))
		case <-time.After(wait):
		}
	}
}

func goOnOnce(ctx context.Context, guest Guest, m Marker) (since time.Time, done bool, err error) {
	limited, cancel := context.WithTimeout(ctx, askLimit)
	defer cancel()
	state, reason, err := guest.State(limited, m.UUID)
	since = time.Now()
	switch {
	case errors.Is(err, hypervisor.ErrNoDomain):
		return since, true, nil
	case err != nil:
		return since, false, err
	case state == hypervisor.StateShutoff, state == hypervisor.StateCrashed:
		return since, true, nil
	}
	if m.Mode == Suspend {
		if state != hypervisor.StatePaused || reason != hypervisor.ReasonPausedBy {
			return since, true, nil
		}
		err := guest.Resume(limited, m.UUID)
		return time.Now(), err == nil, err
	}
	if err := guest.Thaw(limited, m.UUID); err != nil {
		return since, false, err
	}
	since = time.Now()
	// The agent works in order: a freeze that was late is done by now, and
	// was done before the thaw, or shows here.
	status, err := guest.FSStatus(limited, m.UUID)
	return since, err == nil && status == hypervisor.Thawed, err
}

// Watch is the thaw watchdog's work for one marker. It calls ready once it
// watches, waits until the marker's lock is free or its deadline has passed,
// lets the guest go on if the marker is still there, and removes the marker.
func Watch(ctx context.Context, guest Guest, path string, log *slog.Logger, ready func() error) error {
	m, err := openMarker(path)
	if errors.Is(err, os.ErrNotExist) {
		return ready() // done before we came
	}
	if err != nil {
		return err
	}
	defer m.unlock()
	if err := ready(); err != nil {
		return err
	}
	log = log.With("domain", m.UUID, "mode", m.Mode)
	locked := make(chan error, 1)
	go func() { locked <- lock(m.file) }()
	select {
	case err = <-locked:
	case <-time.After(time.Until(m.Deadline)):
		log.Warn("a guest was held for too long, letting it go on")
		if _, err := GoOn(ctx, guest, m.Marker, log); err != nil {
			return err
		}
		// The daemon may be stuck just before the freeze: only when it lets go
		// of the marker is it over.
		select {
		case err = <-locked:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if err != nil {
		return fmt.Errorf("cannot wait for the marker's lock: %w", err)
	}
	if !m.present() {
		return nil // the daemon did it itself
	}
	log.Warn("letting a guest go on in the daemon's stead")
	return m.release(ctx, guest, log)
}

// settle is how long a guest is watched after it was let go on, when the call
// to hold it may still be under way in libvirtd. That call was dispatched
// before ours, so it waits at most for the same lock (the domain's agent job)
// that ours has got meanwhile, and gets it next: moments later, not more.
const settle = 5 * time.Second

// release lets the guest go on in the stead of a holder that is gone, and
// removes the marker, whose lock we have.
func (h *heldMarker) release(ctx context.Context, guest Guest, log *slog.Logger) error {
	h.reread()
	if _, err := GoOn(ctx, guest, h.Marker, log); err != nil {
		return err
	}
	log.Info("the guest goes on")
	if h.Held {
		return h.remove()
	}
	end := time.Now().Add(settle)
	for wait := time.Second; time.Now().Before(end); wait *= 2 {
		select {
		case <-time.After(min(wait, time.Until(end))):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		if _, err := GoOn(ctx, guest, h.Marker, log); err != nil {
			return err
		}
	}
	return h.remove()
}

func lock(f *os.File) error {
	for {
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
