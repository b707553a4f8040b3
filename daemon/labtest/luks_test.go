//go:build lab

package labtest

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/virtbackup/virtbackup/dbus"
)

const luksPassword = "canary-of-the-encrypted-disk"

// luksDisk makes an encrypted image of some format, and libvirt's secret for it.
func luksDisk(t *testing.T, target, format string) (element, secret string) {
	t.Helper()
	directory := fresh(t, "/var/lib/libvirt/images")
	if err := os.Chmod(directory, 0o711); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(directory) })
	file := filepath.Join(directory, target+"."+format)
	args := []string{"create", "-q", "-f", "luks", "-o", "key-secret=key,iter-time=10"}
	if format == "qcow2" {
		args = []string{"create", "-q", "-f", "qcow2", "-o", "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10"}
	}
	args = append(args, "--object", "secret,id=key,data="+luksPassword, file, "8M")
	// qemu-img measures the processor to choose the key's iterations, and gives
	// up on one that is busy with something else.
	eventually(t, "qemu-img makes a LUKS image", func() error { return exec.CommandContext(t.Context(), "qemu-img", args...).Run() })
	secret = defineSecret(t, "<usage type='volume'><volume>"+file+"</volume></usage>", luksPassword)
	return fmt.Sprintf(`<disk type='file' device='disk'><driver name='qemu' type='%s'/><source file='%s'><encryption format='luks'>
		<secret type='passphrase' uuid='%s'/></encryption></source><target dev='%s' bus='virtio'/></disk>`, format, file, secret, target), secret
}

// mark is what a guest writes to encrypted disks; no two sectors of it are in
// any file.
const mark = 0xa7

// TestLUKS takes encrypted disks through a chain of a domain that is off, and
// through both kinds of restore: what is stored are the bytes of their files.
func TestLUKS(t *testing.T) {
	h := newHost(t)
	qcow2, secret := luksDisk(t, "vda", "qcow2")
	raw, _ := luksDisk(t, "vdb", "raw")
	g := defineBare(t, "luks", qcow2, raw)
	write := func(offset string) {
		t.Helper()
		virsh(t, "start", g.name)
		for _, target := range []string{"vda", "vdb"} {
			g.io(target, fmt.Sprintf("write -P %d %s 256k", mark, offset))
		}
		virsh(t, "destroy", g.name)
	}
	var chain []dbus.BackupProperties
	var files []map[string][]byte
	keep := func(kind dbus.BackupKind) {
		t.Helper()
		b := h.backup(g, dbus.BackupOptions{})
		if b.Kind != kind {
			t.Errorf("backup %d is %s: %v", len(chain), b.Kind, b.Causes)
		}
		held := map[string][]byte{}
		for _, d := range g.disks() {
			held[d.target] = readFile(t, d.file)
		}
		chain, files = append(chain, b), append(files, held)
	}
	write("0")
	write("4M") // no later write makes the images longer
	keep(dbus.KindFull)
	keep(dbus.KindIncremental)
	if stored := chain[1].StoredBytes; stored > chain[0].StoredBytes/4 {
		t.Errorf("the increment without changes has %d bytes, the full backup %d", stored, chain[0].StoredBytes)
	}
	write("128k")
	keep(dbus.KindIncremental)
	h.nowhereInClear()
	h.holdsNoSecret([]byte(luksPassword))
	for i, b := range chain {
		t.Run(fmt.Sprintf("new domain of backup %d", i), func(t *testing.T) { h.in(t).testNewLUKS(t, b, files[i], i == 0) })
	}

	if err := h.outcome(h.RestoreInPlace(t.Context(), chain[0].ID, dbus.RestoreInPlaceOptions{})); err != nil {
		t.Fatal(err)
	}
	areTheFiles(t, g.name, files[0])
	virsh(t, "start", g.name)
	g.io("vda", fmt.Sprintf("read -P %d 0 256k", mark))
	virsh(t, "destroy", g.name)

	virsh(t, "secret-undefine", secret)
	plan, err := h.PlanRestore(t.Context(), chain[0].ID, dbus.PlanRestoreOptions{Name: "luks-3"})
	if text := strings.Join(plan.Warnings, ";"); err != nil || !strings.Contains(text, "disk vda is encrypted with libvirt's secret "+secret+", which is not here") {
		t.Errorf("the plan warns %q, %v", text, err)
	}
}

func (h *host) testNewLUKS(t *testing.T, b dbus.BackupProperties, files map[string][]byte, start bool) {
	name := "luks-restored"
	job, err := h.RestoreBackup(t.Context(), b.ID, name, dbus.RestoreOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := h.end(job).Err(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = exec.CommandContext(context.Background(), "virsh", "-q", "destroy", name).Run()
		for _, d := range disksOf(t, name) {
			_ = os.Remove(d.file)
		}
		command(t, "", "virsh", "-q", "undefine", name)
	})
	areTheFiles(t, name, files)
	if start {
		virsh(t, "start", name)
		g := &guest{t: t, name: name}
		g.io("vda", fmt.Sprintf("read -P %d 0 256k", mark))
		g.io("vdb", fmt.Sprintf("read -P %d 4M 256k", mark))
	}
}

// areTheFiles compares the files of a domain's disks with what they should be,
// byte by byte.
func areTheFiles(t *testing.T, name string, want map[string][]byte) {
	t.Helper()
	disks := disksOf(t, name)
	if len(disks) != len(want) {
		t.Errorf("%s has %d disks instead of %d", name, len(disks), len(want))
	}
	for _, d := range disks {
		if !bytes.Equal(readFile(t, d.file), want[d.target]) {
			t.Errorf("%s of %s is not the file that was backed up", d.target, name)
		}
	}
}

// nowhereInClear looks for what the guest wrote in the repository.
func (h *host) nowhereInClear() {
	h.t.Helper()
	clear := bytes.Repeat([]byte{mark}, 1024)
	images, err := filepath.Glob(filepath.Join(h.path, "*/*/*.qcow2"))
	if err != nil || len(images) == 0 {
		h.t.Errorf("the repository has the images %v, %v", images, err)
	}
	for _, path := range images {
		if bytes.Contains(readFile(h.t, path), clear) {
			h.t.Errorf("%s has in clear what the guest wrote", path)
		}
	}
}
