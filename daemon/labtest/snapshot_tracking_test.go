//go:build lab

package labtest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/virtbackup/virtbackup/dbus"
)

// bySnapshot asks for tracking by overlays.
func bySnapshot() dbus.BackupOptions {
	tracking := dbus.TrackingSnapshot
	return dbus.BackupOptions{Settings: dbus.Settings{Tracking: &tracking}}
}

// overlays are those of a disk, the newest first, by the ids of their backups.
func (g *guest) overlays(target string) (ids []string, err error) {
	for _, d := range g.disks() {
		if d.target != target {
			continue
		}
		for file, format := d.file, d.format; ; {
			base, id, ours := strings.Cut(filepath.Base(file), ".virtbackup-")
			if !ours {
				return ids, nil
			}
			if format != "qcow2" {
				return ids, fmt.Errorf("%s is %s", file, format)
			}
			ids = append(ids, id)
			if backing := command(g.t, "", "sh", "-c", "qemu-img info -U -f qcow2 "+file+" | sed -n 's/^backing file: //p'"); filepath.Base(backing) != base {
				file = backing
				continue
			}
			return ids, nil
		}
	}
	return nil, fmt.Errorf("there is no disk %s", target)
}

// onlyOverlay waits until each disk has the overlay of a backup and nothing
// else of ours is there; "" means none.
func (g *guest) onlyOverlay(backup string) {
	g.t.Helper()
	eventually(g.t, "only the overlay of backup "+backup+" is left", func() error {
		count := 0
		for _, d := range g.disks() {
			ids, err := g.overlays(d.target)
			if err != nil {
				return err
			}
			if backup == "" && len(ids) > 0 || backup != "" && !slices.Equal(ids, []string{backup}) {
				return fmt.Errorf("%s has %v", d.target, ids)
			}
			count += len(ids)
		}
		files, err := filepath.Glob("/var/lib/libvirt/images/" + g.name + "-*.virtbackup-*")
		if err == nil && len(files) != count {
			err = fmt.Errorf("files are left: %v", files)
		}
		return err
	})
}

// intact has QEMU check all layers of the guest's disks.
func (g *guest) intact() {
	g.t.Helper()
	for _, d := range g.disks() {
		for file, format := d.file, d.format; format == "qcow2"; {
			command(g.t, "", "qemu-img", "check", "-q", "-U", "-f", "qcow2", file)
			info := command(g.t, "", "sh", "-c", "qemu-img info -U -f qcow2 "+file+" | sed -n 's/^backing file: //p; s/^backing file format: //p'")
			below := strings.Fields(info)
			if len(below) < 2 {
				break
			}
			file, format = below[0], below[1]
		}
	}
}

// TestSnapshotTracking makes a chain by overlays of a qcow2 and a raw disk,
// while the guest runs and while it is off, and ends it.
func TestSnapshotTracking(t *testing.T) {
	for name, writing := range map[string]func(g *guest, write func()){
		"running": func(_ *guest, write func()) { write() },
		"off":     func(g *guest, write func()) { g.whileOn(write) },
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			g := defineGuest(t, "qcow2:16M", "raw:16M")
			if name == "running" {
				command(t, "", "virsh", "-q", "start", "--paused", g.name)
			}
			type made struct {
				dbus.BackupProperties
				want snapshot
			}
			var all []made
			change := func(commands ...string) {
				writing(g, func() {
					for _, target := range []string{"vda", "vdb"} {
						g.io(target, commands...)
					}
				})
			}
			backup := func(want string) {
				t.Helper()
				held := g.snapshot()
				b := h.backup(g, bySnapshot())
				for _, target := range []string{"vda", "vdb"} {
					if got := foundBy(b, target); got != want {
						t.Errorf("%s is %s and not %s", target, got, want)
					}
				}
				h.chainIsExact(b, held)
				g.onlyOverlay(b.ID)
				g.intact()
				h.nothingLeft(g)
				all = append(all, made{b, held})
			}
			change("write -P 1 0 4M")
			backup("full")
			change("write -P 2 1M 64k", "write -z 2M 1M", "discard 3M 512k")
			backup("snapshot")
			backup("snapshot") // nothing changed
			change("write -P 3 8M 1M")
			backup("snapshot")
			if data := all[2].DataBytes; data != 0 {
				t.Errorf("an increment without changes holds %d bytes", data)
			}
			for _, b := range all {
				h.restoreIsExact(b.BackupProperties, b.want)
			}
			last := g.snapshot()
			if err := h.FinishChain(t.Context(), g.uuid); err != nil {
				t.Fatal(err)
			}
			g.onlyOverlay("")
			for _, d := range g.disks() {
				sameContent(t, d.target+" without overlays", d.format, d.file, last[d.target])
			}
			g.intact()
		})
	}
}

