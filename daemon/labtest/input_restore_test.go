//go:build lab

package labtest

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/virtbackup/virtbackup/dbus"
)

// TestInputRestore asks for restores that cannot be.
func TestInputRestore(t *testing.T) {
	h, ctx := newHost(t), t.Context()
	g := startBare(t, "input-restore", bareDisk(t, "vda", "qcow2", ""), bareDisk(t, "vdb", "raw", ""))
	b := h.backup(g, dbus.BackupOptions{})
	const images = "/var/lib/libvirt/images"
	taken := filepath.Join(images, "input-taken-vda.qcow2")
	link := filepath.Join(images, "input-link")
	outside := fresh(t, "/srv")
	if err := os.WriteFile(taken, []byte("somebody's"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(outside, link); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = os.Remove(taken), os.Remove(link) })
	for _, c := range []struct {
		what, name string
		o          dbus.RestoreOptions
		words      []string
	}{
		{"a domain's name", g.name, dbus.RestoreOptions{}, []string{`"input-restore"`, "another name"}},
		{"a file that is there", "input-taken", dbus.RestoreOptions{}, []string{taken, "another name"}},
		{"outside", "input-new", dbus.RestoreOptions{Destination: outside}, []string{outside, "restore.destinations"}},
		{"outside by ..", "input-new", dbus.RestoreOptions{Destination: images + "/../../../.." + outside}, []string{"restore.destinations"}},
		{"outside by a link", "input-new", dbus.RestoreOptions{Destination: link}, []string{link, "restore.destinations"}},
		{"a name that begins so", "input-new", dbus.RestoreOptions{Destination: images + "-2"}, []string{images + "-2"}},
		{"missing", "input-new", dbus.RestoreOptions{Destination: images + "/missing"}, []string{"missing"}},
		{"relative", "input-new", dbus.RestoreOptions{Destination: "images"}, []string{`"images"`}},
		{"a disk that is not there", "input-new", dbus.RestoreOptions{Disks: []string{"vda", "vdz"}}, []string{b.ID, `"vdz"`}},
	} {
		refuses(t, c.what, h.outcome(h.RestoreBackup(ctx, b.ID, c.name, c.o)), dbus.ErrInvalidArgument, c.words...)
		plan, err := h.PlanRestore(ctx, b.ID, dbus.PlanRestoreOptions{Name: c.name, RestoreOptions: c.o})
		if err != nil || len(plan.Refusals) == 0 || !strings.Contains(strings.Join(plan.Refusals, ";"), c.words[0]) && c.words[0] != b.ID {
			t.Errorf("%s: the plan has the refusals %q, %v", c.what, plan.Refusals, err)
		}
	}
	for _, name := range oddNames {
		if name != "nobody" && name != "%s%n" {
			refuses(t, fmt.Sprintf("name %.20q", name), h.outcome(h.RestoreBackup(ctx, b.ID, name, dbus.RestoreOptions{})),
				dbus.ErrInvalidArgument, fmt.Sprintf("%q", name), "letters")
		}
	}
	_, err := h.RestoreBackup(ctx, "01JD8Q4M6Z3V5W7X9YABCDEFGH", "input-new", dbus.RestoreOptions{})
	refuses(t, "unknown backup", err, dbus.ErrNotFound, "01JD8Q4M6Z3V5W7X9YABCDEFGH")
	if content, err := os.ReadFile(taken); err != nil || string(content) != "somebody's" {
		t.Errorf("the file that was there holds %q, %v", content, err)
	}
	if left, err := os.ReadDir(outside); err != nil || len(left) > 0 {
		t.Errorf("outside there is %v, %v", left, err)
	}
	h.nothingRestored("input-new")
}

// TestInputRestoreInPlace asks for exchanges of disks in every state of a domain.
func TestInputRestoreInPlace(t *testing.T) {
	h, ctx := newHost(t), t.Context()
	g := startBare(t, "input-place", bareDisk(t, "vda", "qcow2", ""), bareDisk(t, "vdb", "raw", ""))
	want := g.snapshot()
	b := h.backup(g, dbus.BackupOptions{})
	place := func(disks ...string) error {
		t.Helper()
		return h.outcome(h.RestoreInPlace(ctx, b.ID, dbus.RestoreInPlaceOptions{Disks: disks}))
	}
	refuses(t, "running", place(), dbus.ErrInvalidArgument, `"input-place"`, "running", "shut it off")
	virsh(t, "suspend", g.name)
	refuses(t, "paused", place(), dbus.ErrInvalidArgument, `"input-place"`, "paused", "shut it off")
	virsh(t, "resume", g.name)
	virsh(t, "managedsave", g.name)
	refuses(t, "saved", place(), dbus.ErrInvalidArgument, `"input-place"`, "saved state", "managedsave-remove")
	virsh(t, "managedsave-remove", g.name)
	refuses(t, "unknown disk", place("vdz"), dbus.ErrInvalidArgument, `"vdz"`)
	vda, vdb := g.disks()[0], g.disks()[1]

	virsh(t, "snapshot-create-as", g.name, "admin", "--disk-only", "--diskspec", "vda,file="+vda.file+".overlay", "--diskspec", "vdb,snapshot=no")
	refuses(t, "with a snapshot", place(), dbus.ErrInvalidArgument, `"input-place"`, "snapshots", `"admin"`, "new domain")
	virsh(t, "snapshot-delete", g.name, "admin", "--metadata")
	definition := strings.ReplaceAll(virsh(t, "dumpxml", g.name, "--inactive"), vda.file+".overlay", vda.file)
	command(t, definition, "virsh", "-q", "define", "/dev/stdin")

	virsh(t, "detach-disk", g.name, "vdb", "--config")
	refuses(t, "a disk that is gone", place(), dbus.ErrInvalidArgument, `"input-place"`, "vdb", "only the others")
	command(t, diskXML(vdb.file, "vdb", "raw", ""), "virsh", "-q", "attach-device", g.name, "/dev/stdin", "--config")

	// A file that has another name too: exchanging it would split the two.
	second := vdb.file + ".link"
	if err := os.Link(vdb.file, second); err != nil {
		t.Fatal(err)
	}
	refuses(t, "a file with two names", place(), dbus.ErrInvalidArgument, "vdb", "single name")
	if err := os.Remove(second); err != nil {
		t.Fatal(err)
	}

	// What a resized disk, and a replaced one, hold is given up: the disk is
	// again what the backup has of it.
	command(t, "", "qemu-img", "resize", "-q", "-f", "qcow2", vda.file, "16M")
	makeImage(t, vdb.file, "raw")
	if err := place(); err != nil {
		t.Fatal(err)
	}
	sameContent(t, "vda in place", "qcow2", vda.file, want["vda"])
	sameContent(t, "vdb in place", "raw", vdb.file, want["vdb"])
	virsh(t, "start", g.name)
	after := h.backup(g, dbus.BackupOptions{})
	if after.Kind != dbus.KindFull {
		t.Errorf("the backup after the restore is %s", after.Kind)
	}
	h.chainIsExact(after, want)
}
