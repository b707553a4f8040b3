//go:build lab

package labtest

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/virtbackup/virtbackup/dbus"
)

// mergeSteps are those of a merge and of the deletion after it, in their order.
// It is vdb that is looked at: vda may be full in what it is merged into, as its
// size changes, and is then left as it is.
var mergeSteps = []step{
	{name: "opening", in: theWorker, op: "create", path: `/vdb\.qcow2~`},
	{name: "merging", in: theWorker, op: "write", path: `/vdb\.qcow2~`},
	{name: "flushing", in: theWorker, op: "fsync", path: `/vdb\.qcow2~`},
	{name: "verifying", in: theWorker, op: "read", path: `/vdb\.qcow2~`},
	{name: "committing", in: theWorker, op: "rename", path: `/manifest\.json$`},
	{name: "committed", in: theWorker, op: "rename", path: `/manifest\.json$`, after: true},
	{name: "renaming", in: theWorker, op: "rename", path: `/vdb\.digests$`, after: true},
	{name: "deleting", in: theWorker, op: "rename", path: `^\.staging/` + ulid},
	{name: "deleted", in: theWorker, op: "rename", path: `^\.staging/` + ulid, after: true},
	{name: "removing", in: theWorker, op: "unlink", path: stage + `/vdb`},
}

// TestRetentionKilledAtEachStep has faults come at each step of a merge: what is
// listed is exact at every moment, and nothing is left of the job.
func TestRetentionKilledAtEachStep(t *testing.T) {
	k := &killer{t: t, storage: mountRepository(t), scratch: &faultFS{}}
	k.host = newHostAt(t, k.storage.point)
	k.g = newPausedGuest(t, "qcow2:6M", "raw:1M")
	assign(t, k.host, k.g)
	m := &merger{killer: k, whole: t, held: map[string]snapshot{}}
	for range 3 {
		m.grow()
	}
	for _, f := range faults {
		chosen := os.Getenv("TEST_FAULTS")
		if !slices.Contains([]string{"worker-kill", "daemon-kill", "cancel"}, f.name) {
			continue
		}
		for _, s := range mergeSteps {
			if chosen != "all" && f.name != "worker-kill" && !slices.Contains([]string{"merging", "committed", "deleted"}, s.name) {
				continue
			}
			if !t.Run(f.name+"/"+s.name, func(t *testing.T) { m.try(t, f, s) }) {
				t.FailNow() // what it left would disturb the others
			}
		}
	}
	m.retarget(t)
	for _, id := range m.pruned(m.g) {
		m.restoreIsExact(m.get(id), m.held[id])
	}
}

// merger is a chain that grows at one end, and is merged at the other.
type merger struct {
	*killer
	whole *testing.T // as long as which what the disks held is kept
	held  map[string]snapshot
	size  int // of vda, in MiB
}

// grow makes a backup after the guest did all kinds of things to its disks.
func (m *merger) grow() {
	m.keeping(0)
	m.write("vda", m.seed%50, 5)
	m.write("vdb", m.seed%12, 2)
	m.g.io("vda", "write -z 1M 128k", "discard 2M 256k")
	if m.size = max(m.size, 6); m.seed == 8 {
		m.size++
		command(m.t, "", "virsh", "-q", "blockresize", m.g.name, "vda", fmt.Sprintf("%dMiB", m.size))
	}
	one := m.g.t
	m.g.t = m.whole
	want := m.g.snapshot()
	m.g.t = one
	m.held[m.backup(m.g, dbus.BackupOptions{}).ID] = want
}

// allExact holds all that is listed against what the disks held, as they are
// found by QEMU.
func (m *merger) allExact() (ids []string) {
	for b, err := range m.Backups(m.t.Context(), dbus.BackupFilter{Domain: m.g.uuid, Repository: m.repository}) {
		if err != nil {
			m.t.Fatal(err)
		}
		if b.State == dbus.BackupComplete {
			m.chainIsExact(b, m.held[b.ID])
			ids = append(ids, b.ID)
		}
	}
	return ids
}

func (m *merger) try(t *testing.T, f fault, s step) {
	m.retarget(t)
	m.grow()
	m.keeping(3)
	at := m.trap(s)
	_, jobs, err := m.PruneDomain(t.Context(), m.g.uuid, dbus.PruneOptions{})
	if err != nil || len(jobs) != 1 {
		t.Fatal(jobs, err)
	}
	at.wait()
	m.daemon = daemonPID(t)
	f.do(m.killer, jobs[0])
	if f.settled != nil {
		f.settled(m.killer)
	}
	at.letGo()
	j := m.end(jobs[0])
	m.allExact()
	m.nothingLeft(m.g)
	if owners, err := filepath.Glob(filepath.Join(m.path, "*", ".owner*")); err != nil || len(owners) > 0 {
		t.Errorf("claims are left: %v, %v", owners, err)
	}
	noGenerations(t, m.path)
	if j.State != dbus.JobSucceeded {
		m.pruneAgain()
	}
	t.Logf("%s: %s", j.State, j.ErrorMessage)
	if left := m.allExact(); len(left) != 3 {
		t.Errorf("%v are left", left)
	}
	if left := m.pruned(m.g); len(left) != 3 {
		t.Errorf("%v are left", left)
	}
	m.nothingLeft(m.g)
	noGenerations(t, m.path)
}

// pruneAgain has done what a job before could not.
func (m *merger) pruneAgain() {
	_, jobs, err := m.PruneDomain(m.t.Context(), m.g.uuid, dbus.PruneOptions{})
	if err != nil {
		m.t.Fatal(err)
	}
	for _, id := range jobs {
		if err := m.end(id).Err(); err != nil {
			m.t.Error(err)
		}
	}
}
