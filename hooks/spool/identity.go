package spool

import (
	"fmt"
	"os"
	"strings"
)

// BootID names this boot of the kernel (random(4)).
func BootID() (string, error) {
	text, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("cannot tell which boot of the host this is: %w", err)
	}
	return strings.TrimSpace(string(text)), nil
}

// Process names a process by its id and its start time, as Record.Libvirt has
// it, so that no other one has the same name in one boot; "" if it is gone.
func Process(pid int) string {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ""
	}
	// The name of the program, in parentheses, may hold anything (proc(5)).
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	const startTime = 22 - 3 // the third field is the first one here
	if len(fields) <= startTime {
		return ""
	}
	return fmt.Sprintf("%d@%s", pid, fields[startTime])
}
