//go:build lab

package labtest

import (
	"encoding/json"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/virtbackup/virtbackup/dbus"
)

// whileOn starts the guest without a system in it, lets fn write to its disks,
// and stops it again.
func (g *guest) whileOn(fn func()) {
	g.t.Helper()
	command(g.t, "", "virsh", "-q", "start", "--paused", g.name)
	fn()
	command(g.t, "", "virsh", "-q", "destroy", g.name)
}

// edit has qemu-io change an image while its domain is off.
func (g *guest) edit(target string, commands ...string) {
	g.t.Helper()
	for _, d := range g.disks() {
		if d.target != target {
			continue
		}
		args := []string{"-f", d.format}
		for _, c := range commands {
			args = append(args, "-c", c)
		}
		command(g.t, "", "qemu-io", append(args, d.file)...)
	}
}

// offlineBitmaps lists the bitmaps in an image whose domain is off.
func (g *guest) offlineBitmaps(target string) (names []string) {
	g.t.Helper()
	for _, d := range g.disks() {
		if d.target != target {
			continue
		}
		var info struct {
			Specific struct {
				Data struct {
					Bitmaps []struct{ Name string } `json:"bitmaps"`
				} `json:"data"`
			} `json:"format-specific"`
		}
		out := command(g.t, "", "qemu-img", "info", "-U", "--output=json", "-f", d.format, d.file)
		if err := json.Unmarshal([]byte(out), &info); err != nil {
			g.t.Fatal(err)
		}
		for _, b := range info.Specific.Data.Bitmaps {
			names = append(names, b.Name)
		}
	}
	return names
}

// foundBy is how the changes of a disk were found: "full", or "cbt", "digest" with
// the cause why it was not cbt.
func foundBy(b dbus.BackupProperties, target string) string {
	i := slices.IndexFunc(b.Disks, func(d dbus.BackupDisk) bool { return d.Target == target })
	if i < 0 {
		return "missing"
	}
	if d := b.Disks[i]; d.Changes != "" {
		return strings.TrimSpace(string(d.Changes) + " " + d.Cause)
	}
	return "full"
}

// TestStopped makes a chain of a domain that is off, with runs between.
func TestStopped(t *testing.T) {
	h, g := newHost(t), defineGuest(t, "qcow2:16M", "raw:4M", "qcow2:8M")
	// vdc gets a base.
	vdc := g.disks()[2].file
	base := vdc + ".base"
	command(t, "", "qemu-img", "create", "-q", "-f", "qcow2", base, "8M")
	command(t, "", "qemu-io", "-f", "qcow2", "-c", "write -P 9 0 1M", base)
	command(t, "", "qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", vdc)
	t.Cleanup(func() { _ = os.Remove(base) })
	g.edit("vda", "write -P 1 0 4M", "write -P 2 15M 1M")
	g.edit("vdb", "write -P 3 1M 1M")

	var backups []dbus.BackupProperties
	var held []snapshot
	backup := func(vda, vdb, vdc string) {
		t.Helper()
		held = append(held, g.snapshot())
		b := h.backup(g, dbus.BackupOptions{})
		backups = append(backups, b)
		for target, want := range map[string]string{"vda": vda, "vdb": vdb, "vdc": vdc} {
			if got := foundBy(b, target); got != want {
				t.Errorf("backup %d: %s is %q, want %q", len(backups), target, got, want)
			}
		}
		if off := g.state() == "shut off"; off != (b.Consistency == dbus.ConsistencyOff) {
			t.Errorf("backup %d is %s consistent", len(backups), b.Consistency)
		}
	}
	backup("full", "full", "full")
	backup("cbt", "digest raw-disk", "cbt") // nothing changed
	g.whileOn(func() {
		g.io("vda", "write -P 4 1M 64k", "write -z -u 0 64k")
		g.io("vdb", "write -P 5 0 4k")
		g.io("vdc", "write -P 6 512k 64k")
	})
	backup("cbt", "digest raw-disk", "cbt")
	g.edit("vda", "write -P 7 8M 64k")
	backup("digest changed-while-off", "digest raw-disk", "cbt")
	g.whileOn(func() { // the checkpoint that was made while it was off is good for one that runs
		g.io("vda", "write -P 8 9M 64k")
		backup("cbt", "digest raw-disk", "cbt")
		g.io("vda", "discard 9M 64k")
	})
	backup("cbt", "digest raw-disk", "cbt")
	for i, b := range backups {
		h.chainIsExact(b, held[i])
		h.restoreIsExact(b, held[i])
	}
	h.nothingLeft(g)
	for _, target := range []string{"vda", "vdc"} {
		if left := g.offlineBitmaps(target); len(left) != 1 {
			t.Errorf("%s has the bitmaps %v", target, left)
		}
	}
}
