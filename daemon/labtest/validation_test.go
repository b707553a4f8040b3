//go:build lab

package labtest

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/virtbackup/virtbackup/dbus"
)

// validate tries a backup.
func (h *host) validate(id string, steps ...string) dbus.JobProperties {
	h.t.Helper()
	job, err := h.ValidateBackup(h.t.Context(), id, dbus.ValidateOptions{Steps: steps})
	if err != nil {
		h.t.Fatal(err)
	}
	return h.end(job)
}

// validated returns what is known of a backup that was tried.
func (h *host) validated(id string) dbus.BackupProperties {
	h.t.Helper()
	b, err := dbus.Get[dbus.BackupProperties](h.t.Context(), h.Client, id)
	if err != nil {
		h.t.Fatal(err)
	}
	return b
}

// noValidation holds that nothing is left of any.
func noValidation(t *testing.T) {
	t.Helper()
	if out := command(t, "", "virsh", "-q", "list", "--all", "--name"); strings.Contains(out, "virtbackup-validation") {
		t.Errorf("a domain is left: %s", out)
	}
	for _, pattern := range []string{
		"/var/lib/virtbackup/validation/*", "/run/virtbackup/validation/*", "/run/virtbackup/jobs/*", "/var/lib/libvirt/swtpm/*-8???-*",
		"/var/log/libvirt/qemu/virtbackup-validation-*", "/var/log/swtpm/libvirt/qemu/virtbackup-validation-*", "/var/lib/libvirt/qemu/nvram/virtbackup-validation*",
	} {
		if left, err := filepath.Glob(pattern); err != nil || len(left) > 0 {
			t.Errorf("%v are left, %v", left, err)
		}
	}
	if out := command(t, "", "sh", "-c", "ps -eo comm,args | grep -c '[v]irtbackup-validation' || :"); strings.TrimSpace(out) != "0" {
		t.Errorf("%s processes are left", out)
	}
}

// TestValidation tries backups of a guest: a full one and an increment, valid,
// and not valid because of what the guest has, or of what the repository has.
func TestValidation(t *testing.T) {
	h, g := newHost(t), newGuest(t, "qcow2:64M:fs", "qcow2:8M")
	g.run("sh", "-c", "echo hello >/mnt/vda/hello && sync")
	full := h.backup(g, dbus.BackupOptions{})
	g.run("sh", "-c", "echo later >/mnt/vda/later && sync")
	increment := h.backup(g, dbus.BackupOptions{})
	held := g.snapshot()
	for _, b := range []dbus.BackupProperties{full, increment} {
		if err := h.validate(b.ID, "wait_for_boot").Err(); err != nil {
			t.Errorf("%s: %v", b.Kind, err)
		}
		if now := h.validated(b.ID); now.ValidationResult != dbus.ValidationResult("valid") || now.Validated.IsZero() {
			t.Errorf("%s: %+v", b.Kind, now)
		}
		noValidation(t)
	}
	// Nothing was changed by that, neither the backups nor the domain.
	h.chainIsExact(increment, held)
	if got := g.state(); got != "running" {
		t.Errorf("the domain is %s", got)
	}
	if out := command(t, "", "virtbackupctl", "domain", "list"); strings.Contains(out, "virtbackup-validation") {
		t.Errorf("a temporary domain is shown: %s", out)
	}
}

// TestValidationOfDamage tries a backup that is not what was written.
func TestValidationOfDamage(t *testing.T) {
	h, g := newHost(t), newGuest(t, "qcow2:64M:fs")
	b := h.backup(g, dbus.BackupOptions{})
	image := h.image(b, "vda")
	// The superblock of its file system, which the guest reads when it mounts it.
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	flipped := make([]byte, 1)
	for at := int64(1 << 16); at < info.Size(); at += 1 << 12 { // somewhere in each cluster
		if _, err := f.ReadAt(flipped, at+0x438); err != nil {
			break
		}
		if flipped[0] == 0x53 { // of ext4's magic number
			flipped[0] ^= 1
			if _, err := f.WriteAt(flipped, at+0x438); err != nil {
				t.Fatal(err)
			}
			break
		}
	}
	j := h.validate(b.ID, "wait_for_boot")
	if !errors.Is(j.Err(), dbus.ErrNotValid) || !strings.Contains(j.ErrorMessage, "not what was written") {
		t.Errorf("%s: %v", j.State, j.Err())
	}
	now := h.validated(b.ID)
	if now.ValidationResult != dbus.ValidationResult("not-valid") || now.State != dbus.BackupDamaged {
		t.Errorf("it is %s, %s: %s: %s", now.State, now.ValidationResult, now.ValidationStep, now.ValidationCause)
	}
	if next := h.backup(g, dbus.BackupOptions{}); next.Kind != dbus.KindFull {
		t.Errorf("the next backup is %s", next.Kind)
	}
	noValidation(t)
}
