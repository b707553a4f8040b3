// Package fingerprint tells whether the disks of a stopped domain are still
// what they were: it looks at each file of a disk's backing chain without
// reading the data in it, and compares what it saw with what was seen before.
//
// It sees every change that goes through a file system, as that stamps the
// file. What is behind a block device or a network cannot be seen so: such a
// layer is opaque, and never the same.
package fingerprint

import (
	"fmt"
	"time"
)

// Kind is what a layer is, or why it was not looked at.
type Kind string

// The kinds of layers.
const (
	KindFile  Kind = "file"
	KindBlock Kind = "block"
	// KindNetwork is all that is known by a name and not by a path: network
	// storage, a volume of a pool, an NVMe device, vhost-user.
	KindNetwork Kind = "network"
	// KindMissing: there is nothing at the path.
	KindMissing Kind = "missing"
	// KindUnreadable: it could not be looked at; Identity says why.
	KindUnreadable Kind = "unreadable"
)

// Layer is one file, device or network image of a disk's backing chain.
type Layer struct {
	Path string `json:"path"`
	Kind Kind   `json:"kind"`
	// Device is the number of the file system, Inode that of the file in it;
	// both are 0 for what is no file.
	Device uint64 `json:"device,omitempty"`
	Inode  uint64 `json:"inode,omitempty"`
	// Size is in bytes.
	Size int64 `json:"size,omitempty"`
	// Modified and Changed are mtime and ctime, in ns since the epoch. Nobody
	// can set the ctime.
	Modified int64 `json:"modified,omitempty"`
	Changed  int64 `json:"changed,omitempty"`
	// Identity is what a block device is known by (a number that is its own,
	// else its major and minor number), or what names a network image.
	Identity string `json:"identity,omitempty"`
}

// Disk is what was seen of one disk of a domain.
type Disk struct {
	Target string `json:"target"`
	Format string `json:"format"`
	// Layers are those of the backing chain, the top first, each followed by
	// its external data file if it has one.
	Layers []Layer `json:"layers"`
}

// Opaque is what Compare says of a disk whose contents may have changed
// without a trace.
const Opaque = "opaque"

// Compare tells whether a disk that is seen as now must still have the
// contents that it had when it was seen as d. Why says what speaks against
// that; it is Opaque when nothing but that its layers cannot be seen through.
func (d Disk) Compare(now Disk) (same bool, why string) {
	switch {
	case d.Format != now.Format:
		return false, fmt.Sprintf("its format is %q and was %q", now.Format, d.Format)
	case len(d.Layers) == 0 || len(now.Layers) == 0:
		return false, "nothing of it was seen"
	}
	for i := range min(len(d.Layers), len(now.Layers)) {
		if why := d.Layers[i].compare(now.Layers[i]); why != "" {
			return false, why
		}
	}
	if len(d.Layers) != len(now.Layers) {
		return false, fmt.Sprintf("its backing chain has %d files and had %d", len(now.Layers), len(d.Layers))
	}
	for _, l := range d.Layers {
		if l.Kind != KindFile {
			return false, Opaque
		}
	}
	return true, ""
}

// compare says what differs; nothing for a layer that cannot be seen through
// but is the same one.
func (l Layer) compare(now Layer) string {
	switch {
	case now.Kind == KindUnreadable || now.Kind == KindMissing:
		return fmt.Sprintf("%s is %s%s", now.Path, now.Kind, reason(now))
	case l.Kind == KindUnreadable || l.Kind == KindMissing:
		return fmt.Sprintf("%s was %s%s", l.Path, l.Kind, reason(l))
	case l.Kind != now.Kind || l.Identity != now.Identity:
		return fmt.Sprintf("%s was replaced by something else", now.Path)
	case l.Size != now.Size:
		return fmt.Sprintf("%s has %d bytes and had %d", now.Path, now.Size, l.Size)
	case l.Kind != KindFile:
		return ""
	case l.Inode != now.Inode || l.Device != now.Device && (coarse(l) || coarse(now)):
		return fmt.Sprintf("%s was replaced by another file", now.Path)
	case l.Modified != now.Modified:
		return fmt.Sprintf("%s was modified at %s", now.Path, stamp(now.Modified))
	case l.Changed != now.Changed:
		return fmt.Sprintf("%s was changed at %s", now.Path, stamp(now.Changed))
	}
	// The number of a file system alone differs: that of a share, of btrfs and
	// of device mapper is another after each boot. A file of another file
	// system does not have the same stamps to the nanosecond.
	return ""
}

func reason(l Layer) string {
	if l.Identity == "" {
		return ""
	}
	return ": " + l.Identity
}

func stamp(ns int64) string { return time.Unix(0, ns).UTC().Format(time.RFC3339Nano) }

// coarse tells whether a file's stamps are of whole seconds, as those of ext3,
// and of ext4 with inodes of 128 bytes.
func coarse(l Layer) bool {
	return l.Modified%int64(time.Second) == 0 && l.Changed%int64(time.Second) == 0
}
