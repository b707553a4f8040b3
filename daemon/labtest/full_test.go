//go:build lab

package labtest

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/virtbackup/virtbackup/dbus"
)

// failsAs checks that a job failed for a reason.
func failsAs(t *testing.T, j dbus.JobProperties, want dbus.ErrorName) {
	t.Helper()
	if j.State != dbus.JobFailed || !errors.Is(j.Err(), want) {
		t.Errorf("the job is %s, %s (%s), and is to fail with %s", j.State, j.Error, j.ErrorMessage, want)
	}
}

// TestRepositoryFull has a backup that does not fit.
func TestRepositoryFull(t *testing.T) {
	image, point := filepath.Join(fresh(t, "/var/tmp"), "ext4"), fresh(t, "/srv")
	command(t, "", "truncate", "--size=16M", image)
	command(t, "", "mkfs.ext4", "-q", image)
	command(t, "", "mount", "-o", "loop", image, point)
	t.Cleanup(func() { command(t, "", "umount", point) })
	repository := fresh(t, point)
	h, g := newHostAt(t, repository), newPausedGuest(t, "qcow2:32M")
	g.io("vda", "write -P 1 0 1M")
	first := g.snapshot()
	good := h.backup(g, dbus.BackupOptions{})
	g.io("vda", "write -P 2 0 32M")
	failsAs(t, h.end(h.start(g, dbus.BackupOptions{})), dbus.ErrRepositoryFull)
	h.nothingLeft(g)
	h.chainIsExact(good, first)
	g.io("vda", "write -z 2M 30M", "write -P 3 1M 64k")
	last := g.snapshot()
	h.chainIsExact(h.backup(g, dbus.BackupOptions{}), last)
	h.nothingLeft(g)
}

// TestScratchFull has no space for what the guest overwrites during a backup:
// QEMU pauses the guest then, and it must not stay so.
func TestScratchFull(t *testing.T) {
	k := newKiller(t)
	k.write("vda", 0, 64)
	job, at := k.startAndStop(steps[stepIndex("copying")])
	full := k.scratch.fail("write", `/vda\.qcow2$`, syscall.ENOSPC)
	k.g.run("sh", "-c", "dd if=/dev/urandom of=/dev/vda bs=64k count=64 oflag=direct >/dev/null 2>&1 && touch /run/written &")
	full.wait()
	// While the repository still hangs.
	k.g.run("sh", "-c", "until [ -e /run/written ]; do usleep 50000; done")
	full.letGo()
	at.letGo()
	j := k.end(job)
	t.Logf("%s: %s", j.State, j.ErrorMessage)
	if j.State == dbus.JobSucceeded {
		t.Error("a backup succeeded without what the guest had overwritten")
	}
	k.nothingLeft(k.g)
	want := k.g.snapshot("vda")
	k.chainIsExact(k.backup(k.g, k.options()), want)
	k.nothingLeft(k.g)
}

// TestRepositoryFails has a repository that fails in the middle of a backup.
func TestRepositoryFails(t *testing.T) {
	storage := mountRepository(t)
	h, g := newHostAt(t, storage.point), newPausedGuest(t, "qcow2:16M")
	h.backup(g, dbus.BackupOptions{})
	for name, p := range map[string]struct {
		op, path string
		errno    syscall.Errno
		want     dbus.ErrorName
	}{
		"read-only":    {"mkdir", stage + `$`, syscall.EROFS, dbus.ErrRepositoryUnavailable},
		"write error":  {"write", stage + `/vda\.qcow2$`, syscall.EIO, dbus.ErrRepositoryUnavailable},
		"flush error":  {"fsync", stage + `/vda\.qcow2$`, syscall.EIO, dbus.ErrRepositoryUnavailable},
		"read error":   {"read", stage + `/vda\.qcow2$`, syscall.EIO, dbus.ErrDamaged},
		"stale handle": {"rename", `/manifest\.json$`, syscall.ESTALE, dbus.ErrRepositoryUnavailable},
	} {
		t.Run(name, func(t *testing.T) {
			h.t, g.t, storage.t = t, t, t
			g.io("vda", "write -P 9 1M 1M")
			bad := storage.fail(p.op, p.path, p.errno)
			j := h.end(h.start(g, dbus.BackupOptions{}))
			bad.wait()
			failsAs(t, j, p.want)
			bad.letGo()
			h.nothingLeft(g)
			g.io("vda", "write -P 10 3M 1M")
			want := g.snapshot()
			h.chainIsExact(h.backup(g, dbus.BackupOptions{}), want)
		})
	}
}

