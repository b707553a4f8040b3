//go:build lab

package labtest

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

const (
	theHook   = "/etc/libvirt/hooks/qemu.d/virtbackup"
	theSpool  = "/var/lib/virtbackup/hooks"
	theBootID = "/proc/sys/kernel/random/boot_id"
)

// around are things that happen to a running domain while those who watch it
// are away. All of them leave the domain in some state, and the watchers there.
var around = []action{
	{name: "libvirtd restarted", do: func(s *scene, _ string) { s.withoutLibvirtd(func() {}) }},
	{name: "libvirtd down: SIGTERM of QEMU", do: func(s *scene, target string) {
		s.withoutLibvirtd(func() { s.end("-TERM") })
		s.isOff()
	}},
	{name: "libvirtd down: SIGTERM of QEMU, image edited beneath qcow2", do: func(s *scene, target string) {
		d := s.disk(target)
		s.withoutLibvirtd(func() {
			s.end("-TERM")
			scribble(s.t, d)
		})
		s.isOff()
	}, can: isSingleQcow2},
	{name: "libvirtd down: SIGKILL of QEMU, image edited by qemu-io", do: func(s *scene, target string) {
		d := s.disk(target)
		s.withoutLibvirtd(func() {
			s.end("-KILL")
			command(s.t, "", "qemu-io", "-f", d.format, "-c", "write -P 98 2M 64k", d.file)
		})
		s.isOff()
	}},
	{name: "host power loss", do: func(s *scene, _ string) { s.losePower(func() {}) }},
	{name: "host power loss, image edited beneath qcow2 before it is up", do: func(s *scene, target string) {
		d := s.disk(target)
		s.losePower(func() { scribble(s.t, d) })
	}, can: isSingleQcow2},
	{name: "virtbackupd stopped: destroy, start", do: func(s *scene, _ string) {
		s.withoutDaemon(func() {
			s.virsh("destroy", s.name)
			s.virsh("start", s.name)
		})
	}},
	{name: "virtbackupd stopped: destroy, image edited beneath qcow2, start", do: func(s *scene, target string) {
		s.withoutDaemon(func() {
			s.virsh("destroy", s.name)
			scribble(s.t, s.disk(target))
			s.virsh("start", s.name)
		})
	}, can: isSingleQcow2},
	{name: "virtbackupd stopped: detach-disk, edit it, attach the same", do: func(s *scene, target string) {
		s.withoutDaemon(func() {
			d := s.detach(target)
			scribble(s.t, d)
			s.attach(d.file, target, d.format, "--live", "--config")
		})
	}, can: isSingleQcow2},
	{name: "virtbackupd hung: destroy, start", do: func(s *scene, _ string) {
		s.withHungDaemon(func() {
			s.virsh("destroy", s.name)
			s.virsh("start", s.name)
		})
	}},
	{name: "virtbackupd hung: destroy, image edited beneath qcow2, start", do: func(s *scene, target string) {
		s.withHungDaemon(func() {
			s.virsh("destroy", s.name)
			scribble(s.t, s.disk(target))
			s.virsh("start", s.name)
		})
	}, can: isSingleQcow2},
	{name: "hook missing: destroy, start", do: func(s *scene, _ string) {
		s.withoutHook(func() {
			s.virsh("destroy", s.name)
			s.virsh("start", s.name)
		})
	}},
	{name: "hook missing: destroy, image edited beneath qcow2, start", do: func(s *scene, target string) {
		s.withoutHook(func() {
			s.virsh("destroy", s.name)
			scribble(s.t, s.disk(target))
			s.virsh("start", s.name)
		})
	}, can: isSingleQcow2},
	{name: "virtbackupd stopped, records of the hook lost: destroy, image edited beneath qcow2, start", do: func(s *scene, target string) {
		s.withoutDaemon(func() {
			s.virsh("destroy", s.name)
			scribble(s.t, s.disk(target))
			s.virsh("start", s.name)
			loseRecords(s.t)
		})
	}, can: isSingleQcow2},
}

