//go:build lab

package labtest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/virtbackup/virtbackup/dbus"
)

// loopDevice is a block device with an ext4 of so many MiB on it.
func loopDevice(t *testing.T, mebibytes int) string {
	t.Helper()
	image := filepath.Join(fresh(t, "/var/tmp"), "ext4")
	command(t, "", "truncate", fmt.Sprintf("--size=%dM", mebibytes), image)
	command(t, "", "mkfs.ext4", "-q", image)
	device := command(t, "", "losetup", "--find", "--show", image)
	t.Cleanup(func() {
		eventually(t, device+" is free", func() error { return exec.Command("losetup", "--detach", device).Run() })
	})
	return device
}

// newHostOn is newHost with a repository on a device that the daemon mounts.
func newHostOn(t *testing.T, device string) *host {
	t.Helper()
	h := &host{Client: rootClient(t), t: t, offering: filepath.Base(fresh(t, "/run/lab"))}
	nothing := uint64(0)
	id, job, err := h.CreateRepository(t.Context(), h.offering, "mount", device,
		dbus.CreateRepositoryOptions{FileSystem: "ext4", MountOptions: []string{"noatime"}, MinimumFree: &nothing})
	if err := h.outcome(job, err); err != nil {
		t.Fatal(err)
	}
	none := dbus.QuiesceNone
	if _, err := h.CreateOffering(t.Context(), h.offering, id, settingsOnly(dbus.Settings{Quiesce: &none, ChainSize: new(uint32(0))})); err != nil {
		t.Fatal(err)
	}
	h.repository, h.path = id, "/run/virtbackup/mounts/"+id
	t.Cleanup(func() { // or its device stays in use
		h.t = t
		ctx := context.Background()
		o, err := h.FindOffering(ctx, h.offering)
		if err == nil {
			_, err = h.RemoveOffering(ctx, o, dbus.RemoveOfferingOptions{Forced: true})
		}
		if err == nil {
			err = h.RemoveRepository(ctx, id, dbus.RemoveRepositoryOptions{ForgetBackups: true})
		}
		if err != nil {
			t.Error(err)
		}
		eventually(t, "its storage is unmounted", func() error { return isMounted(h.path, false) })
	})
	return h
}

// isMounted is an error unless it is.
func isMounted(path string, want bool) error {
	err := exec.Command("findmnt", "-n", path).Run()
	if (err == nil) != want {
		return fmt.Errorf("%s: mounted is %v", path, err == nil)
	}
	return nil
}

func (h *host) properties() dbus.RepositoryProperties {
	h.t.Helper()
	r, err := dbus.Get[dbus.RepositoryProperties](h.t.Context(), h.Client, h.repository)
	if err != nil {
		h.t.Fatal(err)
	}
	return r
}

// TestStorageIsMountedWhenNeeded backs up to, and restores from, storage that is
// mounted only as long as that takes.
func TestStorageIsMountedWhenNeeded(t *testing.T) {
	configure(t, "[repositories]\nunmount_after = \"1s\"\n")
	device := loopDevice(t, 64)
	h, g := newHostOn(t, device), newPausedGuest(t, "qcow2:16M")
	idle := func() {
		t.Helper()
		eventually(t, "it is unmounted", func() error { return isMounted(h.path, false) })
	}
	idle()
	eventually(t, "it is told that it is not mounted", func() error {
		if r := h.properties(); r.Mounted || r.Address != device {
			return fmt.Errorf("%+v", r)
		}
		return nil
	})
	if found, err := os.ReadDir(h.path); err != nil || len(found) != 1 || found[0].Name() != ".virtbackup-not-mounted" {
		t.Errorf("below it lies %v, %v", found, err)
	}
	g.io("vda", "write -P 1 0 4M")
	first := g.snapshot()
	b := h.backup(g, dbus.BackupOptions{})
	running := startBare(t, "storage-mounted", bareDisk(t, "vda", "qcow2", ""))
	goOn := stopWorkers(t)
	job := h.start(running, suspended())
	running.inBackup()
	if options := command(t, "", "findmnt", "-no", "OPTIONS", h.path); !strings.Contains(options, "nosuid,nodev,noexec,noatime") {
		t.Errorf("it is mounted with %s", options)
	}
	// A daemon that starts anew leaves what is in use, for longer than it leaves what is not.
	command(t, "", "systemctl", "restart", "virtbackupd.service")
	eventually(t, "the daemon is back", func() error { _, err := dbus.Get[dbus.ManagerProperties](t.Context(), h.Client, ""); return err })
	command(t, "", "sleep", "2")
	if err := isMounted(h.path, true); err != nil {
		t.Errorf("a job uses it: %v", err)
	}
	goOn()
	h.made(h.end(job))
	idle()
	h.restoreIsExact(b, first)
	// It has to be the same repository, and that is looked at.
	_, err := h.UpdateRepository(t.Context(), h.repository, dbus.UpdateRepositoryOptions{MountOptions: &[]string{"noatime,suid"}})
	refuses(t, "a bad option", err, dbus.ErrInvalidArgument, "no option")
	if err := h.outcome(h.UpdateRepository(t.Context(), h.repository, dbus.UpdateRepositoryOptions{MountOptions: &[]string{"commit=30"}})); err != nil {
		t.Error(err)
	}
	other := loopDevice(t, 16)
	err = h.outcome(h.UpdateRepository(t.Context(), h.repository, dbus.UpdateRepositoryOptions{Address: &other}))
	refuses(t, "another device", err, dbus.ErrRepositoryUnavailable, "not a virtbackup repository")
	gone := "/dev/disk/by-id/gone"
	err = h.outcome(h.UpdateRepository(t.Context(), h.repository, dbus.UpdateRepositoryOptions{Address: &gone}))
	refuses(t, "no device", err, dbus.ErrRepositoryUnavailable, "gone", "cannot mount")
	if _, err := os.Stat(filepath.Join(h.path, "virtbackup-repository.json")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("something was written below the mount point: %v", err)
	}
	if err := h.outcome(h.UpdateRepository(t.Context(), h.repository, dbus.UpdateRepositoryOptions{Address: &device})); err != nil {
		t.Error(err)
	}
	h.restoreIsExact(b, first)
}

// TestStorageCredentialsStaySecret looks for a password wherever it must not be.
func TestStorageCredentialsStaySecret(t *testing.T) {
	h := &host{Client: rootClient(t), t: t}
	const canary = "c4nary-of-credentials"
	// No such server: what is tried is told, and nothing stays.
	err := h.addRepository("secret", "cifs", "//localhost/none", dbus.CreateRepositoryOptions{Credentials: "username=u\npassword=" + canary})
	refuses(t, "no server", err, dbus.ErrRepositoryUnavailable, "localhost", "cannot mount")
	err = h.addRepository("secret", "cifs", "//localhost/none", dbus.CreateRepositoryOptions{Credentials: "password=" + canary})
	refuses(t, "no user", err, dbus.ErrInvalidArgument, "username")
	if left, err := filepath.Glob("/var/lib/virtbackup/credentials/*"); err != nil || len(left) > 0 {
		t.Errorf("credentials are left: %v, %v", left, err)
	}
	command(t, "", "journalctl", "--sync")
	if out, err := exec.Command("sh", "-c", "journalctl --no-pager -o export | grep -a "+canary).CombinedOutput(); err == nil {
		t.Errorf("the journal tells it: %s", out)
	}
	if out, err := exec.Command("grep", "-rla", canary, "/var/lib/virtbackup", "/run/virtbackup", "/run/systemd").CombinedOutput(); err == nil {
		t.Errorf("it lies in %s", out)
	}
}
