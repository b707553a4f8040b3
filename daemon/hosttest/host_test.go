//go:build hosts

package hosttest

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// limit bounds every wait. It is for a machine that is busy with much else; no
// test measures time by it.
const limit = 3 * time.Minute

// lab is where the lab's scripts are.
const lab = "../../testdata/lab"

// host is a host of the lab, with the installed daemon.
type host struct {
	t  *testing.T
	id string
}

// newHost boots a host of this name that has these directories of the machine,
// writable. It ends with the test, or with this process, however that ends.
func newHost(t *testing.T, name string, shared ...string) *host {
	t.Helper()
	args := []string{"--attend", "--name", name}
	for _, path := range shared {
		args = append(args, "--bind", path)
	}
	cmd := exec.Command(filepath.Join(lab, "run"), args...)
	cmd.Stderr = os.Stderr
	input, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	output, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(input.Close(), cmd.Wait()); err != nil {
			t.Errorf("host %s did not end well: %v", name, err)
		}
	})
	id, err := bufio.NewReader(output).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) || id == "" {
		t.Fatalf("host %s did not come up: %v", name, err)
	}
	return &host{t: t, id: strings.TrimSpace(id)}
}

// try runs a command in the host, and returns its output, without its errors'.
func (h *host) try(args ...string) (string, error) {
	cmd := exec.Command(filepath.Join(lab, "shell"), append([]string{h.id}, args...)...)
	out, err := cmd.Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		err = fmt.Errorf("%s: %w: %s%s", args[0], err, out, exit.Stderr)
	}
	return strings.TrimSpace(string(out)), err
}

// run is try of what has to succeed.
func (h *host) run(args ...string) string {
	h.t.Helper()
	out, err := h.try(args...)
	if err != nil {
		h.t.Fatal(err)
	}
	return out
}

// tryScript is try of a shell script with arguments.
func (h *host) tryScript(text string, args ...string) (string, error) {
	return h.try(append([]string{"bash", "-euo", "pipefail", "-c", text, "sh"}, args...)...)
}

// script is tryScript of what has to succeed.
func (h *host) script(text string, args ...string) string {
	h.t.Helper()
	out, err := h.tryScript(text, args...)
	if err != nil {
		h.t.Fatal(err)
	}
	return out
}

// ctl runs virtbackupctl.
func (h *host) ctl(args ...string) string {
	h.t.Helper()
	return h.run(append([]string{"virtbackupctl"}, args...)...)
}

// read stores what virtbackupctl prints as JSON.
func (h *host) read(result any, args ...string) {
	h.t.Helper()
	if err := json.Unmarshal([]byte(h.ctl(append(args, "--json=short")...)), result); err != nil {
		h.t.Fatalf("virtbackupctl %s: %v", strings.Join(args, " "), err)
	}
}

// reboot reboots the host and waits until it is up; hard, as after a loss of power.
func (h *host) reboot(options ...string) {
	h.t.Helper()
	if out, err := exec.Command(filepath.Join(lab, "reboot"), append(options, h.id)...).CombinedOutput(); err != nil {
		h.t.Fatalf("cannot reboot: %v: %s", err, out)
	}
}

// eventually waits until a condition holds.
func eventually(t *testing.T, what string, holds func() error) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for {
		err := holds()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("it does not come about that %s: %v", what, err)
		}
		time.Sleep(500 * time.Millisecond)
	}
}
