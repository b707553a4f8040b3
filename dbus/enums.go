package dbus

// Mode is how an offering backs up.
type Mode string

// Compression is how data is compressed while a backup is written.
type Compression string

// CompressionTime is when data is compressed: while a backup is written, or by a
// job after it.
type CompressionTime string

// CompressionState is how far a backup is compressed by a job after it; "" if it
// is not to be.
type CompressionState string

// ValidationResult is what came of trying a backup; "" if it was never tried.
type ValidationResult string

// ValidationVerdict is what one step found.
type ValidationVerdict string

// Quiesce is how a guest is quieted for the point in time.
type Quiesce string

// QuiescePolicy is what becomes of a backup when the guest cannot be quieted.
type QuiescePolicy string

// BackupKind is whether a backup, or a disk in it, builds on a parent.
type BackupKind string

// BackupState is what is known of a backup's files.
type BackupState string

// Consistency is what a point in time is consistent for.
type Consistency string

// Tracking is how changes since the last backup are known.
type Tracking string

// Fallback is what becomes of a disk whose changes are not known.
type Fallback string

// HookState is whether libvirt tells what it does with domains.
type HookState string

// RepositoryState is what is known of a repository.
type RepositoryState string

// Protection is whether a domain is being backed up.
type Protection string

// ChainState is whether a chain goes on.
type ChainState string

// UsageBy is what usage is told by.
type UsageBy string

// QuotaKind is what a quota bounds.
type QuotaKind string

// JobState is how far a job is.
type JobState string

// JobOrigin is who started a job.
type JobOrigin string

// ScheduleQuiesce is how a schedule quiets guests.
type ScheduleQuiesce string

// Overlap is what becomes of a schedule's run that cannot start when it is due.
type Overlap string

// RunState is how far a schedule's run is.
type RunState string

// Operation is what a job does.
type Operation string

// The values of the types above; interfaces/ says what they mean.
const (
	ModeFull        Mode = "full"
	ModeIncremental Mode = "incremental"

	CompressionNone Compression = "none"
	CompressionZlib Compression = "zlib"
	CompressionZstd Compression = "zstd"

	CompressionInline   CompressionTime = "inline"
	CompressionDeferred CompressionTime = "deferred"

	CompressionDue    CompressionState = "due"
	CompressionDone   CompressionState = "done"
	CompressionFailed CompressionState = "failed"

	ValidationValid    ValidationResult = "valid"
	ValidationNotValid ValidationResult = "not-valid"
	ValidationUnable   ValidationResult = "unable"

	VerdictValid    ValidationVerdict = "valid"
	VerdictNotValid ValidationVerdict = "not-valid"
	VerdictUnable   ValidationVerdict = "unable"
	VerdictSkipped  ValidationVerdict = "skipped"

	QuiesceNone    Quiesce = "none"
	QuiesceAgent   Quiesce = "agent"
	QuiesceSuspend Quiesce = "suspend"

	QuiesceRequire QuiescePolicy = "require"
	QuiescePrefer  QuiescePolicy = "prefer"

	KindFull        BackupKind = "full"
	KindIncremental BackupKind = "incremental"

	BackupComplete BackupState = "complete"
	BackupDamaged  BackupState = "damaged"
	BackupMissing  BackupState = "missing"
	BackupDeleting BackupState = "deleting"

	ConsistencyApplication Consistency = "application"
	ConsistencyFilesystem  Consistency = "filesystem"
	ConsistencySuspended   Consistency = "suspended"
	ConsistencyCrash       Consistency = "crash"
	ConsistencyOff         Consistency = "off"

	TrackingCBT      Tracking = "cbt"
	TrackingSnapshot Tracking = "snapshot"
	TrackingDigest   Tracking = "digest"
	TrackingNone     Tracking = "none"

	FallbackDigest Fallback = "digest"
	FallbackFull   Fallback = "full"

	HookMissing   HookState = "missing"
	HookInstalled HookState = "installed"
	HookActive    HookState = "active"

	RepositoryUnknown     RepositoryState = "unknown"
	RepositoryOnline      RepositoryState = "online"
	RepositorySlow        RepositoryState = "slow"
	RepositoryFull        RepositoryState = "full"
	RepositoryReadOnly    RepositoryState = "read-only"
	RepositoryUnavailable RepositoryState = "unavailable"
	RepositoryGone        RepositoryState = "gone"
	RepositoryHung        RepositoryState = "hung"

	ProtectionUnassigned Protection = "unassigned"
	ProtectionPending    Protection = "pending"
	ProtectionProtected  Protection = "protected"
	ProtectionFailing    Protection = "failing"

	ChainOpen     ChainState = "open"
	ChainFinished ChainState = "finished"
	ChainBroken   ChainState = "broken"

	UsageByDomain     UsageBy = "domain"
	UsageByOffering   UsageBy = "offering"
	UsageByUser       UsageBy = "user"
	UsageByRepository UsageBy = "repository"

	QuotaDomain   QuotaKind = "domain"
	QuotaOffering QuotaKind = "offering"
	QuotaUser     QuotaKind = "user"

	JobQueued     JobState = "queued"
	JobRunning    JobState = "running"
	JobCancelling JobState = "cancelling"
	JobSucceeded  JobState = "succeeded"
	JobFailed     JobState = "failed"
	JobCancelled  JobState = "cancelled"

	OriginUser     JobOrigin = "user"
	OriginSchedule JobOrigin = "schedule"
	OriginSystem   JobOrigin = "system"

	ScheduleQuiesceOffering ScheduleQuiesce = "offering"

	OverlapSkip  Overlap = "skip"
	OverlapQueue Overlap = "queue"

	RunWaiting   RunState = "waiting"
	RunRunning   RunState = "running"
	RunSucceeded RunState = "succeeded"
	RunFailed    RunState = "failed"
	RunSkipped   RunState = "skipped"
	RunCancelled RunState = "cancelled"

	OperationBackup         Operation = "backup"
	OperationRestore        Operation = "restore"
	OperationRestoreInPlace Operation = "restore-in-place"
	OperationVerify         Operation = "verify"
	OperationDelete         Operation = "delete"
	OperationPrune          Operation = "prune"
	OperationScan           Operation = "scan"
	OperationInspect        Operation = "inspect"
	OperationCheck          Operation = "check"
	OperationCompress       Operation = "compress"
	OperationValidate       Operation = "validate"
	OperationRepair         Operation = "repair"
	OperationGroup          Operation = "group"
)

