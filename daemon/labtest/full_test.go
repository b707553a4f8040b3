//go:build lab

package labtest

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
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
