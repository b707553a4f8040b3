//go:build lab

package labtest

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/virtbackup/virtbackup/dbus"
)

// repairSteps are those of a repair, in their order.
var repairSteps = []step{
	{name: "opening", in: theWorker, op: "create", path: `/vda\.qcow2~`},
	{name: "repairing", in: theWorker, op: "write", path: `/vda\.qcow2~`},
	{name: "flushing", in: theWorker, op: "fsync", path: `/vda\.qcow2~`},
	{name: "committing", in: theWorker, op: "rename", path: `/manifest\.json$`},
	{name: "committed", in: theWorker, op: "rename", path: `/manifest\.json$`, after: true},
	{name: "renaming", in: theWorker, op: "rename", path: `/vda\.digests$`, after: true},
}

// mender is a full backup with two increments, of which the last holds itself
// what is damaged in the first, and a full backup that holds all of it.
type mender struct {
	*killer
	backups []dbus.BackupProperties
	held    []snapshot
}

// damaged is what the damaged block begins with.
var damaged = bytes.Repeat([]byte{0xd7}, 4096)

func (m *mender) grow(t *testing.T) {
	m.retarget(t)
	m.backups, m.held = nil, nil
	m.g.io("vda", "write -P 0xd7 1M 64k", "write -P 0x55 2M 256k")
	for i := range 3 {
		if i == 2 {
			m.g.io("vda", "write -P 0xd8 1M 64k")
		}
		m.write("vdb", 5*i, 9)
		m.held = append(m.held, m.g.snapshot())
		m.backups = append(m.backups, m.backup(m.g, dbus.BackupOptions{Full: i == 0}))
	}
	m.g.io("vda", "write -P 0xd7 1M 64k")
	m.held = append(m.held, m.g.snapshot())
	m.backups = append(m.backups, m.backup(m.g, dbus.BackupOptions{Full: true, Isolated: true}))
}

// flip flips a bit of the block in the first backup's image.
func (m *mender) flip() {
	m.t.Helper()
	name := m.image(m.backups[0], "vda")
	content, err := os.ReadFile(name)
	if err != nil {
		m.t.Fatal(err)
	}
	at := bytes.Index(content, damaged)
	if at < 0 {
		m.t.Fatal("the block is not in the image as it is")
	}
	content[at+100] ^= 1
	f, err := os.OpenFile(name, os.O_WRONLY, 0)
	if err != nil {
		m.t.Fatal(err)
	}
	_, err = f.WriteAt(content[at+100:at+101], int64(at+100))
	if err := f.Close(); err != nil {
		m.t.Fatal(err)
	}
	if err != nil {
		m.t.Fatal(err)
	}
}

func (m *mender) states(want ...dbus.BackupState) {
	m.t.Helper()
	for i, b := range m.backups {
		now, err := dbus.Get[dbus.BackupProperties](m.t.Context(), m.Client, b.ID)
		if err != nil {
			m.t.Fatal(err)
		}
		if now.State != want[i] || (len(now.Damage) > 0) != (now.State == dbus.BackupDamaged) {
			m.t.Errorf("backup %d is %s: %+v", i, now.State, now.Damage)
		}
	}
}

func (m *mender) verify(i int) dbus.JobProperties {
	m.t.Helper()
	job, err := m.VerifyBackup(m.t.Context(), m.backups[i].ID)
	if err != nil {
		m.t.Fatal(err)
	}
	return m.end(job)
}

func (m *mender) repair(o dbus.RepairOptions) string {
	m.t.Helper()
	job, err := m.RepairBackup(m.t.Context(), m.backups[0].ID, o)
	if err != nil {
		m.t.Fatal(err)
	}
	return job
}

// exact holds all backups against what the disks held.
func (m *mender) exact() {
	m.t.Helper()
	for i, b := range m.backups {
		m.chainIsExact(b, m.held[i])
	}
}

const good, hit = dbus.BackupComplete, dbus.BackupDamaged

// TestFlippedBit has a bit flipped in a full backup: where it is is told, and who
// is hit; the next backup does not build on it; and it is repaired, whatever
// comes at each step of that.
func TestFlippedBit(t *testing.T) {
	m := &mender{killer: &killer{t: t, storage: mountRepository(t), scratch: &faultFS{}}}
	m.host = newHostAt(t, m.storage.point)
	m.g = newPausedGuest(t, "qcow2:6M", "raw:2M")
	m.grow(t)
	m.exact()
	m.flip()
	first, last := m.backups[0].ID, m.backups[3].ID
	j := m.verify(2)
	if j.State != dbus.JobFailed || j.Error != dbus.ErrDamaged || !strings.Contains(j.ErrorMessage, "65536 bytes at 1048576") || !strings.Contains(j.ErrorMessage, "virtbackupctl repair "+first) {
		t.Errorf("verify: %s: %s", j.State, j.ErrorMessage)
	}
	m.states(hit, hit, good, good)
	m.restoreIsExact(m.backups[2], m.held[2]) // it holds the block itself
	out := command(t, "", "virtbackupctl", "show", m.backups[1].ID)
	for _, want := range []string{"DAMAGED", "vda", "1048576", "65536", first} {
		if !strings.Contains(out, want) {
			t.Errorf("show does not say %q: %s", want, out)
		}
	}
	if out := command(t, "", "virtbackupctl", "show", first); !strings.Contains(out, "It can be repaired: virtbackupctl repair "+first) || !strings.Contains(out, last) {
		t.Errorf("show says: %s", out)
	}
	m.g.io("vda", "write -P 0x11 3M 64k")
	want := m.g.snapshot()
	next := m.backup(m.g, dbus.BackupOptions{})
	if next.Kind != dbus.KindFull || !slices.Contains(next.Causes, "parent-damaged") {
		t.Errorf("the next one is %s, %v", next.Kind, next.Causes)
	}
	m.restoreIsExact(next, want)
	if j := m.end(m.repair(dbus.RepairOptions{DryRun: true})); j.State != dbus.JobSucceeded {
		t.Errorf("a dry run: %s", j.ErrorMessage)
	}
	m.states(hit, hit, good, good)
	for _, f := range faults {
		if !slices.Contains([]string{"worker-kill", "daemon-kill", "cancel"}, f.name) {
			continue
		}
		for _, s := range repairSteps {
			few := []string{"repairing", "committed"}
			if f.name == "worker-kill" {
				few = append(few, "committing", "renaming")
			}
			if os.Getenv("TEST_FAULTS") == "all" || slices.Contains(few, s.name) {
				t.Run(f.name+"/"+s.name, func(t *testing.T) { m.try(t, f, s) })
			}
		}
	}
}

