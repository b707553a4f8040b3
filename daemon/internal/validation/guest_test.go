package validation

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/failure"
	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/daemon/internal/transfer"
	"github.com/virtbackup/virtbackup/daemon/internal/validation/step"
	"github.com/virtbackup/virtbackup/dbus"
)

// served is a worker that serves.
type served struct {
	mu     sync.Mutex
	status transfer.DiskStatus
	done   chan struct{}
}

func (s *served) Done() <-chan struct{} { return s.done }
func (s *served) Status() (transfer.Status, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return transfer.Status{Disks: []transfer.DiskStatus{s.status}}, nil
}
func (s *served) is(d transfer.DiskStatus) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.status = d
}

// domain is the temporary domain as libvirt has it.
type domain struct {
	Hypervisor
	events        chan hypervisor.Event
	state, reason string
	err           error
}

func (d *domain) Subscribe(context.Context) <-chan hypervisor.Event { return d.events }
func (d *domain) State(context.Context, string) (string, string, error) {
	return d.state, d.reason, d.err
}
func (d *domain) PingAgent(context.Context, string) error             { return d.err }
func (d *domain) GuestSystem(context.Context, string) (string, error) { return "", d.err }
func (d *domain) Execute(context.Context, string, string, []string, []byte) (hypervisor.Executed, error) {
	return hypervisor.Executed{}, d.err
}
func (d *domain) Screenshot(context.Context, string) ([]byte, error) { return nil, d.err }

const testUUID = "aaaaaaaa-bbbb-8ccc-8ddd-eeeeeeeeeeee"

// watched runs fn with a guest that runs and is served.
func watched(t *testing.T, fn func(t *testing.T, g *guest, d *domain, s *served, ended func() error)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		d := &domain{events: make(chan hypervisor.Event, 10), state: hypervisor.StateRunning}
		s := &served{done: make(chan struct{})}
		ctx, end := context.WithCancelCause(t.Context())
		trial := &trial{Kind: New(Deps{Hypervisor: d}), place: place{uuid: testUUID}}
		g := trial.newGuest(ctx, s, end)
		if err := g.Impeded(t.Context()); err != nil {
			t.Errorf("a guest that runs is impeded: %v", err)
		}
		fn(t, g, d, s, func() error { synctest.Wait(); return context.Cause(ctx) })
		end(nil)
		close(d.events)
		synctest.Wait()
	})
}

// TestWaitingExcuses has a repository answer late, and then again: what the guest
// did not do until then, or does not do since, is not its backup's fault.
func TestWaitingExcuses(t *testing.T) {
	watched(t, func(t *testing.T, g *guest, _ *domain, s *served, ended func() error) {
		s.is(transfer.DiskStatus{Target: "vda", Pending: time.Second.Microseconds()})
		time.Sleep(time.Minute)
		if err := g.Impeded(t.Context()); err != nil {
			t.Errorf("a second is nothing: %v", err)
		}
		s.is(transfer.DiskStatus{Target: "vda", Pending: (2 * pendingLimit).Microseconds()})
		time.Sleep(2 * watchEvery)
		s.is(transfer.DiskStatus{Target: "vda"})
		time.Sleep(time.Minute)
		if err := g.Impeded(t.Context()); err == nil {
			t.Error("it had to wait, and is not excused")
		}
		if err := ended(); err != nil {
			t.Errorf("it is ended, although the repository is back: %v", err)
		}
	})
	watched(t, func(t *testing.T, g *guest, _ *domain, s *served, ended func() error) {
		s.is(transfer.DiskStatus{Target: "vda", Refused: 1})
		if err := g.Impeded(t.Context()); err == nil {
			t.Error("it was refused what it read, and is not excused")
		}
		time.Sleep(2 * watchEvery)
		if err := ended(); !errors.Is(err, dbus.ErrRepositoryUnavailable) {
			t.Errorf("it goes on, although it was refused what it read: %v", err)
		}
	})
}

