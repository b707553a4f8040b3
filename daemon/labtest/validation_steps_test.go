//go:build lab

package labtest

import (
	"bytes"
	"errors"
	"image/png"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/virtbackup/virtbackup/dbus"
)

// redefine changes the definition of a guest that is off: pairs of what is
// there and what is to be.
func (g *guest) redefine(change ...string) {
	g.t.Helper()
	before := command(g.t, "", "virsh", "-q", "dumpxml", "--inactive", g.name)
	now := strings.NewReplacer(change...).Replace(before)
	if now == before {
		g.t.Fatalf("there is nothing to change:\n%s", before)
	}
	path := filepath.Join(fresh(g.t, "/var/tmp"), "domain.xml")
	if err := os.WriteFile(path, []byte(now), 0o600); err != nil {
		g.t.Fatal(err)
	}
	command(g.t, "", "virsh", "-q", "define", path)
}

// guestCommandLine is the kernel's, of the guests of the lab.
const guestCommandLine = "console=ttyS0 quiet panic=-1 "

// found returns what each step found when a backup was tried last.
func (h *host) found(id string) map[string]dbus.ValidationFinding {
	h.t.Helper()
	all, err := h.Validations(h.t.Context(), id, 1)
	if err != nil || len(all) != 1 {
		h.t.Fatal(all, err)
	}
	found := map[string]dbus.ValidationFinding{}
	for _, f := range all[0].Findings {
		found[f.Step] = f
	}
	return found
}

// TestValidationSteps has a guest with a file that says "hello" tried by all
// steps; then with a command of its own, and a port, that are not as they must be.
func TestValidationSteps(t *testing.T) {
	h, g := newHost(t), defineGuest(t, "qcow2:64M:fs")
	g.redefine(guestCommandLine, "console=tty0 ")
	g.boot()
	g.run("sh", "-c", "echo hello >/mnt/vda/hello && sync")
	all := []string{"wait_for_boot", "check_filesystems", "execute_command", "check_port", "screenshot", "judge_screen"}
	ok := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	offering, err := h.FindOffering(t.Context(), h.offering)
	ok(err)
	ok(h.UpdateOffering(t.Context(), offering, dbus.UpdateOfferingOptions{OfferingOptions: dbus.OfferingOptions{Overrides: dbus.Overrides{Validation: dbus.Validation{
		ValidationSteps: &all, ValidationScreenshotWait: new(uint32(4)), ValidationCommandTimeout: new(uint32(20)), ValidationPorts: &[]string{"2222"},
		ValidationCommand: new("sh"), ValidationArguments: &[]string{"-c", "nc -l -p 2222 </dev/null >/dev/null 2>&1 & cat /mnt/vda/hello"}, ValidationExpected: new("aGVsbG8="),
	}}}}))
	ok(h.AssignDomain(t.Context(), g.uuid, h.offering))
	b := h.backup(g, dbus.BackupOptions{})

	j := h.validate(b.ID)
	found := h.found(b.ID)
	if err := j.Err(); err != nil {
		t.Errorf("%v: %+v", err, found)
	}
	for _, step := range all {
		if f := found[step]; f.Verdict != dbus.VerdictValid {
			t.Errorf("%s: %+v", step, f)
		}
	}
	if out := found["execute_command"].Output; out != "hello\n" {
		t.Errorf("the command wrote %q", out)
	}
	if out := found["check_filesystems"].Output; !strings.Contains(out, "dmesg: no errors") || !strings.Contains(out, "ext4: 1 file systems") || !strings.Contains(out, "/mnt/vda were read") {
		t.Errorf("file systems: %s", out)
	}
	if out := found["judge_screen"].Output; !strings.Contains(out, "guest: up") {
		t.Errorf("the screen says\n%s", out)
	}
	h.screenshotIsKept(b)
	if page := command(t, "", "virtbackupctl", "show", b.ID); !strings.Contains(page, "Validation: valid") || !strings.Contains(page, "check_filesystems  valid") {
		t.Errorf("the page is\n%s", page)
	}
	noValidation(t)

	ok(h.SetOverrides(t.Context(), g.uuid, dbus.Overrides{Validation: dbus.Validation{
		ValidationCommand: new("cat"), ValidationArguments: &[]string{"/mnt/vda/hello"}, ValidationExpected: new("Z29vZGJ5ZQ=="),
		ValidationCommandTimeout: new(uint32(3)), ValidationSteps: &[]string{"wait_for_boot", "execute_command", "check_port"},
	}}, nil))
	if j := h.validate(b.ID); !errors.Is(j.Err(), dbus.ErrNotValid) || !strings.Contains(j.ErrorMessage, "execute_command") {
		t.Errorf("%s: %v", j.State, j.Err())
	}
	found = h.found(b.ID)
	if f := found["execute_command"]; f.Verdict != dbus.VerdictNotValid || f.Output != "hello\n" {
		t.Errorf("%+v", f)
	}
	if f := found["check_port"]; f.Verdict != dbus.VerdictNotValid || f.Cause != "nobody listens at port 2222 in the guest" {
		t.Errorf("%+v", f)
	}
	now := h.validated(b.ID)
	if now.ValidationResult != dbus.ValidationNotValid || now.ValidationStep != "execute_command" || now.State != dbus.BackupComplete {
		t.Errorf("%+v", now)
	}
	if next := h.backup(g, dbus.BackupOptions{}); next.Kind != dbus.KindFull || !slices.Contains(next.Causes, "validation-failed") {
		t.Errorf("the next backup is %s, because of %v", next.Kind, next.Causes)
	}
	noValidation(t)
}

