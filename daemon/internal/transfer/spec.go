// Package transfer is the mover: it carries out one operation on a repository,
// in a worker process of its own, as the daemon asks for it in a job directory.
//
// The daemon never touches a repository. It writes spec.json, starts the worker
// and follows status.json until result.json is there; both sides meet nowhere
// else, so either may die and the other goes on. SIGTERM cancels: the worker
// then leaves nothing behind and says so in its result.
//
//	spec.json    by the daemon, before the worker starts
//	go.json      by the daemon, in a backup, when the point in time is fixed
//	confirm.json by the daemon, in a backup that asks for it, when the copy may be kept
//	rate.json    by the daemon, at any time: how much the worker may move per second
//	stop.json    by the daemon, to a worker that serves: it is no longer needed
//	status.json  by the worker, at each phase and twice a second
//	result.json  by the worker, once, at the end
package transfer

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/google/renameio/v2"

	"github.com/virtbackup/virtbackup/daemon/internal/damage"
	"github.com/virtbackup/virtbackup/daemon/internal/repository"
)

// SpecVersion is the version of the files of a job directory. The worker and
// the daemon are installed together, but one may outlive an upgrade.
const SpecVersion = 1

// Names of the files of a job directory.
const (
	SpecFile    = "spec.json"
	GoFile      = "go.json"
	ConfirmFile = "confirm.json"
	RateFile    = "rate.json"
	StopFile    = "stop.json"
	StatusFile  = "status.json"
	ResultFile  = "result.json"
)

// Operation is what a worker does.
type Operation string

// The operations. Those on a repository as a whole need only Spec.Repository.
const (
	OperationInit    Operation = "init"    // make Repository.Path a repository
	OperationProbe   Operation = "probe"   // id, space; collects what dead jobs left
	OperationList    Operation = "list"    // manifests of Domain, or of all domains
	OperationBackup  Operation = "backup"  // Spec.BackupSpec
	OperationRestore Operation = "restore" // Spec.Restore
	OperationVerify  Operation = "verify"  // Spec.Backups and all that they stand on
	OperationDelete  Operation = "delete"  // Spec.Backups of Domain
	OperationDiscard Operation = "discard" // what a dead job left of Spec.Backups of Domain
	OperationMerge   Operation = "merge"   // Spec.Merge
	OperationInspect Operation = "inspect" // all backups, as deep as Spec.Depth says
	OperationServe   Operation = "serve"   // Spec.Serve, until stop.json is there
	OperationRepair  Operation = "repair"  // Spec.Repair
	// OperationCompress is Spec.Compress.
	OperationCompress Operation = "compress"
	OperationAttach   Operation = "attach" // Spec.Attach
)

// Spec is spec.json.
type Spec struct {
	Version    int            `json:"version"`
	Job        string         `json:"job"`
	Operation  Operation      `json:"operation"`
	Repository RepositorySpec `json:"repository"`
	Domain     string         `json:"domain,omitempty"`  // UUID
	Backups    []string       `json:"backups,omitempty"` // of verify, delete, discard
	Live       []string       `json:"live,omitempty"`    // of init and probe: ids of jobs that live, and of their backups
	Collect    bool           `json:"collect,omitempty"` // of init and probe: whether to remove what is of none of them
	Try        bool           `json:"try,omitempty"`     // of init and probe: whether to try to write
	Backup     *BackupSpec    `json:"backup,omitempty"`
	Restore    *RestoreSpec   `json:"restore,omitempty"`
	Merge      *MergeSpec     `json:"merge,omitempty"`
	Compress   *CompressSpec  `json:"compress,omitempty"`
	Attach     *AttachSpec    `json:"attach,omitempty"`
	Repair     *RepairSpec    `json:"repair,omitempty"`
	Depth      Depth          `json:"depth,omitempty"` // of inspect
	Serve      *ServeSpec     `json:"serve,omitempty"`
	// Most is how many bytes the worker may move per second by its own bound, in
	// each direction; 0 is none.
	Most uint64 `json:"most_bytes_per_second,omitempty"`
}

// Depth says what of each backup is looked at.
type Depth string

// The depths; each has what is before it.
const (
	DepthManifests Depth = "manifests" // manifests, and that their files are there with their sizes
	DepthHeaders   Depth = "headers"   // images' headers and tables, and the roots of digests
	DepthDigests   Depth = "digests"   // every block against its digest
)

// MergeSpec has a backup of Spec.Domain take over what those below it hold, so
// that they may go. Done again, it changes nothing.
type MergeSpec struct {
	Into string   `json:"into"`
	Drop []string `json:"drop"` // the newest first: the parent of Into, that one's parent, …
	Base string   `json:"base"` // the parent of the last of them; "" if that is a full one
}