// TestNoUseToGoOn has the worker end, and the space for overlays.
func TestNoUseToGoOn(t *testing.T) {
	watched(t, func(t *testing.T, g *guest, _ *domain, s *served, ended func() error) {
		close(s.done)
		if err := ended(); !errors.Is(err, dbus.ErrUnable) || !errors.Is(g.Impeded(t.Context()), errServer) {
			t.Errorf("it goes on without its disks: %v", err)
		}
	})
	watched(t, func(t *testing.T, g *guest, d *domain, _ *served, ended func() error) {
		d.events <- hypervisor.Event{Kind: hypervisor.EventLifecycle, UUID: "another", Action: "suspended", Detail: "ioerror"}
		d.events <- hypervisor.Event{Kind: hypervisor.EventLifecycle, UUID: testUUID, Action: "suspended", Detail: "paused"}
		if err := ended(); err != nil {
			t.Errorf("it is ended: %v", err)
		}
		d.events <- hypervisor.Event{Kind: hypervisor.EventLifecycle, UUID: testUUID, Action: "suspended", Detail: "ioerror"}
		if err := ended(); !errors.Is(err, dbus.ErrUnable) || !errors.Is(g.Impeded(t.Context()), errPaused) {
			t.Errorf("it goes on without space: %v", err)
		}
	})
}

// TestHowItEnded tells a guest that ended from a QEMU that somebody ended.
func TestHowItEnded(t *testing.T) {
	for how, itself := range map[string]bool{"shutdown": true, "crashed": true, "destroyed": false, "failed": false, "": false} {
		watched(t, func(t *testing.T, g *guest, d *domain, _ *served, _ func() error) {
			d.err = fmt.Errorf("%w: gone", hypervisor.ErrNoDomain)
			if how != "" {
				d.events <- hypervisor.Event{Kind: hypervisor.EventLifecycle, UUID: testUUID, Action: "stopped", Detail: how}
			}
			if err := g.Ping(t.Context()); !errors.Is(err, step.ErrEnded) {
				t.Errorf("%q: %v", how, err)
			}
			if err := g.Impeded(t.Context()); (err == nil) != itself {
				t.Errorf("%q: %v", how, err)
			}
		})
	}
}

// TestDisturbed tells what somebody does to a guest from what libvirt does after
// the guest's own end.
func TestDisturbed(t *testing.T) {
	for name, c := range map[string]struct {
		events string
		itself bool
	}{
		"powers itself off": {"shutdown/guest stopped/shutdown", true},
		"SIGTERM to QEMU":   {"shutdown/host stopped/shutdown", false},
		"a pause":           {"suspended/paused resumed/unpaused stopped/shutdown", false},
		"panic device":      {"suspended/paused crashed/panicked shutdown/host stopped/crashed", true},
		"seen late":         {"suspended/paused stopped/crashed", true},
	} {
		watched(t, func(t *testing.T, g *guest, d *domain, _ *served, ended func() error) {
			d.err = fmt.Errorf("%w: gone", hypervisor.ErrNoDomain)
			for _, e := range strings.Fields(c.events) {
				action, detail, _ := strings.Cut(e, "/")
				d.events <- hypervisor.Event{Kind: hypervisor.EventLifecycle, UUID: testUUID, Action: action, Detail: detail}
			}
			if err := g.Impeded(t.Context()); (err == nil) != c.itself {
				t.Errorf("%s: %v", name, err)
			}
			if err := ended(); err != nil {
				t.Errorf("%s: it is ended: %v", name, err)
			}
		})
	}
	// One that runs again is excused all the same: it was late.
	watched(t, func(t *testing.T, g *guest, d *domain, _ *served, ended func() error) {
		d.events <- hypervisor.Event{Kind: hypervisor.EventLifecycle, UUID: testUUID, Action: "suspended", Detail: "paused"}
		if ended(); !errors.Is(g.Impeded(t.Context()), errSuspended) {
			t.Error("it was paused, and is not excused")
		}
	})
}

