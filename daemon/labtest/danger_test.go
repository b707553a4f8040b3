//go:build lab

package labtest

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/virtbackup/virtbackup/dbus"
	"github.com/virtbackup/virtbackup/hooks/spool"
)

// This file tries the dangerous ways of libvirt and QEMU that FACTS lists, one
// after the other.

// suspended is a backup for which the guest is held still, so that the thaw
// watchdog has its part in it.
func suspended() dbus.BackupOptions {
	quiesce := dbus.QuiesceSuspend
	return dbus.BackupOptions{Settings: dbus.Settings{Quiesce: &quiesce}}
}

func frozenByAgent() dbus.BackupOptions {
	quiesce := dbus.QuiesceAgent
	return dbus.BackupOptions{Settings: dbus.Settings{Quiesce: &quiesce}}
}

// dropIn adds settings to all units whose names begin so, until the test ends
// or remove is called.
func dropIn(t *testing.T, unit, settings string) (remove func()) {
	t.Helper()
	directory := filepath.Join("/run/systemd/system", unit+".d")
	if err := os.MkdirAll(directory, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(directory, "test.conf"), []byte("[Service]\n"+settings+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	command(t, "", "systemctl", "daemon-reload")
	remove = func() {
		if err := os.RemoveAll(directory); err != nil {
			t.Error(err)
		}
		command(t, "", "systemctl", "daemon-reload")
	}
	t.Cleanup(remove)
	return remove
}

// atHold has systemd run a script each time that a guest is about to be held:
// the worker is ready, the guest still runs, and virtbackupd waits.
func atHold(t *testing.T, script string) (remove func()) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "at-hold")
	if err := os.WriteFile(file, []byte(script), 0o600); err != nil {
		t.Fatal(err)
	}
	return dropIn(t, "virtbackup-thaw-.service", "ExecStartPre=+/bin/sh "+file)
}

// stopWorkers has the worker of each backup that holds its guest stop before
// it copies anything; goOn lets all go on.
func stopWorkers(t *testing.T) (goOn func()) {
	t.Helper()
	remove := atHold(t, "exec systemctl kill --kill-whom=main --signal=STOP 'virtbackup-job-*.service'")
	goOn = func() {
		remove()
		_ = exec.Command("systemctl", "kill", "--kill-whom=main", "--signal=CONT", "virtbackup-job-*.service").Run()
	}
	t.Cleanup(goOn)
	return goOn
}

// inBackup waits until libvirt's backup of the guest is active, and the guest
// goes on.
func (g *guest) inBackup() {
	g.t.Helper()
	eventually(g.t, "libvirt backs "+g.name+" up", func() error {
		info, err := exec.Command("virsh", "-q", "domjobinfo", g.name).CombinedOutput()
		if err == nil && !strings.Contains(string(info), "Backup") {
			err = fmt.Errorf("its job: %s", info)
		}
		if held, _ := os.ReadDir("/run/virtbackup/frozen"); len(held) > 0 {
			err = errors.Join(err, fmt.Errorf("it is held still: %v", held))
		}
		return err
	})
}

// TestDangerHooks is the first fact: a hook that fails at libvirtd's start
// kills the guests. Ours does not even if it can record nothing, and nobody is
// there to be told.
func TestDangerHooks(t *testing.T) {
	const hook = "/etc/libvirt/hooks/qemu.d/virtbackup"
	if info, err := os.Stat(hook); err != nil || info.Mode()&0o111 == 0 {
		t.Fatalf("libvirt does not call %s: %v", hook, err)
	}
	h := newHost(t)
	g := startBare(t, "danger-hooks", bareDisk(t, "vda", "qcow2", ""))
	h.backup(g, dbus.BackupOptions{})
	pid, err := os.ReadFile("/run/libvirt/qemu/danger-hooks.pid")
	if err != nil {
		t.Fatal(err)
	}
	command(t, "", "systemctl", "stop", "virtbackupd.service")
	command(t, "", "mv", spool.Directory, spool.Directory+".aside")
	command(t, "", "touch", spool.Directory)
	command(t, "", "systemctl", "restart", "libvirtd.service")
	command(t, "", "rm", spool.Directory)
	command(t, "", "mv", spool.Directory+".aside", spool.Directory)
	if again, err := os.ReadFile("/run/libvirt/qemu/danger-hooks.pid"); err != nil || string(again) != string(pid) || g.state() != "running" {
		t.Errorf("the guest is %s, by process %s instead of %s: %v", g.state(), again, pid, err)
	}
	g.io("vda", "write -P 5 1M 64k")
	want := g.snapshot()
	b := h.backup(g, dbus.BackupOptions{})
	if b.Kind != dbus.KindIncremental {
		t.Errorf("the backup after libvirtd's restart is %s: %v", b.Kind, b.Causes)
	}
	h.chainIsExact(b, want)
}

