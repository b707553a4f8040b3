package bustest

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"
	"testing"
	"time"

	godbus "github.com/godbus/dbus/v5"
)

const polkitd = "/usr/lib/polkit-1/polkitd"

// StartPolkit starts the real polkitd on a bus of Start, with the actions of
// one .policy file and the given rules. It needs root, and skips the test
// without. The returned process may be stopped or killed; it ends with the
// test.
func StartPolkit(t testing.TB, address, policyFile string, rules ...string) *os.Process {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("polkitd can be given other actions by root only")
	}
	if _, err := os.Stat(polkitd); err != nil {
		t.Skipf("polkitd is not installed: %v", err)
	}
	dir, err := os.MkdirTemp("", "bustest-polkit-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	files := map[string]string{}
	for i, rule := range rules {
		files[filepath.Join("rules", strconv.Itoa(i)+".rules")] = rule
	}
	action, err := os.ReadFile(policyFile)
	if err != nil {
		t.Fatal(err)
	}
	files[filepath.Join("actions", filepath.Base(policyFile))] = string(action)
	for _, d := range []string{".", "actions", "rules"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	// polkitd's folders are built in, hence a mount namespace of its own.
	cmd := exec.Command("sh", "-ec", `mount --make-rprivate /
		mount --bind "$1/actions" /usr/share/polkit-1/actions
		mount --bind "$1/rules" /etc/polkit-1/rules.d
		exec `+polkitd+` --no-debug`, "sh", dir)
	cmd.Env = append(os.Environ(), "DBUS_SYSTEM_BUS_ADDRESS="+address)
	cmd.Stderr = t.Output()
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
	waitForName(t, address, "org.freedesktop.PolicyKit1", func() {
		if err := cmd.Start(); err != nil {
			t.Fatalf("cannot start polkitd: %v", err)
		}
		t.Cleanup(func() {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		})
	})
	return cmd.Process
}

// waitForName does something, and waits for a name to have an owner then.
func waitForName(t testing.TB, address, name string, do func()) {
	t.Helper()
	ctx, stop := context.WithTimeout(context.Background(), time.Minute)
	defer stop()
	conn, err := godbus.Connect(address)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	signals := make(chan *godbus.Signal, 16)
	conn.Signal(signals)
	if err := conn.AddMatchSignal(godbus.WithMatchMember("NameOwnerChanged"), godbus.WithMatchArg(0, name)); err != nil {
		t.Fatal(err)
	}
	do()
	for {
		select {
		case s := <-signals:
			if s.Name == "org.freedesktop.DBus.NameOwnerChanged" && s.Body[0] == name && s.Body[2] != "" {
				return
			}
		case <-ctx.Done():
			t.Fatalf("%s did not appear on the bus", name)
		}
	}
}

// DialAs connects to a bus as another user. It needs root, and skips the test
// without.
func DialAs(t testing.TB, address string, uid int) *godbus.Conn {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("only root can connect as somebody else")
	}
	type dialled struct {
		conn *godbus.Conn
		err  error
	}
	done := make(chan dialled)
	go func() {
		// The bus takes the user from the thread that connects. The thread is
		// left locked, so that it ends with the goroutine.
		runtime.LockOSThread()
		const unchanged = ^uintptr(0)
		_, _, errno := syscall.RawSyscall(syscall.SYS_SETRESUID, unchanged, uintptr(uid), unchanged)
		if errno != 0 {
			done <- dialled{nil, errno}
			return
		}
		conn, err := godbus.Dial(address)
		done <- dialled{conn, err}
	}()
	d := <-done
	if d.err != nil {
		t.Fatalf("cannot connect as uid %d: %v", uid, d.err)
	}
	t.Cleanup(func() { _ = d.conn.Close() })
	if err := d.conn.Auth([]godbus.Auth{godbus.AuthExternal(strconv.Itoa(uid))}); err != nil {
		t.Fatalf("cannot authenticate as uid %d: %v", uid, err)
	}
	if err := d.conn.Hello(); err != nil {
		t.Fatal(err)
	}
	return d.conn
}
