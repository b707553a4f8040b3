package main

import (
	"io"
	"os"
	"os/exec"
	"strconv"
	"syscall"
)

// startAgent starts polkit's agent on our terminal, as systemctl does, and
// waits until it is registered. What it returns ends it. Without one, polkit
// refuses what needs a password.
func startAgent() func() {
	nothing := func() {}
	registered, notify, err := os.Pipe()
	if err != nil {
		return nothing
	}
	defer registered.Close()
	// An agent of the desktop goes first, so that there is one only.
	cmd := exec.Command("pkttyagent", "--notify-fd", "3", "--fallback", "--process", strconv.Itoa(os.Getpid()))
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stderr, os.Stderr
	cmd.ExtraFiles = []*os.File{notify}
	err = cmd.Start()
	notify.Close()
	if err != nil {
		return nothing
	}
	// It closes the pipe when it is registered, or ends.
	_, _ = io.Copy(io.Discard, registered)
	return func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
	}
}
