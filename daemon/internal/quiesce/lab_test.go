//go:build lab

package quiesce

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
)

const uri = "qemu:///system"

// thawProgram is built once for all tests.
var thawProgram string

func TestMain(m *testing.M) {
	if point := os.Getenv("QUIESCE_DIE_AT"); point != "" {
		die(point)
	}
	directory, err := os.MkdirTemp("", "thaw")
	if err != nil {
		panic(err)
	}
	thawProgram = filepath.Join(directory, "virtbackup-thaw")
	if out, err := exec.Command("go", "build", "-o", thawProgram, "github.com/virtbackup/virtbackup/daemon/thaw").CombinedOutput(); err != nil {
		panic(string(out))
	}
	code := m.Run()
	_ = os.RemoveAll(directory)
	os.Exit(code)
}

// mortal is a Guest that kills its own process just before or after a call.
type mortal struct {
	Guest
	at string
}

func (m mortal) dies(at string) {
	if m.at == at {
		_ = unix.Kill(os.Getpid(), unix.SIGKILL)
		select {}
	}
}

func (m mortal) Freeze(ctx context.Context, uuid string) error {
	m.dies("before freeze")
	if m.at == "during freeze" {
		time.AfterFunc(time.Millisecond, func() { m.dies("during freeze") })
	}
	err := m.Guest.Freeze(ctx, uuid)
	m.dies("after freeze")
	return err
}

func (m mortal) Suspend(ctx context.Context, uuid string) error {
	err := m.Guest.Suspend(ctx, uuid)
	m.dies("after suspend")
	return err
}

func (m mortal) Thaw(ctx context.Context, uuid string) error {
	m.dies("before thaw")
	err := m.Guest.Thaw(ctx, uuid)
	m.dies("after thaw")
	return err
}

// mortalWatchdog lets the process die around the start of the watchdog.
type mortalWatchdog struct {
	Watchdog
	m mortal
}

func (w mortalWatchdog) Start(ctx context.Context, marker string) error {
	w.m.dies("before watchdog")
	err := w.Watchdog.Start(ctx, marker)
	w.m.dies("after watchdog")
	return err
}

// die is the holder that dies: a process of its own.
func die(at string) {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	h, err := hypervisor.Connect(context.Background(), uri, log)
	if err != nil {
		panic(err)
	}
	m := mortal{h, at}
	mode := Agent
	if strings.Contains(at, "suspend") {
		mode = Suspend
	}
	watchdog := mortalWatchdog{ThawUnit{Program: os.Getenv("QUIESCE_THAW"), URI: uri}, m}
	q := New(m, watchdog, Options{Directory: os.Getenv("QUIESCE_MARKERS"), Log: log})
	_, err = q.Hold(context.Background(), os.Getenv("QUIESCE_UUID"), as(mode), func(context.Context) error {
		m.dies("in point")
		return nil
	})
	panic(errors.Join(errors.New("it lives"), err))
}

type lab struct {
	*hypervisor.Hypervisor
	d       hypervisor.Domain
	markers string
	log     *slog.Logger
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// guest starts a guest with a disk.
func guest(t *testing.T, name, disk string) *lab {
	t.Helper()
	log := slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
	h, err := hypervisor.Connect(t.Context(), uri, log)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.Close)
	t.Cleanup(func() { _ = exec.CommandContext(context.Background(), "lab-domain", "remove", name).Run() })
	run(t, "lab-domain", "create", name, "--disk", disk, "--start")
	d, err := h.Lookup(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	return &lab{h, d, filepath.Join(t.TempDir(), "frozen"), log}
}

func (l *lab) quiescer(limit time.Duration) *Quiescer {
	return New(l, ThawUnit{Program: thawProgram, URI: uri}, Options{Directory: l.markers, Limit: limit, Log: l.log})
}

func (l *lab) status(t *testing.T, want hypervisor.FilesystemStatus) {
	t.Helper()
	if got, err := l.FSStatus(t.Context(), l.d.UUID); err != nil || got != want {
		t.Fatalf("filesystems are %q (%v), not %s", got, err, want)
	}
}

func (l *lab) state(t *testing.T, want string) {
	t.Helper()
	if got, reason, err := l.State(t.Context(), l.d.UUID); err != nil || got != want {
		t.Fatalf("the domain is %s (%s, %v), not %s", got, reason, err, want)
	}
}

// until polls for what no event tells.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(90 * time.Second); !ok(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("still not: %s", what)
		}
	}
}