// TestDangerLateFreeze is the second fact: a freeze that timed out happens
// later, and nothing thaws the guest then.
func TestDangerLateFreeze(t *testing.T) {
	configure(t, "[libvirt]\nhold_limit = \"4s\"\n")
	h := newHost(t)
	g := newGuest(t, "qcow2:64M:fs")
	// QEMU stops after the agent has answered for the last time before the
	// freeze, which waits in its socket then.
	remove := atHold(t, "exec kill -STOP $(cat /run/libvirt/qemu/"+g.name+".pid)")
	job := h.end(h.start(g, frozenByAgent()))
	remove()
	refuses(t, "backup of a guest whose agent stalls", job.Err(), dbus.ErrUnavailable, g.name, "agent", "quiesce=none")
	if markers, err := os.ReadDir("/run/virtbackup/frozen"); err != nil || len(markers) != 1 {
		t.Errorf("nobody knows whether the guest is frozen, and the markers are %v, %v", markers, err)
	}
	stopQEMU(t, g)()
	h.nothingLeft(g) // which has it thawed, and no marker
	g.run("sh", "-c", "echo alive >/mnt/vda/file && sync")
	if b := h.backup(g, frozenByAgent()); b.Consistency != dbus.ConsistencyFilesystem {
		t.Errorf("the next backup is %s consistent", b.Consistency)
	}
	h.nothingLeft(g)
}

// TestDangerFrozenAndKilled is the second fact again: the daemon dies while the
// guest is frozen, and stays dead. Somebody else has to thaw it.
func TestDangerFrozenAndKilled(t *testing.T) {
	h := newHost(t)
	g := newGuest(t, "qcow2:64M:fs")
	h.backup(g, frozenByAgent())
	stayDead := dropIn(t, "virtbackupd.service", "Restart=no")
	for try := 1; ; try++ {
		job := h.start(g, frozenByAgent())
		since := time.Now().Unix()
		killFrozen(t, g)
		// Nothing calls the daemon now: the bus would start it.
		eventually(t, "the guest is thawed, without virtbackupd", g.thawed)
		if state, _ := exec.Command("systemctl", "is-active", "virtbackupd.service").Output(); strings.TrimSpace(string(state)) == "active" {
			t.Fatal("virtbackupd was started, and may have thawed the guest itself")
		}
		g.run("sh", "-c", "echo alive >/mnt/vda/file && sync")
		inTime := strings.Contains(command(t, "", "journalctl", "--since=@"+strconv.FormatInt(since, 10), "--output=cat", "--unit=virtbackup-thaw-*"),
			"letting a guest go on in the daemon's stead")
		command(t, "", "systemctl", "reset-failed", "virtbackupd.service")
		command(t, "", "systemctl", "start", "virtbackupd.service")
		h.end(job) // either way: kill tests are elsewhere
		h.nothingLeft(g)
		if inTime {
			break
		}
		if try == 20 {
			t.Fatal("the daemon was never killed while the guest was frozen")
		}
	}
	stayDead()
	h.backupStill(g)
}

// backupStill backs up a guest that has a system, and checks the backup: the
// guest stands still for that, or its writes would go on meanwhile.
func (h *host) backupStill(g *guest) {
	h.t.Helper()
	virsh(h.t, "suspend", g.name)
	want := g.snapshot()
	h.chainIsExact(h.backup(g, dbus.BackupOptions{}), want)
	virsh(h.t, "resume", g.name)
	h.nothingLeft(g)
}

// killFrozen kills the daemon as soon as it has noted that the guest is held.
func killFrozen(t *testing.T, g *guest) {
	t.Helper()
	pid, err := strconv.Atoi(command(t, "", "systemctl", "show", "--property=MainPID", "--value", "virtbackupd.service"))
	if err != nil || pid == 0 {
		t.Fatalf("virtbackupd does not run: %d, %v", pid, err)
	}
	marker := filepath.Join("/run/virtbackup/frozen", g.uuid)
	for deadline := time.Now().Add(limit); ; time.Sleep(time.Millisecond) {
		if content, err := os.ReadFile(marker); err == nil && strings.Contains(string(content), `"held":true`) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the guest was never held")
		}
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
}

