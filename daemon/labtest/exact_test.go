//go:build lab

package labtest

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/virtbackup/virtbackup/dbus"
)

// shape is a disk of the property test.
type shape struct {
	target, disk string
	size         int // bytes
	unit         int // of what is written: a sector
}

// shapes: two sizes of clusters and of sectors, a format without bitmaps, and a
// size that is no multiple of the clusters that we write.
var shapes = []shape{
	{"vda", "qcow2:8M", 8 << 20, 512},
	{"vdb", "qcow2:6M:cluster=4K:sector=4096", 6 << 20, 4096},
	{"vdc", "raw:4M", 4 << 20, 512},
	{"vdd", "qcow2:3147264", 3147264, 512}, // 48 clusters and 1536 bytes
}

// change draws one thing that a guest does to a disk: mostly small, sometimes
// over many clusters, and often where others were.
func change(t *rapid.T, s shape) string {
	units := s.size / s.unit
	count := min(units, 1+rapid.OneOf(rapid.IntRange(0, 16), rapid.IntRange(0, 3*(64<<10)/s.unit)).Draw(t, "count"))
	from := rapid.OneOf(rapid.IntRange(0, min(units-count, (1<<20)/s.unit)), rapid.IntRange(0, units-count), rapid.Just(units-count)).Draw(t, "from")
	where := fmt.Sprintf("%d %d", from*s.unit, count*s.unit)
	return rapid.SampledFrom([]string{
		fmt.Sprintf("write -P %d ", rapid.IntRange(0, 255).Draw(t, "byte")), "write -z ", "write -z -u ", "discard ",
	}).Draw(t, s.target) + where
}

// TestExact makes chains while a guest does anything to its disks: each backup
// holds what the disks held at its point in time, then and after those that
// follow. RAPID_CHECKS says how many chains; a failure prints the seed.
func TestExact(t *testing.T) {
	if os.Getenv("RAPID_CHECKS") == "" {
		if err := flag.Set("rapid.checks", "2"); err != nil {
			t.Fatal(err)
		}
	}
	h := newHost(t)
	var disks []string
	for _, s := range shapes {
		disks = append(disks, s.disk)
	}
	g := newPausedGuest(t, disks...)
	rapid.Check(t, func(rt *rapid.T) {
		c := &exactChain{host: h, g: g, rt: rt}
		for i := range rapid.IntRange(3, 5).Draw(rt, "backups") {
			c.extend(i == 0)
		}
		c.allExact()
	})
	h.nothingLeft(g)
}

// exactChain is a chain of backups, and what the disks held at each of them.
type exactChain struct {
	*host
	g       *guest
	rt      *rapid.T
	backups []dbus.BackupProperties
	held    []snapshot
}

// extend changes the disks and makes a backup.
func (c *exactChain) extend(full bool) {
	for _, s := range shapes {
		if n := rapid.IntRange(0, 6).Draw(c.rt, "changes of "+s.target); n > 0 {
			var all []string
			for range n {
				all = append(all, change(c.rt, s))
			}
			c.g.io(s.target, all...)
		}
	}
	held := c.g.snapshot()
	compression := rapid.SampledFrom([]dbus.Compression{dbus.CompressionNone, dbus.CompressionZlib, dbus.CompressionZstd}).Draw(c.rt, "compression")
	b := c.backup(c.g, dbus.BackupOptions{Full: full, Settings: dbus.Settings{Compression: &compression}})
	if full != (b.Kind == dbus.KindFull) {
		c.rt.Fatalf("backup %s is %s: %v", b.ID, b.Kind, b.Causes)
	}
	c.backups, c.held = append(c.backups, b), append(c.held, held)
}

// allExact compares every backup, and restores one of them and the last.
func (c *exactChain) allExact() {
	for i, b := range c.backups {
		if len(b.Disks) != len(shapes) {
			c.rt.Fatalf("backup %s has %d disks", b.ID, len(b.Disks))
		}
		c.chainIsExact(b, c.held[i])
	}
	last := len(c.backups) - 1
	for _, i := range []int{rapid.IntRange(0, last-1).Draw(c.rt, "restored"), last} {
		c.restoreIsExact(c.backups[i], c.held[i])
	}
	if c.t.Failed() {
		c.rt.Fatalf("chain %s is not exact", c.backups[0].Chain)
	}
}

// TestExactOverChangedDisks resizes a disk, attaches one and detaches it again,
// between increments.
func TestExactOverChangedDisks(t *testing.T) {
	h, g := newHost(t), newPausedGuest(t, "qcow2:8M", "qcow2:4M")
	var backups []dbus.BackupProperties
	var held []snapshot
	backup := func(disks int) {
		t.Helper()
		held = append(held, g.snapshot())
		b := h.backup(g, dbus.BackupOptions{})
		backups = append(backups, b)
		if len(b.Disks) != disks {
			t.Errorf("backup %s has %d disks instead of %d", b.ID, len(b.Disks), disks)
		}
		t.Logf("%s %v", b.Kind, b.Causes)
	}
	extra := filepath.Join("/var/lib/libvirt/images", g.name+"-vdc.qcow2")
	command(t, "", "qemu-img", "create", "-q", "-f", "qcow2", extra, "3M")
	device := strings.NewReplacer("FILE", extra).Replace(`<disk type="file" device="disk"><driver name="qemu" type="qcow2"/><source file="FILE"/><target dev="vdc" bus="virtio"/></disk>`)

	g.io("vda", "write -P 1 0 1M", "write -P 2 7M 1M")
	g.io("vdb", "write -P 3 1M 64k")
	backup(2)
	command(t, "", "virsh", "-q", "blockresize", g.name, "vda", "10M")
	g.io("vda", "write -P 4 9M 1M", "discard 0 64k")
	g.io("vdb", "write -P 5 1M 4k")
	backup(2)
	g.io("vda", "write -P 6 8M 64k")
	backup(2)
	command(t, device, "virsh", "-q", "attach-device", g.name, "/dev/stdin", "--live")
	g.io("vdc", "write -P 7 0 2M")
	g.io("vda", "write -P 8 5M 64k")
	backup(3)
	g.io("vdc", "write -z 64k 128k")
	backup(3)
	for i, b := range backups {
		h.chainIsExact(b, held[i])
		h.restoreIsExact(b, held[i])
	}
	h.nothingLeft(g)
}
