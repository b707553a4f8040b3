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
	None     Tracking = "none"     // not known: the next image is full
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

// Cause says why an image is full, or why a chain ended. The strings are part
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
	NoDiskTracked     Cause = "no-disk-tracked"    // every disk needs a full image, for different causes

	// Of a disk: its image is full, the other disks go on.

	DiskAttached      Cause = "disk-attached"      // the parent has no image of this disk
	DiskReplaced      Cause = "disk-replaced"      // another source or format under the same target
	DiskResized       Cause = "disk-resized"       // the size differs from the parent's image
	RawDisk           Cause = "raw-disk"           // the format cannot carry a bitmap
	CheckpointMissing Cause = "checkpoint-missing" // the parent's checkpoint does not cover the disk, or is gone
	BitmapBroken      Cause = "bitmap-broken"      // the bitmap is missing, in use or inconsistent
	InternalSnapshot  Cause = "internal-snapshot"  // a bitmap would keep the domain from reverting
)
