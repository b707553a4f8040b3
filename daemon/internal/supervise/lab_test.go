//go:build lab

package supervise

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/oklog/ulid/v2"
	"golang.org/x/sys/unix"

	"github.com/virtbackup/virtbackup/daemon/internal/job"
	"github.com/virtbackup/virtbackup/daemon/internal/repository"
	"github.com/virtbackup/virtbackup/daemon/internal/transfer"
	"github.com/virtbackup/virtbackup/systemd/jobunit"
)

// TestMain lets the test's program be a worker as well, and a daemon that is to be killed.
func TestMain(m *testing.M) {
	switch {
	case len(os.Args) == 2 && filepath.IsAbs(os.Args[1]):
		work(os.Args[1])
	case len(os.Args) == 4 && os.Args[1] == "daemon":
		daemon(os.Args[2], os.Args[3])
	default:
		os.Exit(m.Run())
	}
}

// work is a worker that behaves as the name of its repository says.
func work(directory string) {
	terminated, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	spec, err := transfer.ReadSpec(directory)
	must(err)
	switch spec.Repository.Name {
	case "silent":
		os.Exit(1)
	case "deaf":
		signal.Ignore(unix.SIGTERM)
		terminated = context.Background()
	}
	say(directory, transfer.PhaseOpening)
	say(directory, transfer.PhaseReady)
	for !exists(filepath.Join(directory, transfer.GoFile)) {
		select {
		case <-terminated.Done():
			finish(directory, transfer.Result{Error: &transfer.Failure{Class: transfer.ClassCancelled, Message: "asked to"}})
		case <-time.After(10 * time.Millisecond):
		}
	}
	say(directory, transfer.PhaseCopying)
	switch spec.Repository.Name {
	case "eats":
		// Bounded: a host without the memory controller must not be eaten whole.
		for all := [][]byte{}; len(all) < 256; {
			b := make([]byte, 1<<20)
			_, _ = rand.Read(b)
			all = append(all, b)
		}
	case "hangs":
		must(os.WriteFile(filepath.Join(spec.Repository.Path, "file"), nil, 0o600))
	case "commits":
		<-terminated.Done()
	case "fails":
		finish(directory, transfer.Result{Error: &transfer.Failure{Class: transfer.ClassSource, Message: "no source"}})
	}
	finish(directory, transfer.Result{Repository: &transfer.RepositoryState{ID: "done"}})
}

func say(directory, phase string) {
	write(filepath.Join(directory, transfer.StatusFile), transfer.Status{Phase: phase, Updated: time.Now().UnixMicro()})
}

func finish(directory string, r transfer.Result) {
	write(filepath.Join(directory, transfer.ResultFile), r)
	if r.Error != nil {
		os.Exit(1)
	}
	os.Exit(0)
}

func write(path string, v any) {
	b, err := json.Marshal(v)
	must(err)
	must(os.WriteFile(path+".new", b, 0o600))
	must(os.Rename(path+".new", path))
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func must(err error) {
	if err != nil {
		panic(err)
	}
}

// daemon starts a worker and follows it, until somebody kills the daemon.
func daemon(directory, id string) {
	ctx := context.Background()
	units, err := jobunit.Connect(ctx)
	must(err)
	s := supervisor(units, directory)
	w, err := s.Start(ctx, transfer.Spec{Job: id, Operation: transfer.OperationBackup, Repository: transfer.RepositorySpec{Path: directory}}, jobunit.Limits{})
	must(err)
	_, err = w.Follow(ctx, func(s transfer.Status) { _, _ = os.Stdout.WriteString(s.Phase + "\n") })
	must(err)
}

func supervisor(units *jobunit.Manager, directory string) *Supervisor {
	program, err := os.Executable()
	must(err)
	return New(units, Options{Directory: directory, Worker: program, StopAfter: 2 * time.Second, Log: slog.New(slog.DiscardHandler)})
}

type fixture struct {
	*Supervisor
	spec transfer.Spec
}

func setUp(t *testing.T, behaviour string) fixture {
	t.Helper()
	units, err := jobunit.Connect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(units.Close)
	// Below /run, as in real life, which is an empty directory in the worker's root.
	directory, err := os.MkdirTemp("/run", "supervise")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(directory) })
	return fixture{supervisor(units, directory), transfer.Spec{
		Job: ulid.Make().String(), Operation: transfer.OperationBackup,
		Repository: transfer.RepositorySpec{Path: t.TempDir(), Name: behaviour},
	}}
}