// TestLibvirtWasAway has libvirt away when a guest is asked, and back when
// somebody looks why it did not answer.
func TestLibvirtWasAway(t *testing.T) {
	for name, ask := range map[string]func(context.Context, *guest) error{
		"ping":       func(ctx context.Context, g *guest) error { return g.Ping(ctx) },
		"system":     func(ctx context.Context, g *guest) error { _, err := g.System(ctx); return err },
		"execute":    func(ctx context.Context, g *guest) error { _, err := g.Execute(ctx, step.Command{}); return err },
		"screenshot": func(ctx context.Context, g *guest) error { _, err := g.Screenshot(ctx); return err },
	} {
		for _, away := range []bool{true, false} {
			watched(t, func(t *testing.T, g *guest, d *domain, _ *served, ended func() error) {
				if d.err = hypervisor.ErrUnavailable; away { // else it is slow, as an agent may be
					d.err = fmt.Errorf("cannot ask: %w: %w", hypervisor.ErrDisconnected, context.DeadlineExceeded)
				}
				if err := ask(t.Context(), g); err == nil {
					t.Errorf("%s: no error", name)
				}
				d.err = nil
				if err := g.Impeded(t.Context()); errors.Is(err, hypervisor.ErrDisconnected) != away || (err != nil) != away {
					t.Errorf("%s, away %v: %v", name, away, err)
				}
				if err := ended(); err != nil {
					t.Errorf("%s: it is ended: %v", name, err)
				}
			})
		}
	}
}

// TestPrevented has whatever this host cannot do be tried again, unless it never can.
func TestPrevented(t *testing.T) {
	for _, c := range []struct {
		err     error
		want    dbus.ErrorName
		passing bool
	}{
		{errors.New("libvirt: end of file"), dbus.ErrUnable, true},
		{errors.Join(errServer, errors.New("killed")), dbus.ErrUnable, true},
		{fmt.Errorf("cannot start: %w", hypervisor.ErrUnavailable), dbus.ErrUnavailable, true},
		{failure.Errorf(dbus.ErrUnsupported, "its disk is encrypted"), dbus.ErrUnsupported, false},
	} {
		if err := prevented(c.err); !errors.Is(err, c.want) || failure.Passing(err) != c.passing {
			t.Errorf("%v: %v, passing %v", c.err, err, failure.Passing(err))
		}
	}
}

func TestErrorsOfGuests(t *testing.T) {
	watched(t, func(t *testing.T, g *guest, d *domain, _ *served, _ func() error) {
		for from, want := range map[error]error{
			hypervisor.ErrNoAgent: step.ErrNoAgent, hypervisor.ErrAgentSilent: step.ErrSilent, hypervisor.ErrAgent: step.ErrRefused,
			hypervisor.ErrUnavailable: step.ErrSilent, // libvirt is restarted: it is asked again
		} {
			d.err = from
			if err := g.Ping(t.Context()); !errors.Is(err, want) {
				t.Errorf("%v: %v, not %v", from, err, want)
			}
		}
	})
}

// TestUUIDOf has the same job have the same domain, and no two the same.
func TestUUIDOf(t *testing.T) {
	a, b := uuidOf("01KB5W3V9M8Q4T2R7XYZ0A1B2C"), uuidOf("01KB5W3V9M8Q4T2R7XYZ0A1B2D")
	if a == b || a != uuidOf("01KB5W3V9M8Q4T2R7XYZ0A1B2C") || len(a) != 36 || a[14] != '8' {
		t.Errorf("%s, %s", a, b)
	}
}

// restarted is a libvirt that is restarted while a domain is to be ended.
type restarted struct {
	Hypervisor
	away int // that so many calls do not reach it
}

func (r *restarted) EndValidation(ctx context.Context, _ string) error {
	if r.away--; r.away >= 0 {
		return errors.New("client socket is closed")
	}
	return ctx.Err()
}

func TestEndDomain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := New(Deps{Hypervisor: &restarted{away: 3}})
		if err := k.endDomain(t.Context(), testUUID); err != nil {
			t.Error(err)
		}
		k = New(Deps{Hypervisor: &restarted{away: 1 << 30}})
		begun := time.Now()
		if err := k.endDomain(t.Context(), testUUID); err == nil || time.Since(begun) > startLimit+endAgain {
			t.Errorf("%v, after %v", err, time.Since(begun))
		}
	})
}
