//go:build lab

package lifecycle

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/chain"
	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/hooks/spool"
)

const (
	hookPath = "/etc/libvirt/hooks/qemu.d/virtbackup"
	limit    = 3 * time.Minute
)

// lab is a host with the hook, but without the daemon: a Keeper of our own takes
// its place, which sees nothing but what it is made to look at.
type lab struct {
	*Keeper
	t *testing.T
	h *hypervisor.Hypervisor
}

func newLab(t *testing.T) *lab {
	t.Helper()
	l := &lab{t: t}
	l.run("systemctl", "stop", "virtbackupd")
	log := slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
	var err error
	if l.h, err = hypervisor.Connect(t.Context(), "qemu:///system", log); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.h.Close)
	l.Keeper = newKeeper(t, l.h, spool.Directory, hookPath)
	if err := l.Replay(t.Context()); err != nil { // what other tests left
		t.Fatal(err)
	}
	return l
}

func (l *lab) run(name string, args ...string) string {
	l.t.Helper()
	out, err := exec.CommandContext(l.t.Context(), name, args...).CombinedOutput()
	if err != nil {
		l.t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// guest is a domain with the disks vda and sdb, paused for ever. One is on SCSI,
// where a disk can be unplugged although no system agrees.
type guest struct {
	*lab
	name  string
	uuid  string
	after int64 // the newest mark that was looked at
}

func (l *lab) guest(name string) *guest {
	l.t.Helper()
	g := &guest{lab: l, name: name}
	l.run("lab-domain", "create", name, "--disk", "qcow2:64M", "--disk", "qcow2:64M:bus=scsi")
	l.t.Cleanup(func() { _ = exec.CommandContext(context.Background(), "lab-domain", "remove", name).Run() })
	g.uuid = l.run("virsh", "domuuid", name)
	return g
}

func (g *guest) virsh(verb string, args ...string) {
	g.t.Helper()
	g.run("virsh", append([]string{"-q", verb, g.name}, args...)...)
}
func (g *guest) start() { g.t.Helper(); g.virsh("start", "--paused") }
func (g *guest) stop()  { g.t.Helper(); g.virsh("destroy") }
func (g *guest) image(target string) string {
	return "/var/lib/libvirt/images/" + g.name + "-" + target + ".qcow2"
}

// write changes an image that QEMU does not have open.
func (g *guest) write(target string) {
	g.t.Helper()
	g.run("qemu-io", "-f", "qcow2", "-c", "write -P 5 0 64k", g.image(target))
}

// marks returns what became known since it was called last, as "vda unseen".
func (g *guest) marks() []string {
	g.t.Helper()
	var d hypervisor.Domain
	for deadline := time.Now().Add(limit); ; { // libvirt may just be coming back
		var err error
		if d, err = g.h.ByUUID(g.t.Context(), g.uuid); err == nil {
			break
		}
		if time.Now().After(deadline) {
			g.t.Fatal(err)
		}
	}
	last, newest, err := g.Observe(g.t.Context(), d)
	if err != nil {
		g.t.Fatal(err)
	}
	all := []string{}
	for _, m := range newest {
		if m.Number > g.after {
			g.t.Logf("%q: %s: %s", m.Target, m.Cause, m.Detail)
			all = append(all, strings.TrimSpace(m.Target+" "+string(m.Cause)))
		}
	}
	g.after = last
	slices.Sort(all)
	return all
}

// killLibvirtd ends libvirtd, and keeps it from coming back until startLibvirtd.
func (l *lab) killLibvirtd() {
	l.t.Helper()
	l.run("systemctl", "stop", "libvirtd.socket", "libvirtd-ro.socket", "libvirtd-admin.socket")
	l.run("systemctl", "kill", "--signal=KILL", "libvirtd.service")
	l.run("systemctl", "stop", "libvirtd.service") // no restart
}

func (l *lab) startLibvirtd() {
	l.t.Helper()
	l.run("systemctl", "start", "libvirtd.socket", "libvirtd.service")
}

// awaitRunning waits until a libvirtd that was just started talks to QEMU.
func (g *guest) awaitRunning() {
	g.t.Helper()
	g.await(`"running":false`, "qemu-monitor-command", g.name, `{"execute":"query-status"}`)
}

// awaitOff waits until a libvirtd that was just started knows that QEMU is gone.
func (g *guest) awaitOff() { g.t.Helper(); g.await("shut off", "domstate", g.name) }

func (g *guest) await(answer string, virsh ...string) {
	g.t.Helper()
	for deadline := time.Now().Add(limit); ; time.Sleep(50 * time.Millisecond) {
		out, err := exec.CommandContext(g.t.Context(), "virsh", append([]string{"-q"}, virsh...)...).CombinedOutput()
		if err == nil && strings.Contains(string(out), answer) {
			return
		}
		if time.Now().After(deadline) {
			g.t.Fatalf("virsh %s says %s, not %s: %v", virsh, out, answer, err)
		}
	}
}

// endQEMU has QEMU end in good order, and waits until it is gone.
func (g *guest) endQEMU() {
	g.t.Helper()
	pid := g.run("cat", "/run/libvirt/qemu/"+g.name+".pid")
	g.run("kill", pid)
	g.run("tail", "--pid="+pid, "-f", "/dev/null")
}

// TestWhatHappensToADomain does it, while no daemon runs, and looks at the
// domain afterwards.
func TestWhatHappensToADomain(t *testing.T) {
	l := newLab(t)
	const all = "unseen"
	changed, replaced := func(target string) string { return target + " " + string(chain.ChangedWhileOff) },
		func(target string) string { return target + " " + string(chain.DiskReplaced) }
	for n, c := range []struct {
		name string
		do   func(g *guest) // begins and ends with a domain that runs
		want []string
	}{
		{"it is left alone", func(*guest) {}, nil},
		{"stop and start", func(g *guest) { g.stop(); g.start() }, nil},
		{"stop and start, looked at in between", func(g *guest) { g.stop(); g.marks(); g.start() }, nil},
		{"reset", func(g *guest) { g.virsh("reset") }, nil},
		{"save and restore", func(g *guest) { g.virsh("managedsave"); g.start() }, nil},
		{"restart of libvirtd", func(g *guest) { g.run("systemctl", "restart", "libvirtd") }, nil},
		{"kill of libvirtd, stop and start", func(g *guest) {
			g.killLibvirtd()
			g.startLibvirtd()
			g.awaitRunning()
			g.stop()
			g.start()
		}, nil},
		{"a start that fails", func(g *guest) {
			g.stop()
			g.failStart()
			g.start()
		}, nil},
		{"snapshot and commit", func(g *guest) {
			g.virsh("snapshot-create-as", "--name", "s", "--disk-only", "--no-metadata")
			for _, target := range []string{"vda", "sdb"} {
				g.virsh("blockcommit", target, "--active", "--pivot", "--wait")
			}
			g.stop()
			g.start()
		}, nil},

		{"write while off", func(g *guest) { g.stop(); g.write("sdb"); g.start() }, []string{changed("sdb")}},
		{"write while off, looked at in between", func(g *guest) {
			g.stop()
			g.marks()
			g.write("sdb")
			g.start()
		}, []string{changed("sdb")}},
		{"touch", func(g *guest) { g.stop(); g.run("touch", g.image("vda")); g.start() }, []string{changed("vda")}},
		{"write, and the time set back", func(g *guest) {
			g.stop()
			before := g.run("stat", "-c", "%y", g.image("vda"))
			g.write("vda")
			g.run("touch", "-d", before, g.image("vda"))
			g.start()
		}, []string{changed("vda")}},
		{"rollback to an older copy", func(g *guest) {
			g.stop()
			g.run("cp", "-p", g.image("sdb"), g.image("copy"))
			g.start()
			g.marks()
			g.stop()
			g.run("cp", "-p", g.image("copy"), g.image("sdb"))
			g.start()
		}, []string{changed("sdb")}},
		{"an equal copy in its place", func(g *guest) {
			g.stop()
			g.run("cp", "-p", g.image("sdb"), g.image("copy"))
			g.run("mv", g.image("copy"), g.image("sdb"))
			g.start()
		}, []string{changed("sdb")}},
		{"another image in the definition", func(g *guest) {
			g.stop()
			g.run("cp", "-p", g.image("sdb"), g.image("other"))
			g.run("sh", "-c", fmt.Sprintf("virsh dumpxml --inactive %s | sed s,%s,%s, | virsh define /dev/stdin", g.name, g.image("sdb"), g.image("other")))
			g.start()
		}, []string{replaced("sdb")}},
		{"detach and attach", func(g *guest) { g.replug() }, []string{replaced("sdb")}},
		{"detach and attach, then stop and start", func(g *guest) { g.replug(); g.stop(); g.start() }, []string{replaced("sdb")}},
		{"attach", func(g *guest) {
			g.run("qemu-img", "create", "-q", "-f", "qcow2", g.image("sdc"), "16M")
			g.virsh("attach-disk", g.image("sdc"), "sdc", "--subdriver", "qcow2", "--targetbus", "scsi", "--live", "--config")
			g.stop()
			g.start()
		}, []string{replaced("sdc")}},

		{"end of QEMU while libvirtd is down", func(g *guest) {
			g.killLibvirtd()
			g.endQEMU()
			g.write("sdb")
			g.startLibvirtd()
			g.awaitOff()
			g.start()
		}, []string{all}},
		{"stop and start without the hook", func(g *guest) {
			g.without(func() { g.stop(); g.start() })
		}, []string{all}},
		{"stop without the hook", func(g *guest) {
			g.without(g.stop)
			g.start()
		}, []string{all}},
		{"start without the hook", func(g *guest) {
			g.stop()
			g.without(g.start)
		}, []string{all}},
		{"the same number again, without the hook", func(g *guest) {
			g.without(func() {
				g.killLibvirtd()
				g.endQEMU()
				g.startLibvirtd()
				g.awaitOff()
				g.start()
			})
			g.run("systemctl", "restart", "libvirtd") // it looks for hooks
			g.awaitRunning()
		}, []string{all}},
		{"a record that cannot be read", func(g *guest) {
			g.stop()
			records, err := filepath.Glob(spool.Directory + "/*.json")
			if err != nil || len(records) == 0 {
				g.t.Fatal(records, err)
			}
			if err := os.Truncate(records[0], 100); err != nil {
				g.t.Fatal(err)
			}
			g.start()
		}, []string{all}},
	} {
		t.Run(c.name, func(t *testing.T) {
			one := *l
			one.t = t
			g := one.guest(fmt.Sprintf("lifecycle%d", n))
			g.start()
			g.marks() // of one that was never seen before
			c.do(g)
			if got := g.marks(); !slices.Equal(got, c.want) {
				t.Errorf("there are the marks %q, not %q", got, c.want)
			}
			if got := g.marks(); len(got) > 0 {
				t.Errorf("looked at again, there are marks %q", got)
			}
		})
	}
}

// failStart has a hook of the admin refuse a start, so that all other hooks see
// one that fails.
func (g *guest) failStart() {
	g.t.Helper()
	const refuse = "/etc/libvirt/hooks/qemu.d/refuse"
	if err := os.WriteFile(refuse, []byte("#!/bin/sh\n[ \"$2\" != start ]\n"), 0o755); err != nil {
		g.t.Fatal(err)
	}
	defer os.Remove(refuse)
	if out, err := exec.CommandContext(g.t.Context(), "virsh", "start", "--paused", g.name).CombinedOutput(); err == nil {
		g.t.Fatalf("the start did not fail: %s", out)
	}
}

// replug detaches sdb, writes to it, and attaches it again.
func (g *guest) replug() {
	g.t.Helper()
	ctx, cancel := context.WithTimeout(g.t.Context(), limit)
	defer cancel()
	events := g.h.Subscribe(ctx)
	g.virsh("detach-disk", "sdb", "--live")
	for e := range events {
		if e.Kind == hypervisor.EventDeviceRemoved && e.UUID == g.uuid {
			break
		}
	}
	g.write("sdb")
	g.virsh("attach-disk", g.image("sdb"), "sdb", "--subdriver", "qcow2", "--targetbus", "scsi", "--live")
}

// without does something while libvirt has no hook of ours.
func (g *guest) without(do func()) {
	g.t.Helper()
	if err := os.Chmod(hookPath, 0o644); err != nil {
		g.t.Fatal(err)
	}
	defer func() {
		if err := os.Chmod(hookPath, 0o755); err != nil {
			g.t.Error(err)
		}
	}()
	do()
}

// TestRun has what changed unseen marked without anybody asking.
func TestRun(t *testing.T) {
	l := newLab(t)
	g := l.guest("lifecyclerun")
	g.start()
	if err := g.Catalog.SeenDomain(t.Context(), g.uuid, g.name); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); g.Run(ctx) }()
	defer func() { cancel(); <-done }()
	number := int64(0)
	await := func(what, target string, cause chain.Cause) {
		t.Helper()
		for deadline := time.Now().Add(limit); ; time.Sleep(50 * time.Millisecond) {
			marks, err := g.Catalog.Marks(t.Context(), g.uuid, number)
			if err != nil {
				t.Fatal(err)
			}
			if len(marks) > 0 {
				if m := marks[0]; m.Target != target || m.Cause != cause {
					t.Errorf("after %s there is %+v", what, m)
				}
				number = marks[len(marks)-1].Number
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("after %s nothing is marked", what)
			}
		}
	}
	await("the daemon's start", "", chain.Unseen)
	g.stop()
	g.write("vda")
	g.start()
	await("an edit", "vda", chain.ChangedWhileOff)
	for range 3 {
		g.killLibvirtd()
		g.startLibvirtd()
		g.marks() // while it looks for QEMU
		g.awaitRunning()
	}
	if marks, err := g.Catalog.Marks(t.Context(), g.uuid, number); err != nil || len(marks) > 0 {
		t.Errorf("libvirtd was away, and there is %+v, %v", marks, err)
	}
	g.killLibvirtd()
	g.endQEMU()
	g.startLibvirtd()
	g.awaitOff()
	await("the end of QEMU without libvirtd", "", chain.Unseen)
	g.write("sdb")
	g.start()
	await("one more edit", "sdb", chain.ChangedWhileOff)
}

// TestHookBecomesActive installs the hook while libvirtd runs.
func TestHookBecomesActive(t *testing.T) {
	l := newLab(t)
	check := func(want HookStatus) HookState {
		t.Helper()
		s, err := l.Hook(t.Context())
		if err != nil || s.Status != want {
			t.Errorf("the hook is %+v, %v, not %s", s, err, want)
		}
		return s
	}
	l.run("systemctl", "restart", "libvirtd")
	check(HookActive)
	l.run("cp", hookPath, hookPath+".new")
	l.run("mv", hookPath+".new", hookPath)
	check(HookInactive)
	g := l.guest("lifecyclehook")
	before := time.Now().Truncate(time.Microsecond)
	g.start()
	if err := l.Replay(t.Context()); err != nil {
		t.Fatal(err)
	}
	if s := check(HookActive); s.Last.Before(before) || s.Last.After(time.Now()) {
		t.Errorf("it told something at %v, not after %v", s.Last, before)
	}
	if err := os.Chmod(hookPath, 0o644); err != nil {
		t.Fatal(err)
	}
	check(HookMissing)
	if err := os.Chmod(hookPath, 0o755); err != nil {
		t.Fatal(err)
	}
	check(HookActive)
}
