package restore

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// staged makes a disk that is there and a restored one that is to take its place.
func staged(t *testing.T, name string) file {
	t.Helper()
	directory, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	f := file{Staged: filepath.Join(directory, ".staging", name), Final: filepath.Join(directory, name)}
	if err := os.Mkdir(filepath.Dir(f.Staged), 0o700); err != nil {
		t.Fatal(err)
	}
	write(t, f.Staged, "restored")
	write(t, f.Final, "old")
	var st unix.Stat_t
	if err := unix.Stat(f.Staged, &st); err != nil {
		t.Fatal(err)
	}
	f.Inode = st.Ino
	return f
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func holds(t *testing.T, path, want string) {
	t.Helper()
	if got, err := os.ReadFile(path); err != nil || string(got) != want {
		t.Errorf("%s holds %q (%v), want %q", path, got, err, want)
	}
}

// TestExchange does each thing twice, as after a crash.
func TestExchange(t *testing.T) {
	f := staged(t, "vda.qcow2")
	for range 2 {
		if err := f.exchange(); err != nil {
			t.Fatal(err)
		}
		holds(t, f.Final, "restored")
		holds(t, f.Staged, "old")
	}
	for range 2 {
		if err := exchangeBack([]file{f}); err != nil {
			t.Fatal(err)
		}
		holds(t, f.Final, "old")
		holds(t, f.Staged, "restored")
	}
	if err := os.RemoveAll(filepath.Dir(f.Staged)); err != nil {
		t.Fatal(err)
	}
	if err := exchangeBack([]file{f}); err != nil {
		t.Errorf("with the directory gone: %v", err)
	}
	holds(t, f.Final, "old")
}

// TestExchangeBackInDoubt gives nothing back that may not be what it was.
func TestExchangeBackInDoubt(t *testing.T) {
	f := staged(t, "vda.qcow2")
	if err := f.exchange(); err != nil {
		t.Fatal(err)
	}
	write(t, f.Final+".new", "somebody's")
	if err := os.Rename(f.Final+".new", f.Final); err != nil {
		t.Fatal(err)
	}
	if err := exchangeBack([]file{f}); err == nil || !strings.Contains(err.Error(), f.Staged) {
		t.Errorf("the error is %v, and does not say where the old disk is", err)
	}
	holds(t, f.Staged, "old")
}

// TestExchangeUnderQEMU has a QEMU program use the disk that was exchanged: it
// must not lose its file to an undo, nor may a domain start in between.
func TestExchangeUnderQEMU(t *testing.T) {
	f := staged(t, "vda.raw")
	if err := os.Truncate(f.Staged, 1<<20); err != nil {
		t.Fatal(err)
	}
	held, err := lockAll([]file{f})
	if err != nil {
		t.Fatal(err)
	}
	if err := f.exchange(); err != nil {
		t.Fatal(err)
	}
	open := []string{"-f", "raw", "-c", "read 0 512", f.Final}
	if out, err := exec.Command("qemu-io", open...).CombinedOutput(); err == nil || !strings.Contains(string(out), "lock") {
		t.Errorf("QEMU could open a disk that is being exchanged: %v %s", err, out)
	}
	held.release()
	serve(t, f.Final)
	if err := exchangeBack([]file{f}); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("an undo took the disk from under QEMU: %v", err)
	}
	holds(t, f.Staged, "old")
	if _, err := lockAll([]file{f}); err == nil {
		t.Error("a disk that is in use could be locked")
	}
}

// serve has a QEMU program hold a raw disk open until the test ends.
func serve(t *testing.T, path string) {
	t.Helper()
	run := t.TempDir()
	pid := filepath.Join(run, "pid")
	if out, err := exec.Command("qemu-nbd", "--fork", "--pid-file", pid, "-t", "-f", "raw", "-k", filepath.Join(run, "s"), path).CombinedOutput(); err != nil {
		t.Fatalf("qemu-nbd: %v %s", err, out)
	}
	t.Cleanup(func() {
		text, err := os.ReadFile(pid)
		if err != nil {
			t.Fatal(err)
		}
		number, err := strconv.Atoi(strings.TrimSpace(string(text)))
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Kill(number, unix.SIGTERM); err != nil {
			t.Error(err)
		}
	})
}

// TestPlaceKeepsWhatIsThere moves a file only to where nothing is, and removes only its own.
func TestPlaceKeepsWhatIsThere(t *testing.T) {
	f := staged(t, "new-vda.qcow2")
	if err := f.place(); err == nil {
		t.Fatal("a file was replaced")
	}
	if err := f.remove(); err != nil {
		t.Fatal(err)
	}
	holds(t, f.Final, "old")
	if err := os.Remove(f.Final); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := f.place(); err != nil {
			t.Fatal(err)
		}
		holds(t, f.Final, "restored")
	}
	if err := f.remove(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(f.Final); !os.IsNotExist(err) {
		t.Errorf("the file is still there: %v", err)
	}
}

// TestReadOwn refuses what somebody else put in the place of the definition.
func TestReadOwn(t *testing.T) {
	f := staged(t, "domain.xml")
	staging := filepath.Dir(f.Staged)
	if b, err := readOwn(staging, "domain.xml"); err != nil || string(b) != "restored" {
		t.Fatalf("read %q: %v", b, err)
	}
	if err := os.Symlink(f.Final, filepath.Join(staging, "link")); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(f.Final, filepath.Join(staging, "second")); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(filepath.Join(staging, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(staging, "other"), "other")
	if err := os.Chown(filepath.Join(staging, "other"), 65534, 65534); err != nil {
		t.Log("not root:", err)
		_ = os.Remove(filepath.Join(staging, "other"))
	}
	for _, name := range []string{"link", "second", "fifo", "other"} {
		if b, err := readOwn(staging, name); err == nil {
			t.Errorf("read %q from %s", b, name)
		}
	}
}

// TestDestination allows what is below a root, and tells nothing of the rest.
func TestDestination(t *testing.T) {
	base, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	root, outside := filepath.Join(base, "images"), filepath.Join(base, "secret")
	for _, d := range []string{filepath.Join(root, "sub"), outside} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(outside, filepath.Join(root, "out")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(root, filepath.Join(base, "alias")); err != nil {
		t.Fatal(err)
	}
	k := New(Deps{Destinations: func() []string { return []string{filepath.Join(base, "alias")} }})
	for asked, want := range map[string]string{
		"": root, root: root, root + "/": root, filepath.Join(root, "sub"): filepath.Join(root, "sub"),
		filepath.Join(base, "alias", "sub"): filepath.Join(root, "sub"),
	} {
		if got, err := k.destination(asked); err != nil || got != want {
			t.Errorf("%q: %q, %v, want %q", asked, got, err, want)
		}
	}
	var there, missing error
	for _, asked := range []string{outside, filepath.Join(root, "out"), root + "/../secret", root + "x", "/", "relative"} {
		if _, err := k.destination(asked); err == nil {
			t.Errorf("%q was allowed", asked)
		}
	}
	_, there = k.destination(outside)
	_, missing = k.destination(outside + "X")
	if strings.Replace(missing.Error(), "secretX", "secret", 1) != there.Error() {
		t.Errorf("the errors tell what there is: %v, %v", there, missing)
	}
}
