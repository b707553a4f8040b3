package transfer

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/digest"
	"github.com/virtbackup/virtbackup/daemon/internal/repository"
)

// twice is a chain, and another one of the same disks after it.
func twice(t *testing.T, seed uint64, compression ...string) (h *history, all []point) {
	h = newHistory(t, seed)
	h.compressions = compression
	noise := filepath.Join(h.dir, "noise")
	h.command("dd", "if=/dev/urandom", "of="+noise, "bs=64k", "count=16", "status=none")
	h.io(h.host, "write -s "+noise+" 1M 1M", "write -P 3 3M 256k")
	for range 3 {
		h.backup()
		h.change()
		h.io(h.host, fmt.Sprintf("write -P %d 4M 192k", 1+h.IntN(200)))
	}
	all, h.points = h.points, nil
	h.backup()
	all, h.points = append(all, h.points...), append(all, h.points...)
	return h, all
}

func repairSpec(p point) Spec {
	return Spec{Operation: OperationRepair, Repair: &RepairSpec{Backup: p.id}}
}

// wrong returns what is known to be damaged of a backup.
func (h *history) wrong(p point) []Flaw {
	h.Helper()
	for _, b := range h.mustRun(Spec{Operation: OperationVerify, Backups: []string{p.id}}).Backups {
		if b.Backup == p.id {
			return b.Damage
		}
	}
	return nil
}

// TestRepair flips bits anywhere in images: what is repaired is what was written,
// what is not stays as it is, and is told.
func TestRepair(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	for i, compression := range []string{"none", "zstd", "zlib"} {
		t.Run(fmt.Sprintf("%s/%d", compression, seed), func(t *testing.T) {
			t.Parallel()
			h, all := twice(t, seed+uint64(i), compression)
			repaired := 0
			for range 5 {
				p := all[h.IntN(3)]
				name := h.image(p.id, h.disks[h.IntN(2)].target)
				good, err := os.ReadFile(name)
				if err != nil {
					t.Fatal(err)
				}
				h.flip(name, int64(usedByte(good, digest.BlockSize+h.IntN(len(good)-digest.BlockSize))), 1)
				bad, found := h.command("sha256sum", name), h.wrong(p)
				if len(found) == 0 { // nothing that is used
					h.write(name, string(good))
					continue
				}
				s := repairSpec(p)
				s.Repair.DryRun = true
				plan := h.run(s)
				if got := h.command("sha256sum", name); got != bad {
					t.Fatal("a dry run changed it")
				}
				r := h.run(repairSpec(p))
				if (plan.Error == nil) != (r.Error == nil) || len(plan.Repaired) != len(r.Repaired) {
					t.Errorf("planned %+v, and it came to %+v", plan, r)
				}
				if r.Error == nil {
					repaired++
					if r.Manifest == nil || r.Manifest.Generation == 0 || len(r.Repaired) == 0 {
						t.Errorf("it is said to be repaired: %+v", r)
					}
					h.exact()
					continue
				}
				if got := h.command("sha256sum", name); r.Error.Class != ClassVerification || got != bad {
					t.Errorf("it is changed, or another failure: %v", r.Error)
				}
				h.checkClean()
				h.write(name, string(good))
				h.exact()
			}
			if repaired == 0 {
				t.Log("nothing could be repaired")
			}
		})
	}
}

// TestRepairTakesWhatOthersHold damages data that a later full backup holds too,
// and data that nobody holds any more.
func TestRepairTakesWhatOthersHold(t *testing.T) {
	for _, compression := range []string{"none", "zstd"} {
		h, all := twice(t, 3, compression)
		first, name := all[0], h.image(all[0].id, "vda")
		damageAt := func(off uint64) {
			h.Helper()
			good, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			content, err := os.ReadFile(first.held["vda"])
			if err != nil {
				t.Fatal(err)
			}
			if compression != "none" { // noise lies plain
				off = 1 << 20
			}
			for at := 0; at < len(good); at += digest.BlockSize {
				if at+digest.BlockSize <= len(good) && string(good[at:at+digest.BlockSize]) == string(content[off:off+digest.BlockSize]) {
					h.flip(name, int64(at)+77, 3)
					return
				}
			}
			t.Fatalf("%d is not in it", off)
		}
		damageAt(1<<20 + 3*digest.BlockSize)
		found := h.wrong(first)
		if len(found) != 1 || found[0].Donor != all[3].id || found[0].Length != digest.BlockSize {
			t.Fatalf("found %+v", found)
		}
		r := h.mustRun(repairSpec(first))
		if len(r.Repaired) != 1 || r.Repaired[0].Donor != all[3].id || r.Repaired[0].Range != found[0].Range {
			t.Errorf("repaired %+v", r.Repaired)
		}
		h.exact()
		if again := h.mustRun(repairSpec(first)); again.Manifest.Generation != r.Manifest.Generation || len(again.Repaired) != 0 {
			t.Errorf("again, it is %+v", again)
		}
	}
}

