package transfer

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/oklog/ulid/v2"
	"golang.org/x/sys/unix"
)

// TestRestoreDestinations restores beside, onto and through what is there.
func TestRestoreDestinations(t *testing.T) {
	h, want, _, increment := chainOfTwo(t, "zstd")
	dir := filepath.Join(h.dir, "images")
	outside := filepath.Join(h.dir, "outside")
	for _, d := range []string{dir, outside} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	h.write(filepath.Join(dir, "precious"), "precious")
	for name, target := range map[string]string{"dangling": "nowhere", "linked": outside} {
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	restore := func(directory, name string) *Result {
		return h.run(Spec{Operation: OperationRestore, Restore: &RestoreSpec{Backup: increment, Disks: []RestoreDisk{
			{Target: "vda", Directory: directory, Destination: name, Format: FormatRaw}}}})
	}
	for _, bad := range [][2]string{
		{dir, "precious"}, {dir, "dangling"}, {dir, "linked/x"}, {dir, "../outside/x"}, {dir, "/etc/x"}, {dir, "a\x00b"},
		{dir, ""}, {dir, "."}, {dir, "none/x"}, {filepath.Join(dir, "linked"), "x"}, {"relative", "x"},
	} {
		if r := restore(bad[0], bad[1]); r.Error == nil || r.Error.Class != ClassDestination {
			t.Errorf("to %q in %q: %+v", bad[1], bad[0], r.Error)
		}
	}
	if b, err := os.ReadFile(filepath.Join(dir, "precious")); err != nil || string(b) != "precious" {
		t.Errorf("overwritten: %q, %v", b, err)
	}
	if left, err := os.ReadDir(outside); err != nil || len(left) > 0 {
		t.Errorf("restored outside: %v, %v", left, err)
	}
	if r := restore(dir, "good"); r.Error != nil {
		t.Fatal(r.Error)
	}
	h.command("cmp", want, filepath.Join(dir, "good"))
}

func TestRestoreFilesAndOwner(t *testing.T) {
	h, _, _, increment := chainOfTwo(t, "none")
	uid, gid := os.Getuid(), os.Getgid()
	owner := Owner{UID: &uid, GID: &gid, Mode: 0o640}
	r := h.run(Spec{Operation: OperationRestore, Restore: &RestoreSpec{Backup: increment,
		Disks: []RestoreDisk{{Target: "vda", Directory: h.dir, Destination: "new.qcow2", Format: FormatQcow2, Owner: owner}},
		Files: []RestoreFile{{Name: "domain.xml", Directory: h.dir, Destination: "new.xml", Owner: owner}},
	}})
	if r.Error != nil {
		t.Fatal(r.Error)
	}
	for _, name := range []string{"new.qcow2", "new.xml"} {
		info, err := os.Stat(filepath.Join(h.dir, name))
		if err != nil || info.Mode() != 0o640 {
			t.Errorf("%s: %v, %v", name, info, err)
		}
	}
	if b, err := os.ReadFile(filepath.Join(h.dir, "new.xml")); err != nil || string(b) != "<domain/>" {
		t.Errorf("definition is %q, %v", b, err)
	}
	if r.Manifest == nil || r.Manifest.Backup != increment {
		t.Errorf("manifest is %+v", r.Manifest)
	}
	r = h.run(Spec{Operation: OperationRestore, Restore: &RestoreSpec{Backup: increment,
		Disks: []RestoreDisk{{Target: "vda", Directory: h.dir, Destination: "second.raw", Format: FormatRaw}},
		Files: []RestoreFile{{Name: "nvram", Directory: h.dir, Destination: "nvram"}},
	}})
	if r.Error == nil {
		t.Error("a file that is not there was restored")
	}
	if _, err := os.Lstat(filepath.Join(h.dir, "second.raw")); !os.IsNotExist(err) {
		t.Errorf("half of a restore is left: %v", err)
	}
}

// TestRestoreToDevice overwrites a block device that held something else.
func TestRestoreToDevice(t *testing.T) {
	h, want, _, increment := chainOfTwo(t, "zstd")
	for _, size := range []int{chainSize + 4096, 2 << 20} {
		back := filepath.Join(h.dir, "back")
		h.write(back, string(bytes.Repeat([]byte{0xee}, size)))
		device := attachLoop(t, h, back)
		r := h.run(Spec{Operation: OperationRestore, Restore: &RestoreSpec{Backup: increment,
			Disks: []RestoreDisk{{Target: "vda", Device: true, Destination: device, Format: FormatRaw}}}})
		if size < chainSize {
			if r.Error == nil || r.Error.Class != ClassDestination {
				t.Errorf("too small: %+v", r.Error)
			}
			continue
		}
		if r.Error != nil {
			t.Fatal(r.Error)
		}
		h.command("cmp", "-n", fmt.Sprint(chainSize), want, device)
	}
}

func attachLoop(t *testing.T, h *host, file string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("a loop device needs root")
	}
	device := strings.TrimSpace(h.command("losetup", "--find", "--show", file))
	t.Cleanup(func() { h.command("losetup", "--detach", device) })
	return device
}

