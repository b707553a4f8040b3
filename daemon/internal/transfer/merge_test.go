package transfer

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/repository"
)

// history is a domain that is backed up again and again, and what its disks held.
type history struct {
	*host
	*rand.Rand
	disks  []disk
	grown  map[string]bool // since the last backup
	points []point         // of one chain, the full one first
	base   string          // below the first point; "" for nothing
	chain  string

	compressions []string // that backups are made with
}

type point struct {
	id   string
	held map[string]string // raw files, by target
}

func newHistory(t *testing.T, seed uint64) *history {
	h := newHost(t)
	return &history{host: h, Rand: rand.New(rand.NewPCG(seed, 0)), grown: map[string]bool{}, compressions: []string{"none", "zstd", "zlib"}, disks: []disk{
		h.disk("vda", "qcow2", 5<<20+512), h.disk("vdb", "qcow2", 3<<20), h.disk("vdc", "raw", 1<<20+512),
	}}
}

// change changes the disks: data, zeroes, discards, and now and then their sizes.
func (h *history) change() {
	h.Helper()
	for i := range h.disks {
		d := &h.disks[i]
		for range h.IntN(4) {
			length := (h.Uint64N(300<<10) + 1) / 512 * 512
			off := h.Uint64N(d.size-length) / 512 * 512
			d.io(h.host, fmt.Sprintf("%s %d %d", []string{fmt.Sprintf("write -P %d", h.IntN(255)+1), "write -z", "discard"}[h.IntN(3)], off, length))
		}
	}
	if h.IntN(6) == 0 {
		d := &h.disks[h.IntN(2)]
		d.size += 1 << 20
		h.command("qemu-img", "resize", "-q", "-f", d.format, d.path, fmt.Sprint(d.size))
		h.grown[d.target] = true
	}
}

func (h *history) backup() {
	h.Helper()
	id, parent := h.id(), h.base
	if len(h.points) > 0 {
		parent = h.points[len(h.points)-1].id
	}
	if parent == "" {
		h.chain = id
	}
	b := h.backupSpec(id, parent, h.chain, h.disks...)
	b.Compression = h.compressions[h.IntN(len(h.compressions))]
	b.Manifest.Offering.Compression = b.Compression
	for i, d := range h.disks {
		switch {
		case parent == "":
		case h.grown[d.target]:
			b.find(i, "")
		case d.format == "raw" || h.IntN(4) == 0:
			b.find(i, repository.ChangesDigest)
		}
	}
	clear(h.grown)
	if r := h.take(b, h.disks...); r.Error != nil {
		h.Fatal(r.Error)
	}
	p := point{id, map[string]string{}}
	for _, d := range h.disks {
		p.held[d.target] = d.raw(h.host)
	}
	h.points = append(h.points, p)
}

// spec merges the points before the one at into, down to the one at from.
func (h *history) spec(from, into int) *MergeSpec {
	s := &MergeSpec{Into: h.points[into].id, Base: h.base}
	if from > 0 {
		s.Base = h.points[from-1].id
	}
	for i := into - 1; i >= from; i-- {
		s.Drop = append(s.Drop, h.points[i].id)
	}
	return s
}

func (h *history) mustRun(s Spec) *Result {
	h.Helper()
	r := h.run(s)
	if r.Error != nil {
		h.Fatalf("%s: %v", s.Operation, r.Error)
	}
	return r
}

// merge merges, and removes what was merged.
func (h *history) merge(from, into int) {
	h.Helper()
	s := h.spec(from, into)
	first := h.mustRun(Spec{Operation: OperationMerge, Merge: s}).Manifest
	if first.Parent != s.Base || first.Generation == 0 {
		h.Fatalf("merged, it is %+v", first)
	}
	if again := h.mustRun(Spec{Operation: OperationMerge, Merge: s}).Manifest; again.Generation != first.Generation || again.HMAC != first.HMAC {
		h.Fatalf("done again, it is %+v and not %+v", again, first)
	}
	h.exact() // while what was merged is still there
	h.mustRun(Spec{Operation: OperationDelete, Backups: s.Drop})
	h.points = slices.Delete(h.points, from, into)
	h.exact()
}

