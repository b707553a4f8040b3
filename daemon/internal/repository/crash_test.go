package repository

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"testing"
)

// Scenarios that run in a process of their own, which strace kills.
var scenarios = map[string]func(root string) error{
	"init": func(root string) error {
		_, err := Init(context.Background(), root)
		return err
	},
	"backup": func(root string) error {
		r, err := Open(root, ourKey)
		if err != nil {
			return err
		}
		return makeBackup(context.Background(), r, idB, idA)
	},
	"delete": func(root string) error {
		r, err := Open(root, ourKey)
		if err != nil {
			return err
		}
		c, err := r.Claim(testDomain, idB)
		if err != nil {
			return err
		}
		return errors.Join(r.Delete(context.Background(), c, testDomain, idB), c.Release())
	},
	"rewrite": func(root string) error {
		r, err := Open(root, ourKey)
		if err != nil {
			return err
		}
		return rewrite(context.Background(), r, idB)
	},
	"merge": func(root string) error {
		r, err := Open(root, ourKey)
		if err != nil {
			return err
		}
		return merge(context.Background(), r)
	},
	"collect": func(root string) error {
		r, err := Open(root, ourKey)
		if err != nil {
			return err
		}
		return r.Collect(context.Background(), func(string) bool { return false })
	},
}

func TestMain(m *testing.M) {
	if run, ok := scenarios[os.Getenv("REPOSITORY_SCENARIO")]; ok {
		runtime.LockOSThread() // strace counts the calls of each thread
		if err := run(os.Getenv("REPOSITORY_ROOT")); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(3)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// killedAt runs a scenario that is killed at its n-th call of a system call,
// and tells whether it got that far.
func killedAt(t *testing.T, scenario, root, call string, n int) bool {
	t.Helper()
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	inject := fmt.Sprintf("inject=%s:signal=KILL:when=%d", call, n)
	c := exec.Command("strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace="+call, "-e", inject, program)
	c.Env = append(os.Environ(), "REPOSITORY_SCENARIO="+scenario, "REPOSITORY_ROOT="+root)
	out, err := c.CombinedOutput()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return false
	case errors.As(err, &exit) && exit.ExitCode() != 3:
		return true
	}
	t.Fatalf("%s: %v\n%s", scenario, err, out)
	return false
}

// eachKill runs a scenario killed at each call that changes something, until it
// runs to its end; prepare gives the root, check looks at what is left.
func eachKill(t *testing.T, scenario string, prepare func() string, check func(root string)) {
	t.Helper()
	if _, err := exec.LookPath("strace"); err != nil {
		t.Skip("strace is not installed")
	}
	kills := 0
	for _, call := range []string{"openat2", "mkdirat", "write", "fsync", "renameat", "renameat2", "linkat", "unlinkat"} {
		for n := 1; ; n++ {
			root := prepare()
			killed := killedAt(t, scenario, root, call, n)
			check(root)
			if !killed {
				break
			}
			kills++
		}
	}
	t.Logf("%s: killed at %d places", scenario, kills)
	if kills < 5 {
		t.Errorf("%s was killed only %d times: the test shows little", scenario, kills)
	}
}

func TestKilledInInit(t *testing.T) {
	eachKill(t, "init", t.TempDir, func(root string) {
		if _, err := Init(t.Context(), root); err != nil && !errors.Is(err, ErrExists) {
			t.Fatal(err)
		}
		r := open(t, root, ourKey)
		mustBackup(t, r, idA, "")
		if err := os.RemoveAll(root + "/" + repositoryPending); err != nil {
			t.Fatal(err)
		}
		checkWhole(t, root, r, idA)
	})
}

// collected checks that after a Collect nothing is left but one of the sets of
// backups that may be there, and that the repository goes on.
func collected(t *testing.T, root string, may ...[]string) {
	t.Helper()
	r := open(t, root, ourKey)
	if err := r.Collect(t.Context(), func(string) bool { return false }); err != nil {
		t.Fatal(err)
	}
	got, err := r.Backups(testDomain)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(may, func(set []string) bool { return slices.Equal(set, got) }) {
		t.Fatalf("the backups %v are left", got)
	}
	checkWhole(t, root, r, got...)
	mustBackup(t, r, idC, "")
	checkWhole(t, root, r, append(got, idC)...)
}

func prepared(t *testing.T, backups ...string) string {
	t.Helper()
	root, r := newRepository(t)
	parent := ""
	for _, b := range backups {
		mustBackup(t, r, b, parent)
		parent = b
	}
	return root
}

func TestKilledInBackup(t *testing.T) {
	eachKill(t, "backup", func() string { return prepared(t, idA) }, func(root string) {
		collected(t, root, []string{idA}, []string{idA, idB})
	})
}

func TestKilledInDelete(t *testing.T) {
	eachKill(t, "delete", func() string { return prepared(t, idA, idB) }, func(root string) {
		collected(t, root, []string{idA}, []string{idA, idB})
	})
}

func TestKilledInCollect(t *testing.T) {
	eachKill(t, "collect", func() string {
		root := prepared(t, idA)
		if _, err := stageFiles(open(t, root, ourKey), idB); err != nil {
			t.Fatal(err)
		}
		return root
	}, func(root string) { collected(t, root, []string{idA}) })
}
