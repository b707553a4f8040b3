package lifecycle

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/virtbackup/virtbackup/hooks/spool"
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

// process names the process whose id is in a file, as the hook does; "" if it
// is gone.
func process(pidFile string) string {
	text, err := os.ReadFile(pidFile)
	if err != nil {
		return ""
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		return ""
	}
	return spool.Process(pid)
}
