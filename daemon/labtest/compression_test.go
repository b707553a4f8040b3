//go:build lab

package labtest

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/virtbackup/virtbackup/dbus"
)

// compressionSteps are those of a compression, in their order.
var compressionSteps = []step{
	{name: "opening", in: theWorker, op: "create", path: `/vda\.qcow2~`},
	{name: "compressing", in: theWorker, op: "write", path: `/vda\.qcow2~`},
	{name: "flushing", in: theWorker, op: "fsync", path: `/vdb\.qcow2~`},
	{name: "verifying", in: theWorker, op: "read", path: `/vdb\.qcow2~`},
	{name: "committing", in: theWorker, op: "rename", path: `/manifest\.json$`},
	{name: "committed", in: theWorker, op: "rename", path: `/manifest\.json$`, after: true},
	{name: "renaming", in: theWorker, op: "rename", path: `/vda\.digests$`, after: true},
}

// packer is a chain of three backups, of which the middle one is compressed.
type packer struct {
	*killer
	backups []dbus.BackupProperties
	held    []snapshot
}

// grow begins a new chain, nothing of which is compressed.
func (p *packer) grow(t *testing.T) {
	p.retarget(t)
	p.backups, p.held = nil, nil
	for i := range 3 {
		p.write("vda", 10*i, 30)
		p.write("vdb", 5*i, 9)
		p.g.io("vda", "write -z 1M 128k", "discard 2M 256k")
		p.held = append(p.held, p.g.snapshot())
		p.backups = append(p.backups, p.backup(p.g, dbus.BackupOptions{Full: i == 0}))
	}
}

func (p *packer) exact() {
	for i, b := range p.backups {
		p.chainIsExact(b, p.held[i])
	}
}

// look returns what is known of the backup that is compressed.
func (p *packer) look() dbus.BackupProperties {
	b, err := dbus.Get[dbus.BackupProperties](p.t.Context(), p.Client, p.backups[1].ID)
	if err != nil {
		p.t.Fatal(err)
	}
	return b
}

// compress starts to compress the one in the middle.
func (p *packer) compress() (job string) {
	zstd := dbus.CompressionZstd
	job, err := p.CompressBackup(p.t.Context(), p.backups[1].ID, dbus.CompressOptions{Compression: &zstd})
	if err != nil {
		p.t.Fatal(err)
	}
	return job
}

// smaller holds what is known of the backup against its files, which are
// compressed, or as they were.
func (p *packer) smaller(compressed bool) {
	now, before := p.look(), p.backups[1]
	var stored uint64
	for _, d := range now.Disks {
		info, err := os.Stat(p.image(before, d.Target))
		if err != nil {
			p.t.Fatal(err)
		}
		stored += uint64(info.Size())
	}
	if now.StoredBytes != stored || (stored < before.StoredBytes) != compressed || (now.CompressionState == dbus.CompressionDone) != compressed {
		p.t.Errorf("its files have %d bytes, before %d; it is said to have %d, and that it is %q %s", stored, before.StoredBytes, now.StoredBytes, now.CompressionState, now.CompressionError)
	}
}

func (p *packer) nothingLeft() {
	p.killer.nothingLeft(p.g)
	noGenerations(p.t, p.path)
}

// TestCompressionKilledAtEachStep has faults come at each step of a compression:
// the whole chain is exact at every moment, either all images of the backup are
// exchanged or none, nothing is left over, and another try goes well.
func TestCompressionKilledAtEachStep(t *testing.T) {
	p := &packer{killer: &killer{t: t, storage: mountRepository(t), scratch: &faultFS{}}}
	p.host = newHostAt(t, p.storage.point)
	p.g = newPausedGuest(t, "qcow2:6M", "raw:2M")
	for _, f := range faults {
		if !slices.Contains([]string{"worker-kill", "daemon-kill", "cancel", "libvirtd-restart"}, f.name) {
			continue
		}
		for _, s := range compressionSteps {
			few := []string{"compressing", "committed"}
			if f.name == "worker-kill" {
				few = append(few, "opening", "committing", "renaming")
			}
			if os.Getenv("TEST_FAULTS") != "all" && !slices.Contains(few, s.name) {
				continue
			}
			t.Run(f.name+"/"+s.name, func(t *testing.T) { p.try(t, f, s) })
		}
	}
}

func (p *packer) try(t *testing.T, f fault, s step) {
	p.grow(t)
	at := p.trap(s)
	job := p.compress()
	at.wait()
	p.daemon = daemonPID(t)
	f.do(p.killer, job)
	if f.settled != nil {
		f.settled(p.killer)
	}
	p.exact()
	at.letGo()
	j := p.end(job)
	t.Logf("%s: %s", j.State, j.ErrorMessage)
	committed := slices.IndexFunc(compressionSteps, func(c step) bool { return c.name == s.name }) >=
		slices.IndexFunc(compressionSteps, func(c step) bool { return c.name == "committed" })
	switch {
	case f.name == "daemon-kill" || f.name == "libvirtd-restart":
		if j.State != dbus.JobSucceeded {
			t.Errorf("the job is %s", j.State)
		}
	case !committed && s.name != "committing" && j.State == dbus.JobSucceeded:
		t.Error("the job succeeded although it was ended before")
	}
	p.nothingLeft()
	p.exact()
	// A rename that waits is done when it is let go, whoever asked for it.
	p.smaller(committed || j.State == dbus.JobSucceeded || s.name == "committing" && p.look().CompressionState == dbus.CompressionDone)
	if err := p.end(p.compress()).Err(); err != nil {
		t.Error(err)
	}
	p.exact()
	p.smaller(true)
	p.restoreIsExact(p.backups[2], p.held[2])
	p.nothingLeft()
}