// Depth is what a check of a repository looks at.
type Depth string

// The values of Depth.
const (
	DepthProbe     Depth = "probe"
	DepthManifests Depth = "manifests"
	DepthHeaders   Depth = "headers"
	DepthDigests   Depth = "digests"
)

// Values returns what a Depth can be.
func (Depth) Values() []string { return []string{"probe", "manifests", "headers", "digests"} }

// PruneAction is what becomes of a backup that retention looks at.
type PruneAction string

// The values of PruneAction.
const (
	PruneKeep   PruneAction = "keep"
	PruneDelete PruneAction = "delete"
	PruneMerge  PruneAction = "merge"
)

// Final tells whether a job in this state has ended.
func (s JobState) Final() bool {
	return s == JobSucceeded || s == JobFailed || s == JobCancelled
}

// Values returns what a Mode can be.
func (Mode) Values() []string { return []string{"full", "incremental"} }

// Values returns what a Compression can be.
func (Compression) Values() []string { return []string{"none", "zlib", "zstd"} }

// Values returns what a ValidationResult can be.
func (ValidationResult) Values() []string { return []string{"valid", "not-valid", "unable"} }

// Values returns what a ValidationVerdict can be.
func (ValidationVerdict) Values() []string {
	return []string{"valid", "not-valid", "unable", "skipped"}
}

// Values returns what a CompressionTime can be.
func (CompressionTime) Values() []string { return []string{"inline", "deferred"} }

// Values returns what a Quiesce can be.
func (Quiesce) Values() []string { return []string{"none", "agent", "suspend"} }

// Values returns what a QuiescePolicy can be.
func (QuiescePolicy) Values() []string { return []string{"require", "prefer"} }

// Values returns what a Tracking can be that is asked for; that of a disk can
// also be none.
func (Tracking) Values() []string { return []string{"cbt", "digest", "snapshot"} }

// Values returns what a Fallback can be.
func (Fallback) Values() []string { return []string{"digest", "full"} }

// Values returns what a BackupKind can be.
func (BackupKind) Values() []string { return []string{"full", "incremental"} }

// Values returns what a BackupState can be.
func (BackupState) Values() []string { return []string{"complete", "damaged", "missing", "deleting"} }

// Values returns what a Protection can be, the worst first.
func (Protection) Values() []string { return []string{"failing", "pending", "unassigned", "protected"} }

// Values returns what a ChainState can be.
func (ChainState) Values() []string { return []string{"open", "finished", "broken"} }

// Values returns what a UsageBy can be.
func (UsageBy) Values() []string { return []string{"domain", "offering", "user", "repository"} }

// Values returns what a QuotaKind can be.
func (QuotaKind) Values() []string { return []string{"domain", "offering", "user"} }

// Values returns what a JobState can be.
func (JobState) Values() []string {
	return []string{"queued", "running", "cancelling", "succeeded", "failed", "cancelled"}
}

// Values returns what a ScheduleQuiesce can be.
func (ScheduleQuiesce) Values() []string { return []string{"offering", "none", "agent", "suspend"} }

// Values returns what an Overlap can be.
func (Overlap) Values() []string { return []string{"skip", "queue"} }

// Values returns what an Operation can be.
func (Operation) Values() []string {
	return []string{"backup", "restore", "restore-in-place", "verify", "delete", "prune", "check", "scan", "inspect", "group", "compress", "validate", "repair"}
}