// try has a fault come at a step of a repair, and then repairs.
func (m *mender) try(t *testing.T, f fault, s step) {
	m.retarget(t)
	if now, err := dbus.Get[dbus.BackupProperties](t.Context(), m.Client, m.backups[0].ID); err != nil || now.State == good {
		m.flip()
		m.verify(1)
	}
	m.states(hit, hit, good, good)
	at := m.trap(s)
	job := m.repair(dbus.RepairOptions{})
	at.wait()
	m.daemon = daemonPID(t)
	f.do(m.killer, job)
	if f.settled != nil {
		f.settled(m.killer)
	}
	m.chainIsExact(m.backups[2], m.held[2])
	at.letGo()
	j := m.end(job)
	t.Logf("%s: %s", j.State, j.ErrorMessage)
	if f.name == "daemon-kill" && j.State != dbus.JobSucceeded {
		t.Error("the restart of the daemon ended it")
	}
	m.nothingLeft(m.g)
	noGenerations(t, m.path)
	if j.State != dbus.JobSucceeded {
		if err := m.end(m.repair(dbus.RepairOptions{})).Err(); err != nil {
			t.Error(err)
		}
	}
	m.states(good, good, good, good)
	m.exact()
	m.restoreIsExact(m.backups[0], m.held[0])
	if j := m.verify(2); j.State != dbus.JobSucceeded {
		t.Errorf("repaired, it is not what was written: %s", j.ErrorMessage)
	}
	if owners, err := filepath.Glob(filepath.Join(m.path, "*", ".owner*")); err != nil || len(owners) > 0 {
		t.Errorf("claims are left: %v, %v", owners, err)
	}
}

// TestRepairedFromTheDisk has only the domain's disk hold what is damaged, while
// it runs and while it is off, and then not any more.
func TestRepairedFromTheDisk(t *testing.T) {
	m := &mender{killer: &killer{t: t, storage: mountRepository(t), scratch: &faultFS{}}}
	m.host = newHostAt(t, m.storage.point)
	m.g = newPausedGuest(t, "qcow2:6M", "raw:2M")
	m.g.io("vda", "write -P 0xd7 1M 64k")
	m.held = []snapshot{m.g.snapshot()}
	m.backups = []dbus.BackupProperties{m.backup(m.g, dbus.BackupOptions{})}
	for _, state := range []string{"running", "off"} {
		if state == "off" {
			command(t, "", "virsh", "-q", "destroy", m.g.name)
		}
		m.flip()
		m.verify(0)
		m.states(hit)
		out := command(t, "", "virtbackupctl", "repair", m.backups[0].ID)
		if !strings.Contains(out, "65536 bytes at 1048576") || !strings.Contains(out, "the domain's disk") {
			t.Errorf("%s: repair says: %s", state, out)
		}
		m.states(good)
		m.exact()
		m.nothingLeft(m.g)
	}
	command(t, "", "virsh", "-q", "start", "--paused", m.g.name)
	m.g.io("vda", "write -P 0xd8 1M 64k")
	m.flip()
	m.verify(0)
	j := m.end(m.repair(dbus.RepairOptions{}))
	if j.State != dbus.JobFailed || j.Error != dbus.ErrDamaged || !strings.Contains(j.ErrorMessage, "65536 bytes at 1048576") {
		t.Errorf("nobody holds it any more: %s, %s", j.State, j.ErrorMessage)
	}
	m.states(hit)
	m.nothingLeft(m.g)
	noGenerations(t, m.path)
}

// TestVerifiedByItself has a chain be old enough, and finds that it is verified
// without anybody asking.
func TestVerifiedByItself(t *testing.T) {
	h, g := newHost(t), newPausedGuest(t, "qcow2:4M")
	g.io("vda", "write -P 1 0 1M")
	b := h.backup(g, dbus.BackupOptions{})
	// As if it had been made forty days ago.
	command(t, "", "systemctl", "stop", "virtbackupd.service")
	command(t, "", "python3", "-c", `import sqlite3,sys
c=sqlite3.connect("/var/lib/virtbackup/catalog.sqlite")
c.execute("UPDATE backups SET finished = finished - 40*86400*1000000 WHERE id = ?", (sys.argv[1],))
c.commit()`, b.ID)
	command(t, "", "systemctl", "start", "virtbackupd.service")
	eventually(t, "it is verified", func() error {
		now, err := dbus.Get[dbus.BackupProperties](t.Context(), h.Client, b.ID)
		if err == nil && now.Verified.IsZero() {
			err = fmt.Errorf("never")
		}
		return err
	})
	verify := dbus.OperationVerify
	for j, err := range h.Jobs(t.Context(), dbus.JobFilter{Domain: g.uuid, Operation: &verify}) {
		if err != nil || j.Origin != dbus.OriginSystem || j.Backup != b.ID {
			t.Errorf("%+v, %v", j, err)
		}
	}
}
