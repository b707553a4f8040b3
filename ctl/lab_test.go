//go:build lab

package main

import (
	"errors"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

const (
	labGuest      = "ctl1"
	labRepository = "/srv/ctl-test"
	labSecond     = "/srv/ctl-test-second"
	worker        = "/usr/libexec/virtbackup/virtbackup-worker"
	hold          = "/run/ctl-hold"
	// held is a worker that waits while a file is there, so that a test can
	// do something in the middle of a job, however fast jobs are.
	held = "#!/bin/sh\nwhile [ -e " + hold + " ]; do sleep 0.05; done\nexec " + worker + ".real \"$@\"\n"
)

// TestScripts runs testdata/script against the installed daemon, in the order
// of their names: they share one guest, and go on from each other.
func TestScripts(t *testing.T) {
	labRun(t, "lab-domain", "create", labGuest, "--disk", "qcow2:64M:fs", "--disk", "raw:8M", "--start")
	t.Cleanup(func() { labRun(t, "lab-domain", "remove", labGuest) })
	for _, directory := range []string{labRepository, labSecond} {
		if err := os.Mkdir(directory, 0o700); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = os.RemoveAll(directory) })
	}
	// What a script that fails leaves behind.
	t.Cleanup(func() { labRun(t, "systemctl", "unmask", "--runtime", "virtbackupd.service") })
	holdWorkers(t)
	testscript.RunT(inOrder{t}, testscript.Params{
		Dir: "testdata/script",
		Setup: func(env *testscript.Env) error {
			_ = os.Remove(hold) // a script that failed may have left it
			env.Setenv("REPOSITORY", labRepository)
			env.Setenv("SECOND", labSecond)
			env.Setenv("PATH", os.Getenv("PATH"))
			env.Setenv("TERM", "xterm")
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"status": status, "capture": capture},
	})
}

func labRun(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
}

func holdWorkers(t *testing.T) {
	t.Helper()
	if err := os.Rename(worker, worker+".real"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = os.Remove(hold)
		if err := os.Rename(worker+".real", worker); err != nil {
			t.Error(err)
		}
	})
	if err := os.WriteFile(worker, []byte(held), 0o755); err != nil {
		t.Fatal(err)
	}
}

// status N CMD... runs a command, which must exit with that status.
func status(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: status N CMD [ARG]...")
	}
	got := 0
	if err := ts.Exec(args[1], args[2:]...); err != nil {
		var exit *exec.ExitError
		if !errors.As(err, &exit) {
			ts.Fatalf("%v", err)
		}
		got = exit.ExitCode()
	}
	if strconv.Itoa(got) != args[0] {
		ts.Fatalf("the exit status is %d, and %s is expected", got, args[0])
	}
}

// capture NAME CMD... runs a command, and sets a variable to what it printed.
func capture(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: capture NAME CMD [ARG]...")
	}
	ts.Check(ts.Exec(args[1], args[2:]...))
	ts.Setenv(args[0], strings.TrimSpace(ts.ReadFile("stdout")))
}

// inOrder runs scripts one after the other, in place of all at once.
type inOrder struct{ *testing.T }

func (inOrder) Parallel()     {}
func (inOrder) Verbose() bool { return testing.Verbose() }

func (t inOrder) Run(name string, f func(testscript.T)) {
	t.T.Run(name, func(sub *testing.T) { f(inOrder{sub}) })
}
