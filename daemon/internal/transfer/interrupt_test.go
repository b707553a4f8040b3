package transfer

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/virtbackup/virtbackup/daemon/internal/repository"
)

// buildWorker builds the program, as it is installed.
func buildWorker(t testing.TB) string {
	t.Helper()
	program := filepath.Join(t.TempDir(), "virtbackup-worker")
	c := exec.Command("go", "build", "-o", program, "github.com/virtbackup/virtbackup/daemon/worker")
	c.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return program
}

// awaitPhase waits until a job is in a phase, or has ended.
func awaitPhase(h *host, dir, phase string) {
	h.Helper()
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC)
	if err != nil {
		h.Fatal(err)
	}
	defer unix.Close(fd)
	if _, err := unix.InotifyAddWatch(fd, dir, unix.IN_MOVED_TO); err != nil {
		h.Fatal(err)
	}
	for {
		if s, err := ReadStatus(dir); err == nil && s.Phase == phase {
			return
		}
		if _, err := ReadResult(dir); err == nil {
			return
		}
		if _, err := unix.Read(fd, make([]byte, 4096)); err != nil && err != unix.EINTR {
			h.Fatal(err)
		}
	}
}

var backupPhases = []string{PhaseOpening, PhaseReady, PhaseCopying, PhaseFlushing, PhaseConfirming, PhaseVerifying, PhaseCommitting}

// TestSignals sends SIGTERM and SIGKILL in each phase of an increment. After
// SIGTERM nothing is left; after SIGKILL nothing is left once it is discarded.
// Either way the parent is whole, and the increment is there or is not.
func TestSignals(t *testing.T) {
	program := buildWorker(t)
	h := newHost(t)
	d := h.disk("vda", "qcow2", 256<<20)
	d.io(h, "write -P 1 0 128M")
	parent := h.mustTake("", "", d)
	before := d.raw(h)
	d.io(h, "write -P 2 0 64M")
	for _, sig := range []unix.Signal{unix.SIGTERM, unix.SIGKILL} {
		for _, phase := range backupPhases {
			id := h.id()
			b := h.backupSpec(id, parent, parent, d)
			b.Confirm = phase == PhaseConfirming
			stop := h.serve(b, d)
			dir := h.job(Spec{Operation: OperationBackup, Backup: b})
			c := exec.Command(program, dir)
			if err := c.Start(); err != nil {
				t.Fatal(err)
			}
			if phase != PhaseReady && phase != PhaseOpening {
				h.letGo(dir)
			}
			awaitPhase(h, dir, phase)
			if err := c.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
				t.Fatal(err)
			}
			err := c.Wait()
			stop()
			r, resultErr := ReadResult(dir)
			switch {
			case sig == unix.SIGTERM && resultErr != nil:
				t.Fatalf("%s in %s: no result: %v", sig, phase, resultErr)
			case resultErr == nil && (r.Error == nil) != (err == nil):
				t.Errorf("%s in %s: exit status %v, result %+v", sig, phase, err, r.Error)
			case resultErr == nil && r.Error != nil && r.Error.Class != ClassCancelled:
				t.Errorf("%s in %s: %+v", sig, phase, r.Error)
			case resultErr == nil && r.Error == nil && b.Confirm:
				t.Errorf("%s in %s: committed all the same", sig, phase)
			case resultErr == nil && r.Error == nil && phase != PhaseCommitting:
				t.Logf("%s came too late for %s", sig, phase)
			}
			if sig == unix.SIGKILL {
				if r := h.run(Spec{Operation: OperationDiscard, Backups: []string{id}}); r.Error != nil {
					t.Fatal(r.Error)
				}
			}
			h.checkClean()
			checkEither(h, id, resultErr == nil && r.Error == nil, sig == unix.SIGTERM)
			h.command("qemu-img", "bitmap", "--remove", d.path, bitmapName(id))
		}
	}
	h.checkRestored(parent, map[string]string{"vda": before})
}

// checkEither checks that a backup is whole if it is there, and deletes it.
// sure says that the result must be right about that.
func checkEither(h *host, id string, done, sure bool) {
	h.Helper()
	_, err := os.Stat(filepath.Join(h.repo, testDomain, id))
	there := err == nil
	if done && !there || sure && there != done {
		h.Fatalf("the backup is there: %t; it succeeded: %t", there, done)
	}
	if !there {
		return
	}
	r := h.run(Spec{Operation: OperationVerify, Backups: []string{id}})
	if r.Error != nil {
		h.Fatal(r.Error)
	}
	for _, b := range r.Backups {
		if b.Error != nil {
			h.Fatalf("backup %s: %v", b.Backup, b.Error)
		}
	}
	if r := h.run(Spec{Operation: OperationDelete, Backups: []string{id}}); r.Error != nil {
		h.Fatal(r.Error)
	}
}