// screenshotIsKept has the screenshot of a backup written by virtbackupctl, and
// looks at it in the repository, where it is nobody's damage.
func (h *host) screenshotIsKept(b dbus.BackupProperties) {
	h.t.Helper()
	path := filepath.Join(fresh(h.t, "/var/tmp"), "screen.png")
	command(h.t, "", "virtbackupctl", "show", b.ID, "--screenshot", path)
	if out, err := exec.Command("virtbackupctl", "show", b.ID, "--screenshot", path).CombinedOutput(); err == nil || !bytes.Contains(out, []byte("--force")) {
		h.t.Errorf("it was written over: %s, %v", out, err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		h.t.Fatal(err)
	}
	picture, err := png.Decode(bytes.NewReader(data))
	if err != nil || picture.Bounds().Dx() < 640 {
		h.t.Errorf("the screenshot is no picture of a screen: %v", err)
	}
	beside, err := os.ReadFile(filepath.Join(h.path, b.DomainUUID, b.ID, "screenshot.png"))
	if err != nil || !bytes.Equal(beside, data) {
		h.t.Errorf("beside the backup is something else: %d and %d bytes, %v", len(beside), len(data), err)
	}
	job, err := h.VerifyBackup(h.t.Context(), b.ID)
	if err == nil {
		err = h.end(job).Err()
	}
	if err != nil {
		h.t.Errorf("the backup is no longer as it was: %v", err)
	}
}

// TestScreensThatFail tries backups of guests that do not start, which only
// their screens tell: a kernel without a root file system, and a disk that
// nothing can be started from.
func TestScreensThatFail(t *testing.T) {
	for _, test := range []struct {
		name   string
		wait   uint32 // until the screen shows it
		change []string
		cause  string
	}{
		{"panic", 12, []string{guestCommandLine, "console=tty0 rdinit=/none root=/dev/vda "}, "the screen says that the kernel panicked"},
		{"no system", 6, []string{"<kernel>/var/lib/libvirt/images/lab-vmlinuz</kernel>", "", "<initrd>/var/lib/libvirt/images/lab-initramfs</initrd>", "", "<cmdline>", "<!--", "</cmdline>", "-->"},
			"the screen says that the firmware found nothing to start"},
	} {
		t.Run(test.name, func(t *testing.T) {
			h, g := newHost(t), defineGuest(t, "qcow2:16M")
			g.redefine(test.change...)
			if err := h.AssignDomain(t.Context(), g.uuid, h.offering); err != nil {
				t.Fatal(err)
			}
			err := h.SetOverrides(t.Context(), g.uuid, dbus.Overrides{Validation: dbus.Validation{ValidationScreenshotWait: &test.wait}}, nil)
			if err != nil {
				t.Fatal(err)
			}
			b := h.backup(g, dbus.BackupOptions{})
			j := h.validate(b.ID, "screenshot", "judge_screen")
			now := h.validated(b.ID)
			if !errors.Is(j.Err(), dbus.ErrNotValid) || now.ValidationStep != "judge_screen" || !strings.HasPrefix(now.ValidationCause, test.cause) {
				t.Errorf("%v; %s, by %s: %s\n%s", j.Err(), now.ValidationResult, now.ValidationStep, now.ValidationCause, h.found(b.ID)["judge_screen"].Output)
			}
			h.screenshotIsKept(b)
			noValidation(t)
		})
	}
}

// TestFileSystemThatIsBroken tries a backup of a disk whose file system was
// broken before: the guest starts, and meets it when it looks.
func TestFileSystemThatIsBroken(t *testing.T) {
	h, g := newHost(t), newGuest(t, "raw:64M:fs")
	g.run("sh", "-c", "mkdir -p /mnt/vda/a/b && umount /mnt/vda")
	command(t, "", "lab-domain", "destroy", g.name)
	command(t, "", "debugfs", "-w", "-R", "set_inode_field /a/b checksum 0x1", g.disks()[0].file)
	b := h.backup(g, dbus.BackupOptions{})
	j := h.validate(b.ID, "wait_for_boot", "check_filesystems")
	f := h.found(b.ID)["check_filesystems"]
	if !errors.Is(j.Err(), dbus.ErrNotValid) || h.validated(b.ID).ValidationStep != "check_filesystems" || f.Cause != "directories cannot be read in the guest: Bad message" {
		t.Errorf("%v: %+v", j.Err(), f)
	}
	if now := h.validated(b.ID); now.State != dbus.BackupComplete { // it is what the disk held
		t.Errorf("the backup is %s", now.State)
	}
	noValidation(t)
}
