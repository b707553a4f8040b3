package lifecycle

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// qemuProcess names the QEMU process of a domain of qemu:///system; "" if there
// is none to be found.
func qemuProcess(domain string) string {
	p := process(filepath.Join("/run/libvirt/qemu", domain+".pid"))
	// The file of a QEMU that is gone may be left, and its number be another's.
	pid, _, _ := strings.Cut(p, "@")
	if name, err := os.ReadFile(filepath.Join("/proc", pid, "comm")); err != nil || !strings.HasPrefix(string(name), "qemu") {
		return ""
	}
	return p
}

// process names a process as the hook does, by its id and start time, so that
// no other one ever has the same name in one boot; "" if it is gone.
func process(pidFile string) string {
	text, err := os.ReadFile(pidFile)
	if err != nil {
		return ""
	}
	pid := strings.TrimSpace(string(text))
	stat, err := os.ReadFile(filepath.Join("/proc", pid, "stat"))
	if err != nil {
		return ""
	}
	// The name of the program, in parentheses, may hold anything (proc(5)).
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	const startTime = 22 - 3 // the third field is the first one here
	if len(fields) <= startTime {
		return ""
	}
	return pid + "@" + fields[startTime]
}

// bootID names this boot of the kernel (random(4)).
func bootID() (string, error) {
	text, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("cannot tell which boot of the host this is: %w", err)
	}
	return strings.TrimSpace(string(text)), nil
}
