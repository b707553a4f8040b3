// Package chain holds the rules of backup chains: what the next backup of a
// domain has to be, which backups may be deleted, and which images make up a
// restore. It is pure: it sees facts that others gathered and returns
// verdicts, so that every rule can be tested without a hypervisor.
package chain

// Kind says what an image, or a whole backup, contains.
type Kind string

const (
	Full        Kind = "full"        // everything
	Incremental Kind = "incremental" // what changed since the parent
)

// Tracking is how the changes of a disk since a backup are known.
type Tracking string

const (
	CBT      Tracking = "cbt"      // a dirty bitmap that belongs to a libvirt checkpoint
	Snapshot Tracking = "snapshot" // an external overlay
	Digest   Tracking = "digest"   // read everything and compare
	None     Tracking = "none"     // not wanted: the next image is full
)

// Fallback is what an offering wants of a disk whose changes are not known.
type Fallback string

const (
	FallbackDigest Fallback = "digest" // read all of it, store what differs from the parent
	FallbackFull   Fallback = "full"   // store all of it
)

// Mode is what an offering asks for.
type Mode string

const (
	ModeFull        Mode = "full"
	ModeIncremental Mode = "incremental"
)

// State is the state of a chain.
type State string

const (
	Open     State = "open"     // the next backup may be an increment
	Finished State = "finished" // ended on purpose; all of its backups are good
	Broken   State = "broken"   // ended because its tracking or one of its backups cannot be trusted
)

// BackupState is the state of one backup.
type BackupState string

const (
	Running  BackupState = "running"
	Complete BackupState = "complete"
	Failed   BackupState = "failed"
	Damaged  BackupState = "damaged"
	Deleting BackupState = "deleting"
)

// Cause says why an image is not an increment by a bitmap, or why a chain ended. The strings are part
// of the D-Bus API and of the catalog.
type Cause string

const (
	// Of a chain: the next backup is full and starts a new one.

	FirstBackup       Cause = "first-backup"       // no chain of this domain in this repository
	FullRequested     Cause = "full-requested"     // the caller asked for a full backup
	FullMode          Cause = "full-mode"          // the offering makes full backups only
	Isolated          Cause = "isolated"           // the caller asked for a backup outside of the chain
	ChainSize         Cause = "chain-size"         // the chain has as many backups as the offering allows
	ChainFinished     Cause = "chain-finished"     // somebody asked to finish the chain
	ChainBroken       Cause = "chain-broken"       // the chain is broken, and no better cause was recorded
	OfferingChanged   Cause = "offering-changed"   // the chain was made by another offering
	RepositoryChanged Cause = "repository-changed" // the chain is in another repository
	ParentMissing     Cause = "parent-missing"     // the newest backup of the chain is not there (any more)
	ParentDamaged     Cause = "parent-damaged"     // the newest backup of the chain, or one below it, is damaged
	ClockSetBack      Cause = "clock-set-back"     // the newest backup of the chain is dated after this one, and ids must ascend
	BackupDeleted     Cause = "backup-deleted"     // the newest backup of the chain was deleted
	Restored          Cause = "restored"           // a backup was restored over the domain's disks
	ValidationFailed  Cause = "validation-failed"  // the newest backup of the chain was tried, and is not valid
	NoDiskTracked     Cause = "no-disk-tracked"    // every disk needs a full image, for different causes

	// Of a disk: it is read whole, and stored whole or where it differs from the
	// parent; the other disks go on.

	DiskAttached      Cause = "disk-attached"      // the parent has no image of this disk: stored whole
	DiskReplaced      Cause = "disk-replaced"      // another source or format under the same target, or the same detached and attached again
	DiskResized       Cause = "disk-resized"       // the size differs from the parent's image: stored whole
	ChangedWhileOff   Cause = "changed-while-off"  // the image is not as it was when the domain stopped
	Unseen            Cause = "unseen"             // the domain stopped or started, and nobody watched its disks
	HostRestarted     Cause = "host-restarted"     // the host went down while the domain ran
	OfferingDigest    Cause = "offering-digest"    // the offering wants all disks compared
	RawDisk           Cause = "raw-disk"           // the format cannot carry a bitmap
	CheckpointMissing Cause = "checkpoint-missing" // the parent's checkpoint does not cover the disk, or is gone
	BitmapBroken      Cause = "bitmap-broken"      // the bitmap is missing, in use or inconsistent
	InternalSnapshot  Cause = "internal-snapshot"  // a bitmap would keep the domain from reverting, and an overlay would end with the snapshot in it
	OverlayMissing    Cause = "overlay-missing"    // the parent's overlay is not the disk's top layer (any more)
	// OverlayUnsupported: the domain is transient, has snapshots that libvirt
	// knows, or a disk that is no file, so that no overlay is put on its disks.
	OverlayUnsupported Cause = "overlay-unsupported"

	Imported Cause = "imported" // it was found in the repository
	Merged   Cause = "merged"   // what it built on was merged into it
)