func (f fixture) start(t *testing.T, limits jobunit.Limits) *Worker {
	t.Helper()
	w, err := f.Start(t.Context(), f.spec, limits)
	if err != nil {
		t.Fatal(err)
	}
	return w
}

// copying starts a worker and brings it past Go.
func (f fixture) copying(t *testing.T, limits jobunit.Limits) *Worker {
	t.Helper()
	w := f.start(t, limits)
	if err := w.Ready(t.Context(), func(transfer.Status) {}); err != nil {
		t.Fatal(err)
	}
	if err := w.Go(transfer.Go{Created: 1}); err != nil {
		t.Fatal(err)
	}
	return w
}

// gone forgets the worker and sees that nothing is left of it.
func (f fixture) gone(t *testing.T) {
	t.Helper()
	if err := f.Forget(t.Context(), f.spec.Job); err != nil {
		t.Fatal(err)
	}
	if left := f.left(t); left != nil {
		t.Errorf("left: %+v", left)
	}
	if _, err := f.Attach(t.Context(), f.spec.Job); !errors.Is(err, ErrNoWorker) {
		t.Errorf("Attach after Forget: %v", err)
	}
}

func (f fixture) left(t *testing.T) *Leftover {
	t.Helper()
	list, err := f.Leftovers(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(list, func(l Leftover) bool { return l.Job == f.spec.Job })
	if i < 0 {
		return nil
	}
	return &list[i]
}

// cancelAt cancels a context with a cause when the worker reaches a phase.
func cancelAt(t *testing.T, phase string, cause error) (context.Context, func(transfer.Status)) {
	ctx, cancel := context.WithCancelCause(t.Context())
	t.Cleanup(func() { cancel(nil) })
	return ctx, func(s transfer.Status) {
		if s.Phase == phase {
			cancel(cause)
		}
	}
}

func TestWholeLife(t *testing.T) {
	f := setUp(t, "")
	w := f.start(t, jobunit.Limits{})
	if w.Gone() {
		t.Error("Gone before Go")
	}
	if err := w.Ready(t.Context(), func(transfer.Status) {}); err != nil {
		t.Fatal(err)
	}
	if l := f.left(t); l == nil || !l.Directory || l.State.Ended() {
		t.Errorf("while it runs: %+v", l)
	}
	if err := f.Forget(t.Context(), f.spec.Job); err == nil {
		t.Error("a running worker was forgotten")
	}
	for range 2 {
		if err := w.Go(transfer.Go{Created: 1}); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 { // also when it has ended
		w, err := f.Start(t.Context(), f.spec, jobunit.Limits{})
		if err != nil {
			t.Fatal(err)
		}
		if err := w.Ready(t.Context(), func(transfer.Status) {}); err != nil || !w.Gone() {
			t.Errorf("Ready after Go: %v", err)
		}
		result, err := w.Follow(t.Context(), func(transfer.Status) {})
		if err != nil || result.Error != nil || result.Repository == nil {
			t.Fatalf("%+v, %v", result, err)
		}
	}
	f.gone(t)
}

func TestWorkerFails(t *testing.T) {
	f := setUp(t, "fails")
	w := f.copying(t, jobunit.Limits{})
	for range 2 {
		result, err := w.Follow(t.Context(), func(transfer.Status) {})
		if err != nil || result.Error == nil || result.Error.Class != transfer.ClassSource {
			t.Fatalf("%+v, %v", result, err)
		}
	}
	f.gone(t)
}

func TestStartFails(t *testing.T) {
	f := setUp(t, "")
	f.Worker = "/usr/libexec/no-such-worker"
	if _, err := f.Start(t.Context(), f.spec, jobunit.Limits{}); err == nil {
		t.Error("no error")
	}
	if l := f.left(t); l != nil {
		t.Errorf("left: %+v", l)
	}
	f.spec.Job = "../" + f.spec.Job
	if _, err := f.Start(t.Context(), f.spec, jobunit.Limits{}); err == nil {
		t.Error("no error for a bad id")
	}
}

func TestKilled(t *testing.T) {
	for _, test := range []struct {
		behaviour string
		limits    jobunit.Limits
		kill      bool
		signal    unix.Signal
	}{
		{behaviour: "silent"},
		{behaviour: "commits", kill: true, signal: unix.SIGKILL},
		{behaviour: "eats", limits: jobunit.Limits{MemoryMax: 64 << 20}, signal: unix.SIGKILL},
	} {
		t.Run(test.behaviour, func(t *testing.T) {
			f := setUp(t, test.behaviour)
			w := f.start(t, test.limits)
			if err := w.Go(transfer.Go{Created: 1}); err != nil {
				t.Fatal(err)
			}
			if test.kill {
				if err := f.units.Kill(t.Context(), w.unit); err != nil {
					t.Fatal(err)
				}
			}
			for range 2 { // the same is told to a daemon that was not there
				w, err := f.Attach(t.Context(), f.spec.Job)
				if err != nil {
					t.Fatal(err)
				}
				_, err = w.Follow(t.Context(), func(transfer.Status) {})
				if err == nil && test.limits.MemoryMax != 0 {
					f.gone(t)
					t.Skip("this host has no memory controller")
				}
				var killed *KilledError
				if !errors.As(err, &killed) || killed.Hung() || killed.State.Signal != test.signal {
					t.Fatalf("%v", err)
				}
				if err := w.Ready(t.Context(), func(transfer.Status) {}); test.signal == 0 && !errors.As(err, &killed) {
					t.Errorf("Ready: %v", err)
				}
				t.Log(err)
			}
			f.gone(t)
		})
	}
}

func TestCancel(t *testing.T) {
	asked := errors.New("asked to")
	t.Run("before go", func(t *testing.T) {
		f := setUp(t, "")
		ctx, onStatus := cancelAt(t, transfer.PhaseReady, asked)
		result, err := f.start(t, jobunit.Limits{}).Follow(ctx, onStatus)
		if err != nil || result.Error == nil || result.Error.Class != transfer.ClassCancelled {
			t.Fatalf("%+v, %v", result, err)
		}
		f.gone(t)
	})
	t.Run("committed meanwhile", func(t *testing.T) {
		f := setUp(t, "commits")
		ctx, onStatus := cancelAt(t, transfer.PhaseCopying, asked)
		result, err := f.copying(t, jobunit.Limits{}).Follow(ctx, onStatus)
		if err != nil || result.Error != nil {
			t.Fatalf("%+v, %v", result, err)
		}
		f.gone(t)
	})
	t.Run("does not listen", func(t *testing.T) {
		f := setUp(t, "deaf")
		ctx, onStatus := cancelAt(t, transfer.PhaseReady, asked)
		err := f.start(t, jobunit.Limits{}).Ready(ctx, func(s transfer.Status) { onStatus(transfer.Status{Phase: transfer.PhaseReady}) })
		for err == nil { // it may have been ready at once
			_, err = f.start(t, jobunit.Limits{}).Follow(ctx, onStatus)
		}
		var killed *KilledError
		if !errors.As(err, &killed) || killed.State.Signal != unix.SIGKILL || killed.Hung() {
			t.Fatal(err)
		}
		f.gone(t)
	})
	t.Run("before it was started", func(t *testing.T) {
		f := setUp(t, "")
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(asked)
		if _, err := f.Start(ctx, f.spec, jobunit.Limits{}); !errors.Is(err, asked) {
			t.Fatal(err)
		}
		if l := f.left(t); l != nil {
			t.Errorf("left: %+v", l)
		}
	})
	t.Run("after a restart", func(t *testing.T) {
		f := setUp(t, "")
		f.start(t, jobunit.Limits{})
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(asked)
		w, err := f.Start(ctx, f.spec, jobunit.Limits{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Follow(ctx, func(transfer.Status) {}); err != nil && !errors.As(err, new(*KilledError)) {
			t.Fatal(err)
		}
		f.gone(t)
	})
}

func TestDetach(t *testing.T) {
	f := setUp(t, "")
	w := f.start(t, jobunit.Limits{})
	ctx, onStatus := cancelAt(t, transfer.PhaseReady, job.ErrDetach)
	if _, err := w.Follow(ctx, onStatus); !errors.Is(err, job.ErrDetach) {
		t.Fatal(err)
	}
	if l := f.left(t); l == nil || l.State.Ended() {
		t.Fatalf("after the detach: %+v", l)
	}
	result, err := f.copying(t, jobunit.Limits{}).Follow(t.Context(), func(transfer.Status) {})
	if err != nil || result.Error != nil {
		t.Fatalf("%+v, %v", result, err)
	}
	f.gone(t)
}

// The daemon dies by SIGKILL; the next one finds the worker at work and brings the backup to its end.
func TestDaemonIsKilled(t *testing.T) {
	f := setUp(t, "")
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	first := exec.Command(program, "daemon", f.Directory, f.spec.Job)
	out, err := first.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := first.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 1)); err != nil { // a status: the worker is at work
		t.Fatal(err)
	}
	if err := first.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = first.Wait() // killed
	result, err := f.copying(t, jobunit.Limits{}).Follow(t.Context(), func(transfer.Status) {})
	if err != nil || result.Error != nil || result.Repository == nil {
		t.Fatalf("%+v, %v", result, err)
	}
	f.gone(t)
}

// The repository's storage hangs in the middle of a write: the worker cannot be killed, the daemon gives it up.
func TestStorageHangs(t *testing.T) {
	f := setUp(t, "hangs")
	mount := f.spec.Repository.Path
	image := filepath.Join(f.Directory, "image")
	for _, c := range [][]string{{"truncate", "-s", "16M", image}, {"mkfs.ext4", "-q", image}, {"mount", "-o", "loop", image, mount}, {"fsfreeze", "-f", mount}} {
		if out, err := exec.Command(c[0], c[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", c, err, out)
		}
	}
	thaw := func() {
		_ = exec.Command("fsfreeze", "-u", mount).Run() // fails the second time
	}
	t.Cleanup(func() {
		thaw()
		if out, err := exec.Command("umount", "-l", mount).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	})
	w := f.copying(t, jobunit.Limits{})
	ctx, onStatus := cancelAt(t, transfer.PhaseCopying, errors.New("asked to"))
	_, err := w.Follow(ctx, onStatus)
	var killed *KilledError
	if !errors.As(err, &killed) || !killed.Hung() {
		t.Fatal(err)
	}
	t.Log(err)
	if err := f.Forget(t.Context(), f.spec.Job); err != nil {
		t.Error(err)
	}
	if l := f.left(t); l == nil || !l.State.Processes || l.Directory {
		t.Errorf("while it hangs: %+v", l)
	}
	thaw()
	for deadline := time.Now().Add(time.Minute); f.left(t) != nil; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("left when the storage was back: %+v", f.left(t))
		}
	}
}

// The real worker in its sandbox makes a repository, and finds it again.
func TestRealWorker(t *testing.T) {
	const installed = "/usr/libexec/virtbackup/virtbackup-worker"
	if !exists(installed) {
		t.Skip("virtbackup-worker is not installed in this lab")
	}
	f := setUp(t, "test")
	f.Worker = installed
	f.spec.Repository.KeyFile = filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(f.spec.Repository.KeyFile, []byte("0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var id repository.ID
	for _, operation := range []transfer.Operation{transfer.OperationInit, transfer.OperationProbe, transfer.OperationList} {
		f.spec.Job, f.spec.Operation = ulid.Make().String(), operation
		result, err := f.start(t, jobunit.Limits{MemoryMax: 256 << 20, TasksMax: 64}).Follow(t.Context(), func(transfer.Status) {})
		if err != nil || result.Error != nil {
			t.Fatalf("%s: %+v, %v", operation, result, err)
		}
		if s := result.Repository; s != nil {
			if id != "" && id != s.ID || s.ReadOnly || s.Total == 0 {
				t.Errorf("%s: %+v", operation, s)
			}
			id = s.ID
		}
		f.gone(t)
	}
}
