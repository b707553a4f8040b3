//go:build lab

package mountunit

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func command(t *testing.T, name string, arguments ...string) string {
	t.Helper()
	out, err := exec.Command(name, arguments...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v: %s", name, arguments, err, out)
	}
	return strings.TrimSpace(string(out))
}

// loopDevice is a block device with an ext4 on it.
func loopDevice(t *testing.T) string {
	t.Helper()
	image := filepath.Join(t.TempDir(), "image")
	command(t, "truncate", "--size=16M", image)
	command(t, "mkfs.ext4", "-q", image)
	device := command(t, "losetup", "--find", "--show", image)
	t.Cleanup(func() { command(t, "losetup", "--detach", device) })
	return device
}

func TestMount(t *testing.T) {
	var s Systemd
	ctx := t.Context()
	directory := filepath.Join(t.TempDir(), "mounts")
	where := filepath.Join(directory, "one")
	errorsFile := filepath.Join(t.TempDir(), "errors")
	m := Mount{Where: where, What: loopDevice(t), Type: "ext4", Options: "nosuid,nodev,noexec", Description: "test", Timeout: 10 * time.Second, Errors: errorsFile}
	t.Cleanup(func() { _ = s.Unmount(context.Background(), where, time.Second) })

	bad := m
	bad.Type = "xfs"
	if err := s.Mount(ctx, bad); err == nil || errors.Is(err, ErrTimeout) {
		t.Fatalf("what is no xfs was mounted as one: %v", err)
	}
	if said, err := os.ReadFile(errorsFile); err != nil || !strings.Contains(string(said), "wrong fs type") {
		t.Errorf("mount(8) said %q, %v", said, err)
	}
	if state, err := s.State(ctx, where); err != nil || state.Mounted {
		t.Fatalf("%+v, %v", state, err)
	}
	if err := s.Mount(ctx, m); err != nil { // after a failure
		t.Fatal(err)
	}
	if options := command(t, "findmnt", "-no", "OPTIONS", where); !strings.Contains(options, "nosuid,nodev,noexec") {
		t.Errorf("it is mounted with %s", options)
	}
	if err := s.Mount(ctx, m); !errors.Is(err, ErrMounted) {
		t.Errorf("mounted twice: %v", err)
	}
	if all, err := s.Below(ctx, directory); err != nil || len(all) != 1 || all[0].Where != where {
		t.Errorf("below it there is %+v, %v", all, err)
	}
	used, err := os.Create(filepath.Join(where, "used"))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Unmount(ctx, where, 10*time.Second); err == nil {
		t.Error("what is in use was unmounted")
	}
	used.Close()
	if err := s.Unmount(ctx, where, 10*time.Second); err != nil {
		t.Fatal(err)
	}
	if err := s.Unmount(ctx, where, 10*time.Second); err != nil {
		t.Errorf("what is not mounted cannot be unmounted: %v", err)
	}
	if all, err := s.Below(ctx, directory); err != nil || len(all) != 0 {
		t.Errorf("below it there is %+v, %v", all, err)
	}
}
