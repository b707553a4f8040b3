package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"regexp"

	"github.com/virtbackup/virtbackup/dbus"
)

// hostGrammar is what -H takes: nothing in it can be an option of ssh, or be
// understood by a shell that ssh's configuration starts.
var hostGrammar = regexp.MustCompile(`^([A-Za-z0-9_][A-Za-z0-9._-]*@)?[A-Za-z0-9:\[][A-Za-z0-9._:%\]-]*$`)

func checkHost(host string) error {
	if !hostGrammar.MatchString(host) {
		return fmt.Errorf("%q is no host: say [user@]host", host)
	}
	return nil
}

// sshCommand returns the command whose input and output are the system bus of
// a host, as systemd's own tools have it. Unless a person may be asked, ssh
// must not ask either.
func sshCommand(host string, ask bool) []string {
	command := []string{"ssh", "-xT"}
	if !ask {
		command = append(command, "-o", "BatchMode=yes")
	}
	return append(command, "--", host, "systemd-stdio-bridge")
}

// connectRemote connects to the system bus of another host.
func connectRemote(ctx context.Context, host string, ask bool, stderr io.Writer) (*dbus.Client, error) {
	command := sshCommand(host, ask)
	cmd := exec.Command(command[0], command[1:]...)
	cmd.Stderr = stderr
	pipe := &bridge{cmd: cmd}
	var err error
	if pipe.WriteCloser, err = cmd.StdinPipe(); err != nil {
		return nil, fmt.Errorf("cannot make a pipe: %w", err)
	}
	if pipe.Reader, err = cmd.StdoutPipe(); err != nil {
		return nil, fmt.Errorf("cannot make a pipe: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("cannot run ssh: %w", err)
	}
	c, err := dbus.ConnectPipe(ctx, pipe)
	if err != nil {
		return nil, fmt.Errorf("cannot reach the system bus of %s (try: ssh %s systemd-stdio-bridge): %w", host, host, err)
	}
	return c, nil
}

// bridge is the pipe to a command's input and output.
type bridge struct {
	io.Reader
	io.WriteCloser
	cmd *exec.Cmd
}

// Close ends the command by the end of its input, and waits for it.
func (b *bridge) Close() error {
	return errors.Join(b.WriteCloser.Close(), b.cmd.Wait())
}
