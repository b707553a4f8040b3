//go:build lab

package labtest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/virtbackup/virtbackup/dbus"
)

const settingsFile = "/etc/virtbackup/virtbackupd.toml"

// configure puts settings in force for the rest of the test, in place of those
// that were given to it before.
func (h *host) configure(settings string) {
	h.t.Helper()
	before, err := os.ReadFile(settingsFile)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() {
		restore := func() error { return os.WriteFile(settingsFile, before, 0o644) }
		if before == nil {
			restore = func() error { return os.Remove(settingsFile) }
		}
		if err := errors.Join(restore(), h.Reload(context.Background())); err != nil {
			h.t.Error(err)
		}
	})
	if err := os.MkdirAll(filepath.Dir(settingsFile), 0o755); err != nil {
		h.t.Fatal(err)
	}
	if err := errors.Join(os.WriteFile(settingsFile, []byte(settings), 0o644), h.Reload(h.t.Context())); err != nil {
		h.t.Fatal(err)
	}
}

// TestLimitsReachJobsThatRun has a backup held back by its rate take up, while
// it runs, the weights of its unit and another rate.
func TestLimitsReachJobsThatRun(t *testing.T) {
	h, g := newHost(t), newPausedGuest(t, "qcow2:32M")
	g.io("vda", "write -P 1 0 24M")
	want := g.snapshot()
	h.configure("[limits]\nrate_per_job = 1\nrate_per_host = 2\n")
	began := time.Now()
	job := h.start(g, dbus.BackupOptions{})
	eventually(t, "the backup copies", func() error {
		p, err := dbus.Get[dbus.JobProperties](t.Context(), h.Client, job)
		if err == nil && (p.Phase != "copying" || p.BytesDone == 0) {
			err = fmt.Errorf("it is %s, %q, %d bytes", p.State, p.Phase, p.BytesDone)
		}
		return err
	})
	p, err := dbus.Get[dbus.JobProperties](t.Context(), h.Client, job)
	if err != nil {
		t.Fatal(err)
	}
	// A second's share is the burst; all of it would take 24.
	if most := uint64(time.Since(began).Seconds()+4) << 20; p.BytesDone > most {
		t.Errorf("%d bytes were copied within %v at 1 MB/s", p.BytesDone, time.Since(began))
	}
	h.configure("[limits]\ncpu_weight = 77\nio_weight = 66\nmemory_max = \"900MiB\"\nrate_per_job = 2\n")
	got := command(t, "", "systemctl", "show", p.Unit, "-p", "CPUWeight", "-p", "IOWeight", "-p", "MemoryMax")
	for _, one := range []string{"CPUWeight=77", "IOWeight=66", "MemoryMax=943718400"} {
		if !strings.Contains(got, one) {
			t.Errorf("%s is not in %q", one, got)
		}
	}
	h.configure("")
	b := h.made(h.end(job))
	if took := time.Since(began); took > 23*time.Second && took < time.Minute { // a machine that is busy takes longer
		t.Errorf("it took %v, as if its rate had not been lifted", took)
	}
	h.chainIsExact(b, want)
	h.nothingLeft(g)
}

// TestSpaceIsPromisedOnce has two backups that would fit alone, and not together.
func TestSpaceIsPromisedOnce(t *testing.T) {
	image, point := filepath.Join(fresh(t, "/var/tmp"), "ext4"), fresh(t, "/srv")
	command(t, "", "truncate", "--size=64M", image)
	command(t, "", "mkfs.ext4", "-q", image)
	command(t, "", "mount", "-o", "loop", image, point)
	t.Cleanup(func() { command(t, "", "umount", point) })
	h := newHostAt(t, fresh(t, point))
	first, second := newPausedGuest(t, "qcow2:32M"), newPausedGuest(t, "qcow2:32M")
	for _, g := range []*guest{first, second} {
		g.io("vda", "write -P 1 0 32M")
	}
	h.configure("[limits]\nrate_per_job = 1\n")
	one := h.start(first, dbus.BackupOptions{})
	eventually(t, "the first copies", func() error {
		p, err := dbus.Get[dbus.JobProperties](t.Context(), h.Client, one)
		if err == nil && p.Phase != "copying" {
			err = fmt.Errorf("it is %s, %q", p.State, p.Phase)
		}
		return err
	})
	j := h.end(h.start(second, dbus.BackupOptions{}))
	failsAs(t, j, dbus.ErrRepositoryFull)
	if !strings.Contains(j.ErrorMessage, "those being made take") {
		t.Errorf("it says %q", j.ErrorMessage)
	}
	h.configure("")
	h.made(h.end(one))
	h.nothingLeft(first)
}