// TestSnapshotTrackingOfAdmins has admins do things to the layers: each costs a
// comparison, and no wrong increment.
func TestSnapshotTrackingOfAdmins(t *testing.T) {
	h := newHost(t)
	for name, c := range map[string]struct {
		want string // of vda
		do   func(g *guest)
	}{
		"nothing": {"snapshot", func(*guest) {}},
		"commits": {"digest overlay-missing", func(g *guest) {
			command(g.t, "", "virsh", "-q", "blockcommit", g.name, "vda", "--active", "--pivot", "--wait")
		}},
		"copies": {"digest disk-replaced", func(g *guest) {
			to := "/var/lib/libvirt/images/" + g.name + "-copy.qcow2"
			command(g.t, "", "virsh", "-q", "blockcopy", g.name, "vda", to, "--format", "qcow2", "--wait", "--pivot", "--transient-job")
		}},
		"pulls": {"digest disk-replaced", func(g *guest) {
			command(g.t, "", "virsh", "-q", "blockpull", g.name, "vda", "--wait")
			g.io("vda", "write -P 76 6M 64k") // and a flush, or QEMU alone knows what was pulled
		}},
		"snapshots": {"digest overlay-unsupported", func(g *guest) {
			command(g.t, "", "virsh", "-q", "snapshot-create-as", g.name, "s", "--disk-only", "--diskspec", "vda,file=/var/lib/libvirt/images/"+g.name+"-s", "--diskspec", "vdb,snapshot=no")
			g.io("vda", "write -P 77 5M 64k")
		}},
		"reboots": {"snapshot", func(g *guest) {
			command(g.t, "", "virsh", "-q", "destroy", g.name)
			command(g.t, "", "virsh", "-q", "start", "--paused", g.name)
		}},
		"saves": {"snapshot", func(g *guest) {
			command(g.t, "", "virsh", "-q", "resume", g.name)
			command(g.t, "", "virsh", "-q", "managedsave", g.name)
			command(g.t, "", "virsh", "-q", "start", g.name)
			command(g.t, "", "virsh", "-q", "suspend", g.name)
		}},
		"detaches": {"digest disk-replaced", func(g *guest) {
			file := filepath.Join(g.t.TempDir(), "disk.xml")
			command(g.t, "", "sh", "-c", "virsh -q dumpxml "+g.name+" --xpath \"//disk[target/@dev='vda']\" > "+file)
			command(g.t, "", "virsh", "-q", "resume", g.name)
			eventually(g.t, "vda is detached", func() error {
				_, err := tryVirsh("detach-device", g.name, file, "--live")
				if disks := g.disks(); len(disks) == 1 {
					return nil
				}
				return fmt.Errorf("not yet: %w", err)
			})
			command(g.t, "", "virsh", "-q", "attach-device", g.name, file, "--live")
			command(g.t, "", "virsh", "-q", "suspend", g.name)
		}},
		"defines anew": {"snapshot", func(g *guest) {
			file := filepath.Join(g.t.TempDir(), "domain.xml")
			command(g.t, "", "sh", "-c", "virsh -q dumpxml --inactive "+g.name+" > "+file)
			command(g.t, "", "virsh", "-q", "undefine", g.name)
			command(g.t, "", "virsh", "-q", "define", file)
		}},
		"resizes": {"full", func(g *guest) {
			command(g.t, "", "virsh", "-q", "blockresize", g.name, "vda", "20M")
			g.io("vda", "write -P 78 17M 64k")
		}},
	} {
		t.Run(name, func(t *testing.T) {
			h.t = t
			g := newPausedGuest(t, "qcow2:16M", "raw:8M")
			g.io("vda", "write -P 1 0 4M")
			h.backup(g, bySnapshot())
			g.io("vda", "write -P 2 1M 64k")
			g.io("vdb", "write -P 2 1M 64k")
			c.do(g)
			want := g.snapshot()
			b := h.backup(g, bySnapshot())
			if got := foundBy(b, "vda"); got != c.want {
				t.Errorf("vda is %s and not %s", got, c.want)
			}
			h.chainIsExact(b, want)
			g.io("vda", "write -P 3 2M 64k")
			want = g.snapshot()
			h.chainIsExact(h.backup(g, bySnapshot()), want)
			g.intact()
		})
	}
}