// thawed says whether the agent answers that nothing is frozen.
func (g *guest) thawed() error {
	out, err := exec.Command("virsh", "-q", "qemu-agent-command", "--timeout", "10", g.name, `{"execute":"guest-fsfreeze-status"}`).CombinedOutput()
	if err == nil && !strings.Contains(string(out), "thawed") {
		err = fmt.Errorf("it is frozen: %s", out)
	}
	return err
}

// TestDangerInternalSnapshot is the third fact: a domain with a persistent
// bitmap cannot be reverted to an internal snapshot.
func TestDangerInternalSnapshot(t *testing.T) {
	h := newHost(t)
	g := startBare(t, "danger-internal", bareDisk(t, "vda", "qcow2", ""))
	h.backup(g, dbus.BackupOptions{})
	g.io("vda", "write -P 1 1M 64k")
	h.backup(g, dbus.BackupOptions{})
	atSnapshot := g.snapshot()
	virsh(t, "snapshot-create-as", g.name, "admin")
	for range 2 { // always compared, and no bitmap is made
		g.io("vda", "write -P 2 2M 64k")
		want := g.snapshot()
		b := h.backup(g, dbus.BackupOptions{})
		if foundBy(b, "vda") != "digest internal-snapshot" || b.Disks[0].Tracking != dbus.TrackingDigest {
			t.Errorf("a backup with an internal snapshot is %s (%v), tracked by %s", b.Kind, b.Causes, b.Disks[0].Tracking)
		}
		h.chainIsExact(b, want)
		if left := g.bitmaps("vda"); len(left) > 0 {
			t.Errorf("the disk has the bitmaps %v", left)
		}
	}
	virsh(t, "snapshot-revert", g.name, "admin")
	if g.state() != "running" {
		t.Errorf("after the revert the domain is %s", g.state())
	}
	sameContent(t, "the disk after the revert", "qcow2", g.disks()[0].file, atSnapshot["vda"])
	b := h.backup(g, dbus.BackupOptions{})
	h.chainIsExact(b, atSnapshot)
	virsh(t, "snapshot-delete", g.name, "admin")
	h.backup(g, dbus.BackupOptions{})
	g.io("vda", "write -P 3 3M 64k")
	want := g.snapshot()
	if b = h.backup(g, dbus.BackupOptions{}); b.Kind != dbus.KindIncremental {
		t.Errorf("without the snapshot the backup is %s: %v", b.Kind, b.Causes)
	}
	h.chainIsExact(b, want)
}

// TestDangerRevertAtOnce is the third fact with no backup between the snapshot
// and the revert.
func TestDangerRevertAtOnce(t *testing.T) {
	h := newHost(t)
	g := startBare(t, "danger-revert", bareDisk(t, "vda", "qcow2", ""))
	h.backup(g, dbus.BackupOptions{})
	want := g.snapshot()
	virsh(t, "snapshot-create-as", g.name, "admin")
	g.io("vda", "write -P 2 2M 64k")
	eventually(t, "the bitmap is gone", func() error {
		if left := g.bitmaps("vda"); len(left) > 0 {
			return fmt.Errorf("the disk has the bitmaps %v", left)
		}
		return nil
	})
	virsh(t, "snapshot-revert", g.name, "admin")
	if g.state() != "running" {
		t.Errorf("after the revert the domain is %s", g.state())
	}
	b := h.backup(g, dbus.BackupOptions{})
	if b.Kind != dbus.KindIncremental || b.Disks[0].StoredBytes > 4<<20 {
		t.Errorf("the backup after the revert is %s, of %d bytes", b.Kind, b.Disks[0].StoredBytes)
	}
	h.chainIsExact(b, want)
}

