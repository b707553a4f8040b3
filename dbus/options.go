package dbus

import "time"

// NoOptions is what a call takes that has no options yet.
type NoOptions struct{}

// Settings are the settings of an offering, or what overrides them for one
// backup. What is nil is left as it was, or at its default.
type Settings struct {
	Mode             *Mode          `dbus:"mode"`
	Compression      *Compression   `dbus:"compression"`
	CompressionLevel *uint32        `dbus:"compression_level"`
	Threads          *uint32        `dbus:"threads"`
	ChainSize        *uint32        `dbus:"chain_size"`
	Quiesce          *Quiesce       `dbus:"quiesce"`
	QuiescePolicy    *QuiescePolicy `dbus:"quiesce_policy"`
	Tracking         *Tracking      `dbus:"tracking"`
	Fallback         *Fallback      `dbus:"fallback"`
	// CompressionTime is when data is compressed.
	CompressionTime *CompressionTime `dbus:"compression_time"`
	// IncludeDisks and ExcludeDisks are targets, as vda; all disks are included when none is named.
	IncludeDisks  *[]string `dbus:"include_disks"`
	ExcludeDisks  *[]string `dbus:"exclude_disks"`
	VolatileDisks *bool     `dbus:"volatile_disks"`
}

// Retention says which backups stay; what is nil is left as it was.
type Retention struct {
	KeepLast    *uint32 `dbus:"keep_last"`
	KeepHourly  *uint32 `dbus:"keep_hourly"`
	KeepDaily   *uint32 `dbus:"keep_daily"`
	KeepWeekly  *uint32 `dbus:"keep_weekly"`
	KeepMonthly *uint32 `dbus:"keep_monthly"`
	KeepYearly  *uint32 `dbus:"keep_yearly"`
}

// Validation says whether and how backups are tried; what is nil is left as it was.
type Validation struct {
	Validate        *bool     `dbus:"validate"`
	ValidationSteps *[]string `dbus:"validation_steps"`
	// Times are in seconds; 0 for the daemon's configuration.
	ValidationBootTimeout    *uint32   `dbus:"validation_boot_timeout"`
	ValidationCommand        *string   `dbus:"validation_command"`
	ValidationArguments      *[]string `dbus:"validation_arguments"`
	ValidationExpected       *string   `dbus:"validation_expected"` // in base64; empty for an exit code of 0
	ValidationCommandTimeout *uint32   `dbus:"validation_command_timeout"`
	ValidationScreenshotWait *uint32   `dbus:"validation_screenshot_wait"`
	ValidationPorts          *[]string `dbus:"validation_ports"`
}

// Rights are what those who are not root may do; what is nil is left as it was.
type Rights struct {
	AllowUserBackups    *bool `dbus:"allow_user_backups"`
	AllowUserSchedules  *bool `dbus:"allow_user_schedules"`
	AllowQuickRestore   *bool `dbus:"allow_quick_restore"`
	AllowFileExtraction *bool `dbus:"allow_file_extraction"`
}

// Overrides are what a domain has in place of its offering's settings.
type Overrides struct {
	Settings
	Retention
	Rights
	Validation
}

// OfferingOptions are those of Manager.CreateOffering.
type OfferingOptions struct {
	Description *string `dbus:"description"`
	Disabled    *bool   `dbus:"disabled"`
	// Users may use it: names of users, and of groups with an @ before; all when none is named.
	Users *[]string `dbus:"users"`
	Overrides
}

// CreateRepositoryOptions are those of Manager.CreateRepository.
type CreateRepositoryOptions struct {
	// Existing refuses a directory that is no repository yet.
	Existing bool `dbus:"existing"`
	// MinimumFree is in bytes; nil for the daemon's default.
	MinimumFree *uint64 `dbus:"minimum_free"`
	// MountOptions, each as name or name=value, FileSystem and Credentials are for storage that is mounted.
	MountOptions []string `dbus:"mount_options"`
	FileSystem   string   `dbus:"file_system"`
	Credentials  string   `dbus:"credentials"`
}