// TestSnapshotTrackingFails has backups come to nothing: the disks stay whole,
// and what changed is in the next one.
func TestSnapshotTrackingFails(t *testing.T) {
	h := newHost(t)
	g := newPausedGuest(t, "qcow2:16M", "raw:8M")
	g.io("vda", "write -P 1 0 4M")
	tip := h.backup(g, bySnapshot())
	g.io("vda", "write -P 2 1M 64k")
	g.io("vdb", "write -P 3 0 64k")

	t.Run("the repository is away", func(t *testing.T) {
		h.t, g.t = t, t
		if err := os.Rename(h.path, h.path+".away"); err != nil {
			t.Fatal(err)
		}
		j := h.end(h.start(g, bySnapshot()))
		if j.State != dbus.JobFailed {
			t.Errorf("the job is %s", j.State)
		}
		if err := os.Rename(h.path+".away", h.path); err != nil {
			t.Fatal(err)
		}
		g.onlyOverlay(tip.ID)
		h.nothingLeft(g)
	})
	t.Run("it is cancelled", func(t *testing.T) {
		h.t, g.t = t, t
		job := h.start(g, bySnapshot())
		if err := h.CancelJob(t.Context(), job); err != nil && !errors.Is(err, dbus.ErrNotFound) {
			t.Log(err)
		}
		if j := h.end(job); j.State == dbus.JobSucceeded {
			tip = h.made(j)
		}
		g.onlyOverlay(tip.ID)
		h.nothingLeft(g)
	})
	g.t, h.t = t, t
	g.io("vda", "write -P 4 2M 64k")
	want := g.snapshot()
	b := h.backup(g, bySnapshot())
	if got := foundBy(b, "vda"); got != "snapshot" {
		t.Errorf("vda is %s", got)
	}
	h.chainIsExact(b, want)
	g.intact()
}

// TestSnapshotTrackingKill lets faults come at the steps of an increment by
// overlays: whatever happens, the job ends once, the disks have one overlay of
// ours, all layers are whole, and the next backup is exact.
func TestSnapshotTrackingKill(t *testing.T) {
	k := newKiller(t)
	tracking := dbus.TrackingSnapshot
	k.tracking = &tracking
	k.write("vda", 0, 200)
	k.backup(k.g, k.options())
	for _, f := range faults {
		if !slices.Contains([]string{"daemon-kill", "worker-kill", "cancel", "qemu-kill", "libvirtd-restart"}, f.name) {
			continue
		}
		for _, s := range steps {
			if s.scratch || s.in != theWorker || f.name != "daemon-kill" && (s.name == "flushing" || s.name == "verifying") {
				continue
			}
			if !t.Run(f.name+"/"+s.name, func(t *testing.T) { k.tryOverlays(t, f, s) }) {
				t.FailNow()
			}
		}
	}
}

func (k *killer) tryOverlays(t *testing.T, f fault, s step) {
	j, want := k.interrupted(t, f, s)
	if j.State == dbus.JobSucceeded {
		b := k.made(j)
		k.chainIsExact(b, want)
		k.g.onlyOverlay(b.ID)
	}
	k.g.intact()
	k.write("vda", 200, 3)
	want = k.g.snapshot("vda")
	next := k.backup(k.g, k.options())
	t.Logf("%s; the next backup is %s, vda %s", j.State, next.Kind, foundBy(next, "vda"))
	k.chainIsExact(next, want)
	k.g.onlyOverlay(next.ID)
	k.g.intact()
	k.nothingLeft(k.g)
}