// CompressSpec has the images of a backup of Spec.Domain compressed that are not
// yet. What its images hold, and what they stand on, stays the same. Done again,
// it changes nothing.
type CompressSpec struct {
	Backup      string `json:"backup"`
	Compression string `json:"compression"` // "zlib", "zstd"
	Level       int    `json:"level,omitempty"`
	Threads     int    `json:"threads"` // that compress
	// Free is how much must be free in the repository, in bytes, beside what must stay so.
	Free uint64 `json:"free"`
}

// RepositorySpec says where the repository is.
type RepositorySpec struct {
	Path        string        `json:"path"`
	ID          repository.ID `json:"id,omitempty"` // must be the one found there; "" for init and the first probe
	Name        string        `json:"name"`         // for messages
	KeyFile     string        `json:"key_file"`     // the host's manifest key: 64 hex digits
	MinimumFree uint64        `json:"minimum_free"` // bytes that a backup must leave free
	// Pins are of the backups of other hosts that somebody said are to be trusted.
	Pins map[string]string `json:"pins,omitempty"`
	// Promised is how much the backups that were being made in it when this one
	// was begun were still expected to take, in bytes.
	Promised uint64 `json:"promised,omitempty"`
}

// BackupSpec is a backup to make.
type BackupSpec struct {
	// Manifest as far as the daemon knows it: domain, backup, parent, chain,
	// kind, offering, … and of each disk target, size, kind, tracking,
	// checkpoint, format and source. The worker fills in the rest; what changes
	// were found by, it knows by BackupDisk.
	Manifest    repository.Manifest `json:"manifest"`
	Compression string              `json:"compression"`       // "none", "zlib", "zstd"
	Level       int                 `json:"level,omitempty"`   // of the compression; 0 is its default
	Threads     int                 `json:"threads,omitempty"` // that compress, 8 at most; 0 is the number of CPUs
	Expected    uint64              `json:"expected"`          // bytes that it will take, as far as that can be told
	Disks       []BackupDisk        `json:"disks"`             // one for each of the manifest's
	Files       []FileSpec          `json:"files,omitempty"`
	// Confirm has the worker wait in PhaseConfirming for confirm.json before it
	// commits: whether the exports showed one point in time is known only after.
	Confirm bool `json:"confirm,omitempty"`
}

// BackupDisk is the NBD export of one disk. It may come to life as late as go.json.
// It shows the whole disk, whatever of it is to be copied. An incremental image
// has exactly one of Bitmap, Compare and Layer, a full one has none.
type BackupDisk struct {
	Target string `json:"target"`
	Socket string `json:"socket"` // of the NBD server, a unix socket
	Export string `json:"export"`
	Size   uint64 `json:"size"` // bytes; must be what the export says

	// How what changed since the parent is found.
	Bitmap  string `json:"bitmap,omitempty"`  // by the metadata context of a dirty bitmap
	Compare bool   `json:"compare,omitempty"` // by reading the disk and comparing it with the parent's digests
	Layer   bool   `json:"layer,omitempty"`   // it is what the export's top image holds itself, by qemu:allocation-depth
}

// FileSpec is another file of the backup, copied from the host or given.
type FileSpec struct {
	Name    string `json:"name"`              // in the backup
	Path    string `json:"path,omitempty"`    // on the host
	Content []byte `json:"content,omitempty"` // when there is no Path
}

// Go is go.json: the point in time is fixed, the exports are there.
type Go struct {
	Created     int64  `json:"created_usec"` // µs since the epoch
	Consistency string `json:"consistency"`
	Thawed      bool   `json:"thawed"`
	Held        int64  `json:"held_usec,omitempty"` // µs that the guest was held still
	Shortfall   string `json:"shortfall,omitempty"` // why it is less consistent than was asked for
}

// RestoreSpec is a backup to read back.
type RestoreSpec struct {
	Backup string        `json:"backup"` // of Spec.Domain
	Disks  []RestoreDisk `json:"disks"`
	Files  []RestoreFile `json:"files,omitempty"`
}

// Formats of a restored disk.
const (
	FormatQcow2 = "qcow2"
	FormatRaw   = "raw"
)

// RestoreDisk is one disk of the backup and where it goes. The worker finds the
// chain of images by the manifests.
type RestoreDisk struct {
	Target string `json:"target"`
	// A new file beneath Directory, or with Device an existing block device of
	// at least the disk's size, which is overwritten.
	Directory   string `json:"directory,omitempty"`
	Destination string `json:"destination"` // relative to Directory; absolute for a Device
	Device      bool   `json:"device,omitempty"`
	Format      string `json:"format"`
	Owner       Owner  `json:"owner"`
}

