//go:build lab

package labtest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/virtbackup/virtbackup/dbus"
)

const lookOften = "[repositories]\nunmount_after = \"1s\"\nlook_every = \"1s\"\nlook_idle = \"1s\"\nhung_after = \"2s\"\nmount_timeout = \"3s\"\n"

// becomes waits until a repository has a state, and returns what is said of it.
func (h *host) becomes(want dbus.RepositoryState) string {
	h.t.Helper()
	var r dbus.RepositoryProperties
	eventually(h.t, "the repository is "+string(want), func() error {
		if r = h.properties(); r.State != want {
			return fmt.Errorf("it is %s: %s", r.State, r.StateMessage)
		}
		return nil
	})
	if want != dbus.RepositoryOnline && r.StateMessage == "" || r.StateSince.IsZero() {
		h.t.Errorf("nothing is said of a repository that is %s since %v: %q", want, r.StateSince, r.StateMessage)
	}
	if out := command(h.t, "", "virtbackupctl", "repository", "list"); !strings.Contains(out, string(want)) {
		h.t.Errorf("repository list: %s", out)
	}
	return r.StateMessage
}

// TestHealthIsTold has a repository become full, read-only, and be gone.
func TestHealthIsTold(t *testing.T) {
	configure(t, lookOften)
	device, point := loopDevice(t, 16), fresh(t, "/srv")
	mount := func() { command(t, "", "mount", device, point) }
	mount()
	t.Cleanup(func() { _ = exec.Command("umount", point).Run() })
	h := newHostAt(t, makeDirectory(t, filepath.Join(point, filepath.Base(point))))
	h.becomes(dbus.RepositoryOnline)
	filler := filepath.Join(point, "filler")
	// Until no space is left: ext4 keeps some back while it does not know yet where the data goes.
	command(t, "", "sh", "-c", "for i in 1 2 3; do dd if=/dev/zero bs=4k 2>/dev/null >>"+filler+"; sync; done")
	h.becomes(dbus.RepositoryFull)
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	h.becomes(dbus.RepositoryOnline)
	command(t, "", "mount", "-o", "remount,ro", point)
	h.becomes(dbus.RepositoryReadOnly)
	command(t, "", "mount", "-o", "remount,rw", point)
	h.becomes(dbus.RepositoryOnline)
	command(t, "", "umount", point)
	h.becomes(dbus.RepositoryGone)
	makeDirectory(t, h.path)
	h.becomes(dbus.RepositoryUnavailable) // an empty directory is no repository
	mount()
	h.becomes(dbus.RepositoryOnline)
}

// stoppable is a block device whose storage can be made not to answer, as a
// server that is gone: a process that waits for it cannot be killed.
func stoppable(t *testing.T) (device string, stop, goOn func()) {
	t.Helper()
	directory := fresh(t, "/var/tmp")
	image, socket, point := filepath.Join(directory, "image"), filepath.Join(directory, "socket"), filepath.Join(directory, "fuse")
	command(t, "", "truncate", "--size=64M", image)
	if err := os.WriteFile(point, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	server := exec.Command("nbdkit", "--foreground", "--unix", socket, "file", image)
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	goOn = func() { _ = server.Process.Signal(syscall.SIGCONT) }
	t.Cleanup(func() { goOn(); _ = server.Process.Kill(); _ = server.Wait() })
	eventually(t, "nbdkit serves", func() error { _, err := os.Stat(socket); return err })
	bridge := exec.Command("nbdfuse", point, "nbd+unix:///?socket="+socket)
	if err := bridge.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = exec.Command("umount", "-l", point).Run(); _ = bridge.Wait() })
	eventually(t, "nbdfuse shows it", func() error {
		info, err := os.Stat(point)
		if err == nil && info.Size() == 0 {
			err = fmt.Errorf("it has no bytes yet")
		}
		return err
	})
	device = command(t, "", "losetup", "--find", "--show", point)
	t.Cleanup(func() {
		goOn()
		eventually(t, device+" is free", func() error { return exec.Command("losetup", "--detach", device).Run() })
	})
	command(t, "", "mkfs.ext4", "-q", device)
	return device, func() { _ = server.Process.Signal(syscall.SIGSTOP) }, goOn
}

// TestHealthOfStorageThatHangs has the storage of a repository stop to answer.
// Nothing waits for it, and another repository goes on.
func TestHealthOfStorageThatHangs(t *testing.T) {
	configure(t, lookOften)
	device, stop, goOn := stoppable(t)
	hung, other, g := newHostOn(t, device), newHost(t), newPausedGuest(t, "qcow2:16M")
	g.io("vda", "write -P 1 0 4M")
	want := g.snapshot()
	hung.backup(g, dbus.BackupOptions{})
	hung.becomes(dbus.RepositoryOnline)
	stop()
	hung.becomes(dbus.RepositoryHung)
	// It was not mounted perhaps, or was being unmounted: then that hangs.
	if out := command(t, "", "ps", "-eLo", "stat,comm"); !regexp.MustCompile(`(?m)^D\S* +(virtbackup-work|u?mount)`).MatchString(out) {
		t.Errorf("nothing hangs: %s", out)
	}
	refuses(t, "a backup to it", hung.try(g, dbus.BackupOptions{}), dbus.ErrRepositoryUnavailable, "does not answer", hung.offering)
	other.chainIsExact(other.backup(g, dbus.BackupOptions{}), want)
	// A daemon that starts then is not held up either.
	command(t, "", "systemctl", "restart", "virtbackupd.service")
	other.chainIsExact(other.backup(g, dbus.BackupOptions{Full: true}), want)
	hung.becomes(dbus.RepositoryHung)
	goOn()
	hung.becomes(dbus.RepositoryOnline)
	g.io("vda", "write -P 2 1M 1M")
	want = g.snapshot()
	hung.restoreIsExact(hung.backup(g, dbus.BackupOptions{}), want)
	// What other tests left may be looked at all the time.
	eventually(t, "no probe is left", func() error {
		_, err := os.Stat(filepath.Join("/run/virtbackup/probes", hung.repository))
		if err == nil {
			return fmt.Errorf("there is one of %s", hung.repository)
		}
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		return err
	})
}
