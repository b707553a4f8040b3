//go:build lab

package labtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/errand"
	"github.com/virtbackup/virtbackup/daemon/internal/job"
	"github.com/virtbackup/virtbackup/daemon/internal/supervise"
	"github.com/virtbackup/virtbackup/daemon/internal/transfer"
	"github.com/virtbackup/virtbackup/dbus"
	"github.com/virtbackup/virtbackup/systemd/jobunit"
)

// server is a daemon that does nothing but serve backups of a host: an engine of
// its own, whose jobs do what a test says, with the installed worker in its
// sandbox. The installed daemon leaves its units alone.
type server struct {
	*host
	sender  errand.Sender
	catalog *catalog.Catalog
	engine  *job.Engine
	sockets string
	owner   transfer.Owner
	path    string                                   // of the repository, as the worker sees it
	script  func(context.Context, *job.Handle) error // of the next job, or of one that is taken up
}

const servedPrefix = "virtbackup-served-"

func newServer(h *host) *server {
	t := h.t
	t.Helper()
	units, err := jobunit.Connect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(units.Close)
	s := &server{host: h, sockets: fresh(t, "/run"), path: h.path}
	if err := os.Chmod(s.sockets, 0o711); err != nil {
		t.Fatal(err)
	}
	s.sender = errand.Sender{
		Supervisor: supervise.New(units, supervise.Options{Directory: fresh(t, "/run"), Worker: "/usr/libexec/virtbackup/virtbackup-worker",
			StopAfter: 2 * time.Second, Log: slog.New(slog.DiscardHandler), Prefix: servedPrefix}),
		Limits:  func() jobunit.Limits { return jobunit.Limits{MemoryMax: 256 << 20} },
		KeyFile: "/var/lib/virtbackup/manifest.key",
		Pins:    func(context.Context, string) (map[string]string, error) { return nil, nil },
	}
	account, err := user.Lookup("libvirt-qemu")
	if err != nil {
		t.Fatal(err)
	}
	uid, err := strconv.Atoi(account.Uid)
	if err != nil {
		t.Fatal(err)
	}
	s.owner = transfer.Owner{UID: &uid}
	if s.catalog, err = catalog.Open(t.Context(), filepath.Join(t.TempDir(), "catalog.sqlite")); err != nil {
		t.Fatal(err)
	}
	s.boot()
	t.Cleanup(func() {
		s.engine.Stop()
		if err := s.catalog.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// boot starts the engine, which takes up what a stopped one had begun.
func (s *server) boot() {
	s.t.Helper()
	s.engine = job.New(s.catalog, map[string]job.Kind{"serve": s}, job.Options{
		Limits: job.Limits{Stall: time.Hour}, Logger: slog.New(slog.DiscardHandler), KeepFor: time.Hour, KeepMost: 10,
	})
	if s.script == nil {
		s.script = func(context.Context, *job.Handle) error { return nil }
	}
	if err := s.engine.Start(s.t.Context()); err != nil {
		s.t.Fatal(err)
	}
}

func (s *server) Run(ctx context.Context, h *job.Handle) error  { return s.script(ctx, h) }
func (s *server) Undo(ctx context.Context, h *job.Handle) error { return s.sender.End(ctx, h.Job().ID) }

// do runs a script as a job, and returns how that ended.
func (s *server) do(script func(context.Context, *job.Handle) error) error {
	s.t.Helper()
	s.script = script
	return s.await(s.submit())
}

func (s *server) submit() string {
	s.t.Helper()
	st, err := s.engine.Submit(s.t.Context(), job.Request{Kind: "serve"})
	if err != nil {
		s.t.Fatal(err)
	}
	return st.ID
}

func (s *server) await(id string) error {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), limit)
	defer cancel()
	st, err := s.engine.Wait(ctx, id)
	if err == nil && st.State != catalog.JobSucceeded {
		err = fmt.Errorf("the job is %s: %s", st.State, st.ErrorMessage)
	}
	return err
}

// serve has the disks of a backup served.
func (s *server) serve(ctx context.Context, h *job.Handle, b dbus.BackupProperties) (*errand.Serving, error) {
	spec := transfer.Spec{Domain: b.DomainUUID, Serve: &transfer.ServeSpec{Backup: b.ID, Owner: s.owner}}
	for _, d := range b.Disks {
		spec.Serve.Disks = append(spec.Serve.Disks, transfer.ServeDisk{Target: d.Target, Socket: filepath.Join(s.sockets, d.Target)})
	}
	return s.sender.Serve(ctx, h, catalog.Repository{ID: s.repository, Name: s.offering, Path: s.path}, spec)
}

func (s *server) uri(target string) string {
	return fmt.Sprintf("nbd+unix:///%s?socket=%s", target, filepath.Join(s.sockets, target))
}

// isExact has QEMU's user read all disks, and compares them.
func (s *server) isExact(what string, want snapshot) error {
	for target, file := range want {
		out, err := exec.Command("runuser", "-u", "libvirt-qemu", "--", "nbdcopy", s.uri(target), "null:").CombinedOutput()
		if err == nil {
			out, err = exec.Command("qemu-img", "compare", "-f", "raw", "-F", "raw", s.uri(target), file).CombinedOutput()
		}
		if err != nil {
			return fmt.Errorf("%s, %s: %w: %s", what, target, err, out)
		}
	}
	return nil
}

// nothingServed says what is left of serving.
func (s *server) nothingServed() error {
	units, err := exec.Command("systemctl", "list-units", "--all", "--no-legend", "--plain", servedPrefix+"*").CombinedOutput()
	if err == nil && len(bytes.TrimSpace(units)) > 0 {
		return fmt.Errorf("units are left: %s", units)
	}
	for _, directory := range []string{s.sockets, s.sender.Supervisor.Directory} {
		left, err := os.ReadDir(directory)
		if err == nil && len(left) > 0 {
			err = fmt.Errorf("%s: %v is left", directory, left)
		}
		if err != nil {
			return err
		}
	}
	return err
}

// TestServedChain serves each backup of a chain, and compares it with what the
// guest's disks held: also to a daemon that went down meanwhile, and from a
// second worker when the first was killed.
func TestServedChain(t *testing.T) {
	h, g := newHost(t), newPausedGuest(t, "qcow2:8M", "raw:3147264")
	var backups []dbus.BackupProperties
	var held []snapshot
	for i, compression := range []dbus.Compression{dbus.CompressionNone, dbus.CompressionZstd, dbus.CompressionNone} {
		g.io("vda", fmt.Sprintf("write -P %d %dM 1M", i+1, i), fmt.Sprintf("write -P %d 5M 4k", i+10), "discard 0 64k")
		g.io("vdb", fmt.Sprintf("write -P %d 3145728 1536", i+20))
		held = append(held, g.snapshot())
		backups = append(backups, h.backup(g, dbus.BackupOptions{Settings: dbus.Settings{Compression: &compression}}))
	}
	s := newServer(h)
	for i, b := range backups {
		if err := s.do(func(ctx context.Context, h *job.Handle) error {
			v, err := s.serve(ctx, h, b)
			if err != nil {
				return err
			}
			exact := s.isExact(b.ID, held[i])
			result, err := v.Stop(ctx)
			if err == nil && (len(result.Served) != 2 || result.Served[0].Read == 0) {
				err = fmt.Errorf("it served %+v", result.Served)
			}
			return errors.Join(exact, err)
		}); err != nil {
			t.Error(err)
		}
	}
	eventually(t, "nothing is left of serving", s.nothingServed)
	newest, want := backups[2], held[2]

	serving := make(chan string)
	s.script = func(ctx context.Context, h *job.Handle) error {
		if _, err := s.serve(ctx, h, newest); err != nil {
			return err
		}
		select {
		case serving <- h.Job().ID:
		case <-ctx.Done():
		}
		<-ctx.Done() // as if a guest ran
		return context.Cause(ctx)
	}
	id := s.submit()
	<-serving
	pid := workerPID(t, id)
	s.engine.Stop() // the daemon goes down
	if err := s.isExact("without a daemon", want); err != nil {
		t.Error(err)
	}
	s.script = func(ctx context.Context, h *job.Handle) error {
		v, err := s.serve(ctx, h, newest)
		if err != nil {
			return err
		}
		if now := workerPID(t, id); now != pid {
			t.Errorf("worker %s was not taken up: %s serves", pid, now)
		}
		command(t, "", "kill", "-KILL", pid)
		<-v.Done()
		result, killed := v.Stop(ctx)
		if died := new(supervise.KilledError); !errors.As(killed, &died) {
			t.Errorf("of a worker that was killed: %+v, %v", result, killed)
		}
		if v, err = s.serve(ctx, h, newest); err != nil {
			return fmt.Errorf("a second worker: %w", err)
		}
		_, err = v.Stop(ctx)
		return errors.Join(s.isExact("after it was stopped", want), err)
	}
	s.boot()
	if err := s.await(id); err == nil || !strings.Contains(err.Error(), "after it was stopped") {
		t.Errorf("the job that was taken up: %v", err)
	}
	eventually(t, "nothing is left of serving", s.nothingServed)

	s.script = func(ctx context.Context, h *job.Handle) error {
		_, err := s.serve(ctx, h, newest)
		serving <- h.Job().ID
		<-ctx.Done()
		return errors.Join(err, context.Cause(ctx))
	}
	id = s.submit()
	<-serving
	if err := s.engine.Cancel(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if err := s.await(id); err == nil {
		t.Error("the job was not cancelled")
	}
	eventually(t, "nothing is left of serving", s.nothingServed)
}

func workerPID(t *testing.T, id string) string {
	t.Helper()
	return command(t, "", "systemctl", "show", "--value", "-p", "MainPID", servedPrefix+id+".service")
}

// TestServedDamage flips a byte in the middle of a chain: who reads the block
// gets an error, and the damage is named. Beside it all can be read.
func TestServedDamage(t *testing.T) {
	h, g := newHost(t), newPausedGuest(t, "qcow2:8M")
	none := dbus.CompressionNone
	var backups []dbus.BackupProperties
	for i := range 3 {
		g.io("vda", fmt.Sprintf("write -P %d %dM 64k", 0x5b+i, i+1))
		backups = append(backups, h.backup(g, dbus.BackupOptions{Settings: dbus.Settings{Compression: &none}}))
	}
	path := h.image(backups[1], "vda")
	image, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	at := bytes.Index(image, bytes.Repeat([]byte{0x5c}, 64<<10))
	if at < 0 {
		t.Fatal("the image does not hold what was written")
	}
	image[at+1234] ^= 1
	if err := os.WriteFile(path, image, 0o600); err != nil {
		t.Fatal(err)
	}
	s := newServer(h)
	err = s.do(func(ctx context.Context, j *job.Handle) error {
		v, err := s.serve(ctx, j, backups[2])
		if err != nil {
			return err
		}
		if out, err := exec.Command("nbdcopy", s.uri("vda"), "null:").CombinedOutput(); err == nil {
			t.Errorf("the damage was copied: %s", out)
		}
		out, err := exec.Command("qemu-io", "-r", "-f", "raw", "-c", "read -P 0x5b 1M 64k", "-c", "read 2M 512", "-c", "read -P 0x5d 3M 64k", s.uri("vda")).CombinedOutput()
		if strings.Count(string(out), "64 KiB") != 2 || !strings.Contains(string(out), "Input/output error") || strings.Contains(string(out), "Pattern verification failed") {
			t.Errorf("qemu-io: %v: %s", err, out)
		}
		eventually(t, "the status tells of the damage", func() error {
			if st, err := v.Status(); err != nil || len(st.Disks) != 1 || st.Disks[0].Damaged != 64<<10 {
				return fmt.Errorf("%+v, %w", st.Disks, err)
			}
			return nil
		})
		result, err := v.Stop(ctx)
		if !errors.Is(err, dbus.ErrDamaged) || result == nil || len(result.Served) != 1 || len(result.Served[0].Damage) != 1 {
			t.Fatalf("%+v, %v", result, err)
		}
		d := result.Served[0].Damage[0]
		if d.Backup != backups[1].ID || d.Offset != 2<<20 || d.Length != 64<<10 {
			t.Errorf("damage is %+v", d)
		}
		t.Log(err)
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	eventually(t, "nothing is left of serving", s.nothingServed)
}

// TestServedStorageHangs has the repository's storage hang while it is read: the
// status tells, the job goes on, and the backup gets no blame.
func TestServedStorageHangs(t *testing.T) {
	h, g := newHost(t), newPausedGuest(t, "qcow2:8M")
	g.io("vda", "write -P 7 0 1M")
	b := h.backup(g, dbus.BackupOptions{})
	s := newServer(h)
	s.path = fresh(t, "/srv")
	faults := mountFaults(t, h.path, s.path)
	err := s.do(func(ctx context.Context, j *job.Handle) error {
		v, err := s.serve(ctx, j, b)
		if err != nil {
			return err
		}
		hangs := faults.stop("virtbackup-worker", "read", `/vda\.qcow2$`)
		reader := exec.Command("qemu-io", "-r", "-f", "raw", "-c", "read 0 512", s.uri("vda"))
		if err := reader.Start(); err != nil {
			t.Fatal(err)
		}
		hangs.wait()
		eventually(t, "the status tells that a request waits", func() error {
			if st, err := v.Status(); err != nil || st.Disks[0].Pending < time.Second.Microseconds() || st.Disks[0].Damaged > 0 {
				return fmt.Errorf("%+v, %w", st.Disks, err)
			}
			return nil
		})
		result, err := v.Stop(ctx)
		if err != nil || result == nil || len(result.Served) != 1 || result.Served[0].Damage != nil {
			t.Errorf("while it hangs: %+v, %v", result, err)
		}
		if err := reader.Wait(); err == nil {
			t.Error("qemu-io read what was not there")
		}
		hangs.letGo()
		eventually(t, "the worker ends", func() error { return s.sender.End(ctx, j.Job().ID) })
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	eventually(t, "nothing is left of serving", s.nothingServed)
}
