//go:build lab

package labtest

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/virtbackup/virtbackup/dbus"
)

// stop stops the daemon, has something done, and starts it again.
func whileStopped(t *testing.T, do func()) {
	t.Helper()
	command(t, "", "systemctl", "stop", "virtbackupd")
	do()
	command(t, "", "systemctl", "start", "virtbackupd")
}

// again adds a repository that the catalog has lost, and scans it.
func again(t *testing.T, path string, o dbus.ScanRepositoryOptions) (h *host, log string) {
	t.Helper()
	h = newHostAt(t, path)
	job, err := h.ScanRepository(t.Context(), h.repository, o)
	if err != nil {
		t.Fatal(err)
	}
	if err := h.end(job).Err(); err != nil {
		t.Fatal(err)
	}
	messages, err := h.JobLog(t.Context(), job, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range messages {
		log += m.Message + "\n"
	}
	return h, log
}

// TestScanBringsAllBack loses the catalog, and then the host's key too.
func TestScanBringsAllBack(t *testing.T) {
	const state = "/var/lib/virtbackup/"
	h, g := newHost(t), newPausedGuest(t, "qcow2:16M", "raw:1M")
	assign(t, h, g)
	held := map[string]snapshot{}
	var ids []string
	for i := range 3 {
		g.io("vda", []string{"write -P 1 0 4M", "write -P 2 1M 64k", "write -z 0 128k"}[i])
		want := g.snapshot()
		b := h.backup(g, dbus.BackupOptions{})
		held[b.ID], ids = want, append(ids, b.ID)
	}
	exact := func(h *host) {
		t.Helper()
		for _, id := range ids {
			h.restoreIsExact(h.get(id), held[id])
		}
	}
	kept := t.TempDir()
	whileStopped(t, func() { command(t, "", "sh", "-c", "mv "+state+"catalog.sqlite* "+kept) })
	h, log := again(t, h.path, dbus.ScanRepositoryOptions{DryRun: true})
	if !strings.Contains(log, "3 would be imported") {
		t.Errorf("a dry run says %q", log)
	}
	job, err := h.ScanRepository(t.Context(), h.repository, dbus.ScanRepositoryOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := h.end(job).Err(); err != nil {
		t.Fatal(err)
	}
	exact(h)
	// The chain goes on: what changed is found by comparing.
	assign(t, h, g)
	g.io("vda", "write -P 9 9M 64k")
	want := g.snapshot()
	b := h.backup(g, dbus.BackupOptions{})
	if b.Kind != dbus.KindIncremental || b.Parent != ids[2] {
		t.Errorf("the next backup is %s on %q: %v", b.Kind, b.Parent, b.Causes)
	}
	h.chainIsExact(b, want)
	held[b.ID], ids = want, append(ids, b.ID)

	// A block is flipped: the check finds it, and which backups it hits.
	flipAt(t, h.image(h.get(ids[1]), "vda"), 0x50000)
	digests := dbus.DepthDigests
	job, err = h.CheckRepository(t.Context(), h.repository, dbus.CheckRepositoryOptions{Depth: &digests})
	if err != nil {
		t.Fatal(err)
	}
	failsAs(t, h.end(job), dbus.ErrDamaged)
	for i, id := range ids {
		want := dbus.BackupComplete
		if i > 0 {
			want = dbus.BackupDamaged
		}
		if got := h.get(id).State; got != want {
			t.Errorf("backup %d is %s and not %s", i, got, want)
		}
	}
	flipAt(t, h.image(h.get(ids[1]), "vda"), 0x50000)

	// On another host nobody vouches for them.
	whileStopped(t, func() {
		command(t, "", "sh", "-c", "rm "+state+"catalog.sqlite*; mv "+state+"manifest.key "+kept)
	})
	h, log = again(t, h.path, dbus.ScanRepositoryOptions{})
	if !strings.Contains(log, "4 are of other hosts") {
		t.Errorf("the scan says %q", log)
	}
	if n := len(h.pruned(g)); n != 0 {
		t.Errorf("%d backups of another host were taken", n)
	}
	if job, err = h.ScanRepository(t.Context(), h.repository, dbus.ScanRepositoryOptions{ImportForeign: true}); err != nil {
		t.Fatal(err)
	}
	if err := h.end(job).Err(); err != nil {
		t.Fatal(err)
	}
	exact(h)
	// They are not ours to change; and trusted only as they were.
	if _, job, err = h.DeleteBackup(t.Context(), ids[3], dbus.DeleteBackupOptions{}); err == nil {
		err = h.end(job).Err()
	}
	if err == nil {
		t.Error("a backup of another host was deleted")
	}
	manifest := filepath.Join(h.path, g.uuid, ids[0], "manifest.json")
	content, err := os.ReadFile(manifest)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(manifest, []byte(strings.Replace(string(content), `"version"`, `"Version"`, 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	job, err = h.VerifyBackup(t.Context(), ids[0])
	if err != nil {
		t.Fatal(err)
	}
	failsAs(t, h.end(job), dbus.ErrDamaged)
	whileStopped(t, func() { command(t, "", "sh", "-c", "rm "+state+"catalog.sqlite*; mv "+kept+"/* "+state) })
}

// flipAt changes a byte of a file, and back when it is called again.
func flipAt(t *testing.T, path string, at int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := flip(f, at); err != nil {
		t.Fatal(err)
	}
}
