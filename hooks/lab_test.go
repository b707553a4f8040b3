//go:build lab

package main

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/virtbackup/virtbackup/hooks/spool"
)

func command(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
	return strings.TrimSpace(string(out))
}

func virsh(t *testing.T, args ...string) string {
	t.Helper()
	return command(t, "virsh", append([]string{"-q"}, args...)...)
}

// withoutDaemon stops the daemon for a test: what is in the spool stays there.
func withoutDaemon(t *testing.T) {
	t.Helper()
	command(t, "systemctl", "stop", "virtbackupd")
	t.Cleanup(func() { command(t, "systemctl", "start", "virtbackupd") })
}

// labGuest makes a guest of which this test sees all records. Its first disk
// has a backing file of its own, its second is raw.
type labGuest struct {
	name string
	from uint64 // the newest record before
}

func newLabGuest(t *testing.T) *labGuest {
	t.Helper()
	g := &labGuest{name: "hook-" + strings.ToLower(t.Name()[len("TestLab"):])}
	base := "/var/lib/libvirt/images/" + g.name + "-base.qcow2"
	top := "/var/lib/libvirt/images/" + g.name + "-vda.qcow2"
	command(t, "lab-domain", "create", g.name, "--disk", "qcow2:8M", "--disk", "raw:8M")
	t.Cleanup(func() { command(t, "lab-domain", "remove", g.name); os.Remove(base) })
	command(t, "mv", top, base)
	command(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
	g.begin(t)
	return g
}

// begin forgets what was recorded until now.
func (g *labGuest) begin(t *testing.T) {
	t.Helper()
	for _, e := range entries(t, spool.Directory) {
		g.from = e.Number
	}
}

// start starts it without running what is in it, and stop ends it.
func (g *labGuest) start(t *testing.T) { t.Helper(); virsh(t, "start", "--paused", g.name) }
func (g *labGuest) stop(t *testing.T)  { t.Helper(); virsh(t, "destroy", g.name) }

func (g *labGuest) records(t *testing.T) []spool.Record {
	t.Helper()
	var all []spool.Record
	for _, e := range entries(t, spool.Directory) {
		if e.Err != nil {
			t.Error(e.Err)
		}
		if e.Record.Name == g.name && e.Number > g.from {
			all = append(all, e.Record)
		}
	}
	return all
}

// expect waits for a number of records and compares their operations.
func (g *labGuest) expect(t *testing.T, want ...string) []spool.Record {
	t.Helper()
	all := eventually(t, func() ([]spool.Record, bool) { all := g.records(t); return all, len(all) >= len(want) })
	var got []string
	for _, r := range all {
		got = append(got, r.Operation+" "+r.SubOperation)
		if due := r.Operation == "prepare" || r.Operation == "release"; (len(r.Disks) > 0) != due {
			t.Errorf("%s: %d fingerprints", r.Operation, len(r.Disks))
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Fatal(diff)
	}
	return all
}

var (
	started = []string{"prepare begin", "start begin", "started begin"}
	stopped = []string{"stopped end", "release end"}
	cycle   = append(append([]string{}, started...), stopped...)
)

// sameDisks asserts that two records saw the same two disks, three files in all.
func sameDisks(t *testing.T, before, now spool.Record) {
	t.Helper()
	if len(before.Disks) != 2 || len(now.Disks) != 2 || len(now.Disks[0].Layers) != 2 || len(now.Disks[1].Layers) != 1 {
		t.Fatalf("%+v, then %+v", before.Disks, now.Disks)
	}
	for i, d := range before.Disks {
		if same, why := d.Compare(now.Disks[i]); !same {
			t.Errorf("%s, which nobody touched, from %s to %s: %s", d.Target, before.Operation, now.Operation, why)
		}
	}
}

func TestLabStepsAreRecordedWithoutTheDaemon(t *testing.T) {
	withoutDaemon(t)
	g := newLabGuest(t)
	for range 2 {
		g.start(t)
		g.stop(t)
	}
	all := g.expect(t, append(append([]string{}, cycle...), cycle...)...)
	libvirtd := command(t, "systemctl", "show", "-P", "MainPID", "libvirtd")
	domain := virsh(t, "domuuid", g.name)
	for i, r := range all {
		if r.Domain != domain || !strings.HasPrefix(r.Libvirt, libvirtd+"@") || r.Libvirt != all[0].Libvirt || r.Boot == "" {
			t.Errorf("%s: domain %s, libvirt %s (it is %s), boot %s", r.Operation, r.Domain, r.Libvirt, libvirtd, r.Boot)
		}
		// A domain has a number while it is active, which it no longer is then.
		want := all[i/5*5].DomainID
		if r.Operation == "release" {
			want = 0
		}
		if r.DomainID != want {
			t.Errorf("%s: domain number %d instead of %d", r.Operation, r.DomainID, want)
		}
		// Which is why fingerprints follow the images' own headers.
		if chain := strings.Contains(r.XML, g.name+"-base.qcow2"); chain != strings.HasPrefix(r.Operation, "start") {
			t.Errorf("%s: backing chain in the definition: %v", r.Operation, chain)
		}
	}
	if first, second := all[0].DomainID, all[5].DomainID; first == 0 || first >= second {
		t.Errorf("the runs have the numbers %d and %d", first, second)
	}
	sameDisks(t, all[4], all[5])
	if state, _ := exec.Command("systemctl", "is-active", "virtbackupd").Output(); strings.TrimSpace(string(state)) != "inactive" {
		t.Errorf("the hook left the daemon %s", state)
	}
}

func TestLabChangeWhileOffIsSeen(t *testing.T) {
	withoutDaemon(t)
	g := newLabGuest(t)
	g.start(t)
	g.stop(t)
	command(t, "qemu-io", "-f", "qcow2", "-c", "write -P 7 0 64k", "/var/lib/libvirt/images/"+g.name+"-base.qcow2")
	g.start(t)
	all := g.expect(t, append(append([]string{}, cycle...), started...)...)
	before, now := all[4].Disks, all[5].Disks
	if same, why := before[0].Compare(now[0]); same || !strings.Contains(why, "-base.qcow2") {
		t.Errorf("its backing file was written: %v, %s", same, why)
	}
	if same, why := before[1].Compare(now[1]); !same {
		t.Errorf("the other disk: %s", why)
	}
}

func TestLabSaveAndRestore(t *testing.T) {
	withoutDaemon(t)
	g := newLabGuest(t)
	g.start(t)
	virsh(t, "managedsave", g.name)
	virsh(t, "start", "--paused", g.name)
	want := append(append([]string{}, cycle...), "restore begin")
	all := g.expect(t, append(want, started...)...)
	sameDisks(t, all[4], all[6])
}

func TestLabRestartOfLibvirt(t *testing.T) {
	withoutDaemon(t)
	g := newLabGuest(t)
	g.start(t)
	command(t, "systemctl", "restart", "libvirtd")
	virsh(t, "list")
	all := g.expect(t, append(append([]string{}, started...), "reconnect begin")...)
	if all[0].Libvirt == all[3].Libvirt || all[0].DomainID != all[3].DomainID {
		t.Errorf("before: %s, %d; after: %s, %d", all[0].Libvirt, all[0].DomainID, all[3].Libvirt, all[3].DomainID)
	}
	if state := virsh(t, "domstate", g.name); state != "paused" {
		t.Errorf("the guest is %s", state)
	}
}

// hookScript installs a hook as an admin would, and returns what it was called with.
func hookScript(t *testing.T, path, script string) (calls func() string) {
	t.Helper()
	log := t.TempDir() + "/log"
	if err := os.WriteFile(path, []byte("#!/bin/sh\necho \"$1 $2\" >>"+log+"\n"+script+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(path) })
	return func() string { text, _ := os.ReadFile(log); return string(text) }
}

func TestLabOtherHooksAreLeftAlone(t *testing.T) {
	withoutDaemon(t)
	g := newLabGuest(t)
	const own = "/etc/libvirt/hooks/qemu"
	admins := hookScript(t, own, "")
	others := hookScript(t, own+".d/another", `[ "$2" != stopped ] || exit 1`)
	before, err := os.ReadFile(own)
	if err != nil {
		t.Fatal(err)
	}
	command(t, "make", "-s", "-C", "..", "install")
	if now, err := os.ReadFile(own); err != nil || string(now) != string(before) {
		t.Errorf("the admin's hook is now %q, %v", now, err)
	}
	g.start(t)
	g.stop(t)
	g.expect(t, cycle...)
	want := strings.ReplaceAll("NAME prepare\nNAME start\nNAME started\nNAME stopped\nNAME release\n", "NAME", g.name)
	for name, calls := range map[string]func() string{"the admin's": admins, "another": others} {
		if got := calls(); got != want {
			t.Errorf("%s hook was called with %q", name, got)
		}
	}
	// One that forbids the start goes on forbidding it, and is not our doing.
	g.begin(t)
	hookScript(t, own+".d/another", `[ "$2" != prepare ]`)
	if out, err := exec.Command("virsh", "start", g.name).CombinedOutput(); err == nil {
		t.Errorf("a failing hook lets the guest start: %s", out)
	}
	g.expect(t, append([]string{"prepare begin"}, stopped...)...)
}

// The daemon hangs: guests start and stop, and nothing is missed.
func TestLabDaemonThatHangs(t *testing.T) {
	g := newLabGuest(t)
	command(t, "systemctl", "kill", "--kill-whom=main", "--signal=STOP", "virtbackupd")
	resume := func() { command(t, "systemctl", "kill", "--kill-whom=main", "--signal=CONT", "virtbackupd") }
	t.Cleanup(resume)
	g.start(t)
	g.stop(t)
	g.expect(t, cycle...)
	resume()
	g.takenOver(t)
}

// takenOver waits until the daemon has read all that was recorded of the guest.
func (g *labGuest) takenOver(t *testing.T) {
	t.Helper()
	eventually(t, func() (bool, bool) { return true, len(g.records(t)) == 0 })
}

// What the hook records is read by the time that it ends, if the daemon is well.
func TestLabDaemonThatIsWell(t *testing.T) {
	g := newLabGuest(t)
	g.start(t)
	g.stop(t)
	g.takenOver(t)
	c := exec.Command("/etc/libvirt/hooks/qemu.d/virtbackup", g.name, "of-the-future", "begin", "-")
	c.Stdin = strings.NewReader(virsh(t, "dumpxml", g.name))
	if out, err := c.CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("%v: %s", err, out)
	}
	g.takenOver(t)
}

func TestLabInstalled(t *testing.T) {
	for _, path := range []string{"/etc/libvirt/hooks/qemu.d/virtbackup", "/usr/libexec/virtbackup/virtbackup-hook"} {
		info, err := os.Lstat(path)
		if err != nil || !info.Mode().IsRegular() || info.Mode().Perm() != 0o755 {
			t.Errorf("%s: %v, %v", path, info, err)
		}
		if out, err := exec.Command("ldd", path).CombinedOutput(); err == nil {
			t.Errorf("%s is not static: %s", path, out)
		}
	}
}

// Domains share a base: libvirt changes its owner when the first of them
// starts, and leaves it alone from then on.
func TestLabSharedBase(t *testing.T) {
	withoutDaemon(t)
	g := newLabGuest(t)
	g.start(t)
	g.stop(t)
	other := g.name + "-other"
	command(t, "lab-domain", "create", other, "--disk", "qcow2:8M")
	t.Cleanup(func() { command(t, "lab-domain", "remove", other) })
	command(t, "qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2",
		"-b", "/var/lib/libvirt/images/"+g.name+"-base.qcow2", "/var/lib/libvirt/images/"+other+"-vda.qcow2")
	virsh(t, "start", "--paused", other)
	virsh(t, "destroy", other)
	g.start(t)
	all := g.expect(t, append(append([]string{}, cycle...), started...)...)
	sameDisks(t, all[4], all[5])
}