func (l *lab) thawedInTheEnd(t *testing.T) {
	t.Helper()
	until(t, "thawed", func() bool {
		got, err := l.FSStatus(t.Context(), l.d.UUID)
		return err == nil && got == hypervisor.Thawed
	})
}

func (l *lab) runsInTheEnd(t *testing.T) {
	t.Helper()
	until(t, "running", func() bool {
		s, _, err := l.State(t.Context(), l.d.UUID)
		return err == nil && s == hypervisor.StateRunning
	})
}

// silentInTheEnd waits until the agent is gone, as libvirt sees it.
func (l *lab) silentInTheEnd(t *testing.T) {
	t.Helper()
	until(t, "silent", func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		_, err := l.FSStatus(ctx, l.d.UUID)
		return errors.Is(err, hypervisor.ErrAgentSilent)
	})
}

func (l *lab) noMarkerInTheEnd(t *testing.T) {
	t.Helper()
	until(t, "no marker", func() bool { m, err := markers(l.markers); return err == nil && len(m) == 0 })
}

func (l *lab) noMarker(t *testing.T) {
	t.Helper()
	if m, err := markers(l.markers); err != nil || len(m) != 0 {
		t.Errorf("markers %v, %v", m, err)
	}
}

// TestLab is all that needs one running guest: a start takes long under load.
func TestLab(t *testing.T) {
	l := guest(t, "quiesce", "qcow2:16M:fs")
	t.Run("hold", l.testHold)
	t.Run("what the admin holds stays held", l.testAdmin)
	t.Run("holder dies", l.testHolderDies)
	t.Run("limit", l.testLimit)
	t.Run("freeze that comes late", l.testLate)
	t.Run("agent dies in between", l.testAgentDies)
	t.Run("guest goes", l.testGoes)
	t.Run("agent ends", l.testAgentEnds)
}

// as is a wish that requires what it asks for.
func as(mode Mode) Wish { return Wish{Mode: mode} }

func (l *lab) testHold(t *testing.T) {
	q := l.quiescer(0)
	for mode, want := range map[Mode]Consistency{None: Crash, Agent: Filesystem, Suspend: Suspended} {
		called := 0
		var inside time.Duration
		start := time.Now()
		res, err := q.Hold(t.Context(), l.d.UUID, as(mode), func(context.Context) error {
			entered := time.Now()
			called++
			switch mode {
			case Agent:
				l.status(t, hypervisor.Frozen)
			case Suspend:
				l.state(t, hypervisor.StatePaused)
			}
			inside = time.Since(entered)
			return nil
		})
		if err != nil || res.Consistency != want || res.Shortfall != "" || !res.Thawed || called != 1 || (res.Held > 0) != (mode != None) {
			t.Errorf("%s: %+v, %v, called %d times", mode, res, err, called)
		}
		if mode != None && (res.Held < inside || res.Held > time.Since(start)) {
			t.Errorf("%s: held for %v, which is not between %v and %v", mode, res.Held, inside, time.Since(start))
		}
		t.Logf("%s: held for %v", mode, res.Held)
		l.noMarker(t)
		l.state(t, hypervisor.StateRunning)
		l.status(t, hypervisor.Thawed)
	}
	broken := errors.New("no point")
	for _, mode := range []Mode{None, Agent, Suspend} {
		for _, policy := range []Policy{Require, Prefer} {
			called := 0
			if _, err := q.Hold(t.Context(), l.d.UUID, Wish{mode, policy}, func(context.Context) error { called++; return broken }); !errors.Is(err, broken) || called != 1 {
				t.Errorf("%s, %s: %v, called %d times", mode, policy, err, called)
			}
			l.state(t, hypervisor.StateRunning)
			l.status(t, hypervisor.Thawed)
		}
	}
	// A cancelled caller leaves no frozen guest.
	ctx, cancel := context.WithCancel(t.Context())
	if _, err := q.Hold(ctx, l.d.UUID, as(Agent), func(context.Context) error { cancel(); return ctx.Err() }); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	l.status(t, hypervisor.Thawed)
	l.noMarker(t)
}

