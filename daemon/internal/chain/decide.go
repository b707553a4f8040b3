package chain

import "slices"

// Options are what the caller and the offering ask of the next backup.
type Options struct {
	Backup     string // its id, a ULID
	Full       bool   // start a new chain
	Isolated   bool   // stay outside of the domain's chains
	Mode       Mode
	Offering   string   // name
	Repository string   // id
	ChainSize  int      // backups in a chain, the full one included; 0: no bound
	Tracking   Tracking // what the offering asks for; "" is CBT
	Fallback   Fallback // for a disk whose changes are not known; "" is FallbackDigest
}

// Bitmap is the state of the bitmap that the chain's current checkpoint has on
// a disk.
type Bitmap string

const (
	BitmapValid        Bitmap = "valid"
	BitmapMissing      Bitmap = "missing"
	BitmapInconsistent Bitmap = "inconsistent" // or in use
)

// Domain is the domain as it is now.
type Domain struct {
	InternalSnapshots bool // it has some
	Overlays          bool // overlays of ours may be put on its disks
	Disks             []Disk
}

// Disk is a disk as it is now.
type Disk struct {
	Target  string   // "vda"
	Source  string   // path, of the disk below any overlay of ours
	Backing []string // paths of the layers below, top first
	Format  string   // "qcow2", "raw", …
	Size    uint64   // bytes
	Bitmap  Bitmap   // "" is missing
	Overlay string   // path of the overlay of ours that is the top layer; "" if none is
	// Run and Node say which opening of the source this is: QEMU's run, and its
	// block node in it. "" and 0 while the domain is off.
	Run  string
	Node int
	// Unseen is why the disk may have changed unseen since the last backup's
	// point in time, "" if it was watched all the time.
	Unseen Cause
}

// Last is the newest chain of the domain, and its newest backup.
type Last struct {
	Chain      string
	State      State
	Cause      Cause // why the chain ended
	Offering   string
	Repository string
	Length     int // backups in it

	Backup      string // id of its newest backup; "" if there is none
	BackupState BackupState
	Checkpoint  string // the current one; "" if there is none
	Disks       []LastDisk
}

// LastDisk is a disk as the newest backup has it.
type LastDisk struct {
	Target  string
	Source  string
	Backing []string // paths of the layers below, top first
	Format  string
	Size    uint64 // bytes
	CBT     bool   // the checkpoint covers it
	// Overlaid: the backup put an overlay on it, and Node is that one's. Overlay
	// is its path; "" if it is gone.
	Overlaid bool
	Overlay  string
	Run      string // see Disk
	Node     int
}

// Verdict says what the next backup is.
type Verdict struct {
	Kind   Kind
	Cause  Cause  // why it is full; "" for an increment
	Parent string // the backup that an increment builds on
	Chain  string // the chain that an increment extends
	Disks  []DiskVerdict
	// Checkpoint says that the backup is to make a checkpoint, on the disks
	// whose tracking is cbt.
	Checkpoint bool
}

// DiskVerdict says what a disk's image in the next backup is.
type DiskVerdict struct {
	Target   string
	Kind     Kind
	Changes  Tracking // how an increment's changes are found: CBT, Snapshot or Digest; "" if it is full
	Cause    Cause    // why it is not an increment by CBT or Snapshot; "" if it is
	Base     string   // the checkpoint whose changes it holds, of CBT
	Tracking Tracking // of the changes from this backup on
}

// Decide says what the next backup of a domain is. last is nil if the domain
// has no chain in the repository. In doubt no bitmap or overlay is used: a
// needless read is a cost, a wrong increment is a lost machine.
func Decide(o Options, d Domain, last *Last) Verdict {
	v := Verdict{Kind: Incremental, Cause: chainCause(o, last)}
	causes := map[Cause]bool{}
	increments := 0
	for _, disk := range d.Disks {
		one := DiskVerdict{Target: disk.Target, Kind: Full, Cause: v.Cause, Tracking: tracking(o, d, disk)}
		if one.Tracking == CBT {
			v.Checkpoint = true
		}
		if v.Cause == "" {
			one.Cause = diskCause(o, d, disk, last)
			one.Changes = changes(o, one.Cause)
		}
		if one.Changes != "" {
			one.Kind = Incremental
			increments++
		}
		if one.Changes == CBT {
			one.Base = last.Checkpoint
		}
		causes[one.Cause] = true
		v.Disks = append(v.Disks, one)
	}
	if v.Cause == "" && increments == 0 {
		v.Cause = NoDiskTracked
		if len(causes) == 1 { // one cause for all says more
			v.Cause = v.Disks[0].Cause
		}
	}
	if v.Cause != "" {
		v.Kind = Full
		return v
	}
	v.Parent, v.Chain = last.Backup, last.Chain
	return v
}