// TestCompressionFails has the repository fail while a backup is compressed.
func TestCompressionFails(t *testing.T) {
	p := &packer{killer: &killer{t: t, storage: mountRepository(t), scratch: &faultFS{}}}
	p.host = newHostAt(t, p.storage.point)
	p.g = newPausedGuest(t, "qcow2:6M", "raw:2M")
	p.grow(t)
	for _, c := range []struct {
		op, path string
		errno    syscall.Errno
		want     dbus.ErrorName
	}{
		{"write", `/vdb\.qcow2~`, syscall.ENOSPC, dbus.ErrRepositoryFull},
		{"fsync", `/vda\.qcow2~`, syscall.EIO, dbus.ErrRepositoryUnavailable},
		{"rename", `/manifest\.json$`, syscall.EIO, dbus.ErrRepositoryUnavailable},
	} {
		t.Run(c.op, func(t *testing.T) {
			p.retarget(t)
			fails := p.storage.fail(c.op, c.path, c.errno)
			job := p.compress()
			fails.wait()
			fails.letGo()
			failsAs(t, p.end(job), c.want)
			p.nothingLeft()
			p.exact()
			p.smaller(false)
		})
	}
	p.retarget(t)
	if err := p.end(p.compress()).Err(); err != nil {
		t.Error(err)
	}
	p.smaller(true)
	p.exact()
}

// TestDeferredCompression has backups compressed by themselves, in jobs that give
// way to backups and restores of the domain.
func TestDeferredCompression(t *testing.T) {
	configure(t, "[compression]\nrate = 1\n")
	h, g := newHost(t), newPausedGuest(t, "qcow2:24M")
	zstd, deferred := dbus.CompressionZstd, dbus.CompressionDeferred
	o := dbus.BackupOptions{Settings: dbus.Settings{Compression: &zstd, CompressionTime: &deferred}}
	g.io("vda", "write -P 1 0 20M")
	held := []snapshot{g.snapshot()}
	backups := []dbus.BackupProperties{h.backup(g, o)}
	if backups[0].StoredBytes < 20<<20 || backups[0].Compression != dbus.CompressionNone {
		t.Fatalf("it is compressed already: %+v", backups[0])
	}
	compress := dbus.OperationCompress
	var job dbus.JobProperties
	running := func() {
		t.Helper()
		eventually(t, "a job compresses it", func() error {
			for j, err := range h.Jobs(t.Context(), dbus.JobFilter{Domain: g.uuid, Operation: &compress}) {
				if err != nil {
					return err
				}
				if job = j; j.State == dbus.JobRunning && j.BytesDone > 0 {
					return nil
				}
			}
			return fmt.Errorf("%s, %s", job.State, job.Waiting)
		})
	}
	running()
	// At this rate it would take 20 s.
	g.io("vda", "write -P 2 1M 2M")
	held = append(held, g.snapshot())
	backups = append(backups, h.backup(g, o))
	first := job.ID
	running()
	h.restoreIsExact(backups[0], held[0])
	running()
	if job.ID != first || job.Attempt != 1 || job.Origin != dbus.OriginSystem || job.Backup != backups[0].ID {
		t.Errorf("it is another job: %+v", job)
	}
	out := command(t, "", "virtbackupctl", "jobs", "--type", "compression")
	for _, want := range []string{job.ID, backups[0].ID, "running", "1 of 3", "waits for job " + job.ID} {
		if !strings.Contains(out, want) {
			t.Errorf("it does not say %q: %s", want, out)
		}
	}
	if err := os.WriteFile("/etc/virtbackup/virtbackupd.toml", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	command(t, "", "systemctl", "reload", "virtbackupd.service")
	for i, b := range backups {
		eventually(t, "it is compressed", func() error {
			now, err := dbus.Get[dbus.BackupProperties](t.Context(), h.Client, b.ID)
			if err == nil && (now.CompressionState != dbus.CompressionDone || now.Compression != zstd || now.StoredBytes > 1<<20) {
				err = fmt.Errorf("it is %q, %q, %d bytes", now.CompressionState, now.CompressionError, now.StoredBytes)
			}
			return err
		})
		h.chainIsExact(b, held[i])
	}
	out = command(t, "", "virtbackupctl", "list", g.name)
	if !strings.Contains(out, " 98%") || !strings.Contains(out, "SAVED") {
		t.Errorf("what was saved is not told: %s", out)
	}
	noGenerations(t, h.path)
}