// scribble changes a byte of a guest's data in a qcow2 image that nobody uses,
// as a tool would that does not know of bitmaps.
func scribble(t *testing.T, d disk) {
	t.Helper()
	var parts []struct {
		Data   bool
		Start  int64
		Offset int64
	}
	decode(t, command(t, "", "qemu-img", "map", "--output=json", "-f", d.format, d.file), &parts)
	for _, p := range parts {
		if !p.Data {
			continue
		}
		f, err := os.OpenFile(d.file, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := flip(f, p.Offset); err != nil {
			t.Fatal(err)
		}
		return
	}
	t.Fatalf("disk %s holds nothing", d.target)
}

func decode(t *testing.T, document string, into any) {
	t.Helper()
	if err := json.Unmarshal([]byte(document), into); err != nil {
		t.Fatal(err)
	}
}

// end sends QEMU a signal, and waits until it is gone.
func (s *scene) end(signal string) {
	s.t.Helper()
	pid := s.pid()
	command(s.t, "", "kill", signal, pid)
	s.gone(pid)
}

var libvirtdUnits = []string{"libvirtd.socket", "libvirtd-ro.socket", "libvirtd-admin.socket", "libvirtd.service"}

// withoutLibvirtd kills libvirtd, and keeps it from being started meanwhile.
func (s *scene) withoutLibvirtd(do func()) {
	s.t.Helper()
	command(s.t, "", "systemctl", append([]string{"stop"}, libvirtdUnits...)...)
	defer func() {
		command(s.t, "", "systemctl", append([]string{"start"}, libvirtdUnits...)...)
		virsh(s.t, "list")
	}()
	do()
}

// withoutDaemon has the daemon stopped, and cannot be started by a call.
func (s *scene) withoutDaemon(do func()) {
	s.t.Helper()
	command(s.t, "", "systemctl", "mask", "--runtime", "virtbackupd.service")
	command(s.t, "", "systemctl", "stop", "virtbackupd.service")
	defer func() {
		command(s.t, "", "systemctl", "unmask", "--runtime", "virtbackupd.service")
		startDaemon(s.t)
		awaitDomain(s.t, s.name)
	}()
	do()
}

func startDaemon(t *testing.T) {
	t.Helper()
	// Many starts are no reason to give up; systemd may have forgotten them already.
	_ = exec.Command("systemctl", "reset-failed", "virtbackupd.service").Run()
	command(t, "", "systemctl", "start", "virtbackupd.service")
}

// withHungDaemon has the daemon there, but it does nothing.
func (s *scene) withHungDaemon(do func()) {
	s.t.Helper()
	pid := daemonPID(s.t)
	command(s.t, "", "kill", "-STOP", pid)
	defer func() {
		command(s.t, "", "kill", "-CONT", pid)
		awaitDomain(s.t, s.name)
	}()
	do()
}

// withoutHook has somebody remove libvirt's hook, and put it back.
func (s *scene) withoutHook(do func()) {
	s.t.Helper()
	aside := filepath.Join(fresh(s.t, "/etc"), "hook")
	command(s.t, "", "mv", theHook, aside)
	defer command(s.t, "", "mv", aside, theHook)
	do()
}

// loseRecords removes what the hook wrote.
func loseRecords(t *testing.T) {
	t.Helper()
	records, err := filepath.Glob(filepath.Join(theSpool, "*.json"))
	if err != nil || len(records) == 0 {
		t.Fatalf("the hook wrote nothing: %v", err)
	}
	for _, r := range records {
		if err := os.RemoveAll(r); err != nil {
			t.Fatal(err)
		}
	}
}

// losePower ends QEMU, libvirtd and virtbackupd at once, without a word to
// anybody: no hook is called. What was in /run is gone, and the next boot has
// another id. Then the host is up again; between them something is done.
func (s *scene) losePower(meanwhile func()) {
	s.t.Helper()
	libvirtd := command(s.t, "", "systemctl", "show", "--property=MainPID", "--value", "libvirtd.service")
	daemon, guest := daemonPID(s.t), s.pid()
	units := append([]string{"virtbackupd.service"}, libvirtdUnits...)
	command(s.t, "", "kill", "-STOP", libvirtd, daemon)
	command(s.t, "", "systemctl", append([]string{"mask", "--runtime"}, units...)...)
	command(s.t, "", "kill", "-KILL", libvirtd, daemon, guest)
	s.gone(guest)
	command(s.t, "", "systemctl", append([]string{"stop"}, units...)...)
	defer func() {
		command(s.t, "", "systemctl", append([]string{"unmask", "--runtime"}, units...)...)
		command(s.t, "", "systemctl", append([]string{"start"}, libvirtdUnits...)...)
		startDaemon(s.t)
		awaitDomain(s.t, s.name)
	}()
	volatile, err := filepath.Glob(filepath.Join("/run/libvirt/qemu", s.name+".*"))
	if err != nil {
		s.t.Fatal(err)
	}
	for _, file := range volatile {
		if err := os.Remove(file); err != nil {
			s.t.Fatal(err)
		}
	}
	anotherBoot(s.t)
	meanwhile()
}

// anotherBoot gives the host another boot id, for ever: no boot comes back.
func anotherBoot(t *testing.T) {
	t.Helper()
	const id = "/run/lab/boot_id"
	_, err := os.Stat(id)
	now := time.Now().UnixNano()
	if err := os.WriteFile(id, fmt.Appendf(nil, "%08x-0000-4000-8000-%012x\n", uint32(now>>48), now&0xffffffffffff), 0o644); err != nil {
		t.Fatal(err)
	}
	if err == nil {
		return
	}
	command(t, "", "mount", "--bind", id, theBootID)
	// It has a /proc of its own.
	const settings = "/run/systemd/system.control/virtbackupd.service.d/boot.conf"
	if err := os.MkdirAll(filepath.Dir(settings), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(settings, []byte("[Service]\nBindReadOnlyPaths="+id+":"+theBootID+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	command(t, "", "systemctl", "daemon-reload")
}

func isSingleQcow2(s *scene, target string) bool {
	return isQcow2(s, target) && isSingle(s, target)
}