// TestRestoreInterrupted stops a restore while it reads, and lets something
// happen: it goes on, or leaves nothing.
func TestRestoreInterrupted(t *testing.T) {
	k := newStoppedKiller(t)
	b, held, now := k.b, k.held, k.now
	for _, inPlace := range []bool{false, true} {
		for name, do := range map[string]func(*killer, string){"daemon-kill": (*killer).killDaemon, "worker-kill": (*killer).killWorker, "cancel": (*killer).cancel} {
			what := map[bool]string{false: "new", true: "in place"}[inPlace]
			t.Run(what+"/"+name, func(t *testing.T) {
				k.retarget(t)
				k.daemon = daemonPID(t)
				at := k.storage.stop(theWorker, "read", `/`+ulid+`/vda\.qcow2$`)
				job := k.restore(b, inPlace)
				at.wait()
				do(k.killer, job)
				at.letGo()
				if name == "daemon-kill" {
					k.awaitDaemon()
				}
				j := k.end(job)
				want := map[string]dbus.JobState{"daemon-kill": dbus.JobSucceeded, "worker-kill": dbus.JobFailed, "cancel": dbus.JobCancelled}[name]
				if j.State != want {
					t.Errorf("the job is %s and not %s: %v", j.State, want, j.Err())
				}
				k.nothingLeft(k.g)
				k.restored(inPlace, j.State == dbus.JobSucceeded, held, now)
			})
		}
	}
}

// TestExchangeInterrupted kills the daemon between the exchange of one disk and
// the next: it carries on.
func TestExchangeInterrupted(t *testing.T) {
	const images = "/var/lib/libvirt/images"
	below := fresh(t, "/var/tmp")
	command(t, "", "mount", "--bind", images, below)
	t.Cleanup(func() { command(t, "", "umount", below) })
	command(t, "", "mount", "--make-private", below) // or the next mount would appear there too
	disks := mountFaults(t, below, images)
	k := newStoppedKiller(t)
	for _, target := range []string{"vda", "vdb"} {
		k.daemon = daemonPID(t)
		at := disks.stopAfter(theDaemon, "rename", `/?[^/]*`+target+`\.qcow2$`)
		job := k.restore(k.b, true)
		at.wait()
		k.killDaemon(job)
		at.letGo()
		k.awaitDaemon()
		if j := k.end(job); j.State != dbus.JobSucceeded {
			t.Errorf("the job is %s: %v", j.State, j.Err())
		}
		k.nothingLeft(k.g)
		k.restored(true, true, k.held, nil)
	}
}

// stoppedKiller has a guest that is off, and holds other data than its backup.
type stoppedKiller struct {
	*killer
	b         dbus.BackupProperties
	held, now snapshot
}

func newStoppedKiller(t *testing.T) *stoppedKiller {
	k := &stoppedKiller{killer: &killer{t: t}}
	k.storage, k.scratch = mountRepository(t), mountScratch(t)
	k.host, k.g = newHostAt(t, k.storage.point), newPausedGuest(t, "qcow2:16M", "qcow2:4M")
	k.write("vda", 0, 200)
	k.write("vdb", 0, 10)
	k.held = k.g.snapshot()
	k.b = k.backup(k.g, dbus.BackupOptions{})
	k.write("vda", 100, 100)
	k.write("vdb", 5, 10)
	k.now = k.g.snapshot()
	command(t, "", "virsh", "-q", "destroy", k.g.name)
	return k
}

const restoredName = "restored"

func (k *stoppedKiller) restore(b dbus.BackupProperties, inPlace bool) (job string) {
	k.t.Helper()
	var err error
	if inPlace {
		job, err = k.RestoreInPlace(k.t.Context(), b.ID, dbus.RestoreInPlaceOptions{})
	} else {
		job, err = k.RestoreBackup(k.t.Context(), b.ID, restoredName, dbus.RestoreOptions{})
	}
	if err != nil {
		k.t.Fatal(err)
	}
	return job
}

// restored compares what is there after a restore, and puts things back.
func (k *stoppedKiller) restored(inPlace, succeeded bool, held, now snapshot) {
	k.t.Helper()
	domain, want := k.g.name, now
	if succeeded {
		want = held
	}
	if !inPlace {
		if domain = restoredName; !succeeded {
			if exec.Command("virsh", "-q", "dominfo", domain).Run() == nil {
				k.t.Error("a domain is left of a restore that did not succeed")
			}
			if left, _ := filepath.Glob("/var/lib/libvirt/images/" + restoredName + "*"); len(left) > 0 {
				k.t.Errorf("files are left: %v", left)
			}
			domain = k.g.name
		}
	}
	for _, d := range disksOf(k.t, domain) {
		sameContent(k.t, strings.Join([]string{domain, d.target}, " "), d.format, d.file, want[d.target])
		if domain == restoredName {
			if err := os.Remove(d.file); err != nil {
				k.t.Error(err)
			}
		} else if succeeded {
			command(k.t, "", "qemu-img", "convert", "-f", "raw", "-O", "qcow2", k.now[d.target], d.file)
		}
	}
	if domain == restoredName {
		command(k.t, "", "virsh", "-q", "undefine", restoredName)
	}
}