// TestDangerCheckpointOfAFailedBackup is the fourth fact: it survives, and
// would be taken as the base of an increment that lacks what changed before.
func TestDangerCheckpointOfAFailedBackup(t *testing.T) {
	h := newHost(t)
	g := startBare(t, "danger-checkpoint", bareDisk(t, "vda", "qcow2", ""))
	h.backup(g, dbus.BackupOptions{})
	base := g.bitmaps("vda")
	ends := map[dbus.JobState]func(job string) error{
		dbus.JobCancelled: func(job string) error { return h.CancelJob(t.Context(), job) },
		dbus.JobFailed: func(job string) error {
			return exec.Command("systemctl", "kill", "--signal=KILL", "virtbackup-job-"+job+".service").Run()
		},
	}
	for state, end := range ends {
		g.io("vda", "write -P 1 1M 64k") // is in the failed one's increment
		goOn := stopWorkers(t)
		job := h.start(g, suspended())
		g.inBackup()
		if during := g.bitmaps("vda"); len(during) <= len(base) {
			t.Errorf("%s: the backup made no checkpoint: %v", state, during)
		}
		g.io("vda", "write -P 2 2M 64k") // and this would be in the next one's
		if err := end(job); err != nil {
			t.Fatal(err)
		}
		if p := h.end(job); p.State != state {
			t.Errorf("the job is %s instead of %s: %v", p.State, state, p.Err())
		}
		goOn()
		eventually(t, "the checkpoint is gone", func() error {
			return errors.Join(h.noJob(), noFiles(), noUnits(), h.noGarbage(), g.onlyBitmaps(base))
		})
		want := g.snapshot()
		b := h.backup(g, dbus.BackupOptions{})
		if b.Kind != dbus.KindIncremental {
			t.Errorf("%s: the next backup is %s: %v", state, b.Kind, b.Causes)
		}
		h.chainIsExact(b, want)
		base = g.bitmaps("vda")
	}
}

// onlyBitmaps says what else is on the disk, or in libvirt.
func (g *guest) onlyBitmaps(want []string) error {
	if left := g.bitmaps("vda"); !slices.Equal(left, want) {
		return fmt.Errorf("the disk has the bitmaps %v instead of %v", left, want)
	}
	left, err := exec.Command("virsh", "-q", "checkpoint-list", g.name, "--name").CombinedOutput()
	if err != nil {
		return fmt.Errorf("virsh: %s: %w", left, err)
	}
	if len(bytes.TrimSpace(left)) > 0 {
		return fmt.Errorf("libvirt has the checkpoints %s", left)
	}
	return nil
}

// TestDangerShutdown is the fifth fact: a shutdown in the middle of a backup
// hangs in push mode. It must not wait for the backup, which cannot end here.
func TestDangerShutdown(t *testing.T) {
	h := newHost(t)
	g := newGuest(t, "qcow2:64M:fs")
	goOn := stopWorkers(t)
	job := h.start(g, suspended())
	g.inBackup()
	began := time.Now()
	virsh(t, "shutdown", g.name, "--mode", "acpi")
	eventually(t, "the guest is off", func() error {
		if s := g.state(); s != "shut off" {
			return fmt.Errorf("it is %s", s)
		}
		return nil
	})
	t.Logf("the guest was off after %v", time.Since(began))
	goOn()
	refuses(t, "the backup of a domain that was shut down", h.end(job).Err(), dbus.ErrFailed, g.name, "stopped", "shutdown", "start it")
	h.nothingLeft(g)
	g.boot()
	h.backupStill(g)
}