// UpdateRepositoryOptions are those of Repository.Update; what is nil is left as it was.
type UpdateRepositoryOptions struct {
	Address      *string   `dbus:"address"`
	MountOptions *[]string `dbus:"mount_options"`
	// Credentials are removed by an empty text.
	Credentials *string `dbus:"credentials"`
	MinimumFree *uint64 `dbus:"minimum_free"`
}

// RemoveRepositoryOptions are those of Repository.Remove.
type RemoveRepositoryOptions struct {
	// ForgetBackups forgets those in it too; a scan finds them again.
	ForgetBackups bool `dbus:"forget_backups"`
}

// UpdateOfferingOptions are those of Offering.Update.
type UpdateOfferingOptions struct {
	Repository *string `dbus:"repository"`
	OfferingOptions
}

// CreateScheduleOptions are those of Manager.CreateSchedule.
type CreateScheduleOptions struct {
	// Domain and Offering are names or ids; exactly one is given.
	Domain   string `dbus:"domain"`
	Offering string `dbus:"offering"`
	// Repository is a name or id; empty for the offering's.
	Repository string `dbus:"repository"`
	// RandomizedDelay is in microseconds.
	RandomizedDelay uint64 `dbus:"randomized_delay"`
	// Persistent is true when it is nil.
	Persistent *bool            `dbus:"persistent"`
	Isolated   bool             `dbus:"isolated"`
	Quiesce    *ScheduleQuiesce `dbus:"quiesce"`
	Overlap    *Overlap         `dbus:"overlap"`
	Disabled   bool             `dbus:"disabled"`
}

// UpdateScheduleOptions are those of Schedule.Update; what is nil stays as it is.
type UpdateScheduleOptions struct {
	Calendars       *[]string        `dbus:"calendars"`
	Repository      *string          `dbus:"repository"`
	RandomizedDelay *uint64          `dbus:"randomized_delay"`
	Persistent      *bool            `dbus:"persistent"`
	Isolated        *bool            `dbus:"isolated"`
	Quiesce         *ScheduleQuiesce `dbus:"quiesce"`
	Overlap         *Overlap         `dbus:"overlap"`
}

// TriggerOptions are those of Schedule.Trigger.
type TriggerOptions struct {
	// Timer says that the schedule's timer is due.
	Timer bool `dbus:"timer"`
}

// RemoveOfferingOptions are those of Offering.Remove.
type RemoveOfferingOptions struct {
	// Forced takes it from the domains that have it.
	Forced bool `dbus:"forced"`
	DryRun bool `dbus:"dry_run"`
}

// DeleteDomainBackupsOptions are those of Domain.DeleteBackups.
type DeleteDomainBackupsOptions struct {
	DryRun bool `dbus:"dry_run"`
}

// BackupOptions are those of Domain.Backup.
type BackupOptions struct {
	// Offering and Repository are names or ids; at most one is given. With
	// neither, the domain's own offering is meant.
	Offering   string `dbus:"offering"`
	Repository string `dbus:"repository"`
	Isolated   bool   `dbus:"isolated"`
	Full       bool   `dbus:"full"`
	// Priority is from 0 to 99; nil for 50, which is normal.
	Priority *uint32 `dbus:"priority"`
	// Attempts is how often it may be tried when what it fails of may pass; nil for once.
	Attempts *uint32 `dbus:"attempts"`
	Settings
}

// GroupOptions are those of Manager.BackupGroup.
type GroupOptions struct {
	// Sequential begins each backup once the one before has ended.
	Sequential bool `dbus:"sequential"`
	BackupOptions
}

// QuotaOptions are those of Manager.SetQuota. What is nil stays; 0 is no bound.
type QuotaOptions struct {
	Bytes   *uint64 `dbus:"bytes"`
	Backups *uint32 `dbus:"backups"`
	Chains  *uint32 `dbus:"chains"`
}