// TestSnapshotTrackingBeside has a chain by bitmaps and one by overlays of the
// same domain, in two repositories, take turns: neither is wrong.
func TestSnapshotTrackingBeside(t *testing.T) {
	first, second := newHost(t), newHost(t)
	g := newPausedGuest(t, "qcow2:16M")
	for round := range 8 {
		g.io("vda", fmt.Sprintf("write -P %d %dk 192k", round+1, round*128))
		if round%3 == 2 { // what is to be committed then, is while it is off
			command(t, "", "virsh", "-q", "destroy", g.name)
		}
		h, o := first, dbus.BackupOptions{}
		if round%2 == 1 {
			h, o = second, bySnapshot()
		}
		want := g.snapshot()
		b := h.backup(g, o)
		t.Logf("round %d: %s", round, foundBy(b, "vda"))
		if round%2 == 1 && round > 1 && foundBy(b, "vda") != "snapshot" { // that nobody else did anything to it is known
			t.Errorf("round %d: vda is %s", round, foundBy(b, "vda"))
		}
		h.chainIsExact(b, want)
		if round%3 == 2 {
			command(t, "", "virsh", "-q", "start", "--paused", g.name)
		}
		g.io("vda", fmt.Sprintf("write -P %d %dk 64k", 100+round, 8192+round*64))
	}
	g.intact()
}

// TestSnapshotTrackingGivenUp goes over to bitmaps in the same chain, and back.
func TestSnapshotTrackingGivenUp(t *testing.T) {
	for _, state := range []string{"running", "off"} {
		t.Run(state, func(t *testing.T) {
			h, g := newHost(t), newPausedGuest(t, "qcow2:16M", "raw:8M")
			g.io("vda", "write -P 1 0 4M")
			h.backup(g, bySnapshot())
			for i, c := range []struct {
				o       dbus.BackupOptions
				overlay bool
				want    string
			}{
				{dbus.BackupOptions{}, false, "digest checkpoint-missing"},
				{dbus.BackupOptions{}, false, "cbt"},
				{bySnapshot(), true, "digest overlay-missing"},
				{bySnapshot(), true, "snapshot"},
			} {
				g.io("vda", fmt.Sprintf("write -P %d %dM 64k", i+2, i))
				g.io("vdb", fmt.Sprintf("write -P %d %dM 64k", i+2, i))
				if state == "off" {
					command(t, "", "virsh", "-q", "destroy", g.name)
				}
				want := g.snapshot()
				b := h.backup(g, c.o)
				if got := foundBy(b, "vda"); got != c.want {
					t.Errorf("%d: vda is %s and not %s\n%s", i, got, c.want, command(t, "", "virtbackupctl", "domain", "show", g.name))
				}
				h.chainIsExact(b, want)
				if c.overlay {
					g.onlyOverlay(b.ID)
				} else {
					g.onlyOverlay("")
				}
				if state == "off" {
					command(t, "", "virsh", "-q", "start", "--paused", g.name)
				}
			}
			g.intact()
		})
	}
}

// TestSnapshotTrackingRestoredInPlace restores over disks that have overlays:
// those go, and the disks are what the backup holds.
func TestSnapshotTrackingRestoredInPlace(t *testing.T) {
	h, g := newHost(t), newPausedGuest(t, "qcow2:16M", "raw:8M")
	before := g.disks()
	g.io("vda", "write -P 1 0 4M")
	g.io("vdb", "write -P 2 0 1M")
	want := g.snapshot()
	b := h.backup(g, bySnapshot())
	g.io("vda", "write -P 3 1M 4M")
	g.io("vdb", "write -P 4 512k 4M")
	command(t, "", "virsh", "-q", "destroy", g.name)
	job, err := h.RestoreInPlace(t.Context(), b.ID, dbus.RestoreInPlaceOptions{})
	if err == nil {
		err = h.end(job).Err()
	}
	if err != nil {
		t.Fatal(err)
	}
	if now := g.disks(); !slices.Equal(now, before) {
		t.Errorf("the disks are %v and were %v", now, before)
	}
	for _, d := range g.disks() {
		sameContent(t, d.target, d.format, d.file, want[d.target])
	}
	g.onlyOverlay("")
	h.nothingLeft(g)
	next := h.backup(g, bySnapshot())
	if next.Kind != dbus.KindFull {
		t.Errorf("the next backup is %s", next.Kind)
	}
	h.chainIsExact(next, want)
	g.onlyOverlay(next.ID)
}
