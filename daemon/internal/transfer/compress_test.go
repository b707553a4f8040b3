package transfer

import (
	"context"
	"encoding/json"
	"fmt"
	"testing"

	"github.com/virtbackup/virtbackup/daemon/internal/repository"
)

// compress compresses a point with zstd, and returns its new manifest.
func (h *history) compress(p point) *repository.Manifest {
	h.Helper()
	return h.mustRun(Spec{Operation: OperationCompress, Compress: &CompressSpec{Backup: p.id, Compression: "zstd", Threads: 1}}).Manifest
}

// clusters counts those of an image, and the compressed ones.
func (h *history) clusters(backup, target string) (all, compressed int) {
	h.Helper()
	var found struct {
		Allocated  int `json:"allocated-clusters"`
		Compressed int `json:"compressed-clusters"`
	}
	if err := json.Unmarshal([]byte(h.command("qemu-img", "check", "-f", "qcow2", "--output=json", h.image(backup, target))), &found); err != nil {
		h.Fatal(err)
	}
	return found.Allocated, found.Compressed
}

// TestCompress compresses a chain of plain backups from the middle outwards.
func TestCompress(t *testing.T) {
	h := newHistory(t, 3)
	h.compressions = []string{"none"}
	for i := range 3 {
		h.change()
		h.io(h.host, fmt.Sprintf("write -P %d 1M 1M", i+1))
		h.backup()
	}
	for _, i := range []int{1, 0, 2} {
		p := h.points[i]
		_, before := h.clusters(p.id, "vda")
		m := h.compress(p)
		all, compressed := h.clusters(p.id, "vda")
		if before != 0 || compressed == 0 || compressed != all || m.Offering.Compression != "zstd" || m.Generation != 1 {
			t.Errorf("of %d clusters %d are compressed, before %d: %+v", all, compressed, before, m.Offering)
		}
		if again := h.compress(p); again.Generation != m.Generation || again.HMAC != m.HMAC {
			t.Errorf("done again, it is %+v", again)
		}
		h.exact()
	}
	// Merged, they stay as they are compressed.
	h.merge(0, 2)
	if all, compressed := h.clusters(h.points[0].id, "vda"); compressed == 0 || compressed != all {
		t.Errorf("merged, of %d clusters %d are compressed", all, compressed)
	}
	h.checkClean()
}

// TestCompressRefuses has compressions that would be wrong, or of no use.
func TestCompressRefuses(t *testing.T) {
	h := newHistory(t, 4)
	h.compressions = []string{"none"}
	h.io(h.host, "write -P 7 1M 1M")
	h.backup()
	p := h.points[0]
	before := h.command("sha256sum", h.image(p.id, "vda"))
	for name, c := range map[string]struct {
		CompressSpec
		class Class
	}{
		"no room":     {CompressSpec{Backup: p.id, Compression: "zstd", Threads: 1, Free: 1 << 60}, ClassFull},
		"none":        {CompressSpec{Backup: p.id, Compression: "none", Threads: 1}, ClassInternal},
		"not a thing": {CompressSpec{Backup: p.id, Compression: "lzma", Threads: 1}, ClassInternal},
		"nowhere":     {CompressSpec{Backup: h.id(), Compression: "zstd", Threads: 1}, ClassMissing},
	} {
		if r := h.run(Spec{Operation: OperationCompress, Compress: &c.CompressSpec}); r.Error == nil || r.Error.Class != c.class {
			t.Errorf("%s: %+v", name, r.Error)
		}
	}
	// A flipped bit must not get into an image that is right by its digests.
	f := h.image(p.id, "vda")
	h.command("sh", "-c", fmt.Sprintf("printf x | dd of=%s bs=1 seek=$(($(stat -c %%s %s) / 2)) conv=notrunc 2>/dev/null", f, f))
	damaged := h.command("sha256sum", f)
	if r := h.run(Spec{Operation: OperationCompress, Compress: &CompressSpec{Backup: p.id, Compression: "zstd", Threads: 1}}); r.Error == nil || r.Error.Class != ClassVerification {
		t.Errorf("a damaged image was compressed: %+v", r.Error)
	}
	if got := h.command("sha256sum", f); got != damaged || got == before {
		t.Error("it was changed")
	}
	h.checkClean()
}

// TestCompressLeavesWhatIsNotSmaller compresses what cannot be.
func TestCompressLeavesWhatIsNotSmaller(t *testing.T) {
	h := newHistory(t, 5)
	h.compressions = []string{"none"}
	h.disks = h.disks[:1]
	noise := h.TempDir() + "/noise"
	h.command("dd", "if=/dev/urandom", "of="+noise, "bs=1M", "count=2", "status=none")
	h.io(h.host, "write -s "+noise+" 0 2M")
	h.backup()
	before := h.command("sha256sum", h.image(h.points[0].id, "vda"))
	if m := h.compress(h.points[0]); m.Generation != 0 || m.Offering.Compression != "none" {
		t.Errorf("it is %+v now", m)
	}
	if got := h.command("sha256sum", h.image(h.points[0].id, "vda")); got != before {
		t.Error("it was changed")
	}
	h.checkClean()
}

// TestCompressInterrupted cancels in each phase: nothing has changed then.
func TestCompressInterrupted(t *testing.T) {
	h := newHistory(t, 6)
	h.compressions = []string{"none"}
	for i := range 2 {
		h.change()
		h.io(h.host, fmt.Sprintf("write -P %d 1M 1M", i+1))
		h.backup()
	}
	interrupted := 0
	for _, phase := range []string{PhaseOpening, PhaseCompressing, PhaseFlushing, PhaseVerifying, PhaseCommitting} {
		r := h.cancelIn(phase, Spec{Operation: OperationCompress, Compress: &CompressSpec{Backup: h.points[0].id, Compression: "zstd", Threads: 1}})
		h.exact()
		if r.Error == nil {
			break // too late: it was committed
		}
		interrupted++
	}
	if interrupted == 0 {
		t.Error("it was never cancelled")
	}
	h.checkClean()
}

// cancelIn runs a job and cancels it in a phase.
func (h *history) cancelIn(phase string, s Spec) *Result {
	h.Helper()
	dir := h.job(s)
	ctx, cancel := context.WithCancelCause(h.Context())
	defer cancel(nil)
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			if s, err := ReadStatus(dir); err == nil && s.Phase == phase {
				cancel(ErrCancelled)
				return
			}
		}
	}()
	r := h.runJob(ctx, dir)
	if r.Error != nil && r.Error.Class != ClassCancelled {
		h.Fatalf("%s: %v", phase, r.Error)
	}
	h.Logf("cancelled in %s: %v", phase, r.Error)
	return r
}

// io changes the first disk.
func (h *history) io(on *host, commands ...string) { h.disks[0].io(on, commands...) }