// exact compares every backup with what the disks held, and lets verify say so too.
func (h *history) exact() {
	h.Helper()
	var ids []string
	for _, p := range h.points {
		ids = append(ids, p.id)
		for target, reference := range p.held {
			h.command("qemu-img", "compare", "-f", "raw", "-F", "qcow2", reference, h.image(p.id, target))
		}
	}
	for _, b := range h.mustRun(Spec{Operation: OperationVerify, Backups: ids}).Backups {
		if b.Error != nil {
			h.Fatalf("verify: %s: %v", b.Backup, b.Error)
		}
	}
	h.checkClean()
}

// TestMergedChainsAreExact merges and compresses at random in chains of random backups.
func TestMergedChainsAreExact(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	for run := range uint64(3) {
		t.Run(fmt.Sprint(seed+run), func(t *testing.T) {
			t.Parallel()
			h := newHistory(t, seed+run)
			for range 7 {
				h.change()
				h.backup()
				if n := len(h.points); n > 1 && h.IntN(2) == 0 {
					into := 1 + h.IntN(n-1)
					h.merge(h.IntN(into), into)
				}
				if h.IntN(2) == 0 {
					h.compress(h.points[h.IntN(len(h.points))])
					h.exact()
				}
			}
			last := h.points[len(h.points)-1]
			h.checkRestored(last.id, last.held)
			if len(h.points) > 1 {
				h.merge(0, len(h.points)-1)
			}
			h.checkRestored(last.id, last.held)
		})
	}
}

// TestMergeInterrupted cancels a merge in each of its phases: nothing has changed then.
func TestMergeInterrupted(t *testing.T) {
	h := newHistory(t, 1)
	for range 4 {
		h.change()
		h.backup()
	}
	for _, phase := range []string{PhaseOpening, PhaseMerging, PhaseFlushing, PhaseVerifying, PhaseCommitting} {
		r := h.cancelIn(phase, Spec{Operation: OperationMerge, Merge: h.spec(0, 2)})
		h.exact()
		if r.Error == nil {
			return // too late: it was committed
		}
	}
}

// TestMergeRefuses has merges that would not be right.
func TestMergeRefuses(t *testing.T) {
	h := newHistory(t, 2)
	for range 4 {
		h.change()
		h.backup()
	}
	before := map[string]string{}
	for _, p := range h.points {
		before[p.id] = h.command("sha256sum", h.image(p.id, "vda"))
	}
	gap, order, base, parent := h.spec(1, 3), h.spec(0, 3), h.spec(1, 2), h.spec(0, 3)
	gap.Drop = gap.Drop[1:]
	slices.Reverse(order.Drop)
	base.Base = ""
	parent.Into, parent.Base = h.points[0].id, h.points[0].id
	for name, s := range map[string]*MergeSpec{"gap": gap, "order": order, "base": base, "a full one": parent, "nothing": {Into: h.points[3].id}} {
		if r := h.run(Spec{Operation: OperationMerge, Merge: s}); r.Error == nil {
			t.Errorf("%s: %+v was merged", name, s)
		}
	}
	// A block of what is merged is damaged: it must not get into the new image.
	damaged := h.spec(0, 1)
	f := h.image(h.points[0].id, "vdb")
	h.command("sh", "-c", fmt.Sprintf("printf x | dd of=%s bs=1 seek=$(($(stat -c %%s %s) / 2)) conv=notrunc 2>/dev/null", f, f))
	if r := h.run(Spec{Operation: OperationMerge, Merge: damaged}); r.Error == nil {
		t.Error("a damaged image was merged")
	}
	for _, p := range h.points[1:] {
		if got := h.command("sha256sum", h.image(p.id, "vda")); got != before[p.id] {
			t.Errorf("%s was changed", p.id)
		}
	}
	h.checkClean()
}
