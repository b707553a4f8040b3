//go:build lab

package labtest

import (
	"errors"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/virtbackup/virtbackup/dbus"
)

// The programs that look at the images of a domain that is off.
const (
	theExport = "qemu-storage-daemon"
	qemuImg   = "qemu-img"
)

// stoppedSteps are those of a backup of a domain that is off, in their order.
// scratch stands for the file system of the domain's images.
var stoppedSteps = []step{
	{name: "planning", in: qemuImg, scratch: true, op: "open", path: `^vda\.qcow2$`},
	{name: "opening", in: theWorker, op: "mkdir", path: stage + `$`},
	{name: "bitmap", in: qemuImg, scratch: true, op: "write", path: `^vda\.qcow2$`},
	{name: "export", in: theExport, scratch: true, op: "open", path: `^vda\.qcow2$`},
	{name: "reading", in: theExport, scratch: true, op: "read", path: `^vdb\.raw$`},
	{name: "copying", in: theWorker, op: "write", path: stage + `/vda\.qcow2$`},
	{name: "flushing", in: theWorker, op: "fsync", path: stage + `/vda\.qcow2$`},
	{name: "verifying", in: theWorker, op: "read", path: stage + `/vda\.qcow2$`},
	{name: "committed", in: theWorker, op: "rename", path: `/manifest\.json$`, after: true},
}

func stoppedReached(s step, name string) bool {
	index := func(name string) int {
		return slices.IndexFunc(stoppedSteps, func(s step) bool { return s.name == name })
	}
	return index(s.name) >= index(name)
}

// stoppedFault is something that happens in the middle of such a backup.
type stoppedFault struct {
	name string
	do   func(k *killer, job string)
	at   func(s step) bool // whether it is tried there
	ends func(s step) []dbus.JobState
}

var stoppedFaults = []stoppedFault{
	{"start", func(k *killer, _ string) { command(k.t, "", "virsh", "-q", "start", "--paused", k.g.name) },
		// A qemu-img that hangs while it writes is not what a start has to bear.
		func(s step) bool { return s.name != "bitmap" && s.name != "planning" },
		func(s step) []dbus.JobState {
			if stoppedReached(s, "verifying") {
				return []dbus.JobState{dbus.JobSucceeded}
			}
			return []dbus.JobState{dbus.JobFailed}
		}},
	{"daemon-kill", (*killer).killDaemon, func(step) bool { return true },
		func(s step) []dbus.JobState {
			if s.name == "bitmap" { // qemu-img dies with it, and leaves the image's bitmaps broken
				return []dbus.JobState{dbus.JobFailed}
			}
			return []dbus.JobState{dbus.JobSucceeded}
		}},
	{"export-kill", func(k *killer, job string) {
		command(k.t, "", "systemctl", "kill", "--signal=KILL", "virtbackup-export-"+job+".service")
	}, func(s step) bool { return slices.Contains([]string{"export", "reading", "copying"}, s.name) },
		func(s step) []dbus.JobState {
			if s.name == "copying" { // all may have been read
				return []dbus.JobState{dbus.JobFailed, dbus.JobSucceeded}
			}
			return []dbus.JobState{dbus.JobFailed}
		}},
	{"cancel", (*killer).cancel, func(step) bool { return true },
		func(s step) []dbus.JobState {
			switch {
			case s.name == "committed":
				return []dbus.JobState{dbus.JobSucceeded}
			case stoppedReached(s, "copying"):
				return []dbus.JobState{dbus.JobCancelled, dbus.JobSucceeded}
			}
			return []dbus.JobState{dbus.JobCancelled}
		}},
}

// TestStoppedKill lets each fault come at each step of an increment of a domain
// that is off. Whatever happens: the job ends as it should, nothing is left of
// it, the domain starts, and the next backup is exact.
func TestStoppedKill(t *testing.T) {
	k := &killer{t: t}
	k.storage = mountRepository(t)
	k.host = newHostAt(t, k.storage.point)
	point := fresh(t, "/var/lib/libvirt/images")
	if err := os.Chmod(point, 0o711); err != nil {
		t.Fatal(err)
	}
	directory := fresh(t, "/var/tmp")
	if err := os.Chmod(directory, 0o711); err != nil {
		t.Fatal(err)
	}
	k.scratch = mountFaults(t, directory, point)
	k.g = defineBare(t, "stopped-kill", bareDiskAt(t, point+"/vda.qcow2", "vda", "qcow2", ""), bareDiskAt(t, point+"/vdb.raw", "vdb", "raw", ""))
	k.backup(k.g, dbus.BackupOptions{})
	for _, f := range stoppedFaults {
		for _, s := range stoppedSteps {
			if f.at(s) && !t.Run(f.name+"/"+s.name, func(t *testing.T) { k.tryStopped(t, f, s) }) {
				t.FailNow()
			}
		}
	}
}