func nothing(context.Context) error { return nil }

func (l *lab) testAdmin(t *testing.T) {
	q := l.quiescer(0)
	if err := l.Freeze(t.Context(), l.d.UUID); err != nil {
		t.Fatal(err)
	}
	if res, err := q.Hold(t.Context(), l.d.UUID, as(Agent), nothing); err != nil || res.Consistency != Filesystem || res.Held != 0 || res.Shortfall != "" {
		t.Errorf("%+v, %v", res, err)
	}
	l.status(t, hypervisor.Frozen)
	thaw := func(ctx context.Context) error { return l.Thaw(ctx, l.d.UUID) }
	if res, err := q.Hold(t.Context(), l.d.UUID, Wish{Agent, Prefer}, thaw); err != nil || res.Consistency != Crash || res.Shortfall != errLetGo.Error() {
		t.Errorf("%+v, %v", res, err)
	}
	l.status(t, hypervisor.Thawed)
	if err := l.Suspend(t.Context(), l.d.UUID); err != nil {
		t.Fatal(err)
	}
	if res, err := q.Hold(t.Context(), l.d.UUID, as(Suspend), nothing); err != nil || res.Consistency != Suspended || res.Held != 0 {
		t.Errorf("%+v, %v", res, err)
	}
	l.state(t, hypervisor.StatePaused)
	if _, err := q.Hold(t.Context(), l.d.UUID, as(Agent), nil); !errors.Is(err, ErrHold) || !strings.Contains(err.Error(), "paused by its admin") {
		t.Error(err)
	}
	if res, err := q.Hold(t.Context(), l.d.UUID, Wish{Agent, Prefer}, nothing); err != nil || res.Consistency != Crash || res.Shortfall != "the domain was paused by its admin" {
		t.Errorf("%+v, %v", res, err)
	}
	l.state(t, hypervisor.StatePaused)
	if err := l.Resume(t.Context(), l.d.UUID); err != nil {
		t.Fatal(err)
	}
	l.noMarker(t)
}

func (l *lab) testHolderDies(t *testing.T) {
	for _, at := range []string{
		"before watchdog", "after watchdog", "before freeze", "during freeze", "after freeze", "in point", "before thaw", "after thaw", "after suspend",
	} {
		t.Run(at, func(t *testing.T) {
			cmd := exec.CommandContext(t.Context(), os.Args[0])
			cmd.Env = append(os.Environ(), "QUIESCE_DIE_AT="+at, "QUIESCE_THAW="+thawProgram, "QUIESCE_UUID="+l.d.UUID, "QUIESCE_MARKERS="+l.markers)
			cmd.Stderr = t.Output()
			err := cmd.Run()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.String() != "signal: killed" {
				t.Fatalf("it did not die: %v", err)
			}
			if at == "before watchdog" {
				l.status(t, hypervisor.Thawed)
				if err := l.quiescer(0).ThawLeftover(t.Context()); err != nil { // the daemon's next start
					t.Error(err)
				}
			}
			if at == "after suspend" {
				l.runsInTheEnd(t)
			}
			l.thawedInTheEnd(t)
			l.noMarkerInTheEnd(t)
			l.state(t, hypervisor.StateRunning)
			l.status(t, hypervisor.Thawed)
		})
	}
}

