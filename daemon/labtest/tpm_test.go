//go:build lab

package labtest

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/virtbackup/virtbackup/dbus"
)

const tpmXML = `<tpm model='tpm-crb'><backend type='emulator' version='2.0'>%s</backend></tpm>`

// tpmState is where libvirt has the state of a domain's TPM.
func tpmState(uuid string) string {
	return filepath.Join("/var/lib/libvirt/swtpm", uuid, "tpm2/tpm2-00.permall")
}

func readFile(t *testing.T, path string) []byte {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return content
}

// restamp gives a domain that is off another TPM state, as its guest could.
func restamp(t *testing.T, uuid string) []byte {
	t.Helper()
	before := readFile(t, tpmState(uuid))
	command(t, "", "setpriv", "--reuid=tss", "--regid=tss", "--clear-groups", "swtpm_setup", "--tpm2", "--overwrite",
		"--tpmstate", filepath.Dir(tpmState(uuid)), "--logfile", "/dev/null")
	after := readFile(t, tpmState(uuid))
	if bytes.Equal(before, after) {
		t.Fatal("the TPM's state did not change")
	}
	return after
}

// isSwtpms checks that a state is as libvirt makes it: swtpm can use it.
func isSwtpms(t *testing.T, uuid string) {
	t.Helper()
	tss, err := user.Lookup("tss")
	if err != nil {
		t.Fatal(err)
	}
	state := tpmState(uuid)
	for path, mode := range map[string]os.FileMode{state: 0o600, filepath.Dir(state): 0o700 | os.ModeDir} {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if owner := info.Sys().(*syscall.Stat_t).Uid; strconv.Itoa(int(owner)) != tss.Uid || info.Mode()&^0o040 != mode {
			t.Errorf("%s belongs to %d, with mode %v", path, owner, info.Mode())
		}
	}
}

// TestTPM takes the state of a TPM through backups of a running and of a stopped
// domain, and through each kind of restore.
func TestTPM(t *testing.T) {
	h, ctx := newHost(t), t.Context()
	g := startBare(t, "tpm", bareDisk(t, "vda", "qcow2", ""), bareDisk(t, "vdb", "raw", ""), fmt.Sprintf(tpmXML, ""))
	b := h.backup(g, dbus.BackupOptions{})
	state := readFile(t, tpmState(g.uuid))
	if got := h.file(b, "tpm/tpm2-00.permall"); !bytes.Equal(got, state) || len(state) == 0 {
		t.Fatalf("the backup has %d bytes of state, which are not the TPM's %d", len(got), len(state))
	}
	if left, err := filepath.Glob(filepath.Join(h.path, b.DomainUUID, b.ID, "tpm/*")); err != nil || len(left) != 1 {
		t.Errorf("the backup has %v, %v", left, err)
	}

	t.Run("new domain", func(t *testing.T) { h.in(t).testNewTPM(t, b, state) })
	virsh(t, "destroy", g.name)
	t.Run("in place", func(t *testing.T) {
		restamp(t, g.uuid)
		if err := h.in(t).outcome(h.RestoreInPlace(ctx, b.ID, dbus.RestoreInPlaceOptions{})); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(readFile(t, tpmState(g.uuid)), state) {
			t.Error("the TPM's state is not that of the backup")
		}
		isSwtpms(t, g.uuid)
	})
	t.Run("one disk in place", func(t *testing.T) {
		now := restamp(t, g.uuid)
		if err := h.in(t).outcome(h.RestoreInPlace(ctx, b.ID, dbus.RestoreInPlaceOptions{Disks: []string{"vdb"}})); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(readFile(t, tpmState(g.uuid)), now) {
			t.Error("the TPM's state was restored with one disk alone")
		}
	})
	// libvirt removes the state with the definition.
	t.Run("in place of nothing", func(t *testing.T) {
		definition := virsh(t, "dumpxml", g.name, "--inactive")
		virsh(t, "undefine", g.name)
		if _, err := os.Stat(tpmState(g.uuid)); err == nil {
			t.Fatal("the TPM's state was not removed")
		}
		command(t, definition, "virsh", "-q", "define", "/dev/stdin")
		awaitDomain(t, g.name)
		if err := h.in(t).outcome(h.RestoreInPlace(ctx, b.ID, dbus.RestoreInPlaceOptions{})); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(readFile(t, tpmState(g.uuid)), state) {
			t.Error("the TPM's state is not that of the backup")
		}
		isSwtpms(t, g.uuid)
	})
	t.Run("of a domain that is off", func(t *testing.T) {
		now := restamp(t, g.uuid)
		h := h.in(t)
		if got := h.file(h.backup(g, dbus.BackupOptions{}), "tpm/tpm2-00.permall"); !bytes.Equal(got, now) {
			t.Error("the backup does not have the TPM's state")
		}
	})
	virsh(t, "start", g.name)
	notMadeAnew(t, g.name, 1)
	eventually(t, "no file of a job is left", noFiles)
	if left, err := filepath.Glob("/var/lib/libvirt/swtpm/.virtbackup-*"); err != nil || len(left) > 0 {
		t.Errorf("directories are left: %v, %v", left, err)
	}
}

