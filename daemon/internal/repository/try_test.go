package repository

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestMountPointOfNothingIsNoRepository(t *testing.T) {
	root, _ := newRepository(t)
	marker := filepath.Join(root, NotMounted)
	if err := os.WriteFile(marker, nil, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(root, ourKey); !errors.Is(err, ErrNotMounted) {
		t.Errorf("opened: %v", err)
	}
	if _, err := Init(t.Context(), root); !errors.Is(err, ErrNotMounted) {
		t.Errorf("made one: %v", err)
	}
	if err := os.Remove(marker); err != nil {
		t.Fatal(err)
	}
	open(t, root, ourKey)
}

func TestTry(t *testing.T) {
	root := mountTmpfs(t, "64k")
	if _, err := Init(t.Context(), root); err != nil {
		t.Fatal(err)
	}
	r := open(t, root, ourKey)
	for range 2 {
		if err := r.Try(); err != nil {
			t.Fatal(err)
		}
	}
	if left, err := os.ReadDir(filepath.Join(root, stagingName)); err != nil || len(left) > 0 {
		t.Errorf("it left %v, %v", left, err)
	}
	filler, err := os.Create(filepath.Join(root, "filler"))
	if err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = filler.Write(make([]byte, 4096))
	}
	filler.Close()
	if err := r.Try(); !errors.Is(err, ErrNoSpace) {
		t.Errorf("when it is full: %v", err)
	}
	if err := os.Remove(filler.Name()); err != nil {
		t.Fatal(err)
	}
	if err := r.Try(); err != nil {
		t.Errorf("when it is not any more: %v", err)
	}
	if err := unix.Mount("", root, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	if err := r.Try(); !errors.Is(err, ErrReadOnly) {
		t.Errorf("when it is read-only: %v", err)
	}
}
