//go:build lab

// Package systemd_test tries the unit files against the real systemd.
package systemd_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

func command(t *testing.T, name string, arguments ...string) string {
	t.Helper()
	out, err := exec.Command(name, arguments...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v: %s", name, arguments, err, out)
	}
	return string(out)
}

func TestUnitFilesVerify(t *testing.T) {
	// Said by systemd about a file that is not installed: its program may not be there either.
	program := regexp.MustCompile(`(?m)^.*Command /usr/s?bin/virtbackup(d|ctl) is not executable: No such file or directory\n`)
	for _, unit := range []string{"virtbackupd.service", "virtbackup.slice", "virtbackup-failed@.service", "virtbackup-schedule@.service"} {
		out, _ := exec.Command("systemd-analyze", "--man=no", "verify", "./"+unit).CombinedOutput()
		if out := program.ReplaceAllString(string(out), ""); out != "" {
			t.Errorf("%s: %s", unit, out)
		}
	}
}

// The exposure (0 best, 10 worst) must not grow unnoticed. What is open is told with its reason in the unit file.
func TestServiceIsSandboxed(t *testing.T) {
	out := command(t, "systemd-analyze", "security", "--offline=yes", "--no-pager", "./virtbackupd.service")
	m := regexp.MustCompile(`Overall exposure level for virtbackupd.service: ([0-9.]+)`).FindStringSubmatch(out)
	if m == nil {
		t.Fatal(out)
	}
	if level, err := strconv.ParseFloat(m[1], 64); err != nil || level > 4.0 {
		t.Errorf("exposure level %s: %s", m[1], out)
	}
	t.Log(m[0])
}

// A block device as a guest's disk may be one, and openat2(2) with RESOLVE_NO_SYMLINKS.
const (
	readDevice = `head -c 512 $DEVICE | cmp - /dev/zero -n 512`
	openBelow  = `python3 -c 'import ctypes; how = (ctypes.c_uint64 * 3)(0, 0, 4); fd = ctypes.CDLL(None).syscall(437, -100, b"/etc/hostname", how, 24); exit(fd < 0)'`
)

// In the daemon's sandbox works what the daemon does, and nothing that it does not do.
func TestServiceMayDoItsWork(t *testing.T) {
	for name, script := range map[string]string{
		"scratch":   `qemu-img create -q -f qcow2 /var/lib/virtbackup/scratch.qcow2 1M && chown 64055:64055 /var/lib/virtbackup/scratch.qcow2`,
		"runtime":   `mkdir /run/virtbackup/made && rmdir /run/virtbackup/made && [ "$(stat -c %a /run/virtbackup /var/lib/virtbackup | tr '\n' ' ')" = "711 711 " ]`,
		"umask":     `touch /run/virtbackup/file && [ "$(stat -c %a /run/virtbackup/file)" = 600 ]`,
		"libvirt":   `virsh -c qemu:///system list`,
		"systemd":   `systemd-run --quiet --wait true && busctl status org.freedesktop.systemd1`,
		"devices":   readDevice,
		"openat2":   openBelow,
		"timers":    `touch /etc/systemd/system/file && rm /etc/systemd/system/file`,
		"read-only": `! touch /usr/file && ! touch /etc/file && ! sysctl -w kernel.hostname=x`,
		"no mount":  `! mount -t tmpfs none /mnt && ! unshare -n true`,
	} {
		t.Run(name, func(t *testing.T) {
			if out, err := sandboxed(t, script, ""); err != nil {
				t.Error(out)
			}
		})
	}
}

// What the unit file says about directives that are left out is so. (Not ProtectClock=: the lab has no device controller.)
func TestLeftOut(t *testing.T) {
	for directive, script := range map[string]string{
		"RestrictSUIDSGID=yes": openBelow,
		"PrivateDevices=yes":   readDevice,
	} {
		t.Run(directive, func(t *testing.T) {
			if _, err := sandboxed(t, script, directive); err == nil {
				t.Error("it does no harm")
			}
		})
	}
}

// sandboxed runs a script in the sandbox of virtbackupd.service, with a directive more. DEVICE is a block device.
func sandboxed(t *testing.T, script, directive string) (string, error) {
	t.Helper()
	unit, err := os.ReadFile("virtbackupd.service")
	if err != nil {
		t.Fatal(err)
	}
	directory, err := os.MkdirTemp("/run", "sandbox")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(directory)
	image, program := filepath.Join(directory, "image"), filepath.Join(directory, "program")
	command(t, "truncate", "-s", "1M", image)
	device := strings.TrimSpace(command(t, "losetup", "--find", "--show", image))
	defer command(t, "losetup", "-d", device)
	if err := os.WriteFile(program, []byte("set -e\nDEVICE="+device+"\n"+script), 0o600); err != nil {
		t.Fatal(err)
	}
	text := regexp.MustCompile(`(?m)^(Type|BusName|ExecStart|ExecReload|Restart|WatchdogSec)=.*\n`).ReplaceAllString(string(unit), "")
	text = strings.Replace(text, "[Service]\n", "[Service]\nType=oneshot\nExecStart=/bin/sh "+program+"\n"+directive+"\n", 1)
	// A name of its own, so that systemd need not be reloaded, which others who run now would feel.
	name := filepath.Base(directory) + ".service"
	if err := os.WriteFile("/run/systemd/system/"+name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	defer os.Remove("/run/systemd/system/" + name)
	// It is preserved by the unit; and a daemon that runs, or a probe of its, puts something there meanwhile.
	command(t, "sh", "-c", "systemctl stop virtbackupd.service; for i in 1 2 3 4 5 6 7 8 9 10; do rm -rf /run/virtbackup && exit; sleep 1; done; exit 1")
	if out, err := exec.Command("systemctl", "start", name).CombinedOutput(); err != nil {
		return string(out) + command(t, "journalctl", "--no-pager", "-n", "20", "-o", "cat", "-u", name), err
	}
	return "", nil
}
