// Package bustest runs a real dbus-daemon of its own for one test. It stands
// in for the system bus: it is of the type system, and any user may connect.
package bustest

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

const configuration = `<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:path=%s</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/>
    %s
    <allow receive_sender="*"/>
    <allow send_type="signal"/>
    <allow send_destination="org.freedesktop.DBus"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
  </policy>
  %s
</busconfig>
`

// Start starts a bus on which everybody may own and call everything, and
// returns its address. It ends with the test.
func Start(t testing.TB) string {
	t.Helper()
	return start(t, `<allow own="*"/><allow send_destination="*"/>`, "")
}

// StartWithPolicy starts a bus as strict as a distribution's system bus, with
// one policy file in force.
func StartWithPolicy(t testing.TB, file string) string {
	t.Helper()
	absolute, err := filepath.Abs(file)
	if err != nil {
		t.Fatal(err)
	}
	return start(t, `<deny own="*"/><deny send_type="method_call"/>`, "<include>"+absolute+"</include>")
}

func start(t testing.TB, rules, include string) string {
	t.Helper()
	// Not t.TempDir: other users must be able to reach the socket.
	dir, err := os.MkdirTemp("", "bustest-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	config := filepath.Join(dir, "bus.conf")
	text := fmt.Sprintf(configuration, filepath.Join(dir, "socket"), rules, include)
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("dbus-daemon", "--config-file="+config, "--nofork", "--nopidfile", "--print-address=1")
	cmd.Stderr = t.Output()
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatalf("cannot start dbus-daemon: %v", err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	// It prints its address when it listens.
	address, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		t.Fatalf("dbus-daemon did not start: %v", err)
	}
	return strings.TrimSpace(address)
}