// TestRepairFromTheLiveDisk has only the domain's disk hold the same.
func TestRepairFromTheLiveDisk(t *testing.T) {
	h := newHistory(t, 4)
	h.compressions = []string{"none"}
	h.io(h.host, "write -P 5 1M 1M")
	h.backup()
	p := h.points[0]
	c := h.plainClusters(p, "vda")
	h.flip(h.image(p.id, "vda"), c[len(c)/2].host, 1)
	if r := h.run(repairSpec(p)); r.Error == nil || len(r.Lost) != 1 || r.Lost[0].Offset != c[len(c)/2].off {
		t.Fatalf("without it: %+v", r)
	}
	socket, stop := h.disks[0].export(h.host, "")
	defer stop()
	s := repairSpec(p)
	s.Repair.Live = []BackupDisk{{Target: "vda", Socket: socket, Export: "vda", Size: h.disks[0].size}}
	if r := h.mustRun(s); len(r.Repaired) != 1 || r.Repaired[0].Donor != DonorLive {
		t.Errorf("repaired %+v", r.Repaired)
	}
	h.exact()
}

// TestRepairInterrupted cancels in each phase: nothing has changed then.
func TestRepairInterrupted(t *testing.T) {
	h, all := twice(t, 5, "none")
	p := all[0]
	content := h.plainClusters(p, "vda")
	var at cluster
	for _, c := range content {
		if c.off == 1<<20 {
			at = c
		}
	}
	name := h.image(p.id, "vda")
	h.flip(name, at.host, 1)
	bad := h.command("sha256sum", name)
	interrupted := 0
	for _, phase := range []string{PhaseOpening, PhaseRepairing, PhaseFlushing, PhaseVerifying, PhaseCommitting} {
		r := h.cancelIn(phase, repairSpec(p))
		if r.Error == nil {
			break
		}
		if interrupted++; h.command("sha256sum", name) != bad {
			t.Fatal("it has changed")
		}
		h.checkClean()
	}
	if interrupted == 0 {
		t.Error("it was never cancelled")
	}
	h.mustRun(repairSpec(p))
	h.exact()
	if _, err := os.Stat(filepath.Join(h.repo, testDomain, p.id, repository.DigestName("vda"))); err != nil {
		t.Error(err)
	}
}

// TestRepairOfDigests damages digests, which are made anew from images that are
// well, and from no others.
func TestRepairOfDigests(t *testing.T) {
	h, all := twice(t, 8, "none")
	for i, p := range all[:3] {
		for _, target := range []string{"vda", "vdb"} {
			name := filepath.Join(h.repo, testDomain, p.id, repository.DigestName(target))
			before := h.command("sha256sum", name)
			info, err := os.Stat(name)
			if err != nil {
				t.Fatal(err)
			}
			h.flip(name, h.Int64N(info.Size()), 1)
			found := h.wrong(p)
			if len(found) != 1 || found[0].Target != target || !found[0].Whole {
				t.Fatalf("%d %s: found %+v", i, target, found)
			}
			s := repairSpec(p)
			s.Repair.DryRun = true
			if r := h.mustRun(s); len(r.Repaired) != 1 || h.command("sha256sum", name) == before {
				t.Errorf("a dry run: %+v", r.Repaired)
			}
			if r := h.mustRun(repairSpec(p)); len(r.Repaired) != 1 || len(r.Lost) != 0 || r.Manifest == nil {
				t.Errorf("repaired %+v, lost %+v", r.Repaired, r.Lost)
			}
			if after := h.command("sha256sum", name); after != before {
				t.Errorf("they are others: %s", after)
			}
			h.exact()
		}
	}
	p := all[0]
	name := filepath.Join(h.repo, testDomain, p.id, repository.DigestName("vda"))
	h.flip(name, 90, 1)
	h.flip(h.image(p.id, "vda"), h.plainClusters(p, "vda")[0].host, 1)
	bad := h.command("sha256sum", name)
	r := h.run(repairSpec(p))
	if r.Error == nil || r.Error.Class != ClassVerification || len(r.Lost) != 1 || h.command("sha256sum", name) != bad {
		t.Errorf("of a damaged image: %+v", r)
	}
	h.checkClean()
}
