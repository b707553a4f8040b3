package transfer

import (
	"path/filepath"
	"slices"
)

// ServeSpec has the disks of a backup of Spec.Domain served over NBD, read-only, each block compared with its digest.
// Whoever reads them opens no file of the repository. Before that, other files of the backup are written.
type ServeSpec struct {
	Backup string        `json:"backup"`
	Disks  []ServeDisk   `json:"disks"`
	Owner  Owner         `json:"owner"` // of the sockets; Mode 0 leaves 0600
	Files  []RestoreFile `json:"files,omitempty"`
	// Wait has a request that the storage does not answer, or answers with an error of its own, wait until it is
	// there again. Without, such a request ends with EIO after Patience.
	Wait     bool  `json:"wait,omitempty"`
	Patience int64 `json:"patience_usec,omitempty"` // µs; 0 for the default
}

// ServeDisk is a disk of the backup and where it is served: the NBD export of the name Target, on a unix socket in a
// directory that belongs to the daemon. A socket that a dead worker left there is replaced.
type ServeDisk struct {
	Target string `json:"target"`
	Socket string `json:"socket"` // absolute path of 107 bytes at most
}

// ServedDisk is what came of serving one disk.
type ServedDisk struct {
	Target string   `json:"target"`
	Read   uint64   `json:"read"`             // bytes that clients got
	Damage []Damage `json:"damage,omitempty"` // ascending, without overlap; not more than maxDamage
	// Unanswered is the first failure of the storage itself: it says nothing about the backup.
	Unanswered *Failure `json:"unanswered,omitempty"`
}

// Damage is a range of a disk that is not what was written.
type Damage struct {
	Offset uint64 `json:"offset"` // on the disk, as the guest sees it
	Length uint64 `json:"length"` // bytes
	Backup string `json:"backup"` // whose image holds the range
	Detail string `json:"detail"`
}

// WriteStop ends a worker that serves.
func WriteStop(directory string) error {
	return writeJSON(filepath.Join(directory, StopFile), struct{}{})
}

// maxDamage bounds how many ranges are told of a disk.
const maxDamage = 1024

// addDamage adds a range that nothing in the list overlaps, and joins it with
// its neighbours.
func addDamage(list []Damage, d Damage) []Damage {
	at, _ := slices.BinarySearchFunc(list, d.Offset, func(l Damage, off uint64) int {
		if l.Offset < off {
			return -1
		}
		return 1
	})
	if at < len(list) && d.Offset+d.Length == list[at].Offset && list[at].Backup == d.Backup {
		d.Length += list[at].Length
		list = slices.Delete(list, at, at+1)
	}
	if at > 0 && list[at-1].Offset+list[at-1].Length == d.Offset && list[at-1].Backup == d.Backup {
		list[at-1].Length += d.Length
		return list
	}
	if len(list) >= maxDamage {
		return list
	}
	return slices.Insert(list, at, d)
}