// The daemon lives, but does not come back from fixing the point in time.
func (l *lab) testLimit(t *testing.T) {
	for policy, want := range map[Policy]error{Prefer: nil, Require: ErrHold} {
		for mode, goesOn := range map[Mode]func(*testing.T){Agent: l.thawedInTheEnd, Suspend: l.runsInTheEnd} {
			res, err := l.quiescer(time.Second).Hold(t.Context(), l.d.UUID, Wish{mode, policy}, func(context.Context) error {
				goesOn(t) // by the watchdog
				return nil
			})
			if !errors.Is(err, want) || res.Consistency != Crash || res.Shortfall == "" || !res.Thawed {
				t.Errorf("%s: %+v, %v: what was let go meanwhile is no consistent point", policy, res, err)
			}
			l.status(t, hypervisor.Thawed)
			l.noMarkerInTheEnd(t)
		}
	}
}

// A freeze that times out takes effect when the agent comes back.
func (l *lab) testLate(t *testing.T) {
	pid := strings.TrimSpace(run(t, "lab-domain", "exec", l.d.Name, "--", "pidof", "qemu-ga"))
	for policy, points := range map[Policy]int{Require: 0, Prefer: 1} {
		// The guest stops the agent after it has answered for the last time before
		// the freeze, and lets it go on much later.
		stalled := stalling{Guest: l, stall: func() {
			run(t, "lab-domain", "exec", l.d.Name, "--", "sh", "-c", "(sleep 0.5; kill -STOP "+pid+"; sleep 15; kill -CONT "+pid+") >/dev/null 2>&1 &")
			time.Sleep(2 * time.Second) // until it is stopped: nothing but the agent could tell
		}}
		q := New(stalled, ThawUnit{Program: thawProgram, URI: uri}, Options{Directory: l.markers, Limit: 4 * time.Second, Log: l.log})
		called := 0
		res, err := q.Hold(t.Context(), l.d.UUID, Wish{Agent, policy}, func(context.Context) error {
			called++
			return nil
		})
		if errors.Is(err, ErrHold) != (policy == Require) || res.Thawed || called != points || res.Held != 0 {
			t.Errorf("%s: %+v, %v, called %d times", policy, res, err, called)
		}
		if policy == Prefer && (res.Consistency != Crash || res.Shortfall == "") {
			t.Errorf("%+v", res)
		}
		if m, _ := markers(l.markers); len(m) != 1 {
			t.Error("there is no marker, although nobody knows whether the guest is frozen")
		}
		l.noMarkerInTheEnd(t)
		l.status(t, hypervisor.Thawed)
		run(t, "lab-domain", "exec", l.d.Name, "--", "sh", "-c", "echo alive >/mnt/vda/file && sync")
	}
}

type stalling struct {
	Guest
	stall func()
}

func (s stalling) Freeze(ctx context.Context, uuid string) error {
	s.stall()
	return s.Guest.Freeze(ctx, uuid)
}

// An agent that dies while the guest is frozen, and comes back much later.
func (l *lab) testAgentDies(t *testing.T) {
	for policy, want := range map[Policy]error{Prefer: nil, Require: ErrHold} {
		// The file is how the agent remembers that it froze the filesystems; the
		// freeze itself takes moments after that.
		run(t, "lab-domain", "exec", l.d.Name, "--", "sh", "-c", `(until [ -e /run/qga.state.isfrozen ]; do usleep 10000; done
			sleep 1; kill -9 $(pidof qemu-ga); sleep 8
			exec qemu-ga -m virtio-serial -p /dev/virtio-ports/org.qemu.guest_agent.0 -t /run) >/dev/null 2>&1 &`)
		res, err := l.quiescer(0).Hold(t.Context(), l.d.UUID, Wish{Agent, policy}, func(context.Context) error {
			l.silentInTheEnd(t)
			return nil
		})
		if !errors.Is(err, want) || res.Consistency != Crash || res.Shortfall != "the guest agent does not answer" || res.Thawed {
			t.Errorf("%s: %+v, %v", policy, res, err)
		}
		l.noMarkerInTheEnd(t)
		l.status(t, hypervisor.Thawed)
		run(t, "lab-domain", "exec", l.d.Name, "--", "sh", "-c", "echo alive >/mnt/vda/file && sync")
	}
}