func (k *killer) tryStopped(t *testing.T, f stoppedFault, s step) {
	k.retarget(t)
	k.whileOff(3, 7)
	want := k.g.snapshot()
	at := k.trap(s)
	job := k.start(k.g, dbus.BackupOptions{})
	at.wait()
	k.daemon = daemonPID(t)
	f.do(k, job)
	at.letGo()
	if f.name == "daemon-kill" {
		k.awaitDaemon()
	}
	j := k.end(job)
	if !slices.Contains(f.ends(s), j.State) {
		t.Errorf("the job is %s and not %v: %v", j.State, f.ends(s), j.Err())
	}
	if f.name == "start" {
		if j.State == dbus.JobFailed && !errors.Is(j.Err(), dbus.ErrBusy) {
			t.Errorf("the job of a domain that was started failed with: %v", j.Err())
		}
		k.write("vda", 9, 2)
		command(t, "", "virsh", "-q", "destroy", k.g.name)
	}
	k.nothingLeft(k.g)
	if j.State == dbus.JobSucceeded {
		k.chainIsExact(k.made(j), want)
	}
	// Killed at its work, qemu-img takes all bitmaps of the image along.
	if left := k.g.offlineBitmaps("vda"); len(left) != 1 && (f.name != "daemon-kill" || s.name != "bitmap") {
		t.Errorf("the bitmaps are %v", left)
	}
	k.whileOff(20, 3)
	want = k.g.snapshot()
	next := k.backup(k.g, dbus.BackupOptions{})
	t.Logf("%s (%v); the next backup is %s: vda %s, vdb %s", j.State, j.Err(), next.Kind, foundBy(next, "vda"), foundBy(next, "vdb"))
	k.chainIsExact(next, want)
	k.nothingLeft(k.g)
}

// whileOff has the guest write while it runs, between two backups.
func (k *killer) whileOff(from, clusters int) {
	k.t.Helper()
	k.g.whileOn(func() {
		k.write("vda", from, clusters)
		k.write("vdb", from, 1)
	})
}

// TestStoppedAndStarted starts a domain at every moment of its backups: it is
// never refused, and no backup is wrong.
func TestStoppedAndStarted(t *testing.T) {
	h, g := newHost(t), defineGuest(t, "qcow2:64M", "qcow2:32M", "qcow2:16M")
	g.edit("vda", "write -P 1 0 48M")
	g.edit("vdb", "write -P 2 0 24M")
	h.backup(g, dbus.BackupOptions{})
	ends := map[dbus.JobState]int{}
	for i := range 12 {
		want := g.snapshot()
		events := make(chan struct{})
		job := h.start(g, dbus.BackupOptions{Full: i%2 == 0})
		go func() { // a moment later each time, counted in what a host does meanwhile
			defer close(events)
			for range i {
				_ = exec.Command("virsh", "-q", "domstate", g.name).Run()
			}
		}()
		<-events
		command(t, "", "virsh", "-q", "start", "--paused", g.name)
		g.io("vda", "write -P 3 1M 64k")
		command(t, "", "virsh", "-q", "destroy", g.name)
		j := h.end(job)
		ends[j.State]++
		switch {
		case j.State == dbus.JobSucceeded:
			b := h.made(j)
			// The start may have been over before the backup began.
			if b.Created.IsZero() {
				t.Error("it has no point in time")
			}
			if !h.isExact(b, want) {
				h.chainIsExact(b, g.snapshot())
			}
		case !errors.Is(j.Err(), dbus.ErrBusy) || !strings.Contains(j.Err().Error(), "start"):
			t.Errorf("start %d: %v", i, j.Err())
		}
		h.nothingLeft(g)
	}
	t.Logf("%v", ends)
	want := g.snapshot()
	b := h.backup(g, dbus.BackupOptions{})
	h.chainIsExact(b, want)
	h.restoreIsExact(b, want)
}

// isExact tells whether the images of a backup hold what the disks held.
func (h *host) isExact(b dbus.BackupProperties, want snapshot) bool {
	for target, file := range want {
		if exec.Command("qemu-img", "compare", "-U", "-q", "-f", "qcow2", "-F", "raw", h.image(b, target), file).Run() != nil {
			return false
		}
	}
	return true
}
