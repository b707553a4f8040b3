package transfer

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/virtbackup/virtbackup/daemon/internal/repository"
)

// takeBy makes an increment whose changes are found in this way.
func (h *host) takeBy(changes, parent, chain string, disks ...disk) *Result {
	h.Helper()
	b := h.backupSpec(h.id(), parent, chain, disks...)
	for i := range disks {
		b.find(i, changes)
	}
	return h.take(b, disks...)
}

// mustTakeBy makes one of a single disk, or ends the test.
func (h *host) mustTakeBy(changes, parent, chain string, d disk) (id string, count DiskStatus, entry repository.Disk) {
	h.Helper()
	r := h.takeBy(changes, parent, chain, d)
	if r.Error != nil {
		h.Fatal(r.Error)
	}
	entry = r.Manifest.Disks[0]
	if entry.Changes != changes || entry.ReadBytes != r.Disks[0].Read {
		h.Errorf("the manifest says %+v, counted %+v", entry, r.Disks[0])
	}
	return r.Manifest.Backup, r.Disks[0], entry
}

// TestCompare changes single blocks, and nothing, without a bitmap that tells.
func TestCompare(t *testing.T) {
	for _, format := range []string{"raw", "qcow2"} {
		h := newHost(t)
		const size = 9<<20 + 512
		d := h.disk("vda", format, size)
		d.io(h, "write -P 1 0 5M", fmt.Sprintf("write -P 1 %d 512", 9<<20))
		full := h.mustTake("", "", d)

		same, got, entry := h.mustTakeBy(repository.ChangesDigest, full, full, d)
		if got.Dirty != 0 || got.Read < 5<<20 || got.Zero != 0 || entry.DataBytes != 0 || entry.StoredBytes > 512<<10 {
			t.Errorf("%s, nothing changed: counted %+v, stored %+v", format, got, entry)
		}
		want := map[string]string{"vda": d.raw(h)}

		// Two neighbours and one apart in the same MiB, one that becomes zeros by data and one by a hole, one
		// that was zeros, one that is written as it was, and the short one at the end.
		d.io(h, "write -P 2 1M 68k", "write -P 3 1536k 1k", "write -P 0 2M 64k", "write -z -u 3M 64k",
			"write -P 4 8M 512", "write -P 1 4M 64k", fmt.Sprintf("write -P 5 %d 512", 9<<20))
		some, got, entry := h.mustTakeBy(repository.ChangesDigest, same, full, d)
		if got.Dirty != 6*64<<10+512 || got.Zero != 2*64<<10 || entry.DataBytes != 4*64<<10+512 {
			t.Errorf("%s: counted %+v, stored %+v", format, got, entry)
		}
		h.checkRestored(same, want)
		h.checkRestored(some, map[string]string{"vda": d.raw(h)})

		d.io(h, fmt.Sprintf("write -z -u 0 %d", size))
		none, got, entry := h.mustTakeBy(repository.ChangesDigest, some, full, d)
		if got.Read > 64<<10 || got.Dirty != got.Zero || entry.DataBytes != 0 {
			t.Errorf("%s, all zeros: counted %+v, stored %+v", format, got, entry)
		}
		h.checkRestored(none, map[string]string{"vda": d.raw(h)})
		if damaged(h, none) {
			t.Errorf("%s: verify found what is not damaged", format)
		}
		h.checkClean()
	}
}

