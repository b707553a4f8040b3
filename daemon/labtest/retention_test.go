//go:build lab

package labtest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/virtbackup/virtbackup/dbus"
)

// keeping has the host's offering keep so many backups.
func (h *host) keeping(last uint32) {
	h.t.Helper()
	id, err := h.FindOffering(h.t.Context(), h.offering)
	if err == nil {
		err = h.UpdateOffering(h.t.Context(), id, dbus.UpdateOfferingOptions{OfferingOptions: dbus.OfferingOptions{
			Overrides: dbus.Overrides{Retention: dbus.Retention{KeepLast: &last}}}})
	}
	if err != nil {
		h.t.Fatal(err)
	}
}

// pruned waits until no prune of a domain is left to be done, and returns the
// backups that there are, oldest first.
func (h *host) pruned(g *guest) []string {
	h.t.Helper()
	for {
		operation, done := dbus.OperationPrune, true
		for j, err := range h.Jobs(h.t.Context(), dbus.JobFilter{Domain: g.uuid, Operation: &operation}) {
			if err != nil {
				h.t.Fatal(err)
			}
			if !j.State.Final() {
				done = false
				h.end(j.ID)
			}
		}
		plan, _, err := h.PruneDomain(h.t.Context(), g.uuid, dbus.PruneOptions{DryRun: true, Repository: h.repository})
		if err != nil {
			h.t.Fatal(err)
		}
		if done && !slices.ContainsFunc(plan, func(e dbus.PruneEntry) bool { return e.Action != dbus.PruneKeep }) {
			break
		}
	}
	var ids []string
	for b, err := range h.Backups(h.t.Context(), dbus.BackupFilter{Domain: g.uuid, Repository: h.repository}) {
		if err != nil {
			h.t.Fatal(err)
		}
		ids = append([]string{b.ID}, ids...)
	}
	return ids
}

// TestRetentionKeepsTheNewest has a chain of which four stay, with all that a
// guest does to disks, and compares each one that is listed after each backup.
func TestRetentionKeepsTheNewest(t *testing.T) {
	h, g := newHost(t), newPausedGuest(t, "qcow2:24M", "raw:2M")
	assign(t, h, g)
	h.keeping(4)
	held := map[string]snapshot{}
	for i, changes := range [][]string{
		{"write -P 1 0 4M", "write -P 2 8M 64k"}, {"write -P 3 1M 1M"}, {"write -z 0 512k", "discard 2M 1M"}, {"write -P 4 9M 192k"},
		{"write -P 5 0 64k", "write -z 8M 64k"}, {"discard 0 1M"}, {"write -P 6 20M 2M"}, {"write -P 7 3M 100k"},
	} {
		g.io("vda", changes...)
		g.io("vdb", fmt.Sprintf("write -P %d %dk 8k", i+1, i*16))
		want := g.snapshot()
		b := h.backup(g, dbus.BackupOptions{})
		held[b.ID] = want
		left := h.pruned(g)
		if len(left) != min(i+1, 4) || left[len(left)-1] != b.ID {
			t.Fatalf("after backup %d these are left: %v", i+1, left)
		}
		for _, id := range left {
			h.chainIsExact(h.get(id), held[id])
		}
		if i == 3 { // the first one that others would be merged over stays
			if err := h.HoldBackup(t.Context(), left[0], "a test"); err != nil {
				t.Fatal(err)
			}
			if _, _, err := h.DeleteBackup(t.Context(), left[0], dbus.DeleteBackupOptions{WithChildren: true}); err != nil && !errors.Is(err, dbus.ErrBusy) {
				t.Fatal(err)
			}
			if err := h.ReleaseBackup(t.Context(), left[0]); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, id := range h.pruned(g) {
		h.restoreIsExact(h.get(id), held[id])
	}
	h.nothingLeft(g)
	noGenerations(t, h.path)
}

// get returns a backup.
func (h *host) get(id string) dbus.BackupProperties {
	h.t.Helper()
	b, err := dbus.Get[dbus.BackupProperties](h.t.Context(), h.Client, id)
	if err != nil {
		h.t.Fatal(err)
	}
	return b
}

// noGenerations checks that no file of a backup waits for its name.
func noGenerations(t *testing.T, root string) {
	t.Helper()
	err := filepath.WalkDir(root, func(path string, _ os.DirEntry, err error) error {
		if strings.Contains(filepath.Base(path), "~") {
			t.Errorf("%s is left", path)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// TestRetentionKilled kills the daemon, and the worker, in the middle of merges.
func TestRetentionKilled(t *testing.T) {
	h, g := newHost(t), newPausedGuest(t, "qcow2:64M")
	assign(t, h, g)
	held := map[string]snapshot{}
	var ids []string
	for i := range 5 {
		g.io("vda", fmt.Sprintf("write -P %d %dM 24M", i+1, i*8), fmt.Sprintf("write -z %dM 1M", i*4))
		want := g.snapshot()
		b := h.backup(g, dbus.BackupOptions{})
		held[b.ID], ids = want, append(ids, b.ID)
	}
	for i, kill := range []func(job string){
		func(string) { command(t, "", "systemctl", "kill", "--signal=KILL", "virtbackupd") },
		func(job string) {
			// It may have ended already.
			_ = exec.Command("systemctl", "kill", "--signal=KILL", "virtbackup-job-"+job+".service").Run()
		},
		func(string) { command(t, "", "systemctl", "restart", "virtbackupd") },
	} {
		h.keeping(uint32(4 - i))
		_, jobs, err := h.PruneDomain(t.Context(), g.uuid, dbus.PruneOptions{})
		if err != nil || len(jobs) != 1 {
			t.Fatal(jobs, err)
		}
		kill(jobs[0])
		j := h.end(jobs[0])
		t.Logf("%s: %s", j.State, j.ErrorMessage)
		left := ids[i:]
		if j.State == dbus.JobSucceeded {
			left = ids[i+1:]
		}
		for _, id := range left {
			if b := h.get(id); b.State == dbus.BackupComplete { // or marked: it has been merged
				h.chainIsExact(b, held[id])
			}
		}
		if j.State != dbus.JobSucceeded {
			if _, jobs, err = h.PruneDomain(t.Context(), g.uuid, dbus.PruneOptions{}); err != nil {
				t.Fatal(err)
			}
			for _, id := range jobs {
				if err := h.end(id).Err(); err != nil {
					t.Fatal(err)
				}
			}
		}
		if got := h.pruned(g); !slices.Equal(got, ids[i+1:]) {
			t.Fatalf("%v are left of %v", got, ids)
		}
		for _, id := range ids[i+1:] {
			h.chainIsExact(h.get(id), held[id])
		}
	}
	h.nothingLeft(g)
	noGenerations(t, h.path)
}

func assign(t *testing.T, h *host, g *guest) {
	t.Helper()
	if err := h.AssignDomain(t.Context(), g.uuid, h.offering); err != nil {
		t.Fatal(err)
	}
}
