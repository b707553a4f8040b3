package repository

import (
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// mountTmpfs mounts a tmpfs of so many bytes for the time of a test.
func mountTmpfs(t *testing.T, size string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting a file system needs root")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func TestFullRepository(t *testing.T) {
	root := mountTmpfs(t, "64k")
	if _, err := Init(t.Context(), root); err != nil {
		t.Fatal(err)
	}
	r := open(t, root, ourKey)
	mustBackup(t, r, idA, "")
	free, total, err := r.Space()
	if err != nil || total != 64<<10 || free >= total {
		t.Errorf("free %d of %d (error %v)", free, total, err)
	}
	filler, err := os.Create(root + "/filler")
	if err != nil {
		t.Fatal(err)
	}
	// Leave so many pages that the failure comes at each step in turn.
	for pages := range 6 {
		left := int64(pages * os.Getpagesize())
		if err := filler.Truncate(0); err != nil {
			t.Fatal(err)
		}
		free, _, err := r.Space()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := filler.Write(make([]byte, int64(free)-left)); err != nil {
			t.Fatal(err)
		}
		err = makeBackup(t.Context(), r, idB, idA)
		if pages < 4 && !errors.Is(err, ErrNoSpace) && !errors.Is(err, unix.ENOSPC) {
			t.Errorf("with %d pages left: %v", pages, err)
		}
		if err := r.Discard(testDomain, idB); err != nil {
			t.Fatal(err)
		}
		if _, err := r.Manifest(testDomain, idA); err != nil {
			t.Error(err)
		}
		if err == nil {
			continue
		}
		if err := r.Collect(t.Context(), func(string) bool { return false }); err != nil {
			t.Fatal(err)
		}
	}
}

func TestReadOnlyRepository(t *testing.T) {
	root := mountTmpfs(t, "1m")
	if _, err := Init(t.Context(), root); err != nil {
		t.Fatal(err)
	}
	mustBackup(t, open(t, root, ourKey), idA, "")
	if err := unix.Mount("", root, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	r := open(t, root, ourKey)
	if ro, err := r.ReadOnly(); err != nil || !ro {
		t.Errorf("read-only is %v (error %v)", ro, err)
	}
	if _, err := r.Claim(testDomain, idB); !errors.Is(err, ErrReadOnly) {
		t.Errorf("Claim: %v", err)
	}
	if _, err := r.Stage(idB); !errors.Is(err, ErrReadOnly) {
		t.Errorf("Stage: %v", err)
	}
	checkWhole(t, root, r, idA)
}