// TestNeverStarted backs up a domain whose variable store and TPM are yet to be
// made, and restores it.
func TestNeverStarted(t *testing.T) {
	h := newHost(t)
	g := defineBare(t, "never-started", bareDisk(t, "vda", "qcow2", ""), fmt.Sprintf(tpmXML, ""))
	const firmware = `<loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.fd</loader>
		<nvram template='/usr/share/OVMF/OVMF_VARS_4M.fd'>/var/lib/libvirt/qemu/nvram/never-started.fd</nvram></os><features><acpi/></features>`
	command(t, strings.Replace(virsh(t, "dumpxml", g.name), "</os>", firmware, 1), "virsh", "-q", "define", "/dev/stdin")
	content := filepath.Join(t.TempDir(), "vda")
	command(t, "", "qemu-img", "convert", "-f", "qcow2", "-O", "raw", g.disks()[0].file, content)
	b := h.backup(g, dbus.BackupOptions{})
	for _, name := range []string{"nvram", "tpm"} {
		if _, err := os.Stat(filepath.Join(h.path, b.DomainUUID, b.ID, name)); err == nil {
			t.Errorf("the backup has %s", name)
		}
	}
	h.restoreIsExact(b, snapshot{"vda": content})
}

// notMadeAnew checks how many times libvirt had the TPM of a domain made: it
// does so when it finds no state.
func notMadeAnew(t *testing.T, name string, times int) {
	t.Helper()
	log := string(readFile(t, "/var/log/swtpm/libvirt/qemu/"+name+"-swtpm.log"))
	if made := strings.Count(log, "Starting vTPM manufacturing"); made != times {
		t.Errorf("the TPM of %s was made %d times instead of %d:\n%s", name, made, times, log)
	}
}

func (h *host) testNewTPM(t *testing.T, b dbus.BackupProperties, state []byte) {
	const name = "tpm-restored"
	job, err := h.RestoreBackup(t.Context(), b.ID, name, dbus.RestoreOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = exec.CommandContext(context.Background(), "virsh", "-q", "destroy", name).Run()
		for _, d := range disksOf(t, name) {
			_ = os.Remove(d.file)
		}
		command(t, "", "virsh", "-q", "undefine", name)
	})
	if err := h.end(job).Err(); err != nil {
		t.Fatal(err)
	}
	uuid := command(t, "", "virsh", "domuuid", name)
	if uuid == b.DomainUUID || !bytes.Equal(readFile(t, tpmState(uuid)), state) {
		t.Errorf("the TPM's state of %s is not that of the backup of %s", uuid, b.DomainUUID)
	}
	isSwtpms(t, uuid)
	_ = os.Remove("/var/log/swtpm/libvirt/qemu/" + name + "-swtpm.log")
	virsh(t, "start", name)
	notMadeAnew(t, name, 0)
}

// TestTPMSecret has a TPM whose state is encrypted: the backup has it as it is,
// and the restore says what is needed.
func TestTPMSecret(t *testing.T) {
	h, ctx := newHost(t), t.Context()
	const value = "canary-of-the-tpm"
	secret := defineSecret(t, "<usage type='vtpm'><name>tpm-secret</name></usage>", value)
	g := startBare(t, "tpm-secret", bareDisk(t, "vda", "qcow2", ""), fmt.Sprintf(tpmXML, "<encryption secret='"+secret+"'/>"))
	b := h.backup(g, dbus.BackupOptions{})
	if got := h.file(b, "tpm/tpm2-00.permall"); !bytes.Equal(got, readFile(t, tpmState(g.uuid))) {
		t.Error("the backup does not have the TPM's state as it is")
	}
	var manifest struct {
		Secrets []map[string]string `json:"secrets"`
	}
	if err := json.Unmarshal(h.file(b, "manifest.json"), &manifest); err != nil || len(manifest.Secrets) != 1 || manifest.Secrets[0]["uuid"] != secret {
		t.Errorf("the manifest names %v, %v", manifest.Secrets, err)
	}
	warns := func(words ...string) {
		t.Helper()
		plan, err := h.PlanRestore(ctx, b.ID, dbus.PlanRestoreOptions{Name: "tpm-secret-2"})
		warning := slices.IndexFunc(plan.Warnings, func(w string) bool { return strings.Contains(w, secret) })
		if err != nil || warning < 0 {
			t.Fatalf("the plan does not name the secret: %v, %v", plan.Warnings, err)
		}
		for _, word := range words {
			if !strings.Contains(plan.Warnings[warning], word) {
				t.Errorf("%q does not say %q", plan.Warnings[warning], word)
			}
		}
	}
	warns("encrypted", "TPM")
	virsh(t, "destroy", g.name)
	virsh(t, "secret-undefine", secret)
	warns("not here", "secret-define")
	h.holdsNoSecret([]byte(value))
}

// defineSecret gives libvirt a secret, and returns its UUID.
func defineSecret(t *testing.T, usage, value string) string {
	t.Helper()
	words := strings.Fields(command(t, "<secret private='yes'>"+usage+"</secret>", "virsh", "secret-define", "/dev/stdin"))
	secret := words[1] // Secret UUID created
	t.Cleanup(func() { _ = exec.CommandContext(context.Background(), "virsh", "-q", "secret-undefine", secret).Run() })
	file := filepath.Join(t.TempDir(), "value")
	if err := os.WriteFile(file, []byte(value), 0o600); err != nil {
		t.Fatal(err)
	}
	virsh(t, "secret-set-value", secret, "--plain", "--file", file)
	return secret
}