// changes says how to find what changed since the parent, "" for not at all.
func changes(o Options, cause Cause) Tracking {
	switch {
	case cause == "" && o.Tracking == Snapshot:
		return Snapshot
	case cause == "":
		return CBT
	case cause == DiskAttached || cause == DiskResized:
		return "" // the parent has nothing to compare with
	case o.Fallback == FallbackFull && cause != OfferingDigest:
		return ""
	}
	return Digest
}

// chainCause returns why the next backup starts a new chain, "" if it does not.
func chainCause(o Options, last *Last) Cause {
	switch {
	case o.Isolated:
		return Isolated
	case o.Mode == ModeFull:
		return FullMode
	case o.Full:
		return FullRequested
	case last == nil:
		return FirstBackup
	case last.Repository != o.Repository:
		return RepositoryChanged
	case last.Offering != o.Offering:
		return OfferingChanged
	case last.State != Open:
		return endedCause(last)
	case last.Backup == "" || last.BackupState == Deleting:
		return ParentMissing
	case last.BackupState != Complete:
		return ParentDamaged
	case last.Backup >= o.Backup:
		return ClockSetBack
	case o.ChainSize > 0 && last.Length >= o.ChainSize:
		return ChainSize
	}
	return ""
}

func endedCause(last *Last) Cause {
	switch {
	case last.Cause != "":
		return last.Cause
	case last.State == Finished:
		return ChainFinished
	}
	return ChainBroken
}

// diskCause returns why the disk's image cannot be an increment by the
// checkpoint's bitmap, or the overlay, "" if it can.
func diskCause(o Options, d Domain, disk Disk, last *Last) Cause {
	i := slices.IndexFunc(last.Disks, func(l LastDisk) bool { return l.Target == disk.Target })
	if i < 0 {
		return DiskAttached
	}
	before := last.Disks[i]
	switch {
	case before.Size != disk.Size:
		return DiskResized
	case !sameDisk(before, disk):
		return DiskReplaced
	case disk.Unseen != "":
		return disk.Unseen
	case o.Tracking == Snapshot:
		return overlayCause(d, disk, before)
	case disk.Format != "qcow2":
		return RawDisk
	case d.InternalSnapshots:
		return InternalSnapshot
	case o.Tracking == Digest:
		return OfferingDigest
	case last.Checkpoint == "" || !before.CBT:
		return CheckpointMissing
	case disk.Bitmap == BitmapInconsistent:
		return BitmapBroken
	case disk.Bitmap != BitmapValid:
		return CheckpointMissing
	}
	return ""
}

// overlayCause returns why the overlay that the last backup made does not hold
// all changes since then, "" if it does.
func overlayCause(d Domain, disk Disk, before LastDisk) Cause {
	switch {
	case d.InternalSnapshots:
		return InternalSnapshot
	case !d.Overlays:
		return OverlayUnsupported
	case before.Overlay == "" || disk.Overlay != before.Overlay:
		return OverlayMissing
	}
	return ""
}

// sameDisk tells whether this is the disk that the last backup had, whatever
// snapshots were put on top of it or committed into it meanwhile: bitmaps go
// along with those.
func sameDisk(before LastDisk, now Disk) bool {
	if before.Format != now.Format {
		return false
	}
	if before.Source != now.Source {
		return slices.Contains(now.Backing, before.Source) || slices.Contains(before.Backing, now.Source)
	}
	if before.Overlaid && (before.Overlay == "" || before.Overlay != now.Overlay) {
		return true // the node went with the overlay
	}
	// Opened anew in the same run, it was detached: nobody watched it meanwhile.
	return now.Run == "" || now.Run != before.Run || now.Node == before.Node
}

// tracking says how the disk's changes can be known from the next backup on.
func tracking(o Options, d Domain, disk Disk) Tracking {
	switch {
	case o.Isolated || o.Mode == ModeFull:
		return None
	case o.Tracking == Snapshot && d.Overlays && !d.InternalSnapshots:
		return Snapshot
	case o.Tracking == Snapshot:
		return Digest
	case d.InternalSnapshots || disk.Format != "qcow2" || o.Tracking == Digest:
		return Digest
	case disk.Overlay != "":
		// Of another chain, which has it committed into the disk some time: a
		// bitmap that was begun in it would be lost then, and that of the next
		// overlay, which has the same name, would be taken for all of it.
		return Digest
	}
	return CBT
}
