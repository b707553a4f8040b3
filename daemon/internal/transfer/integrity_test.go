package transfer

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/virtbackup/virtbackup/daemon/internal/damage"
	"github.com/virtbackup/virtbackup/daemon/internal/digest"
	"github.com/virtbackup/virtbackup/daemon/internal/repository"
)

// flip changes bytes of a file, and returns what was there.
func (h *history) flip(name string, at int64, n int) (before []byte) {
	h.Helper()
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		h.Fatal(err)
	}
	defer f.Close()
	before = make([]byte, n)
	if _, err := f.ReadAt(before, at); err != nil {
		h.Fatal(err)
	}
	after := make([]byte, n)
	for i := range after {
		after[i] = before[i] ^ 0x10
	}
	if _, err := f.WriteAt(after, at); err != nil {
		h.Fatal(err)
	}
	return before
}

// cluster is one that an image holds as it is.
type cluster struct {
	off  uint64 // on the disk
	host int64
}

// plainClusters finds those of a disk's image in a backup.
func (h *history) plainClusters(p point, target string) (all []cluster) {
	h.Helper()
	var runs []struct {
		Start, Length uint64
		Depth         int
		Data          bool
		Offset        *int64 // none of what is compressed
	}
	if err := json.Unmarshal([]byte(h.command("qemu-img", "map", "-f", "qcow2", "--output=json", h.image(p.id, target))), &runs); err != nil {
		h.Fatal(err)
	}
	for _, r := range runs {
		for at := uint64(0); r.Depth == 0 && r.Data && r.Offset != nil && at < r.Length; at += digest.BlockSize {
			all = append(all, cluster{r.Start + at, *r.Offset + int64(at)})
		}
	}
	return all
}

// differs tells where QEMU reads something else of a disk than it held, in blocks.
func (h *history) differs(p point, target string) (all damage.Ranges) {
	h.Helper()
	out := h.dir + "/read-" + h.id()
	defer os.Remove(out)
	h.command("qemu-img", "convert", "-f", "qcow2", "-O", "raw", h.image(p.id, target), out)
	want, err := os.ReadFile(p.held[target])
	if err != nil {
		h.Fatal(err)
	}
	got, err := os.ReadFile(out)
	if err != nil {
		h.Fatal(err)
	}
	for at := 0; at < len(want); at += digest.BlockSize {
		end := min(len(want), at+digest.BlockSize)
		if string(want[at:end]) != string(got[at:end]) {
			all = all.Add(damage.Range{Offset: uint64(at), Length: uint64(end - at)})
		}
	}
	return all
}

// TestVerifySaysWhereAndWhoIsHit flips bytes in plain images of random chains:
// verify says of each disk of each backup exactly what QEMU then reads wrong.
func TestVerifySaysWhereAndWhoIsHit(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	for run := range uint64(2) {
		t.Run(fmt.Sprint(seed+run), func(t *testing.T) {
			t.Parallel()
			h := newHistory(t, seed+run)
			h.compressions = []string{"none"}
			h.io(h.host, "write -P 7 1M 2M")
			for range 5 {
				h.change()
				h.backup()
			}
			var ids []string
			for _, p := range h.points {
				ids = append(ids, p.id)
			}
			flipped := 0
			for range 4 {
				in, target := h.points[h.IntN(len(h.points))], h.disks[h.IntN(3)].target
				clusters := h.plainClusters(in, target)
				if len(clusters) == 0 {
					continue
				}
				flipped++
				c := clusters[h.IntN(len(clusters))]
				name := h.image(in.id, target)
				before := h.flip(name, c.host+100, 2)
				h.tellsWhatIsWrong(ids, in.id)
				f, err := os.OpenFile(name, os.O_WRONLY, 0)
				if err == nil {
					_, err = f.WriteAt(before, c.host+100)
					f.Close()
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			if flipped == 0 {
				t.Skip("there was no data")
			}
			h.exact()
		})
	}
}

// tellsWhatIsWrong compares what verify says with what QEMU reads.
func (h *history) tellsWhatIsWrong(ids []string, in string) {
	h.Helper()
	want, got := map[string]damage.Ranges{}, map[string]damage.Ranges{}
	for _, p := range h.points {
		for target := range p.held {
			if wrong := h.differs(p, target); len(wrong) > 0 {
				want[p.id+" "+target] = wrong
			}
		}
	}
	r := h.mustRun(Spec{Operation: OperationVerify, Backups: ids})
	for _, b := range r.Backups {
		if (b.Error != nil) != (b.Backup == in) || (len(b.Damage) > 0) != (b.Backup == in) {
			h.Errorf("of %s, verify says: %+v, %+v", b.Backup, b.Error, b.Damage)
		}
		for _, d := range b.Damage {
			got[b.Backup+" "+d.Target] = got[b.Backup+" "+d.Target].Add(d.Range)
		}
	}
	for _, hit := range r.Hit {
		if hit.Image != in {
			h.Errorf("it is said to be in %s", hit.Image)
		}
		got[hit.Backup+" "+hit.Target] = got[hit.Backup+" "+hit.Target].Add(hit.Range)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		h.Errorf("damaged in %s (- what QEMU reads wrong, + what verify says):\n%s", in, diff)
	}
	for _, p := range h.points {
		for target := range p.held {
			if _, bad := want[p.id+" "+target]; !bad {
				h.canBeRestored(p, target)
			}
		}
	}
}

// canBeRestored restores one disk of a backup that is not hit.
func (h *history) canBeRestored(p point, target string) {
	h.Helper()
	dir, err := os.MkdirTemp(h.dir, "whole")
	if err != nil {
		h.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if r := h.restore(p.id, FormatRaw, dir, target); r.Error != nil {
		h.Errorf("disk %s of %s is not hit, and cannot be restored: %v", target, p.id, r.Error)
	} else if out, err := exec.Command("cmp", p.held[target], dir+"/"+target+".raw").CombinedOutput(); err != nil {
		h.Errorf("disk %s of %s is not hit, and is something else: %s", target, p.id, out)
	}
}

// TestDamageInTablesHitsAllOfADisk flips bits in what says where data is.
func TestDamageInTablesHitsAllOfADisk(t *testing.T) {
	h := newHistory(t, 9)
	h.compressions = []string{"none"}
	h.io(h.host, "write -P 7 1M 2M")
	for range 3 {
		h.change()
		h.io(h.host, "write -P 9 1M 64k")
		h.backup()
	}
	first := h.points[0].id
	for name, f := range map[string]string{"digests": h.repo + "/" + testDomain + "/" + first + "/" + repository.DigestName("vda")} {
		h.flip(f, 50, 1)
		r := h.mustRun(Spec{Operation: OperationVerify, Backups: []string{h.points[2].id}})
		b := r.Backups[0]
		if b.Backup != first || len(b.Damage) != 1 || !b.Damage[0].Whole || b.Damage[0].Target != "vda" || len(r.Hit) != 2 {
			t.Errorf("%s: %+v, %+v", name, b.Damage, r.Hit)
		}
	}
}
