//go:build lab

package jobunit

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func manager(t *testing.T) *Manager {
	t.Helper()
	m, err := Connect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Close)
	return m
}

// shell is a unit that runs a script in an own root, which may write into out.
func shell(t *testing.T, out, script string) Unit {
	t.Helper()
	name := "virtbackup-job-" + strings.ToLower(strings.NewReplacer("/", "-", " ", "-").Replace(t.Name())) + ".service"
	return Unit{
		Name:        name,
		Description: t.Name(),
		Command:     []string{"/bin/bash", "-c", "cd " + out + " && " + script},
		Root:        t.TempDir(),
		ReadWrite:   []string{out},
		StopAfter:   10 * time.Second,
	}
}

// run starts a unit, waits for its end and forgets it.
func run(t *testing.T, m *Manager, u Unit) State {
	t.Helper()
	if err := m.Start(t.Context(), u); err != nil {
		t.Fatal(err)
	}
	return ended(t, m, u)
}

func ended(t *testing.T, m *Manager, u Unit) State {
	t.Helper()
	state, err := m.Wait(t.Context(), u.Name)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Forget(t.Context(), u.Name); err != nil {
		t.Fatal(err)
	}
	after, err := m.Wait(t.Context(), u.Name)
	if err != nil || after.Known {
		t.Fatalf("after Forget: %+v, %v", after, err)
	}
	return state
}

// begin starts a unit whose script makes the file "started", and waits for that.
func begin(t *testing.T, m *Manager, out string, u Unit) {
	t.Helper()
	if err := m.Start(t.Context(), u); err != nil {
		t.Fatal(err)
	}
	appears(t, filepath.Join(out, "started"))
}

func appears(t *testing.T, path string) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(path); err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s does not appear", path)
		}
	}
}