// RestoreFile is another file of the backup and where it goes, as a new file.
type RestoreFile struct {
	Name        string `json:"name"`
	Directory   string `json:"directory"`
	Destination string `json:"destination"`
	Owner       Owner  `json:"owner"`
}

// Owner is given to a restored file once it is complete; nil leaves root's.
type Owner struct {
	UID  *int   `json:"uid,omitempty"`
	GID  *int   `json:"gid,omitempty"`
	Mode uint32 `json:"mode,omitempty"` // 0 leaves 0600
}

// Rate is rate.json.
type Rate struct {
	// Bytes per second that the worker may read from the guest's disks, and as
	// many that it may write to the repository; 0 is no bound.
	Bytes uint64 `json:"bytes_per_second"`
}

// Phases of an operation, in their order.
const (
	PhaseOpening    = "opening"
	PhaseReady      = "ready" // waits for go.json; only in a backup
	PhaseCopying    = "copying"
	PhaseFlushing   = "flushing"
	PhaseConfirming = "confirming" // waits for confirm.json; only with BackupSpec.Confirm
	PhaseVerifying  = "verifying"
	PhaseCommitting = "committing"
	PhaseDeleting   = "deleting"
	PhaseMerging    = "merging"
	PhaseServing    = "serving" // waits for stop.json; its disks can be read
	PhaseRepairing  = "repairing"
	// PhaseCompressing is of compress.
	PhaseCompressing = "compressing"
)

// Status is status.json.
type Status struct {
	Phase   string       `json:"phase"`
	Done    uint64       `json:"done"`  // bytes of this phase
	Total   uint64       `json:"total"` // bytes of this phase; may grow while extents are found
	Disks   []DiskStatus `json:"disks,omitempty"`
	Updated int64        `json:"updated_usec"` // µs since the epoch
}

// DiskStatus counts bytes of one disk.
type DiskStatus struct {
	Target  string `json:"target"`
	Done    uint64 `json:"done"`    // of Total: copied, zero or skipped
	Total   uint64 `json:"total"`   // that have to be looked at in this phase
	Read    uint64 `json:"read"`    // from the source, or from the images in a restore
	Written uint64 `json:"written"` // to the image, or to the destination
	Dirty   uint64 `json:"dirty"`   // changed since the parent, in whole clusters
	Zero    uint64 `json:"zero"`    // stored as zeroes, without data

	// Of a disk that is served.
	Pending int64  `json:"pending_usec,omitempty"`  // µs that the oldest request waits for its answer; long: the storage hangs
	Waited  int64  `json:"waited_usec,omitempty"`   // µs in all in which some request waited for its answer
	Damaged uint64 `json:"damaged_bytes,omitempty"` // asked for, and not what was written
	Refused uint64 `json:"refused,omitempty"`       // requests that the storage gave no answer to
}

// Result is result.json.
type Result struct {
	Version    int                  `json:"version"`
	Error      *Failure             `json:"error,omitempty"` // nil: done
	Disks      []DiskStatus         `json:"disks,omitempty"`
	Manifest   *repository.Manifest `json:"manifest,omitempty"` // of the backup that was made, restored, or took over others
	Repository *RepositoryState     `json:"repository,omitempty"`
	Backups    []BackupState        `json:"backups,omitempty"`   // of list, verify
	Repaired   []Flaw               `json:"repaired,omitempty"`  // by repair, or could be: with the donor
	Lost       []Flaw               `json:"lost,omitempty"`      // which nobody else holds
	Hit        []Hit                `json:"hit,omitempty"`       // of verify and inspect: what the damage in Backups does to others
	HitKnown   bool                 `json:"hit_known,omitempty"` // of verify: Hit is all; else whatever builds on what is damaged may be hit
	Deleted    []string             `json:"deleted,omitempty"`   // backups; also when a later one failed
	Served     []ServedDisk         `json:"served,omitempty"`    // of serve, whatever Error says
}

// RepositoryState is what init and probe find.
type RepositoryState struct {
	ID       repository.ID `json:"id"`
	Host     string        `json:"host"`  // this host's id
	Free     uint64        `json:"free"`  // bytes
	Total    uint64        `json:"total"` // bytes
	ReadOnly bool          `json:"read_only"`
	NoSpace  bool          `json:"no_space,omitempty"`  // nothing could be written; only with Spec.Try
	Took     int64         `json:"took_usec,omitempty"` // µs to look, and to write a little
}

