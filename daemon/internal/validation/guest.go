package validation

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/failure"
	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/daemon/internal/transfer"
	"github.com/virtbackup/virtbackup/daemon/internal/validation/step"
	"github.com/virtbackup/virtbackup/dbus"
)

const (
	// pingLimit is how long the agent may take to answer to be there.
	pingLimit = 5 * time.Second
	// pendingLimit is how long the repository may take to answer a request of the
	// guest's before the guest is excused.
	pendingLimit = 5 * time.Second
	// watchEvery is how often that is looked at; the worker tells twice a second.
	watchEvery = 500 * time.Millisecond
	// stateLimit bounds a question to libvirt.
	stateLimit = 15 * time.Second
	// settle is how long an event may come after what it tells of.
	settle = 2 * time.Second
)

// guest is the temporary domain, as the steps see it.
type guest struct {
	hypervisor Hypervisor
	serving    server
	uuid       string
	limit      time.Duration // of a question to the agent
	since      time.Time     // when it could begin to read

	mu        sync.Mutex
	stopped   string // how it ended, as libvirt names it; "" while it runs, or if nobody saw
	crashed   bool   // by itself: what libvirt does to its QEMU then is nobody's doing
	disturbed error  // what somebody did to it
	impeded   error  // what on the host kept it from going on, at any time
}

// server is whoever serves its disks.
type server interface {
	Done() <-chan struct{}
	Status() (transfer.Status, error)
}

var _ step.Guest = (*guest)(nil)

// newGuest watches the domain until ctx ends; end is called with the reason when
// it is of no use to go on. It is called before the start.
func (t *trial) newGuest(ctx context.Context, serving server, end context.CancelCauseFunc) *guest {
	g := &guest{hypervisor: t.Hypervisor, serving: serving, uuid: t.uuid, limit: t.settings.CommandTimeout, since: time.Now()}
	go g.watch(ctx, end)
	go g.listen(t.Hypervisor.Subscribe(ctx), end)
	return g
}

// watch looks whether its disks are served. A guest that had to wait is excused
// for what it does not do later: it may still be late then.
func (g *guest) watch(ctx context.Context, end context.CancelCauseFunc) {
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-g.serving.Done():
			g.impede(errServer)
			end(errServer)
			return
		case <-tick.C:
			status, err := g.serving.Status()
			switch {
			case err != nil: // it says nothing: Done does
			case refused(status) != nil:
				g.impede(refused(status))
				end(refused(status))
				return
			case waits(status) != nil:
				g.impede(waits(status))
			}
		}
	}
}

func (g *guest) listen(events <-chan hypervisor.Event, end context.CancelCauseFunc) {
	for e := range events {
		if e.UUID != g.uuid || e.Kind != hypervisor.EventLifecycle {
			continue
		}
		if e.Action == "suspended" && e.Detail == hypervisor.ReasonIOError {
			g.impede(errPaused)
			end(errPaused)
			continue
		}
		g.saw(e)
	}
}

// saw notes an event of its life. A guest that panics, and has a device to say
// so, is paused and its QEMU told to end by libvirt itself.
func (g *guest) saw(e hypervisor.Event) {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch e.Action {
	case "stopped":
		g.stopped = e.Detail
		g.crashed = g.crashed || e.Detail == "crashed"
	case "crashed":
		g.crashed = true
	case "shutdown":
		if e.Detail == "host" && g.disturbed == nil { // its QEMU got a signal
			g.disturbed = errKilled
		}
	case "suspended":
		if e.Detail == "paused" && g.disturbed == nil {
			g.disturbed = errSuspended
		}
	}
}

// hindrance is what has kept it from going on so far.
func (g *guest) hindrance() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.impeded == nil && !g.crashed {
		return g.disturbed
	}
	return g.impeded
}

// impede notes what keeps the guest from going on; the first reason stays.
func (g *guest) impede(err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.impeded == nil {
		g.impeded = err
	}
}

// waits says which disk's reads the repository does not answer.
func waits(s transfer.Status) error {
	for _, d := range s.Disks {
		if time.Duration(d.Pending)*time.Microsecond > pendingLimit {
			return failure.Errorf(dbus.ErrRepositoryUnavailable, "the repository does not answer what the guest reads of disk %s", d.Target)
		}
	}
	return nil
}

// slow says on which disk the guest waited for most of the time: it was the
// repository then that did not get on, and not the guest.
func slow(s transfer.Status, elapsed time.Duration) error {
	for _, d := range s.Disks {
		if waited := time.Duration(d.Waited) * time.Microsecond; waited > pendingLimit && waited > elapsed/2 {
			return failure.Errorf(dbus.ErrRepositoryUnavailable, "the repository was too slow: the guest waited for %s of %s for what it read of disk %s",
				waited.Round(time.Second), elapsed.Round(time.Second), d.Target)
		}
	}
	return nil
}

