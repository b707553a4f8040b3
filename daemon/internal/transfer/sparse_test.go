package transfer

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/repository"
)

// TestSparseDisk backs up disks which are big and almost empty. What is stored
// and how long it takes must not follow from their sizes.
func TestSparseDisk(t *testing.T) {
	for _, tib := range []uint64{1, 64} {
		t.Run(fmt.Sprint(tib), func(t *testing.T) {
			h := newHost(t)
			d := h.disk("vda", "qcow2", tib<<40)
			full := takeSparse(h, "", "", d, 1<<10)
			d.io(h, "write -P 7 600G 4k")
			one := takeSparse(h, full, full, d, 16<<10)
			d.io(h, "write -P 8 10G 64k", "write -z 600G 64k", "write -P 9 1023G 64k")
			three := takeSparse(h, one, full, d, 64<<10)
			same := compareSparse(h, three, full, d, 64<<10, 0)
			d.io(h, "write -P 7 600G 4k", "write -z 10G 64k")
			three = compareSparse(h, same, full, d, 64<<10, 2*64<<10)

			verified := h.run(Spec{Operation: OperationVerify, Backups: []string{three}})
			if verified.Error != nil || len(verified.Backups) != 5 {
				t.Fatalf("verify: %+v", verified)
			}
			for _, b := range verified.Backups {
				if b.Error != nil {
					t.Errorf("verify: %s: %v", b.Backup, b.Error)
				}
			}
			if r := h.restore(three, FormatQcow2, h.dir, "vda"); r.Error == nil {
				t.Error("it was restored over the disk")
			}
			to := filepath.Join(h.dir, "restored")
			if err := os.Mkdir(to, 0o700); err != nil {
				t.Fatal(err)
			}
			if r := h.restore(three, FormatQcow2, to, "vda"); r.Error != nil {
				t.Fatal(r.Error)
			}
			h.command("qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", d.path, filepath.Join(to, "vda.qcow2"))
		})
	}
}

// takeSparse makes a backup with at most so many bytes of digests.
func takeSparse(h *host, parent, chain string, d disk, limit uint64) string {
	h.Helper()
	start := time.Now()
	id := h.mustTake(parent, chain, d)
	checkSparse(h, id, parent, d, limit, start)
	return id
}

// compareSparse makes an increment by comparing, which must find so much dirty.
func compareSparse(h *host, parent, chain string, d disk, limit, dirty uint64) string {
	h.Helper()
	start := time.Now()
	id, got, _ := h.mustTakeBy(repository.ChangesDigest, parent, chain, d)
	checkSparse(h, id, parent, d, limit, start)
	if got.Dirty != dirty || got.Read > 1<<20 {
		h.Errorf("%d bytes changed, counted %+v", dirty, got)
	}
	return id
}

func checkSparse(h *host, id, parent string, d disk, limit uint64, start time.Time) {
	h.Helper()
	took := time.Since(start).Round(time.Millisecond)
	info, err := os.Stat(filepath.Join(h.repo, testDomain, id, repository.DigestName(d.target)))
	if err != nil {
		h.Fatal(err)
	}
	h.Logf("%d TiB, parent %q: %s, %d bytes of digests", d.size>>40, parent, took, info.Size())
	if info.Size() > int64(limit) {
		h.Errorf("%d bytes of digests, more than %d", info.Size(), limit)
	}
}
