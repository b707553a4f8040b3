package transfer

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/virtbackup/virtbackup/daemon/internal/repository"
)

func TestFullAndIncrement(t *testing.T) {
	h := newHost(t)
	vda, vdb := h.disk("vda", "qcow2", 5<<20+512), h.disk("vdb", "raw", 3<<20+4096)
	vda.io(h, "write -P 1 0 3M", "write -P 2 5M 512")
	vdb.io(h, "write -P 9 1M 100k")
	first := h.mustTake("", "", vda, vdb)
	want1 := map[string]string{"vda": vda.raw(h), "vdb": vdb.raw(h)}

	vda.io(h, "write -P 3 1M 4k", "write -z -u 2M 128k", "write -P 4 5242880 512")
	second := h.id()
	r := h.take(h.backupSpec(second, first, first, vda, vdb), vda, vdb)
	if r.Error != nil {
		t.Fatal(r.Error)
	}
	want2 := map[string]string{"vda": vda.raw(h), "vdb": vdb.raw(h)}
	h.checkRestored(first, want1)
	h.checkRestored(second, want2)
	h.checkClean()

	// 4 KiB at 1 MiB, 128 KiB of zeros, and the short cluster at the end.
	got := r.Disks[0]
	if got.Dirty != 64<<10+128<<10+512 || got.Read != 64<<10+512 || got.Zero != 128<<10 {
		t.Errorf("counted %+v", got)
	}
	verified := h.run(Spec{Operation: OperationVerify, Backups: []string{second}})
	if verified.Error != nil || len(verified.Backups) != 2 {
		t.Fatalf("verify: %+v", verified)
	}
	for _, b := range verified.Backups {
		if b.Error != nil {
			t.Errorf("verify: %s: %v", b.Backup, b.Error)
		}
	}
}

// TestRandomIncrements writes and resizes at random between increments, in all
// ways that a guest can, finds the changes in all ways that there are, and
// compares each backup with the disks as they were.
func TestRandomIncrements(t *testing.T) {
	outer := newHost(t)
	rapid.Check(t, func(t *rapid.T) {
		h := *outer
		dir, err := os.MkdirTemp(outer.dir, "run")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(dir)
		h.dir = dir
		var disks []disk
		for i := range rapid.IntRange(1, 2).Draw(t, "disks") {
			format := rapid.SampledFrom([]string{"qcow2", "qcow2", "raw"}).Draw(t, "format")
			disks = append(disks, h.disk(fmt.Sprintf("vd%c", 'a'+i), format, drawSize(t)))
		}
		compression := rapid.SampledFrom([]string{"none", "zlib", "zstd"}).Draw(t, "compression")
		var parent, chain string
		backups := map[string]map[string]string{}
		for range rapid.IntRange(1, 4).Draw(t, "backups") {
			want := map[string]string{}
			id := h.id()
			if chain == "" {
				chain = id
			}
			tops, ways := slices.Clone(disks), make([]string, len(disks))
			for i := range disks {
				if parent != "" {
					ways[i] = drawWay(t, &h, &disks[i])
				}
				tops[i] = disks[i]
				if ways[i] == repository.ChangesSnapshot {
					tops[i] = disks[i].overlay(&h, rapid.SampledFrom(layerOptions).Draw(t, "layer"))
				}
				if commands := drawWrites(t, tops[i].size); len(commands) > 0 {
					tops[i].io(&h, commands...)
				}
				want[tops[i].target] = tops[i].raw(&h)
			}
			spec := h.backupSpec(id, parent, chain, disks...)
			spec.Compression = compression
			for i := range disks {
				spec.find(i, ways[i])
			}
			if r := h.take(spec, tops...); r.Error != nil {
				t.Fatal(r.Error)
			}
			for i, top := range tops {
				if ways[i] != repository.ChangesSnapshot {
					continue
				}
				top.commit(&h)
				if disks[i].format == "qcow2" {
					disks[i].bitmap(&h, bitmapName(id))
				}
			}
			backups[id], parent = want, id
		}
		for id, want := range backups {
			h.checkRestored(id, want)
		}
		if damaged(&h, parent) {
			t.Error("verify found what is not damaged")
		}
		h.checkClean()
		if err := os.RemoveAll(filepath.Join(h.repo, testDomain)); err != nil {
			t.Fatal(err)
		}
	})
}

// layerOptions are those of the overlays: clusters smaller than ours, greater,
// and in parts.
var layerOptions = []string{"cluster_size=64k", "cluster_size=4k", "cluster_size=2M", "cluster_size=128k,extended_l2=on"}

// drawWay draws how the changes of a disk are to be found. A disk of another
// size has its image full.
func drawWay(t *rapid.T, h *host, d *disk) string {
	h.Helper()
	if rapid.IntRange(0, 3).Draw(t, "resize") == 0 {
		d.size = drawSize(t)
		h.command("qemu-img", "resize", "-q", "--shrink", "-f", d.format, d.path, fmt.Sprint(d.size))
		return ""
	}
	ways := []string{repository.ChangesSnapshot, repository.ChangesDigest}
	if d.format == "qcow2" {
		ways = append(ways, repository.ChangesCBT)
	}
	return rapid.SampledFrom(ways).Draw(t, "way")
}

// drawSize draws the size of a disk, up to a bit over two nodes of digests.
func drawSize(t *rapid.T) uint64 {
	const node = 64 * clusterSize / 512
	few := rapid.IntRange(1, 40*128)
	bounds := rapid.SampledFrom([]int{node - 1, node, node + 1, 2*node + 128})
	return 512 * uint64(rapid.OneOf(few, bounds).Draw(t, "sectors"))
}

func drawWrites(t *rapid.T, size uint64) []string {
	var commands []string
	for range rapid.IntRange(0, 8).Draw(t, "writes") {
		off := uint64(rapid.IntRange(0, int(size/512)-1).Draw(t, "at")) * 512
		length := min(uint64(rapid.SampledFrom([]int{1, 8, 127, 128, 129, 300, 2000}).Draw(t, "length"))*512, size-off)
		verb := rapid.SampledFrom([]string{"write -P 1", "write -P 2", "write -P 0", "write -z", "write -z -u", "discard"}).Draw(t, "verb")
		commands = append(commands, fmt.Sprintf("%s %d %d", verb, off, length))
	}
	return commands
}
