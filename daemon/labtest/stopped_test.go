//go:build lab

package labtest

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
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

// TestStoppedStates is about domains that are off in other ways than by a clean
// end on one image file.
func TestStoppedStates(t *testing.T) {
	h := newHost(t)
	t.Run("saved", func(t *testing.T) {
		g := defineGuest(t, "qcow2:8M")
		h.in(t).backup(g, dbus.BackupOptions{})
		command(t, "", "virsh", "-q", "start", "--paused", g.name)
		g.io("vda", "write -P 1 1M 64k")
		command(t, "", "virsh", "-q", "managedsave", g.name, "--paused")
		want := g.snapshot()
		b := h.backup(g, dbus.BackupOptions{})
		if b.Consistency != dbus.ConsistencyCrash || foundBy(b, "vda") != "cbt" {
			t.Errorf("it is %s, found by %s", b.Consistency, foundBy(b, "vda"))
		}
		h.chainIsExact(b, want)
		command(t, "", "virsh", "-q", "start", g.name) // restores
		command(t, "", "virsh", "-q", "resume", g.name)
		g.io("vda", "write -P 2 2M 64k")
		want = g.snapshot()
		b = h.backup(g, dbus.BackupOptions{})
		if foundBy(b, "vda") != "cbt" {
			t.Errorf("after the restore: %s", foundBy(b, "vda"))
		}
		h.chainIsExact(b, want)
		h.nothingLeft(g)
	})
	t.Run("block device", func(t *testing.T) {
		file := filepath.Join("/var/tmp", filepath.Base(fresh(t, "/var/tmp"))+".img")
		command(t, "", "truncate", "-s", "8M", file)
		loop := command(t, "", "losetup", "--find", "--show", file)
		t.Cleanup(func() { command(t, "", "losetup", "-d", loop); _ = os.Remove(file) })
		device := `<disk type='block' device='disk'><driver name='qemu' type='raw'/><source dev='` + loop + `'/><target dev='vda' bus='virtio'/></disk>`
		g := defineBare(t, "stopped-block", device)
		command(t, "", "qemu-io", "-f", "raw", "-c", "write -P 1 0 1M", loop)
		b := h.in(t).backup(g, dbus.BackupOptions{})
		h.chainIsExact(b, snapshot{"vda": rawCopy(t, loop)})
		command(t, "", "qemu-io", "-f", "raw", "-c", "write -P 2 1M 64k", loop)
		b = h.backup(g, dbus.BackupOptions{})
		if b.Disks[0].Changes != dbus.TrackingDigest || b.Disks[0].StoredBytes > 1<<20 {
			t.Errorf("%s, %d bytes", foundBy(b, "vda"), b.Disks[0].StoredBytes)
		}
		h.chainIsExact(b, snapshot{"vda": rawCopy(t, loop)})
	})
	t.Run("firmware", func(t *testing.T) {
		nvram := filepath.Join(fresh(t, "/var/lib/libvirt/images"), "nvram")
		if err := os.WriteFile(nvram, []byte("variables"), 0o600); err != nil {
			t.Fatal(err)
		}
		g := defineGuest(t, "qcow2:4M")
		definition := command(t, "", "virsh", "-q", "dumpxml", "--inactive", g.name)
		definition = strings.Replace(definition, "</os>", "<loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE.fd</loader><nvram>"+nvram+"</nvram></os>", 1)
		command(t, definition, "virsh", "-q", "define", "/dev/stdin")
		b := h.in(t).backup(g, dbus.BackupOptions{})
		got, err := os.ReadFile(filepath.Join(h.path, b.DomainUUID, b.ID, "nvram"))
		if err != nil || string(got) != "variables" {
			t.Errorf("the variable store of the backup is %q, %v", got, err)
		}
	})
	t.Run("base that is no file", func(t *testing.T) {
		g := defineGuest(t, "qcow2:4M")
		command(t, "", "qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "nbd://127.0.0.1/x", "-F", "raw", g.disks()[0].file)
		j := h.in(t).end(h.start(g, dbus.BackupOptions{}))
		if !errors.Is(j.Err(), dbus.ErrUnsupported) || !strings.Contains(j.Err().Error(), "vda") {
			t.Errorf("the job failed with: %v", j.Err())
		}
	})
}

// rawCopy copies what a block device holds.
func rawCopy(t *testing.T, device string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "raw")
	command(t, "", "qemu-img", "convert", "-f", "raw", "-O", "raw", device, file)
	return file
}