// TestCompareCountsTheWholeDisk makes only the copy, as its counts begin anew with the next phase.
func TestCompareCountsTheWholeDisk(t *testing.T) {
	h := newHost(t)
	d := h.disk("vda", "raw", 64<<20+512)
	d.io(h, "write -P 1 0 20M")
	full := h.mustTake("", "", d)
	d.io(h, "write -P 2 2M 1M")
	b := h.backupSpec(h.id(), full, full, d)
	b.find(0, repository.ChangesDigest)
	defer h.serve(b, d)()
	dir := h.job(Spec{Operation: OperationBackup, Backup: b})
	spec, err := ReadSpec(dir)
	if err != nil {
		t.Fatal(err)
	}
	w := &worker{directory: dir, spec: spec, status: newReporter(dir), throttle: newThrottle()}
	c := &backup{worker: w, BackupSpec: spec.Backup}
	if c.repo, err = w.open(); err != nil {
		t.Fatal(err)
	}
	defer c.repo.Close()
	if c.stage, err = c.repo.Stage(c.Manifest.Backup); err != nil {
		t.Fatal(err)
	}
	defer c.stage.Discard()
	defer c.closeDisks()
	if err := errors.Join(c.prepare(), c.eachDisk(t.Context(), (*diskCopy).copy)); err != nil {
		t.Fatal(err)
	}
	if got := w.status.snapshot()[0]; got.Total != d.size || got.Done != d.size || got.Read != 20<<20 || got.Dirty != 1<<20 {
		t.Errorf("of %d bytes: %+v", d.size, got)
	}
}

// TestLayer takes increments from frozen layers, of a raw disk too, and of
// layers upon layers: only the top one counts.
func TestLayer(t *testing.T) {
	h := newHost(t)
	for _, format := range []string{"raw", "qcow2"} {
		base := h.disk("vda", format, 6<<20+512)
		base.io(h, "write -P 1 0 5M")
		full := h.mustTake("", "", base)
		below := base.overlay(h, "cluster_size=64k")
		below.io(h, "write -P 2 1M 1M")
		first, got, _ := h.mustTakeBy(repository.ChangesSnapshot, full, full, below)
		if got.Dirty != 1<<20 || got.Read != 1<<20 || got.Zero != 0 {
			t.Errorf("%s: counted %+v", format, got)
		}
		want := below.raw(h)
		top := below.overlay(h, "cluster_size=4k")
		top.io(h, "write -P 3 1028k 4k", "write -z 3M 64k", "discard 4M 64k", fmt.Sprintf("write -P 4 %d 512", 6<<20))
		second, got, entry := h.mustTakeBy(repository.ChangesSnapshot, first, full, top)
		if got.Dirty != 3*64<<10+512 || got.Zero != 2*64<<10 || entry.DataBytes != 64<<10+512 {
			t.Errorf("%s: counted %+v, stored %+v", format, got, entry)
		}
		h.checkRestored(first, map[string]string{"vda": want})
		h.checkRestored(second, map[string]string{"vda": top.raw(h)})
		// What the layers hold becomes the disk's own: to compare it finds nothing.
		after := top.raw(h)
		top.commit(h)
		below.commit(h)
		third, got, _ := h.mustTakeBy(repository.ChangesDigest, second, full, base)
		if got.Dirty != 0 {
			t.Errorf("%s, after the commit: counted %+v", format, got)
		}
		h.checkRestored(third, map[string]string{"vda": after})
		if err := os.Remove(base.path); err != nil {
			t.Fatal(err)
		}
	}
}

// TestDamagedDigestsOfTheParent changes each byte that means something in the
// digests which a disk is compared with.
func TestDamagedDigestsOfTheParent(t *testing.T) {
	h, _, full, increment := chainOfTwo(t, "none")
	d := disk{"vda", filepath.Join(h.dir, "vda.qcow2"), "qcow2", chainSize}
	for _, backup := range []string{full, increment} {
		name := filepath.Join(h.repo, testDomain, backup, repository.DigestName(d.target))
		good, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		refusals := 0
		for i := range 8 {
			bad := []byte(string(good))
			bad[usedByte(good, len(good)*i/8)] ^= 0x10
			h.write(name, string(bad))
			r := h.takeBy(repository.ChangesDigest, increment, full, d)
			if r.Error == nil { // of what the increment replaces, nothing is read
				continue
			}
			refusals++
			if r.Error.Class != ClassParent || !strings.Contains(r.Error.Message, "digests") {
				t.Errorf("%s, byte %d of %d: %+v", backup, len(good)*i/8, len(good), r.Error)
			}
			h.checkClean()
		}
		if refusals < 3 {
			t.Errorf("only %d changes of %s were found", refusals, name)
		}
		h.write(name, string(good))
	}
	h.checkRestored(increment, map[string]string{"vda": restored(h, "the good digests", increment)})
}

