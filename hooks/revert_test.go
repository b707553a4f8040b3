package main

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestMakeRevertible has bitmaps of ours removed from an image with internal
// snapshots, and from no other; those of others stay.
func TestMakeRevertible(t *testing.T) {
	qemuImg := func(args ...string) string {
		t.Helper()
		out, err := exec.CommandContext(t.Context(), "qemu-img", args...).CombinedOutput()
		if err != nil {
			t.Fatalf("qemu-img %v: %v: %s", args, err, out)
		}
		return string(out)
	}
	var definition strings.Builder
	definition.WriteString("<domain><devices>")
	image := func(name string) string {
		path := filepath.Join(t.TempDir(), name)
		fmt.Fprintf(&definition, "<disk type='file' device='disk'><driver type='qcow2'/><source file='%s'/><target dev='%s'/></disk>", path, name)
		return path
	}
	with, without := image("vda"), image("vdb")
	image("vdc")                                             // is missing
	if err := unix.Mkfifo(image("vdd"), 0o600); err != nil { // nobody is at its other end
		t.Fatal(err)
	}
	definition.WriteString("</devices></domain>")
	for _, path := range []string{with, without} {
		qemuImg("create", "-q", "-f", "qcow2", path, "1M")
		for _, bitmap := range []string{"virtbackup-1", "virtbackup-2", "theirs"} {
			if path == with && bitmap == "theirs" {
				continue // it would keep the snapshot from being reverted to
			}
			qemuImg("bitmap", "--add", path, bitmap)
		}
	}
	qemuImg("snapshot", "-c", "before", with)
	late, cancel := context.WithCancel(t.Context())
	cancel()
	if err := makeRevertible(late, []byte(definition.String())); err == nil || !strings.Contains(qemuImg("info", with), "virtbackup-2") {
		t.Errorf("it begins when libvirt does not wait any more: %v", err)
	}
	if err := makeRevertible(t.Context(), []byte(definition.String())); err != nil {
		t.Fatal(err)
	}
	if out := qemuImg("info", with); strings.Contains(out, "virtbackup-") {
		t.Errorf("a bitmap is left: %s", out)
	}
	qemuImg("snapshot", "-a", "before", with)
	if out := qemuImg("info", without); !strings.Contains(out, "virtbackup-1") || !strings.Contains(out, "virtbackup-2") || !strings.Contains(out, "theirs") {
		t.Errorf("a bitmap was removed from an image without snapshots: %s", out)
	}
}