// TestDangerDamagedImage is the sixth fact: QEMU reads what is missing of a
// qcow2 image as zeros, and flipped bytes as data.
func TestDangerDamagedImage(t *testing.T) {
	h := newHost(t)
	g := startBare(t, "danger-damaged", bareDisk(t, "vda", "qcow2", ""))
	half := int64(bareDiskSize / 4)
	for what, damage := range map[string]func(f *os.File) error{
		"truncated":       func(f *os.File) error { return f.Truncate(half) },
		"cut at the end":  func(f *os.File) error { st, err := f.Stat(); return errors.Join(err, f.Truncate(st.Size()-1)) },
		"longer":          func(f *os.File) error { st, err := f.Stat(); return errors.Join(err, f.Truncate(st.Size()+1)) },
		"with a flip":     func(f *os.File) error { return flip(f, half) },
		"with a hole":     func(f *os.File) error { return zero(f, half, 64<<10) },
		"without a table": func(f *os.File) error { return zeroTable(f) },
		"gone":            func(f *os.File) error { return os.Remove(f.Name()) },
	} {
		t.Run(what, func(t *testing.T) {
			h := h.in(t)
			b := h.backup(g, dbus.BackupOptions{Isolated: true})
			f, err := os.OpenFile(h.image(b, "vda"), os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if err := damage(f); err != nil {
				t.Fatal(err)
			}
			h.isDamaged(b)
		})
	}
}

func flip(f *os.File, at int64) error {
	var b [1]byte
	_, err := f.ReadAt(b[:], at)
	b[0] ^= 1
	_, werr := f.WriteAt(b[:], at)
	return errors.Join(err, werr)
}

func zero(f *os.File, at, length int64) error {
	_, err := f.WriteAt(make([]byte, length), at)
	return err
}

// zeroTable clears the L1 table, whose place is at byte 40 of a header of QEMU
// docs/interop/qcow2.txt: an image of zeros that is without a fault by itself.
func zeroTable(f *os.File) error {
	var place [8]byte
	if _, err := f.ReadAt(place[:], 40); err != nil {
		return err
	}
	at := int64(0)
	for _, b := range place {
		at = at<<8 | int64(b)
	}
	return zero(f, at, 8)
}

// isDamaged tries to restore a backup, which has to fail and leave nothing,
// then to verify it, and then to restore it again.
func (h *host) isDamaged(b dbus.BackupProperties) {
	h.t.Helper()
	name := "restored-" + strings.ToLower(b.ID)
	refuses(h.t, "restore", h.outcome(h.RestoreBackup(h.t.Context(), b.ID, name, dbus.RestoreOptions{})), dbus.ErrDamaged, h.offering)
	h.nothingRestored(name)
	refuses(h.t, "verify", h.outcome(h.VerifyBackup(h.t.Context(), b.ID)), dbus.ErrDamaged, h.offering, b.ID)
	after, err := dbus.Get[dbus.BackupProperties](h.t.Context(), h.Client, b.ID)
	if err != nil || after.State != dbus.BackupDamaged {
		h.t.Errorf("verify takes the backup for %s, %v", after.State, err)
	}
	refuses(h.t, "restore what is known to be damaged", h.outcome(h.RestoreBackup(h.t.Context(), b.ID, name, dbus.RestoreOptions{})),
		dbus.ErrInvalidArgument, b.ID, "damaged")
	h.nothingRestored(name)
}

func (h *host) nothingRestored(name string) {
	h.t.Helper()
	if _, err := exec.Command("virsh", "-q", "domuuid", name).Output(); err == nil {
		h.t.Errorf("domain %s is there", name)
	}
	files, err := filepath.Glob("/var/lib/libvirt/images/" + name + "*")
	if err != nil || len(files) > 0 {
		h.t.Errorf("files are left: %v, %v", files, err)
	}
	if err := noFiles(); err != nil {
		h.t.Error(err)
	}
}

// TestDangerUnseenChanges is the seventh fact: some changes of a domain's disks
// are told by no event. Each is seen by the next backup.
func TestDangerUnseenChanges(t *testing.T) {
	h := newHost(t)
	g := startBare(t, "danger-unseen", bareDisk(t, "vda", "qcow2", ""), bareDisk(t, "vdb", "qcow2", ""))
	h.backup(g, dbus.BackupOptions{})
	file := g.disks()[0].file
	for _, change := range []struct {
		what  string
		do    func()
		cause string // of vda's image; "" for an increment
	}{
		{"nothing", func() {}, ""},
		{"external snapshot", func() {
			virsh(t, "snapshot-create-as", g.name, "--disk-only", "--no-metadata", "--diskspec", "vda,file="+file+".overlay", "--diskspec", "vdb,snapshot=no")
		}, ""}, // the bitmap goes along
		{"nothing more", func() {}, ""},
		{"commit of the snapshot", func() { virsh(t, "blockcommit", g.name, "vda", "--active", "--pivot", "--wait") }, ""},
		{"block resize", func() { virsh(t, "blockresize", g.name, "vda", "16M") }, "disk-resized"},
		{"another disk, smaller again, in the configuration", func() {
			other := strings.Replace(file, "vda", "other", 1)
			makeImage(t, other, "qcow2")
			virsh(t, "detach-disk", g.name, "vda", "--config")
			command(t, diskXML(other, "vda", "qcow2", ""), "virsh", "-q", "attach-device", g.name, "/dev/stdin", "--config")
			virsh(t, "destroy", g.name)
			virsh(t, "start", g.name)
		}, "disk-resized"},
		{"nothing at last", func() {}, ""},
	} {
		g.io("vda", "write -P 6 1M 64k")
		change.do()
		g.io("vda", "write -P 7 2M 192k")
		g.io("vdb", "write -P 8 3M 64k")
		want := g.snapshot()
		b := h.backup(g, dbus.BackupOptions{})
		for _, d := range b.Disks {
			cause := ""
			if d.Target == "vda" {
				cause = change.cause
			}
			if d.Cause != cause || d.Kind != map[bool]dbus.BackupKind{true: dbus.KindIncremental, false: dbus.KindFull}[cause == ""] {
				t.Errorf("%s: the image of %s is %s (%q)", change.what, d.Target, d.Kind, d.Cause)
			}
		}
		h.chainIsExact(b, want)
	}
}