// TestCancelledRestoreLeavesNothing cancels before and while it copies.
func TestCancelledRestoreLeavesNothing(t *testing.T) {
	h, _, _, increment := chainOfTwo(t, "none")
	dir := filepath.Join(h.dir, "images")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(ErrCancelled)
	r := h.runJob(ctx, h.job(Spec{Operation: OperationRestore, Restore: &RestoreSpec{Backup: increment,
		Disks: []RestoreDisk{{Target: "vda", Directory: dir, Destination: "x", Format: FormatRaw}}}}))
	if r.Error == nil || r.Error.Class != ClassCancelled {
		t.Errorf("%+v", r.Error)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// TestProbeCollects finds the repository and clears up after a dead job only.
func TestProbeCollects(t *testing.T) {
	h, _, full, increment := chainOfTwo(t, "none")
	dead, live := h.id(), h.id()
	younger := ulid.MustNew(h.clock+1e6, rand.Reader).String() // submitted after the probe
	probe := h.run(Spec{Operation: OperationProbe})
	if probe.Error != nil || probe.Repository.ID == "" || probe.Repository.Free == 0 || probe.Repository.ReadOnly {
		t.Fatalf("%+v", probe)
	}
	stage := func(id string) string { return filepath.Join(h.repo, ".staging", id+"."+probe.Repository.Host) }
	for _, id := range []string{dead, live, younger} {
		if err := os.Mkdir(stage(id), 0o700); err != nil {
			t.Fatal(err)
		}
		h.write(filepath.Join(stage(id), "vda.qcow2"), "half")
	}
	if r := h.run(Spec{Operation: OperationProbe, Collect: true, Live: []string{live}}); r.Error != nil {
		t.Fatal(r.Error)
	}
	if err := unix.Access(stage(dead), unix.F_OK); err != unix.ENOENT {
		t.Errorf("what the dead job left is there: %v", err)
	}
	for _, id := range []string{live, younger} {
		if err := unix.Access(stage(id), unix.F_OK); err != nil {
			t.Errorf("what a live job made is gone: %v", err)
		}
	}
	if r := h.run(Spec{Operation: OperationDiscard, Backups: []string{live, younger}}); r.Error != nil {
		t.Fatal(r.Error)
	}
	h.checkClean()
	r := h.run(Spec{Operation: OperationDelete, Backups: []string{full, increment}})
	if r.Error != nil || len(r.Deleted) != 2 {
		t.Errorf("%+v", r)
	}
	if r := h.run(Spec{Operation: OperationList}); r.Error != nil || len(r.Backups) != 0 {
		t.Errorf("%+v", r)
	}
}

// TestMissingBackup tells a backup that somebody removed from a repository that
// is not there, and from one that is damaged.
func TestMissingBackup(t *testing.T) {
	h, _, full, increment := chainOfTwo(t, "none")
	if err := os.RemoveAll(filepath.Join(h.repo, testDomain, full)); err != nil {
		t.Fatal(err)
	}
	r := h.run(Spec{Operation: OperationVerify, Backups: []string{increment}})
	if r.Error != nil {
		t.Fatal(r.Error)
	}
	got := map[string]Class{}
	for _, b := range r.Backups {
		if b.Error != nil {
			got[b.Backup] = b.Error.Class
		}
	}
	if len(got) != 2 || got[full] != ClassMissing || got[increment] != ClassParent {
		t.Errorf("found %v", got)
	}
	if err := os.Rename(h.repo, h.repo+".away"); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(h.repo, 0o700); err != nil {
		t.Fatal(err)
	}
	r = h.run(Spec{Operation: OperationVerify, Backups: []string{increment}})
	if r.Error == nil || r.Error.Class != ClassRepository || len(r.Backups) > 0 {
		t.Errorf("of a share that is away: %+v", r)
	}
}
