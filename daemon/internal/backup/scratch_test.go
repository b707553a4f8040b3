package backup

import (
	"encoding/json"
	"errors"
	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/virtbackup/virtbackup/dbus"
)

func TestMakeImage(t *testing.T) {
	path := filepath.Join(t.TempDir(), "vda.qcow2")
	const size = 123 * 512
	if err := hypervisor.MakeImage(t.Context(), path, size, os.Getuid(), os.Getgid()); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm() != 0o600 {
		t.Errorf("mode is %o", info.Mode().Perm())
	}
	out, err := exec.CommandContext(t.Context(), "qemu-img", "info", "-f", "qcow2", "--output=json", path).Output()
	if err != nil {
		t.Fatal(err)
	}
	var image struct {
		Size uint64 `json:"virtual-size"`
	}
	if err := json.Unmarshal(out, &image); err != nil || image.Size != size {
		t.Errorf("virtual size is %d (%v), want %d", image.Size, err, size)
	}
	if err := hypervisor.MakeImage(t.Context(), path, size, os.Getuid(), os.Getgid()); !errors.Is(err, fs.ErrExist) {
		t.Errorf("an image that is there was taken: %v", err)
	}
}

func TestQcow2Header(t *testing.T) {
	for want, compat := range map[uint32]string{2: "0.10", 3: "1.1"} {
		path := filepath.Join(t.TempDir(), "image")
		for i, args := range [][]string{{"create", "-q", "-f", "qcow2", "-o", "compat=" + compat, path, "1M"}, {"snapshot", "-c", "one", path}, {"snapshot", "-d", "one", path}} {
			if out, err := exec.CommandContext(t.Context(), "qemu-img", args...).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			version, snapshots, err := qcow2Header(path)
			if err != nil || version != want || snapshots != uint32(i%2) {
				t.Errorf("compat=%s, after %s: version %d, %d snapshots (%v)", compat, args[0], version, snapshots, err)
			}
		}
	}
}

func TestRemoveScratch(t *testing.T) {
	directory := t.TempDir()
	own := filepath.Join(directory, "01M7ZDF22CST13SYGG9CJXZ56M")
	if err := os.Mkdir(own, 0o711); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(own, "vda.qcow2"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 { // again when there is nothing
		if err := removeScratch(directory, filepath.Base(own)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat(own); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it is still there: %v", err)
	}
}

func TestClaim(t *testing.T) {
	k := New(Deps{})
	release, err := k.claim(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	if _, free := k.tryClaim("a"); free {
		t.Error("a domain was claimed twice")
	}
	other, free := k.tryClaim("b")
	if !free {
		t.Error("another domain was not free")
	}
	other()
	waited := make(chan error)
	go func() {
		again, err := k.claim(t.Context(), "a")
		if err == nil {
			again()
		}
		waited <- err
	}()
	release()
	if err := <-waited; err != nil {
		t.Errorf("the one who waited got %v", err)
	}
}

func TestScratchIsSetAside(t *testing.T) {
	for want, used := range map[uint64][]uint64{100: nil, 200: {0}, 230: {70, 0, 200}, 101: {99, 100}} {
		if got := setAsideNow(100, used); got != want {
			t.Errorf("%v: %d, want %d", used, got, want)
		}
	}
	directory := t.TempDir()
	k := New(Deps{})
	if err := k.setAside(filepath.Join(directory, "one"), 1<<20); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(directory, "one", "vda.qcow2"), make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := allocated(filepath.Join(directory, "one")); got < 1<<20 {
		t.Errorf("%d bytes are allocated", got)
	}
	err := k.setAside(filepath.Join(directory, "two"), 1<<60)
	if !errors.Is(err, dbus.ErrLimitsExceeded) || !strings.Contains(err.Error(), "for each of 2 backups") {
		t.Errorf("space that nobody has was set aside: %v", err)
	}
	if _, err := os.Stat(filepath.Join(directory, "two")); err == nil {
		t.Error("a directory was made")
	}
}
