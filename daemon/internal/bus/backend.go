package bus

import (
	"context"
	"time"

	"github.com/virtbackup/virtbackup/dbus"
)

// Caller is who made a call. Its uid is the real one of the connection, as the
// bus knows it.
type Caller struct {
	UID uint32
	// Sender is the unique bus name.
	Sender string
}

// Backend does what the API promises (dbus/interfaces). Calls come from many
// goroutines at once, and only after they were authorized; the exceptions are
// Find and Object, with which the Server learns beforehand what polkit is to
// be told. Arguments are the caller's as they were when it was authorized;
// options are decoded and their enumerations checked, the rest is not.
//
// Errors carry a name of dbus/errors.go where a program may ask for it. IDs
// that are returned are those of dbus.Ref.
type Backend interface {
	Reader
	Repositories
	Offerings
	Schedules
	Domains
	Backups
	Jobs
	Accounts
	// EffectiveConfiguration returns every setting that is in force.
	EffectiveConfiguration(ctx context.Context) ([]dbus.Setting, error)
	// Reload reads the configuration again.
	Reload(ctx context.Context, caller Caller) error
	// NotifyHook takes over what the libvirt hook has recorded.
	NotifyHook(ctx context.Context) error
}

// Reader is what the Server reads properties with.
type Reader interface {
	// Manager returns the state of the daemon.
	Manager(ctx context.Context) (dbus.ManagerProperties, error)
	// Objects returns all managed objects: repositories, offerings, schedules, domains,
	// and the jobs that are live or ended lately.
	Objects(ctx context.Context) ([]dbus.Record, error)
	// Object returns one object of any kind, also chains, backups and old jobs;
	// dbus.ErrNotFound when there is none. It must not wait for libvirt.
	Object(ctx context.Context, ref dbus.Ref) (dbus.Record, error)
	// Find resolves the name or id of a repository, offering or schedule, the name or
	// UUID of a domain, or the (beginning of the) id of a backup;
	// dbus.ErrNotFound when there is none.
	Find(ctx context.Context, kind dbus.Kind, name string) (dbus.Ref, error)
	// ListRepositories, ListOfferings and ListSchedules return all, by name.
	ListRepositories(ctx context.Context) ([]dbus.RepositoryProperties, error)
	ListOfferings(ctx context.Context) ([]dbus.OfferingProperties, error)
	ListSchedules(ctx context.Context) ([]dbus.ScheduleProperties, error)
	// ListDomains returns one page, as the API has it. The limit is from 1 to 1000.
	ListDomains(ctx context.Context, f dbus.DomainFilter, cursor string, limit int) (dbus.DomainPage, error)
	// ListChains, ListBackups and ListJobs return one page, newest first, and
	// the cursor of the next, which is empty at the end. The limit is from 1 to 1000.
	ListChains(ctx context.Context, f dbus.ChainFilter, cursor string, limit int) ([]dbus.ChainProperties, string, error)
	ListBackups(ctx context.Context, f dbus.BackupFilter, cursor string, limit int) ([]dbus.BackupProperties, string, error)
	ListJobs(ctx context.Context, f dbus.JobFilter, cursor string, limit int) ([]dbus.JobProperties, string, error)
}

// Repositories is what is done with repositories.
type Repositories interface {
	CreateRepository(ctx context.Context, caller Caller, name, typ, path string, o dbus.CreateRepositoryOptions) (repository, job string, err error)
	CheckRepository(ctx context.Context, caller Caller, id string, o dbus.CheckRepositoryOptions) (job string, err error)
	ScanRepository(ctx context.Context, caller Caller, id string, o dbus.ScanRepositoryOptions) (job string, err error)
	UpdateRepository(ctx context.Context, caller Caller, id string, o dbus.UpdateRepositoryOptions) (job string, err error)
	RemoveRepository(ctx context.Context, caller Caller, id string, o dbus.RemoveRepositoryOptions) error
}

// Offerings is what is done with offerings.
type Offerings interface {
	CreateOffering(ctx context.Context, caller Caller, name, repository string, o dbus.OfferingOptions) (offering string, err error)
	UpdateOffering(ctx context.Context, caller Caller, id string, o dbus.UpdateOfferingOptions) error
	// RemoveOffering returns the UUIDs of the domains that have, or had, it.
	RemoveOffering(ctx context.Context, caller Caller, id string, o dbus.RemoveOfferingOptions) (domains []string, err error)
}

// Schedules is what is done with schedules. Counts and limits are from 1 to 1000.
type Schedules interface {
	CreateSchedule(ctx context.Context, caller Caller, name string, calendars []string, o dbus.CreateScheduleOptions) (schedule string, err error)
	UpdateSchedule(ctx context.Context, caller Caller, id string, o dbus.UpdateScheduleOptions) error
	EnableSchedule(ctx context.Context, caller Caller, id string) error
	DisableSchedule(ctx context.Context, caller Caller, id string) error
	RemoveSchedule(ctx context.Context, caller Caller, id string) error
	// TriggerSchedule returns the run that it became.
	TriggerSchedule(ctx context.Context, caller Caller, id string, o dbus.TriggerOptions) (dbus.ScheduleRun, error)
	// PreviewCalendars returns when one of the calendars is due next.
	PreviewCalendars(ctx context.Context, calendars []string, count int) ([]time.Time, error)
	PreviewSchedule(ctx context.Context, id string, count int) ([]time.Time, error)
	// ScheduleRuns returns the newest first.
	ScheduleRuns(ctx context.Context, id string, limit int) ([]dbus.ScheduleRun, error)
}