// CheckRepositoryOptions are those of Repository.Check.
type CheckRepositoryOptions struct {
	// Depth is DepthProbe when it is nil.
	Depth *Depth `dbus:"depth"`
}

// ScanRepositoryOptions are those of Repository.Scan.
type ScanRepositoryOptions struct {
	ImportForeign bool `dbus:"import_foreign"`
	DryRun        bool `dbus:"dry_run"`
}

// PruneOptions are those of Domain.Prune.
type PruneOptions struct {
	// Repository is a name or id; empty for all.
	Repository string `dbus:"repository"`
	DryRun     bool   `dbus:"dry_run"`
}

// DeleteBackupOptions are those of Backup.Delete.
type DeleteBackupOptions struct {
	WithChildren bool `dbus:"with_children"`
	DryRun       bool `dbus:"dry_run"`
}

// DeleteChainOptions are those of Chain.Delete.
type DeleteChainOptions struct {
	DryRun bool `dbus:"dry_run"`
}

// ValidateOptions are those of Backup.Validate.
type ValidateOptions struct {
	// Steps are tried in place of those that are set.
	Steps []string `dbus:"steps"`
}

// RepairOptions are those of Backup.Repair.
type RepairOptions struct {
	// DryRun only tells what could be repaired.
	DryRun bool `dbus:"dry_run"`
}

// CompressOptions are those of Backup.Compress.
type CompressOptions struct {
	// Compression is zlib or zstd; nil for what its offering said, or zstd.
	Compression *Compression `dbus:"compression"`
	Level       *uint32      `dbus:"level"`
}

// RestoreOptions are those of Backup.Restore.
type RestoreOptions struct {
	// Destination is a directory; empty for the daemon's default.
	Destination string `dbus:"destination"`
	// Disks are targets, as vda; empty for all.
	Disks          []string `dbus:"disks"`
	KeepMACs       bool     `dbus:"keep_macs"`
	DropInterfaces bool     `dbus:"drop_interfaces"`
	Start          bool     `dbus:"start"`
}

// RestoreInPlaceOptions are those of Backup.RestoreInPlace.
type RestoreInPlaceOptions struct {
	Disks []string `dbus:"disks"`
	Start bool     `dbus:"start"`
}

// PlanRestoreOptions are those of Backup.PlanRestore.
type PlanRestoreOptions struct {
	InPlace bool   `dbus:"in_place"`
	Name    string `dbus:"name"`
	RestoreOptions
}

// BackupFilter is what Manager.ListBackups filters by; what is empty does not.
type BackupFilter struct {
	Domain     string       `dbus:"domain"`
	Repository string       `dbus:"repository"`
	Offering   string       `dbus:"offering"`
	Chain      string       `dbus:"chain"`
	State      *BackupState `dbus:"state"`
	Kind       *BackupKind  `dbus:"kind"`
	Since      *time.Time   `dbus:"since"`
	Until      *time.Time   `dbus:"until"`
}

// DomainFilter is what Manager.ListDomains filters by; what is empty does not.
type DomainFilter struct {
	Offering   string      `dbus:"offering"`
	Protection *Protection `dbus:"protection"`
}

// ChainFilter is what Manager.ListChains filters by; what is empty does not.
type ChainFilter struct {
	Domain     string      `dbus:"domain"`
	Repository string      `dbus:"repository"`
	State      *ChainState `dbus:"state"`
}

// JobFilter is what Manager.ListJobs filters by; what is empty does not.
type JobFilter struct {
	Domain    string     `dbus:"domain"`
	Operation *Operation `dbus:"operation"`
	State     *JobState  `dbus:"state"`
	// Unfinished leaves out those that have ended.
	Unfinished bool `dbus:"unfinished"`
	// Parent is the id of a group.
	Parent string     `dbus:"parent"`
	Since  *time.Time `dbus:"since"`
	Until  *time.Time `dbus:"until"`
}
