//go:build lab

package labtest

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/virtbackup/virtbackup/dbus"
)

// TestInputDisks has every kind of disk that is left out in one domain.
func TestInputDisks(t *testing.T) {
	h := newHost(t)
	medium := filepath.Join(t.TempDir(), "medium.iso")
	if err := os.WriteFile(medium, make([]byte, 1<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	g := startBare(t, "input-disks",
		bareDisk(t, "vda", "qcow2", ""), bareDisk(t, "vdb", "raw", ""),
		bareDisk(t, "vdc", "qcow2", "<readonly/>"), bareDisk(t, "vdd", "raw", "<shareable/>"),
		bareDisk(t, "vde", "qcow2", "<transient/>"),
		`<disk type='file' device='cdrom'><target dev='sda' bus='sata'/><readonly/></disk>`,
		`<disk type='file' device='cdrom'><driver name='qemu' type='raw'/><source file='`+moved(t, medium)+`'/><target dev='sdb' bus='sata'/><readonly/></disk>`,
		`<disk type='file' device='floppy'><target dev='fda' bus='fdc'/></disk>`)
	leftOut := map[string]string{
		"vdc": "read-only", "vdd": "shared", "vde": "transient", "sda": "cdrom", "sdb": "cdrom", "fda": "floppy",
	}
	before := g.snapshot("vda", "vdb")
	job := h.end(h.start(g, dbus.BackupOptions{}))
	b := h.made(job)
	h.chainIsExact(b, before)
	h.restoreIsExact(b, before)
	p, err := dbus.Get[dbus.DomainProperties](t.Context(), h.Client, g.uuid)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range p.Disks {
		if why := leftOut[d.Target]; d.Included != (why == "") || !strings.Contains(d.Cause, why) {
			t.Errorf("disk %s: included %t, %q", d.Target, d.Included, d.Cause)
		}
	}
	log, err := h.JobLog(t.Context(), job.ID, 0)
	if err != nil {
		t.Fatal(err)
	}
	for target, why := range leftOut {
		if !slices.ContainsFunc(log, func(m dbus.LogMessage) bool {
			return strings.Contains(m.Message, "disk "+target) && strings.Contains(m.Message, why)
		}) {
			t.Errorf("the job's log does not say why disk %s is left out: %v", target, log)
		}
	}
}

// moved is a file's new place, where QEMU may read it.
func moved(t *testing.T, file string) string {
	t.Helper()
	directory := fresh(t, "/var/lib/libvirt/images")
	t.Cleanup(func() { _ = os.RemoveAll(directory) })
	to := filepath.Join(directory, filepath.Base(file))
	content, err := os.ReadFile(file)
	if err == nil {
		err = os.WriteFile(to, content, 0o644)
	}
	if err == nil {
		err = os.Chmod(directory, 0o711)
	}
	if err != nil {
		t.Fatal(err)
	}
	return to
}

func TestInputDisksThatAreRefused(t *testing.T) {
	h := newHost(t)
	t.Run("no disk at all", func(t *testing.T) {
		g := startBare(t, "input-diskless")
		refuses(t, "backup", h.in(t).try(g, dbus.BackupOptions{}), dbus.ErrUnsupported, `"input-diskless"`, "no disk")
	})
	t.Run("only a drive", func(t *testing.T) {
		g := startBare(t, "input-drive", `<disk type='file' device='cdrom'><target dev='sda' bus='sata'/><readonly/></disk>`)
		refuses(t, "backup", h.in(t).try(g, dbus.BackupOptions{}), dbus.ErrUnsupported, `"input-drive"`, "sda", "cdrom")
	})
	t.Run("encrypted", func(t *testing.T) { testEncrypted(t, h.in(t)) })
	t.Run("without a file", func(t *testing.T) { testDiskWithoutFile(t, h.in(t)) })
	t.Run("in the repository", func(t *testing.T) {
		h, inside := h.in(t), filepath.Join(h.path, "disk.qcow2")
		if err := os.Chmod(h.path, 0o711); err != nil {
			t.Fatal(err)
		}
		g := startBare(t, "input-inside", bareDiskAt(t, inside, "vda", "qcow2", ""))
		t.Cleanup(func() { _ = os.Remove(inside) })
		refuses(t, "backup", h.try(g, dbus.BackupOptions{}), dbus.ErrInvalidArgument, `"input-inside"`, "vda", inside, h.offering)
	})
	t.Run("beside the repository", func(t *testing.T) {
		g := startBare(t, "input-beside", bareDisk(t, "vda", "raw", ""))
		h := newHostAt(t, fresh(t, filepath.Dir(g.disks()[0].file)))
		refuses(t, "backup", h.try(g, dbus.BackupOptions{}), dbus.ErrInvalidArgument, `"input-beside"`, "vda", h.path, h.offering)
	})
}

func testEncrypted(t *testing.T, h *host) {
	disk, _ := luksDisk(t, "vda", "raw")
	g := startBare(t, "input-luks", disk)
	refuses(t, "backup", h.try(g, dbus.BackupOptions{}), dbus.ErrUnsupported, `"input-luks"`, "vda", "encrypted", "shut the domain off")
	h.holdsNoSecret([]byte(luksPassword))
}

// The file was deleted under the running domain: QEMU still has it, and it is
// there to be saved once more.
func testDiskWithoutFile(t *testing.T, h *host) {
	g := startBare(t, "input-deleted", bareDisk(t, "vda", "qcow2", ""))
	want := g.snapshot()
	if err := os.Remove(g.disks()[0].file); err != nil {
		t.Fatal(err)
	}
	err := h.try(g, dbus.BackupOptions{})
	if err != nil {
		refuses(t, "backup", err, dbus.ErrUnsupported, `"input-deleted"`, "vda")
		return
	}
	for b, err := range h.Backups(t.Context(), dbus.BackupFilter{Domain: g.uuid}) {
		if err != nil {
			t.Fatal(err)
		}
		h.chainIsExact(b, want)
	}
}

// TestInputStates tries a domain in each state that it can be in.
func TestInputStates(t *testing.T) {
	h := newHost(t)
	g := defineBare(t, "input-states", bareDisk(t, "vda", "qcow2", ""), `<panic model='isa'/>`)
	if b := h.backup(g, dbus.BackupOptions{}); b.Consistency != dbus.ConsistencyOff {
		t.Errorf("a domain that is off: %s", b.Consistency)
	}
	virsh(t, "start", g.name)
	virsh(t, "suspend", g.name)
	agent, prefer := dbus.QuiesceAgent, dbus.QuiescePrefer
	refuses(t, "paused", h.try(g, dbus.BackupOptions{Settings: dbus.Settings{Quiesce: &agent}}), dbus.ErrUnavailable, `"input-states"`, "paused by its admin", "prefer")
	b := h.backup(g, dbus.BackupOptions{Settings: dbus.Settings{Quiesce: &agent, QuiescePolicy: &prefer}})
	if b.Consistency != dbus.ConsistencyCrash || b.Shortfall != "the domain was paused by its admin" || b.HeldUsec != 0 || g.state() != "paused" {
		t.Errorf("a domain that the admin paused: %s, %q, held for %v, and it is %s", b.Consistency, b.Shortfall, time.Duration(b.HeldUsec)*time.Microsecond, g.state())
	}
	h.chainIsExact(b, g.snapshot())
	if reason := virsh(t, "domstate", g.name, "--reason"); !strings.Contains(reason, "user") {
		t.Errorf("the domain is paused for another reason: %s", reason)
	}
	virsh(t, "resume", g.name)
	none := dbus.QuiesceSuspend
	b = h.backup(g, dbus.BackupOptions{Settings: dbus.Settings{Quiesce: &none}})
	if b.Kind != dbus.KindIncremental || b.Consistency != dbus.ConsistencySuspended || b.HeldUsec == 0 || g.state() != "running" {
		t.Errorf("%s after %v, %s, held for %v, and the domain is %s", b.Kind, b.Causes, b.Consistency, time.Duration(b.HeldUsec)*time.Microsecond, g.state())
	}
	// The port of the panic device: what a guest's kernel does when it dies.
	virsh(t, "qemu-monitor-command", g.name, "--hmp", "o /b 0x505 1")
	eventually(t, "the domain is crashed", func() error {
		if s := g.state(); s != "crashed" {
			return dbus.Errorf(dbus.ErrBusy, "it is %s", s)
		}
		return nil
	})
	refuses(t, "crashed", h.try(g, dbus.BackupOptions{}), dbus.ErrUnsupported, `"input-states"`, "crashed", "start it")
	virsh(t, "destroy", g.name)
	virsh(t, "start", g.name)
	h.backup(g, dbus.BackupOptions{})
}

// TestInputTransientDomain is a domain that libvirt forgets when it ends.
func TestInputTransientDomain(t *testing.T) {
	h, name := newHost(t), "input-transient"
	uuid := makeBare(t, "create", name, bareDisk(t, "vda", "qcow2", ""))
	g := &guest{t: t, name: name, uuid: uuid}
	h.backup(g, dbus.BackupOptions{})
	g.io("vda", "write -P 7 1M 64k")
	want := g.snapshot()
	b := h.backup(g, dbus.BackupOptions{})
	if b.Kind != dbus.KindIncremental {
		t.Errorf("the second backup is %s: %v", b.Kind, b.Causes)
	}
	virsh(t, "destroy", name)
	h.chainIsExact(b, want)
	h.restoreIsExact(b, want)
}

// TestInputOddName is a domain with what libvirt allows in a name.
func TestInputOddName(t *testing.T) {
	h, name := newHost(t), `input '"<name>&amp; $(reboot); ü %s \n`
	g := startBare(t, name, bareDisk(t, "vda", "qcow2", ""))
	if uuid, err := h.FindDomain(t.Context(), name); err != nil || uuid != g.uuid {
		t.Errorf("%q, %v", uuid, err)
	}
	want := g.snapshot()
	full := h.backup(g, dbus.BackupOptions{})
	b := h.backup(g, dbus.BackupOptions{})
	if full.DomainName != name || b.Kind != dbus.KindIncremental {
		t.Errorf("%q, %s", full.DomainName, b.Kind)
	}
	h.chainIsExact(b, want)
	h.restoreIsExact(b, want)
	refuses(t, "its own name for a new domain", h.outcome(h.RestoreBackup(t.Context(), b.ID, name, dbus.RestoreOptions{})),
		dbus.ErrInvalidArgument, "name")
}

// TestInputForeignCheckpoints leaves alone what the admin made.
func TestInputForeignCheckpoints(t *testing.T) {
	h := newHost(t)
	g := startBare(t, "input-foreign", bareDisk(t, "vda", "qcow2", ""))
	virsh(t, "checkpoint-create-as", g.name, "admin-1")
	h.backup(g, dbus.BackupOptions{})
	g.io("vda", "write -P 9 2M 128k")
	virsh(t, "checkpoint-create-as", g.name, "admin-2")
	g.io("vda", "write -P 10 3M 64k")
	want := g.snapshot()
	b := h.backup(g, dbus.BackupOptions{})
	if b.Kind != dbus.KindIncremental {
		t.Errorf("the second backup is %s: %v", b.Kind, b.Causes)
	}
	h.chainIsExact(b, want)
	if left := strings.Fields(virsh(t, "checkpoint-list", g.name, "--name")); !slices.Equal(left, []string{"admin-1", "admin-2"}) {
		t.Errorf("libvirt has the checkpoints %v", left)
	}
	for _, name := range []string{"admin-1", "admin-2"} {
		if !strings.Contains(virsh(t, "checkpoint-dumpxml", g.name, name, "--size"), " size=") {
			t.Errorf("checkpoint %s has lost its bitmap", name)
		}
	}
}

// TestInputBusyDomain is one with a job that is not ours.
func TestInputBusyDomain(t *testing.T) {
	h := newHost(t)
	g := startBare(t, "input-busy", bareDisk(t, "vda", "qcow2", ""))
	copied := g.disks()[0].file + ".copy"
	virsh(t, "blockcopy", g.name, "vda", "--dest", copied, "--transient-job")
	refuses(t, "block job", h.try(g, dbus.BackupOptions{}), dbus.ErrBusy, `"input-busy"`, "vda", "block job", "virsh blockjob")
	virsh(t, "blockjob", g.name, "vda", "--abort")
	socket := filepath.Join("/run/lab", g.name+".sock")
	if err := os.Chmod("/run/lab", 0o777); err != nil {
		t.Fatal(err)
	}
	command(t, `<domainbackup mode='pull'><server transport='unix' socket='`+socket+`'/><disks><disk name='vda' backup='yes' type='file'><scratch file='`+
		g.disks()[0].file+`.scratch'/></disk></disks></domainbackup>`, "virsh", "-q", "backup-begin", g.name, "/dev/stdin")
	refuses(t, "another's backup", h.try(g, dbus.BackupOptions{}), dbus.ErrBusy, `"input-busy"`, "job", "domjobabort")
	if info := virsh(t, "domjobinfo", g.name); strings.Contains(info, "None") {
		t.Error("the admin's backup was ended")
	}
	virsh(t, "domjobabort", g.name)
	want := g.snapshot()
	h.chainIsExact(h.backup(g, dbus.BackupOptions{}), want)
}