// Domains is what is done with domains and their chains.
type Domains interface {
	AssignDomain(ctx context.Context, caller Caller, uuid, offering string) error
	UnassignDomain(ctx context.Context, caller Caller, uuid string) error
	BackupDomain(ctx context.Context, caller Caller, uuid string, o dbus.BackupOptions) (job string, err error)
	FinishChain(ctx context.Context, caller Caller, uuid string) error
	// SetOverrides sets and unsets what a domain has in place of its offering's
	// settings; DomainSettings returns what is in force, and from where.
	SetOverrides(ctx context.Context, caller Caller, uuid string, o dbus.Overrides, unset []string) error
	DomainSettings(ctx context.Context, uuid string) ([]dbus.EffectiveSetting, error)
	// PruneDomain returns what becomes of each backup, newest first, and the jobs,
	// none for a dry run.
	PruneDomain(ctx context.Context, caller Caller, uuid string, o dbus.PruneOptions) (plan []dbus.PruneEntry, jobs []string, err error)
	DomainTracking(ctx context.Context, uuid string) ([]dbus.DomainTracking, error)
	// DomainMarks returns the newest first. The limit is from 1 to 1000.
	DomainMarks(ctx context.Context, uuid string, limit int) ([]dbus.Mark, error)
	// DeleteDomainBackups returns the backups that go, newest first, and their
	// bytes; there are no jobs for a dry run.
	DeleteDomainBackups(ctx context.Context, caller Caller, uuid string, o dbus.DeleteDomainBackupsOptions) (backups []string, bytes uint64, jobs []string, err error)
	VerifyChain(ctx context.Context, caller Caller, id string) (job string, err error)
	// DeleteChain and DeleteBackup return the backups that go, newest first;
	// the job is empty for a dry run.
	DeleteChain(ctx context.Context, caller Caller, id string, o dbus.DeleteChainOptions) (backups []string, job string, err error)
}

// Backups is what is done with backups.
type Backups interface {
	DeleteBackup(ctx context.Context, caller Caller, id string, o dbus.DeleteBackupOptions) (backups []string, job string, err error)
	// HoldBackup has a backup stay for a reason, ReleaseBackup lets it go again.
	HoldBackup(ctx context.Context, caller Caller, id, reason string) error
	ReleaseBackup(ctx context.Context, caller Caller, id string) error
	VerifyBackup(ctx context.Context, caller Caller, id string) (job string, err error)
	ValidateBackup(ctx context.Context, caller Caller, id string, o dbus.ValidateOptions) (job string, err error)
	RepairBackup(ctx context.Context, caller Caller, id string, o dbus.RepairOptions) (job string, err error)
	CompressBackup(ctx context.Context, caller Caller, id string, o dbus.CompressOptions) (job string, err error)
	// BackupValidations returns the newest first. The limit is from 1 to 1000.
	BackupValidations(ctx context.Context, id string, limit int) ([]dbus.ValidationRecord, error)
	// BackupScreenshot returns a PNG; dbus.ErrNotFound when there is none.
	BackupScreenshot(ctx context.Context, id string) ([]byte, error)
	RestoreBackup(ctx context.Context, caller Caller, id, name string, o dbus.RestoreOptions) (job string, err error)
	RestoreInPlace(ctx context.Context, caller Caller, id string, o dbus.RestoreInPlaceOptions) (job string, err error)
	PlanRestore(ctx context.Context, id string, o dbus.PlanRestoreOptions) (dbus.RestorePlan, error)
}

// Accounts is what backups take, and how much they may.
type Accounts interface {
	// Metrics returns all of it, and more, in Prometheus' text format.
	Metrics(ctx context.Context) (string, error)
	ListUsage(ctx context.Context, by dbus.UsageBy) ([]dbus.Usage, error)
	ListQuotas(ctx context.Context) ([]dbus.Quota, error)
	SetQuota(ctx context.Context, caller Caller, kind dbus.QuotaKind, name string, o dbus.QuotaOptions) error
	RemoveQuota(ctx context.Context, caller Caller, kind dbus.QuotaKind, name string) error
}

// Jobs is what is done with jobs.
type Jobs interface {
	// BackupGroup backs up the domains with these UUIDs.
	BackupGroup(ctx context.Context, caller Caller, uuids []string, o dbus.GroupOptions) (job string, err error)
	RetryJob(ctx context.Context, caller Caller, id string) (job string, err error)
	// RetryDetails returns the details of all that RetryJob would do.
	RetryDetails(ctx context.Context, id string) ([]map[string]string, error)
	// Inhibit holds jobs back until ctx ends, which it does when the caller goes.
	Inhibit(ctx context.Context, caller Caller, what []string, who, why string) error
	ListInhibitors(ctx context.Context) ([]dbus.Inhibitor, error)
	CancelJob(ctx context.Context, caller Caller, id string) error
	// JobLog returns the newest messages, oldest first; all for a limit of 0.
	JobLog(ctx context.Context, id string, limit int) ([]dbus.LogMessage, error)
}
