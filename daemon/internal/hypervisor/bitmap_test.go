package hypervisor

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// To kill qemu-img while it has an image open for writing leaves all bitmaps
// of the image inconsistent.
func TestRemovingABitmapIsNotCutOff(t *testing.T) {
	real, err := exec.LookPath("qemu-img")
	if err != nil {
		t.Fatal(err)
	}
	directory := t.TempDir()
	image := filepath.Join(directory, "a.qcow2")
	for _, args := range [][]string{
		{"create", "-q", "-f", "qcow2", image, "1M"}, {"bitmap", "--add", image, "virtbackup-1"}, {"bitmap", "--add", image, "foreign"},
	} {
		if out, err := exec.CommandContext(t.Context(), real, args...).CombinedOutput(); err != nil {
			t.Fatalf("qemu-img %v: %v: %s", args, err, out)
		}
	}
	begun, goOn := filepath.Join(directory, "begun"), filepath.Join(directory, "go")
	for _, fifo := range []string{begun, goOn} {
		if err := unix.Mkfifo(fifo, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	// The real one, which waits for us before it writes.
	script := "#!/bin/sh\nif [ $1 = bitmap ]; then echo >" + begun + "; read -r _ <" + goOn + "; fi\nexec " + real + ` "$@"` + "\n"
	if err := os.WriteFile(filepath.Join(directory, "qemu-img"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", directory+":"+os.Getenv("PATH"))
	held, err := os.OpenFile(goOn, os.O_RDWR, 0) // waits for no reader
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		_, _ = os.ReadFile(begun)
		cancel()
		_, _ = held.WriteString("go\n")
	}()
	dom := Domain{Disks: []Disk{{Target: "vda", Device: "disk", Source: image, Format: "qcow2"}}}
	if err := removeOffline(ctx, dom, "virtbackup-1"); err != nil {
		t.Error(err)
	}
	info, err := imageInfo(t.Context(), image, "qcow2")
	left := info.Specific.Data.Bitmaps
	if err != nil || len(left) != 1 || left[0].Name != "foreign" || !left[0].consistent() {
		t.Errorf("bitmaps %+v, error %v", left, err)
	}
	if err := removeOffline(ctx, dom, "foreign"); !errors.Is(err, context.Canceled) {
		t.Errorf("begun after its context had ended: %v", err)
	}
}