// refused says which disk's reads the repository gave no answer to, so that the
// guest got an error: nothing that it does since says anything of the backup.
func refused(s transfer.Status) error {
	for _, d := range s.Disks {
		if d.Refused > 0 {
			return failure.Errorf(dbus.ErrRepositoryUnavailable, "the repository gave no answer to what the guest read of disk %s", d.Target)
		}
	}
	return nil
}

var (
	errServer    = failure.Errorf(dbus.ErrUnable, "the worker that serves its disks has ended")
	errKilled    = failure.Errorf(dbus.ErrUnable, "its QEMU was ended from outside, by a signal")
	errSuspended = failure.Errorf(dbus.ErrUnable, "somebody paused the guest")
	errPaused    = failure.Errorf(dbus.ErrUnable, "QEMU has paused the guest, as it cannot write to an overlay: is there space for it?")
)

// meant tells a step what an error means. A guest is excused for what it did not
// do while libvirt was away: nobody could see it.
func (g *guest) meant(err error) error {
	if errors.Is(err, hypervisor.ErrDisconnected) {
		g.impede(fmt.Errorf("libvirt was away meanwhile: %w", err))
	}
	for _, one := range []struct{ is, means error }{
		{hypervisor.ErrNoAgent, step.ErrNoAgent},
		{hypervisor.ErrAgentSilent, step.ErrSilent},
		{hypervisor.ErrAgent, step.ErrRefused},
		{hypervisor.ErrNoDomain, step.ErrEnded},
		{hypervisor.ErrNotRunning, step.ErrEnded},
	} {
		if errors.Is(err, one.is) {
			return fmt.Errorf("%w: %w", one.means, err)
		}
	}
	return err
}

// Ping asks the agent for an answer. While libvirt is away, as when it is
// restarted, nobody answers.
func (g *guest) Ping(ctx context.Context) error {
	within, cancel := context.WithTimeout(ctx, pingLimit)
	defer cancel()
	err := g.meant(g.hypervisor.PingAgent(within, g.uuid))
	if errors.Is(err, hypervisor.ErrUnavailable) {
		return fmt.Errorf("%w: %w", step.ErrSilent, err)
	}
	return err
}

func (g *guest) System(ctx context.Context) (string, error) {
	within, cancel := context.WithTimeout(ctx, g.limit)
	defer cancel()
	name, err := g.hypervisor.GuestSystem(within, g.uuid)
	return name, g.meant(err)
}

func (g *guest) Execute(ctx context.Context, c step.Command) (step.Output, error) {
	done, err := g.hypervisor.Execute(ctx, g.uuid, c.Path, c.Arguments, c.Input)
	if err != nil {
		return step.Output{}, g.meant(err)
	}
	o := step.Output{ExitCode: done.ExitCode, Stdout: done.Stdout, Stderr: done.Stderr, Truncated: done.Truncated}
	if done.Signal != 0 {
		o.ExitCode, o.Signalled = done.Signal, true
	}
	for _, text := range []*[]byte{&o.Stdout, &o.Stderr} {
		if len(*text) > step.MaxOutput {
			*text, o.Truncated = (*text)[:step.MaxOutput], true
		}
	}
	return o, nil
}

func (g *guest) Screenshot(ctx context.Context) ([]byte, error) {
	within, cancel := context.WithTimeout(ctx, g.limit)
	defer cancel()
	picture, err := g.hypervisor.Screenshot(within, g.uuid)
	return picture, g.meant(err)
}

// Impeded says what on the host keeps the guest from going on.
func (g *guest) Impeded(ctx context.Context) error {
	if err := g.hindrance(); err != nil {
		return err
	}
	select {
	case <-g.serving.Done():
		return errServer
	default:
	}
	status, err := g.serving.Status()
	if err := errors.Join(err, refused(status), waits(status), slow(status, time.Since(g.since))); err != nil {
		return err
	}
	within, cancel := context.WithTimeout(ctx, stateLimit)
	defer cancel()
	state, reason, err := g.hypervisor.State(within, g.uuid)
	switch {
	case errors.Is(err, hypervisor.ErrNoDomain):
		return g.ended(ctx)
	case err != nil:
		return err
	case state == hypervisor.StatePaused && reason == hypervisor.ReasonIOError:
		return errPaused
	case state == hypervisor.StatePaused:
		return fmt.Errorf("the guest is paused (%s)", reason)
	}
	return nil
}

// ended says how it ended, unless the guest did that by itself.
func (g *guest) ended(ctx context.Context) error {
	for deadline := time.Now().Add(settle); ; {
		g.mu.Lock()
		how := g.stopped
		g.mu.Unlock()
		switch how {
		case "shutdown", "crashed":
			return g.hindrance() // what tells of it may have come meanwhile
		case "":
			if time.Now().Before(deadline) && ctx.Err() == nil {
				time.Sleep(50 * time.Millisecond)
				continue
			}
			return errors.New("its QEMU ended, and nobody saw why")
		}
		return fmt.Errorf("its QEMU was ended from outside (%s)", how)
	}
}
