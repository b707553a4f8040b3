//go:build lab

// Package systemd_test tries the unit files against the real systemd.
package systemd_test

import (
	"os/exec"
	"regexp"
	"strconv"
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
	program := regexp.MustCompile(`(?m)^.*Command /usr/sbin/virtbackupd is not executable: No such file or directory\n`)
	for _, unit := range []string{"virtbackupd.service", "virtbackup.slice"} {
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