// BackupState is the verdict on one backup.
type BackupState struct {
	Domain   string               `json:"domain"`
	Backup   string               `json:"backup"`
	Manifest *repository.Manifest `json:"manifest,omitempty"`
	Error    *Failure             `json:"error,omitempty"`
	// Damage is what of the backup's own files is damaged, of verify; empty, with
	// an Error that tells of damage: nothing of it can be used.
	Damage []Flaw `json:"damage,omitempty"`
	// Unseen: some of it was not looked at, as that stands on what is damaged.
	Unseen bool `json:"unseen,omitempty"`
	// Pin is that of a backup of another host; Manifest is then what it says, and
	// Error what else is wrong with it. Only of inspect.
	Pin string `json:"pin,omitempty"`
}

// Flaw is a part of a disk's image, or another file of a backup, that is not
// what was written.
type Flaw struct {
	Target string `json:"target,omitempty"`
	damage.Range
	Whole bool   `json:"whole,omitempty"` // it is all of the disk, as the damage is in what says where its data is
	File  string `json:"file,omitempty"`  // another file, and no disk
	Donor string `json:"donor,omitempty"` // of repair: where the same was found: a backup, or DonorLive
}

// Hit is a part of a disk of a backup that is seen through to a damaged image
// below it.
type Hit struct {
	Domain string `json:"domain"`
	Backup string `json:"backup"`
	Target string `json:"target"`
	damage.Range
	Image string `json:"image"` // the backup that the damaged image is of
}

// Class says whose fault a failure is, and so what the daemon does next.
type Class string

// The classes.
const (
	ClassCancelled    Class = "cancelled"
	ClassRepository   Class = "repository"      // missing, not one, read-only, I/O error
	ClassGone         Class = "gone"            // the repository's storage is not there
	ClassFull         Class = "repository-full" // also: less would stay free than must
	ClassSource       Class = "source"          // the NBD export, or a file of the host
	ClassParent       Class = "parent"          // the parent backup is missing or damaged: make a full one
	ClassForeign      Class = "foreign"         // another host writes here
	ClassManifest     Class = "manifest"        // damaged, forged, or another host's
	ClassMissing      Class = "missing"         // the backup is not in the repository, which itself is there
	ClassVerification Class = "verification"    // the data read back is not what was written
	ClassDestination  Class = "destination"     // of a restore
	ClassInternal     Class = "internal"        // our fault
)

// Failure is why an operation failed.
type Failure struct {
	Class   Class  `json:"class"`
	Message string `json:"message"`
}

func (f *Failure) Error() string { return f.Message }

// ReadSpec reads the spec of a job directory.
func ReadSpec(directory string) (*Spec, error) {
	var s Spec
	if err := readJSON(filepath.Join(directory, SpecFile), &s); err != nil {
		return nil, err
	}
	if s.Version != SpecVersion {
		return nil, fmt.Errorf("%s has version %d, this worker knows %d", SpecFile, s.Version, SpecVersion)
	}
	return &s, nil
}

// WriteSpec writes the spec into a job directory, WriteGo lets a backup go on
// from PhaseReady, and WriteConfirm from PhaseConfirming. The files appear whole
// or not at all.
func WriteSpec(directory string, s *Spec) error {
	return writeJSON(filepath.Join(directory, SpecFile), s)
}

// WriteGo lets a backup go on: see Go.
func WriteGo(directory string, g Go) error { return writeJSON(filepath.Join(directory, GoFile), g) }

// WriteConfirm lets a backup be kept: see BackupSpec.Confirm.
func WriteConfirm(directory string) error {
	return writeJSON(filepath.Join(directory, ConfirmFile), struct{}{})
}

// ReadRate reads the worker's rate, no bound if none was written; WriteRate sets it.
func ReadRate(directory string) (Rate, error) {
	var r Rate
	err := readJSON(filepath.Join(directory, RateFile), &r)
	if errors.Is(err, fs.ErrNotExist) {
		return Rate{}, nil
	}
	return r, err
}

// WriteRate tells a worker how much it may move from now on.
func WriteRate(directory string, r Rate) error {
	return writeJSON(filepath.Join(directory, RateFile), r)
}

// ReadStatus reads the newest status; fs.ErrNotExist before the first.
func ReadStatus(directory string) (Status, error) {
	var s Status
	return s, readJSON(filepath.Join(directory, StatusFile), &s)
}

// ReadResult reads the result; fs.ErrNotExist while there is none.
func ReadResult(directory string) (*Result, error) {
	var r Result
	if err := readJSON(filepath.Join(directory, ResultFile), &r); err != nil {
		return nil, err
	}
	return &r, nil
}

func readJSON(path string, v any) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("cannot read %s: %w", path, err)
	}
	return nil
}

func writeJSON(path string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("cannot encode %s: %w", path, err)
	}
	return renameio.WriteFile(path, b, 0o600)
}