// TestSourceVanishes ends the NBD server while its disk is copied.
func TestSourceVanishes(t *testing.T) {
	h := newHost(t)
	d := h.disk("vda", "qcow2", 1<<30)
	d.io(h, "write -P 1 0 512M")
	b := h.backupSpec(h.id(), "", "01JAAAAAAAAAAAAAAAAAAAAAAA", d)
	stop := h.serve(b, d)
	dir := h.job(Spec{Operation: OperationBackup, Backup: b})
	done := make(chan *Result)
	go func() { done <- h.runJob(context.Background(), dir) }()
	awaitPhase(h, dir, PhaseReady)
	stop()
	h.letGo(dir)
	if r := <-done; r.Error == nil || r.Error.Class != ClassSource {
		t.Errorf("with no server: %+v", r.Error)
	}
	h.checkClean()
}

func TestBackupRefusesBeforeItStarts(t *testing.T) {
	h := newHost(t)
	d := h.disk("vda", "qcow2", 1<<20)
	parent := h.mustTake("", "", d)
	for what, c := range map[string]struct {
		change func(s *Spec)
		class  Class
	}{
		"other repository": {func(s *Spec) { s.Repository.ID = "01JAAAAAAAAAAAAAAAAAAAAAAA" }, ClassRepository},
		"too full":         {func(s *Spec) { s.Repository.MinimumFree = 1 << 60 }, ClassFull},
		"missing parent":   {func(s *Spec) { s.Backup.Manifest.Parent = "01JAAAAAAAAAAAAAAAAAAAAAAA" }, ClassParent},
		"other chain":      {func(s *Spec) { s.Backup.Manifest.Chain = "01JAAAAAAAAAAAAAAAAAAAAAAA" }, ClassParent},
		"resized": {func(s *Spec) {
			s.Backup.Disks[0].Size, s.Backup.Manifest.Disks[0].Size = 2<<20, 2<<20
		}, ClassParent},
		"contradiction":   {func(s *Spec) { s.Backup.Disks[0].Bitmap = "" }, ClassInternal},
		"no repository":   {func(s *Spec) { s.Repository.KeyFile = "/nonexistent" }, ClassInternal},
		"name of a file":  {func(s *Spec) { s.Backup.Files[0].Name = "../../x" }, ClassRepository},
		"link to a file":  {func(s *Spec) { s.Backup.Files[0].Path = link(h) }, ClassSource},
		"missing file":    {func(s *Spec) { s.Backup.Files[0].Path = "/nonexistent" }, ClassSource},
		"not an export":   {func(s *Spec) { s.Backup.Disks[0].Export = "vdz" }, ClassSource},
		"missing bitmap":  {func(s *Spec) { s.Backup.Disks[0].Bitmap = "qemu:dirty-bitmap:none" }, ClassSource},
		"missing socket":  {func(s *Spec) { s.Backup.Disks[0].Socket = "/nonexistent" }, ClassSource},
		"missing backup":  {func(s *Spec) { s.Backup = nil }, ClassInternal},
		"unknown command": {func(s *Spec) { s.Operation = "sing" }, ClassInternal},
	} {
		b := h.backupSpec(h.id(), parent, parent, d)
		stop := h.serve(b, d)
		s := Spec{Operation: OperationBackup, Backup: b}
		dir := h.job(s)
		full, err := ReadSpec(dir)
		if err != nil {
			t.Fatal(err)
		}
		c.change(full)
		if err := WriteSpec(dir, full); err != nil {
			t.Fatal(err)
		}
		h.letGo(dir)
		r := h.runJob(context.Background(), dir)
		stop()
		if r.Error == nil || r.Error.Class != c.class {
			t.Errorf("%s: %+v, want class %s", what, r.Error, c.class)
		}
		h.checkClean()
	}
}

func link(h *host) string {
	h.Helper()
	name := filepath.Join(h.dir, "link-"+h.id())
	if err := os.Symlink("/etc/passwd", name); err != nil {
		h.Fatal(err)
	}
	return name
}

// TestFullRepositoryAndTwoHosts runs into a full file system and a foreign host.
func TestFullRepositoryAndTwoHosts(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting a file system needs root")
	}
	h := newHost(t)
	small := filepath.Join(h.dir, "small")
	if err := os.Mkdir(small, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", small, "tmpfs", 0, "size=8m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(small, unix.MNT_DETACH) })
	h.repo = small
	if r := h.run(Spec{Operation: OperationInit}); r.Error != nil {
		t.Fatal(r.Error)
	}
	d := h.disk("vda", "qcow2", 32<<20)
	d.io(h, "write -P 1 0 20M")
	b := h.backupSpec(h.id(), "", "01JAAAAAAAAAAAAAAAAAAAAAAA", d)
	b.Compression = "none"
	if r := h.take(b, d); r.Error == nil || r.Error.Class != ClassFull {
		t.Errorf("full: %+v", r.Error)
	}
	h.checkClean()
	ours := h.key
	h.key = filepath.Join(h.dir, "other-key")
	h.write(h.key, strings.Repeat("ab", 32))
	key, err := (&worker{spec: &Spec{Repository: RepositorySpec{KeyFile: ours}}}).key()
	if err != nil {
		t.Fatal(err)
	}
	r, err := repository.Open(small, key)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := r.Claim(testDomain, h.id()); err != nil {
		t.Fatal(err)
	}
	if r := h.take(h.backupSpec(h.id(), "", "01JAAAAAAAAAAAAAAAAAAAAAAA", d), d); r.Error == nil || r.Error.Class != ClassForeign {
		t.Errorf("foreign: %+v", r.Error)
	}
}