// TestContradictions gives an image more or less than one way to find changes.
func TestContradictions(t *testing.T) {
	h := newHost(t)
	d := h.disk("vda", "qcow2", 1<<20)
	parent := h.mustTake("", "", d)
	for what, change := range map[string]func(b *BackupSpec){
		"none":              func(b *BackupSpec) { b.Disks[0].Bitmap = "" },
		"bitmap and digest": func(b *BackupSpec) { b.Disks[0].Compare = true },
		"bitmap and layer":  func(b *BackupSpec) { b.Disks[0].Layer = true },
		"full and digest":   func(b *BackupSpec) { b.find(0, ""); b.Disks[0].Compare = true },
		"full and layer":    func(b *BackupSpec) { b.find(0, ""); b.Disks[0].Layer = true },
	} {
		b := h.backupSpec(h.id(), parent, parent, d)
		stop := h.serve(b, d)
		change(b)
		r := h.run(Spec{Operation: OperationBackup, Backup: b})
		stop()
		if r.Error == nil || r.Error.Class != ClassInternal {
			t.Errorf("%s: %+v", what, r.Error)
		}
	}
	resized := d
	resized.size = 2 << 20
	h.command("qemu-img", "resize", "-q", d.path, fmt.Sprint(resized.size))
	if r := h.takeBy(repository.ChangesDigest, parent, parent, resized); r.Error == nil || r.Error.Class != ClassParent {
		t.Errorf("resized: %+v", r.Error)
	}
	h.checkClean()
}

// TestNothingIsKeptUnconfirmed waits for a word, and takes nothing else for it.
func TestNothingIsKeptUnconfirmed(t *testing.T) {
	h := newHost(t)
	d := h.disk("vda", "qcow2", 8<<20)
	d.io(h, "write -P 1 0 1M")
	for _, confirmed := range []bool{false, true} {
		id := h.id()
		b := h.backupSpec(id, "", id, d)
		b.Confirm = true
		stop := h.serve(b, d)
		dir := h.job(Spec{Operation: OperationBackup, Backup: b})
		h.letGo(dir)
		ctx, cancel := context.WithCancelCause(t.Context())
		done := make(chan *Result, 1)
		go func() { done <- h.runJob(ctx, dir) }()
		awaitPhase(h, dir, PhaseConfirming)
		stop()       // the copy is made: the export is not needed any more
		h.letGo(dir) // which is no confirmation
		if _, err := os.Stat(filepath.Join(h.repo, testDomain, id)); !os.IsNotExist(err) {
			t.Errorf("there is a backup before the word: %v", err)
		}
		if confirmed {
			if err := WriteConfirm(dir); err != nil {
				t.Fatal(err)
			}
		} else {
			cancel(ErrCancelled)
		}
		r := <-done
		cancel(nil)
		switch {
		case confirmed && r.Error != nil:
			t.Error(r.Error)
		case confirmed:
			h.checkRestored(id, map[string]string{"vda": d.raw(h)})
		case r.Error == nil || r.Error.Class != ClassCancelled:
			t.Errorf("without a word: %+v", r.Error)
		}
		h.checkClean()
	}
}

// TestConfirmedBefore finds the word there already when it comes to wait for it.
func TestConfirmedBefore(t *testing.T) {
	h := newHost(t)
	d := h.disk("vda", "qcow2", 8<<20)
	id := h.id()
	b := h.backupSpec(id, "", id, d)
	b.Confirm = true
	defer h.serve(b, d)()
	dir := h.job(Spec{Operation: OperationBackup, Backup: b})
	h.letGo(dir)
	if err := WriteConfirm(dir); err != nil {
		t.Fatal(err)
	}
	if r := h.runJob(t.Context(), dir); r.Error != nil {
		t.Fatal(r.Error)
	}
}