// An agent that has ended is no reason to leave a guest without a backup, unless
// it is required.
func (l *lab) testAgentEnds(t *testing.T) {
	run(t, "lab-domain", "start", l.d.Name)
	q := l.quiescer(0)
	run(t, "lab-domain", "exec", l.d.Name, "--", "sh", "-c", "(sleep 0.5; kill $(pidof qemu-ga)) >/dev/null 2>&1 &")
	l.silentInTheEnd(t)
	if _, err := q.Hold(t.Context(), l.d.UUID, as(Agent), nil); !errors.Is(err, ErrHold) || !errors.Is(err, hypervisor.ErrAgentSilent) {
		t.Error(err)
	}
	l.fallsShort(t, "the guest agent does not answer")
	if res, err := q.Hold(t.Context(), l.d.UUID, as(Suspend), nothing); err != nil || res.Consistency != Suspended {
		t.Errorf("%+v, %v", res, err)
	}
	l.noMarker(t)
}

// fallsShort has a point fixed for which an agent is preferred that cannot do it.
func (l *lab) fallsShort(t *testing.T, why string) {
	t.Helper()
	called := 0
	res, err := l.quiescer(0).Hold(t.Context(), l.d.UUID, Wish{Agent, Prefer}, func(context.Context) error { called++; return nil })
	if want := (Result{Consistency: Crash, Shortfall: why, Thawed: true}); err != nil || res != want || called != 1 {
		t.Errorf("%+v, %v, called %d times", res, err, called)
	}
	l.state(t, hypervisor.StateRunning)
	l.noMarker(t)
}

// TestLabNothingToFreeze has a guest without filesystems, which is frozen as far
// as it can be, and then one without an agent.
func TestLabNothingToFreeze(t *testing.T) {
	l := guest(t, "quiesce-bare", "qcow2:16M")
	res, err := l.quiescer(0).Hold(t.Context(), l.d.UUID, as(Agent), nothing)
	if want := (Result{Consistency: Crash, Shortfall: nothingToFreeze, Thawed: true}); err != nil || res != want {
		t.Errorf("%+v, %v", res, err)
	}
	l.fallsShort(t, nothingToFreeze)
	run(t, "lab-domain", "destroy", l.d.Name)
	run(t, "sh", "-c", "virsh dumpxml quiesce-bare | sed '/<channel/,/<.channel>/d' | virsh define /dev/stdin && virsh start quiesce-bare </dev/null")
	if _, err := l.quiescer(0).Hold(t.Context(), l.d.UUID, as(Agent), nil); !errors.Is(err, ErrHold) || !errors.Is(err, hypervisor.ErrNoAgent) {
		t.Error(err)
	}
	l.fallsShort(t, "no guest agent is configured")
}

// A guest that is gone needs no thaw; one without agent is told so.
func (l *lab) testGoes(t *testing.T) {
	q := l.quiescer(0)
	end := func(ctx context.Context) error { return l.Destroy(ctx, l.d.UUID) }
	res, err := q.Hold(t.Context(), l.d.UUID, Wish{Agent, Prefer}, end)
	if err != nil || !res.Thawed || res.Consistency != Crash || res.Shortfall == "" {
		t.Errorf("%+v, %v", res, err)
	}
	l.noMarker(t)
	if _, err := q.Hold(t.Context(), l.d.UUID, as(Agent), nil); !errors.Is(err, ErrHold) || !strings.Contains(err.Error(), "shutoff") {
		t.Error(err)
	}
	l.noMarker(t)
}
