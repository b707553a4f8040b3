//go:build lab

package labtest

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
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

// noValidation holds that nothing is left of any, once those have ended that the
// daemon may have begun by itself.
func noValidation(t *testing.T) {
	t.Helper()
	eventually(t, "nothing is left of validations", func() error {
		var left []string
		out, err := tryVirsh("list", "--all", "--name")
		if strings.Contains(out, "virtbackup-validation") {
			left = append(left, out)
		}
		for _, pattern := range []string{
			"/var/lib/virtbackup/validation/*", "/run/virtbackup/validation/*", "/var/lib/libvirt/swtpm/*-8???-*",
			"/var/log/libvirt/qemu/virtbackup-validation-*", "/var/log/swtpm/libvirt/qemu/virtbackup-validation-*", "/var/lib/libvirt/qemu/nvram/virtbackup-validation*",
		} {
			files, badPattern := filepath.Glob(pattern)
			left, err = append(left, files...), errors.Join(err, badPattern)
		}
		if out := command(t, "", "sh", "-c", "ps -eo comm,args | grep '[v]irtbackup-validation' || :"); out != "" {
			left = append(left, out)
		}
		if len(left) > 0 {
			err = errors.Join(err, fmt.Errorf("%v", left))
		}
		return err
	})
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
		if now := h.validated(b.ID); now.ValidationResult != "valid" || now.Validated.IsZero() {
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
	if now.ValidationResult != "not-valid" || now.State != dbus.BackupDamaged {
		t.Errorf("it is %s, %s: %s: %s", now.State, now.ValidationResult, now.ValidationStep, now.ValidationCause)
	}
	if next := h.backup(g, dbus.BackupOptions{}); next.Kind != dbus.KindFull {
		t.Errorf("the next backup is %s", next.Kind)
	}
	noValidation(t)
}

// TestValidationShow is what an administrator sees: an offering that compresses
// later and tries each backup by all steps.
func TestValidationShow(t *testing.T) {
	h, g := newHost(t), newGuest(t, "qcow2:64M:fs")
	g.run("sh", "-c", "echo hello >/mnt/vda/hello && sync")
	zstd, deferred, yes := dbus.CompressionZstd, dbus.CompressionDeferred, true
	steps := []string{"wait_for_boot", "check_filesystems", "execute_command", "screenshot", "judge_screen"}
	h.set(dbus.OfferingOptions{Overrides: dbus.Overrides{
		Settings: dbus.Settings{Compression: &zstd, CompressionTime: &deferred},
		Validation: dbus.Validation{
			Validate: &yes, ValidationSteps: &steps, ValidationCommand: new("/bin/cat"), ValidationArguments: &[]string{"/mnt/vda/hello"},
			ValidationExpected: new("aGVsbG8K"), ValidationScreenshotWait: new(uint32(2)),
		},
	}})
	assign(t, h, g)
	b := h.backup(g, dbus.BackupOptions{})
	eventually(t, "it is compressed and valid", func() error {
		now := h.validated(b.ID)
		if now.CompressionState != dbus.CompressionDone || now.ValidationResult == "" {
			return fmt.Errorf("it is %q and %q", now.CompressionState, now.ValidationResult)
		}
		return nil
	})
	picture := filepath.Join(fresh(t, "/var/tmp"), "screen.png")
	out := command(t, "", "virtbackupctl", "show", b.ID, "--screenshot", picture)
	t.Logf("%s", out)
	content, err := os.ReadFile(picture)
	if err != nil || !bytes.HasPrefix(content, []byte("\x89PNG")) {
		t.Errorf("the screenshot is no PNG: %v", err)
	}
	if dir := os.Getenv("TEST_KEEP"); dir != "" { // for somebody to look at
		command(t, "", "cp", picture, dir)
	}
	if now := h.validated(b.ID); now.ValidationResult != "valid" {
		t.Errorf("it is %s: %s: %s", now.ValidationResult, now.ValidationStep, now.ValidationCause)
	}
	list, err := h.Validations(t.Context(), b.ID, 10)
	if err != nil || len(list) != 1 || len(list[0].Findings) != len(steps) {
		t.Fatalf("%+v, %v", list, err)
	}
	for _, f := range list[0].Findings {
		t.Logf("%s: %s %s %q", f.Step, f.Verdict, f.Cause, f.Output)
		if f.Verdict != "valid" && f.Step != "judge_screen" {
			t.Errorf("%s is %s: %s", f.Step, f.Verdict, f.Cause)
		}
	}
	// What it is not.
	h.set(dbus.OfferingOptions{Overrides: dbus.Overrides{
		Validation: dbus.Validation{ValidationExpected: new("YnllCg==")},
	}})
	failsAs(t, h.validate(b.ID), dbus.ErrNotValid)
	if now := h.validated(b.ID); now.ValidationResult != "not-valid" || now.ValidationStep != "execute_command" || now.State != dbus.BackupComplete {
		t.Errorf("it is %s, %s: %s: %s", now.State, now.ValidationResult, now.ValidationStep, now.ValidationCause)
	}
	h.set(dbus.OfferingOptions{Overrides: dbus.Overrides{Validation: dbus.Validation{Validate: new(bool)}}}) // or the next one is tried as well
	if next := h.backup(g, dbus.BackupOptions{}); next.Kind != dbus.KindFull || !slices.Contains(next.Causes, "validation-failed") {
		t.Errorf("the next backup is %s: %v", next.Kind, next.Causes)
	}
	noValidation(t)
}

// bootSector writes a text on the screen, and halts.
func bootSector(text string) []byte {
	code := []byte{
		0x31, 0xc0, 0x8e, 0xd8, // xor ax, ax; mov ds, ax
		0xbe, 0x18, 0x7c, // mov si, text
		0xac, 0x08, 0xc0, 0x74, 0x09, // next: lodsb; or al, al; jz halt
		0xb4, 0x0e, 0xbb, 0x07, 0x00, 0xcd, 0x10, // mov ah, 0eh; mov bx, 7; int 10h
		0xeb, 0xf2, // jmp next
		0xf4, 0xeb, 0xfd, // halt: hlt; jmp halt
	}
	sector := append(append(code, text...), make([]byte, 512)...)[:512]
	sector[510], sector[511] = 0x55, 0xaa
	return sector
}

// TestValidationByScreen tries backups of a machine without an agent, which
// boots from its disk: by what its screen shows.
func TestValidationByScreen(t *testing.T) {
	configure(t, "[validation]\nscreenshot_wait = \"5s\"\n")
	h, g := newHost(t), defineGuest(t, "raw:1M", "qcow2:1M")
	// As it is sold: no kernel from outside, and no agent.
	text := command(t, "", "virsh", "dumpxml", "--inactive", g.name)
	for _, part := range []string{`(?s)<kernel>.*</cmdline>`, `(?s)<channel.*?</channel>`} {
		text = regexp.MustCompile(part).ReplaceAllString(text, "")
	}
	command(t, text, "virsh", "-q", "define", "/dev/stdin")
	disk := ""
	for _, d := range g.disks() {
		if d.target == "vda" {
			disk = d.file
		}
	}
	write := func(sector []byte) {
		f, err := os.OpenFile(disk, os.O_RDWR, 0)
		if err == nil {
			_, err = f.WriteAt(sector, 0)
			err = errors.Join(err, f.Sync(), f.Close())
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	write(bootSector("virtbackup: this disk is up"))
	good := h.backup(g, dbus.BackupOptions{})
	if err := h.validate(good.ID).Err(); err != nil {
		t.Error(err)
	}
	list, err := h.Validations(t.Context(), good.ID, 1)
	if err != nil || len(list) != 1 {
		t.Fatalf("%v, %v", list, err)
	}
	read := ""
	for _, f := range list[0].Findings {
		t.Logf("%s: %s %s %q", f.Step, f.Verdict, f.Cause, f.Output)
		read += f.Output
	}
	if !strings.Contains(read, "this disk is up") {
		t.Errorf("it was not read what the screen shows")
	}
	write(make([]byte, 512))
	bad := h.backup(g, dbus.BackupOptions{})
	failsAs(t, h.validate(bad.ID), dbus.ErrNotValid)
	if now := h.validated(bad.ID); now.ValidationStep != "judge_screen" || now.ValidationResult != "not-valid" {
		t.Errorf("it is %s: %s: %s", now.ValidationResult, now.ValidationStep, now.ValidationCause)
	}
	if next := h.backup(g, dbus.BackupOptions{}); next.Kind != dbus.KindFull || !slices.Contains(next.Causes, "validation-failed") {
		t.Errorf("the next backup is %s: %v", next.Kind, next.Causes)
	}
	noValidation(t)
}

// TestValidationWithoutRepository tries a backup whose repository is away.
func TestValidationWithoutRepository(t *testing.T) {
	h, g := newHost(t), newPausedGuest(t, "qcow2:4M")
	g.io("vda", "write -P 1 0 1M")
	b := h.backup(g, dbus.BackupOptions{})
	away := h.path + ".away"
	if err := os.Rename(h.path, away); err != nil {
		t.Fatal(err)
	}
	failsAs(t, h.validate(b.ID), dbus.ErrRepositoryUnavailable)
	now := h.validated(b.ID)
	if now.ValidationResult != "unable" || now.State != dbus.BackupComplete {
		t.Errorf("it is %s, %s: %s: %s", now.State, now.ValidationResult, now.ValidationStep, now.ValidationCause)
	}
	if err := os.Rename(away, h.path); err != nil {
		t.Fatal(err)
	}
	if next := h.backup(g, dbus.BackupOptions{}); next.Kind != dbus.KindIncremental {
		t.Errorf("the chain has ended: %s %v", next.Kind, next.Causes)
	}
	noValidation(t)
}

// TestValidationOfFirmware tries a backup of a machine with UEFI, a TPM and disks
// on two buses, whose domain is gone.
func TestValidationOfFirmware(t *testing.T) {
	h, g := newHost(t), &guest{t: t, name: filepath.Base(fresh(t, "/run/lab"))}
	command(t, "", "lab-domain", "create", g.name, "--disk", "qcow2:64M:fs", "--disk", "raw:8M:bus=scsi", "--uefi", "--memory", "384")
	removed := false
	t.Cleanup(func() {
		if !removed {
			command(t, "", "lab-domain", "remove", g.name)
		}
	})
	text := command(t, "", "virsh", "dumpxml", "--inactive", g.name)
	text = strings.Replace(text, "</devices>", fmt.Sprintf(tpmXML, "")+"</devices>", 1)
	command(t, text, "virsh", "-q", "define", "/dev/stdin")
	g.uuid = command(t, "", "virsh", "domuuid", g.name)
	awaitDomain(t, g.name)
	g.boot()
	g.run("sh", "-c", "echo hello >/mnt/vda/hello && sync")
	b := h.backup(g, dbus.BackupOptions{})
	now := h.validated(b.ID)
	if len(now.Disks) != 2 {
		t.Fatalf("%+v", now.Disks)
	}
	command(t, "", "lab-domain", "remove", g.name)
	removed = true
	if err := h.validate(b.ID, "wait_for_boot", "check_filesystems").Err(); err != nil {
		t.Error(err)
	}
	if now := h.validated(b.ID); now.ValidationResult != "valid" {
		t.Errorf("it is %s: %s: %s", now.ValidationResult, now.ValidationStep, now.ValidationCause)
	}
	noValidation(t)
}