func content(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

func TestArgumentsAreLiteral(t *testing.T) {
	out := t.TempDir()
	u := shell(t, out, `printf '%s|' "$0" "$@" >arguments`)
	u.Command = append(u.Command, "$HOME", "${HOME}", "$$", "%n", `a "b" \x`, "")
	if state := run(t, manager(t), u); state.Known && state.Result != "success" {
		t.Fatal(state)
	}
	if got, want := content(t, filepath.Join(out, "arguments")), `$HOME|${HOME}|$$|%n|a "b" \x||`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestHowItEnded(t *testing.T) {
	m := manager(t)
	for _, test := range []struct {
		name, script, want string
		state              State
	}{
		{"status", "exit 3", "ended with status 3", State{Result: "exit-code", ExitStatus: 3}},
		{"killed", "kill -KILL $$", "killed by SIGKILL", State{Result: "signal", Signal: unix.SIGKILL}},
		{"crashed", "kill -SEGV $$", "killed by SIGSEGV", State{Result: "signal", Signal: unix.SIGSEGV}},
	} {
		t.Run(test.name, func(t *testing.T) {
			got := run(t, m, shell(t, t.TempDir(), test.script))
			test.state.Name, test.state.Known, test.state.Active = got.Name, true, "failed"
			if got != test.state || got.String() != test.want {
				t.Errorf("got %+v %q, want %+v %q", got, got, test.state, test.want)
			}
		})
	}
}

func TestStartFails(t *testing.T) {
	m := manager(t)
	missing := shell(t, t.TempDir(), "")
	missing.Command = []string{"/usr/bin/no-such-program"}
	noRoot := shell(t, t.TempDir(), "")
	noRoot.Root = filepath.Join(noRoot.Root, "missing")
	for want, u := range map[string]Unit{"(EXEC": missing, "(NAMESPACE": noRoot} {
		err := m.Start(t.Context(), u)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v", want, err)
		}
		if state, err := m.Wait(t.Context(), u.Name); err != nil || state.Known {
			t.Errorf("%s: still there: %+v, %v", want, state, err)
		}
	}
	out := t.TempDir()
	twice := shell(t, out, "touch started; sleep infinity")
	begin(t, m, out, twice)
	if err := m.Start(t.Context(), twice); !errors.Is(err, ErrExists) {
		t.Errorf("second start: %v", err)
	}
	if err := m.Kill(t.Context(), twice.Name); err != nil {
		t.Error(err)
	}
	if err := m.Start(t.Context(), twice); !errors.Is(err, ErrExists) {
		t.Errorf("start of a failed one: %v", err)
	}
	if state := ended(t, m, twice); state.Signal != unix.SIGKILL {
		t.Error(state)
	}
}

func TestStopAndList(t *testing.T) {
	m := manager(t)
	out := t.TempDir()
	obeys := shell(t, out, "trap 'touch asked; exit 0' TERM; touch started; sleep infinity & wait")
	begin(t, m, out, obeys)
	list, err := m.List(t.Context(), "virtbackup-job-teststop*.service")
	if err != nil || len(list) != 1 || list[0].Name != obeys.Name || list[0].Ended() {
		t.Fatalf("list: %+v, %v", list, err)
	}
	if err := m.Stop(t.Context(), obeys.Name); err != nil {
		t.Fatal(err)
	}
	content(t, filepath.Join(out, "asked"))
	ended(t, m, obeys)
	if err := m.Stop(t.Context(), obeys.Name); err != nil {
		t.Errorf("stop of one that is gone: %v", err)
	}
	if err := m.Kill(t.Context(), obeys.Name); err != nil {
		t.Errorf("kill of one that is gone: %v", err)
	}

	out = t.TempDir()
	deaf := shell(t, out, "trap '' TERM; touch started; while :; do sleep 1000; done")
	deaf.StopAfter = time.Second
	begin(t, m, out, deaf)
	if err := m.Stop(t.Context(), deaf.Name); err != nil {
		t.Fatal(err)
	}
	if state := ended(t, m, deaf); state.Signal != unix.SIGKILL || state.Result != "timeout" || state.Processes {
		t.Errorf("%+v", state)
	}
}

// A process that hangs in the kernel outlives SIGKILL: systemd gives it up, and so must we.
func TestProcessThatHangsInTheKernel(t *testing.T) {
	m := manager(t)
	out := t.TempDir()
	mount := frozen(t)
	hangs := shell(t, out, "trap '' TERM; touch started; exec touch "+mount+"/file")
	hangs.ReadWrite = append(hangs.ReadWrite, mount)
	hangs.StopAfter = time.Second
	begin(t, m, out, hangs)
	if err := m.Stop(t.Context(), hangs.Name); err != nil {
		t.Fatal(err)
	}
	state, err := m.State(t.Context(), hangs.Name)
	if err != nil || !state.Ended() || !state.Processes || state.Result != "timeout" {
		t.Errorf("%+v, %v", state, err)
	}
	t.Log(state)
	if err := m.Forget(t.Context(), hangs.Name); err != nil {
		t.Error(err)
	}
	if state, err := m.State(t.Context(), hangs.Name); err != nil || !state.Processes {
		t.Errorf("forgotten while it hangs: %+v, %v", state, err)
	}
	thaw(t, mount)
	for !t.Failed() {
		state, err := m.State(t.Context(), hangs.Name)
		if err != nil {
			t.Fatal(err)
		}
		if !state.Known {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// frozen is a file system on which every write hangs, as on a share whose server is away.
func frozen(t *testing.T) string {
	t.Helper()
	directory := t.TempDir()
	image := image(t)
	command(t, "mkfs.ext4", "-q", image)
	command(t, "mount", "-o", "loop", image, directory)
	command(t, "fsfreeze", "-f", directory)
	t.Cleanup(func() {
		_ = exec.Command("fsfreeze", "-u", directory).Run() // is thawed already when the test passed
		command(t, "umount", "-l", directory)
	})
	return directory
}

// image is an empty file for a loop device, in memory.
func image(t *testing.T) string {
	t.Helper()
	directory, err := os.MkdirTemp("/run", "jobunit")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(directory) })
	path := filepath.Join(directory, "image")
	command(t, "truncate", "-s", "16M", path)
	return path
}

func thaw(t *testing.T, directory string) {
	t.Helper()
	command(t, "fsfreeze", "-u", directory)
}

func command(t *testing.T, name string, arguments ...string) string {
	t.Helper()
	out, err := exec.Command(name, arguments...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v: %s", name, arguments, err, out)
	}
	return string(out)
}

func TestSandbox(t *testing.T) {
	m := manager(t)
	for name, script := range map[string]string{
		"sees only its paths":     `[ "$(ls -d /etc/shadow /var/lib /home /root/* /root/.[a-z]* /run/dbus 2>/dev/null)" = "" ]`,
		"root is read-only":       `! touch /file 2>/dev/null && ! mkdir /tmp 2>/dev/null && ! touch /usr/file 2>/dev/null`,
		"missing path is missing": `! mkdir -p "$MISSING" 2>/dev/null`,
		"may chown":               `touch file && chown 64055:64055 file`,
		"no network":              `[ "$(ls /sys/class/net 2>/dev/null | grep -v lo)" = "" ] && ! (exec 3<>/dev/tcp/127.0.0.1/22) 2>/dev/null`,
		"no devices":              `[ ! -e /dev/loop0 ] && [ ! -e /dev/kvm ] && [ -c /dev/null ]`,
		"no mounts":               `! mount -t tmpfs none . 2>/dev/null && ! unshare -n true 2>/dev/null`,
		"no core":                 `grep -q 'Max core file size *0 *0' /proc/self/limits`,
	} {
		t.Run(name, func(t *testing.T) {
			u := shell(t, t.TempDir(), script)
			u.ReadWrite = append(u.ReadWrite, "/nowhere/missing")
			u.Command[2] = "MISSING=/nowhere/missing; " + u.Command[2]
			if state := run(t, m, u); state.Known && state.Result != "success" {
				t.Error(state)
			}
		})
	}
}

// TestMain lets the test's program be a worker that opens a path as workers do.
func TestMain(m *testing.M) {
	if len(os.Args) != 3 || os.Args[1] != "openat2" {
		os.Exit(m.Run())
	}
	_, err := unix.Openat2(unix.AT_FDCWD, os.Args[2], &unix.OpenHow{Flags: unix.O_RDONLY, Resolve: unix.RESOLVE_NO_SYMLINKS})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func TestOpenat2(t *testing.T) {
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	u := shell(t, t.TempDir(), "")
	u.Command = []string{program, "openat2", u.ReadWrite[0]}
	if state := run(t, manager(t), u); state.Known && state.Result != "success" {
		t.Error(state)
	}
}

func TestDevice(t *testing.T) {
	image := image(t)
	loop := strings.TrimSpace(command(t, "losetup", "--find", "--show", image))
	defer command(t, "losetup", "-d", loop)
	u := shell(t, t.TempDir(), "[ -b "+loop+" ] && echo data | dd of="+loop+" conv=notrunc status=none && blockdev --getsize64 "+loop)
	u.Devices = []string{loop}
	if state := run(t, manager(t), u); state.Known && state.Result != "success" {
		t.Fatal(state)
	}
	if got := content(t, image); !strings.HasPrefix(got, "data") {
		t.Errorf("%.10q", got)
	}
}

// That it cannot be written to is up to cgroups, which the lab has not: see
// DeviceAllow= in systemd.resource-control(5).
func TestReadOnlyDevice(t *testing.T) {
	image := image(t)
	loop := strings.TrimSpace(command(t, "losetup", "--find", "--show", image))
	defer command(t, "losetup", "-d", loop)
	u := shell(t, t.TempDir(), "dd if="+loop+" of=/dev/null bs=4096 count=1 status=none")
	u.ReadOnlyDevices = []string{loop}
	if state := run(t, manager(t), u); state.Known && state.Result != "success" {
		t.Error(state)
	}
}

func TestCapabilities(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(file, 1, 1); err != nil {
		t.Fatal(err)
	}
	u := shell(t, t.TempDir(), "[ \"$(cat "+file+")\" = secret ] && ! echo >>"+file+" && ! chown 2 "+file)
	u.ReadWrite = append(u.ReadWrite, file)
	u.Capabilities = 1 << unix.CAP_DAC_READ_SEARCH
	if state := run(t, manager(t), u); state.Known && state.Result != "success" {
		t.Error(state)
	}
}

func TestLimits(t *testing.T) {
	m := manager(t)
	out := t.TempDir()
	u := shell(t, out, "touch started; sleep infinity")
	u.Limits = Limits{CPUWeight: 50, CPUQuota: 150, IOWeight: 30, MemoryMax: 64 << 20, TasksMax: 20}
	begin(t, m, out, u)
	got := command(t, "systemctl", "show", u.Name, "-p", "CPUWeight,CPUQuotaPerSecUSec,IOWeight,MemoryMax,TasksMax,Slice")
	for _, want := range []string{"CPUWeight=50", "CPUQuotaPerSecUSec=1.500000s", "IOWeight=30", "MemoryMax=67108864", "TasksMax=20", "Slice=" + Slice} {
		if !strings.Contains(got, want) {
			t.Errorf("%s is not in %s", want, got)
		}
	}
	if err := m.Kill(t.Context(), u.Name); err != nil {
		t.Fatal(err)
	}
	ended(t, m, u)
}

// The bus is restarted while somebody waits: signals are lost, the end is seen nevertheless.
func TestWaitOutlivesTheBus(t *testing.T) {
	m := manager(t)
	out := t.TempDir()
	u := shell(t, out, "touch started; until [ -e end ]; do sleep 0.1; done; exit 5")
	begin(t, m, out, u)
	done := make(chan State, 1)
	go func() {
		state, err := m.Wait(context.WithoutCancel(t.Context()), u.Name)
		if err != nil {
			t.Error(err)
		}
		done <- state
	}()
	m.mu.Lock()
	m.conn.Close() // what a restart of the bus does to us; restarting it for good takes half the lab down
	m.mu.Unlock()
	if err := os.WriteFile(filepath.Join(out, "end"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if state := <-done; state.ExitStatus != 5 {
		t.Errorf("%+v", state)
	}
	ended(t, m, u)
}

func TestWaitEndsWithItsContext(t *testing.T) {
	m := manager(t)
	out := t.TempDir()
	u := shell(t, out, "touch started; sleep infinity")
	begin(t, m, out, u)
	cause := errors.New("cause")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(cause)
	if _, err := m.Wait(ctx, u.Name); !errors.Is(err, cause) {
		t.Error(err)
	}
	if err := m.Kill(t.Context(), u.Name); err != nil {
		t.Fatal(err)
	}
	ended(t, m, u)
}

// TestLimitsChangeWhileItRuns gives a unit other limits, and none, and leaves
// nothing of that behind.
func TestLimitsChangeWhileItRuns(t *testing.T) {
	m, out := manager(t), t.TempDir()
	u := shell(t, out, "touch started && sleep 60")
	u.Limits = Limits{CPUWeight: 50, IOWeight: 50, MemoryMax: 1 << 30}
	begin(t, m, out, u)
	for want, l := range map[string]Limits{
		"CPUWeight=200 CPUQuotaPerSecUSec=500ms IOWeight=30 MemoryMax=536870912":                {CPUWeight: 200, CPUQuota: 50, IOWeight: 30, MemoryMax: 512 << 20},
		"CPUWeight=[not set] CPUQuotaPerSecUSec=infinity IOWeight=[not set] MemoryMax=infinity": {},
	} {
		if err := m.SetLimits(t.Context(), u.Name, l); err != nil {
			t.Fatal(err)
		}
		got, err := exec.Command("systemctl", "show", u.Name, "-p", "CPUWeight", "-p", "CPUQuotaPerSecUSec", "-p", "IOWeight", "-p", "MemoryMax").Output()
		if err != nil {
			t.Fatal(err)
		}
		for _, property := range strings.Split(strings.ReplaceAll(want, "[not set]", "[not.set]"), " ") {
			if property = strings.ReplaceAll(property, "[not.set]", "[not set]"); !strings.Contains(string(got), property+"\n") {
				t.Errorf("%s is not in %q", property, got)
			}
		}
	}
	if err := m.Stop(t.Context(), u.Name); err != nil {
		t.Fatal(err)
	}
	ended(t, m, u)
	left, err := filepath.Glob("/run/systemd/*/" + u.Name + "*")
	if err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	if err := m.SetLimits(t.Context(), u.Name, u.Limits); err != nil {
		t.Errorf("of a unit that has ended: %v", err)
	}
}
