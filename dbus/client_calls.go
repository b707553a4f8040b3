package dbus

import (
	"context"
	"time"

	godbus "github.com/godbus/dbus/v5"
)

// The calls of the API, in the order of interfaces/, which says what each
// does. Those that start a job return its id.

// CreateRepository makes a directory a repository.
func (c *Client) CreateRepository(ctx context.Context, name, typ, path string, o CreateRepositoryOptions) (repository, job string, err error) {
	var paths [2]godbus.ObjectPath
	if err := c.manager(ctx, "CreateRepository", []any{name, typ, path, EncodeOptions(o)}, &paths[0], &paths[1]); err != nil {
		return "", "", err
	}
	if repository, err = idOf(paths[0], KindRepository); err != nil {
		return "", "", err
	}
	job, err = idOf(paths[1], KindJob)
	return repository, job, err
}

// CreateOffering makes a named set of backup options.
func (c *Client) CreateOffering(ctx context.Context, name, repository string, o OfferingOptions) (string, error) {
	return c.find(ctx, KindOffering, "CreateOffering", name, repository, EncodeOptions(o))
}

// CreateSchedule has a domain, or the domains of an offering, backed up by itself.
func (c *Client) CreateSchedule(ctx context.Context, name string, calendars []string, o CreateScheduleOptions) (string, error) {
	return c.find(ctx, KindSchedule, "CreateSchedule", name, calendars, EncodeOptions(o))
}

// PreviewSchedule returns when calendars are due next.
func (c *Client) PreviewSchedule(ctx context.Context, calendars []string, count uint32) ([]time.Time, error) {
	var times []uint64
	err := c.manager(ctx, "PreviewSchedule", []any{calendars, count}, &times)
	return fromMicros(times), err
}

func fromMicros(all []uint64) []time.Time {
	times := make([]time.Time, len(all))
	for i, t := range all {
		times[i] = Time(t)
	}
	return times
}

// FindSchedule returns the id of the schedule with that name or id.
func (c *Client) FindSchedule(ctx context.Context, name string) (string, error) {
	return c.find(ctx, KindSchedule, "GetSchedule", name)
}

// FindRepository returns the id of the repository with that name or id.
func (c *Client) FindRepository(ctx context.Context, name string) (string, error) {
	return c.find(ctx, KindRepository, "GetRepository", name)
}

// FindOffering returns the id of the offering with that name or id.
func (c *Client) FindOffering(ctx context.Context, name string) (string, error) {
	return c.find(ctx, KindOffering, "GetOffering", name)
}

// FindDomain returns the UUID of the domain with that name or UUID.
func (c *Client) FindDomain(ctx context.Context, name string) (string, error) {
	return c.find(ctx, KindDomain, "GetDomain", name)
}

// FindBackup returns the id of the backup whose id begins so.
func (c *Client) FindBackup(ctx context.Context, id string) (string, error) {
	return c.find(ctx, KindBackup, "GetBackup", id)
}

// EffectiveConfiguration returns every setting that is in force.
func (c *Client) EffectiveConfiguration(ctx context.Context) ([]Setting, error) {
	return list[Setting](ctx, c, Ref{Kind: KindManager}, "EffectiveConfiguration")
}

// Metrics returns what is known of backups in Prometheus' text format.
func (c *Client) Metrics(ctx context.Context) (text string, err error) {
	return text, c.manager(ctx, "Metrics", nil, &text)
}

// Usage returns what backups take, by one thing.
func (c *Client) Usage(ctx context.Context, by UsageBy) ([]Usage, error) {
	return list[Usage](ctx, c, Ref{Kind: KindManager}, "ListUsage", string(by))
}

// Quotas returns all quotas, and what is used of each.
func (c *Client) Quotas(ctx context.Context) ([]Quota, error) {
	return list[Quota](ctx, c, Ref{Kind: KindManager}, "ListQuotas")
}

// SetQuota bounds what there may be of a domain, an offering or a user, each by
// name or id.
func (c *Client) SetQuota(ctx context.Context, kind QuotaKind, name string, o QuotaOptions) error {
	return c.manager(ctx, "SetQuota", []any{string(kind), name, EncodeOptions(o)})
}

// RemoveQuota takes such a bound away.
func (c *Client) RemoveQuota(ctx context.Context, kind QuotaKind, name string) error {
	return c.manager(ctx, "RemoveQuota", []any{string(kind), name, EncodeOptions(NoOptions{})})
}

// Reload makes the daemon read its configuration again.
func (c *Client) Reload(ctx context.Context) error {
	return c.manager(ctx, "Reload", []any{EncodeOptions(NoOptions{})})
}

// NotifyHook makes a daemon that runs take over what the libvirt hook has
// recorded. One that does not run is not started: it fails with ErrNoDaemon.
func (c *Client) NotifyHook(ctx context.Context) error {
	manager := Ref{Kind: KindManager}
	return c.call(ctx, manager.Path(), manager.Kind.Interface()+".NotifyHook", godbus.FlagNoAutoStart, []any{EncodeOptions(NoOptions{})})
}

// CheckRepository looks at a repository again.
func (c *Client) CheckRepository(ctx context.Context, id string, o CheckRepositoryOptions) (job string, err error) {
	return c.job(ctx, Ref{KindRepository, id}, "Check", EncodeOptions(o))
}

// ScanRepository has the catalog know all backups that are in a repository.
func (c *Client) ScanRepository(ctx context.Context, id string, o ScanRepositoryOptions) (job string, err error) {
	return c.job(ctx, Ref{KindRepository, id}, "Scan", EncodeOptions(o))
}

// UpdateRepository changes a repository.
func (c *Client) UpdateRepository(ctx context.Context, id string, o UpdateRepositoryOptions) (job string, err error) {
	return c.job(ctx, Ref{KindRepository, id}, "Update", EncodeOptions(o))
}

// RemoveRepository forgets a repository, and leaves its files.
func (c *Client) RemoveRepository(ctx context.Context, id string, o RemoveRepositoryOptions) error {
	return c.object(ctx, Ref{KindRepository, id}, "Remove", []any{EncodeOptions(o)})
}

// UpdateOffering changes what is given.
func (c *Client) UpdateOffering(ctx context.Context, id string, o UpdateOfferingOptions) error {
	return c.object(ctx, Ref{KindOffering, id}, "Update", []any{EncodeOptions(o)})
}

// RemoveOffering removes an offering, and returns the UUIDs of the domains that
// had it, or for a dry run have it.
func (c *Client) RemoveOffering(ctx context.Context, id string, o RemoveOfferingOptions) (domains []string, err error) {
	err = c.object(ctx, Ref{KindOffering, id}, "Remove", []any{EncodeOptions(o)}, &domains)
	return domains, err
}

// UpdateSchedule changes what is given.
func (c *Client) UpdateSchedule(ctx context.Context, id string, o UpdateScheduleOptions) error {
	return c.object(ctx, Ref{KindSchedule, id}, "Update", []any{EncodeOptions(o)})
}

// EnableSchedule starts a schedule's timer.
func (c *Client) EnableSchedule(ctx context.Context, id string) error {
	return c.object(ctx, Ref{KindSchedule, id}, "Enable", []any{EncodeOptions(NoOptions{})})
}

// DisableSchedule stops a schedule's timer.
func (c *Client) DisableSchedule(ctx context.Context, id string) error {
	return c.object(ctx, Ref{KindSchedule, id}, "Disable", []any{EncodeOptions(NoOptions{})})
}

// TriggerSchedule runs a schedule now. It returns the state of the run, why it
// does not run or what it leaves out, and the jobs that were started.
func (c *Client) TriggerSchedule(ctx context.Context, id string, o TriggerOptions) (state RunState, reason string, jobs []string, err error) {
	var paths []godbus.ObjectPath
	if err := c.object(ctx, Ref{KindSchedule, id}, "Trigger", []any{EncodeOptions(o)}, (*string)(&state), &reason, &paths); err != nil {
		return "", "", nil, err
	}
	for _, path := range paths {
		job, err := idOf(path, KindJob)
		if err != nil {
			return "", "", nil, err
		}
		jobs = append(jobs, job)
	}
	return state, reason, jobs, nil
}

// PreviewOf returns when a schedule is due next; limit as of the API.
func (c *Client) PreviewOf(ctx context.Context, id string, count uint32) ([]time.Time, error) {
	var times []uint64
	err := c.object(ctx, Ref{KindSchedule, id}, "Preview", []any{count}, &times)
	return fromMicros(times), err
}

// ScheduleRuns returns what became of a schedule's runs, newest first; limit as of the API.
func (c *Client) ScheduleRuns(ctx context.Context, id string, limit uint32) ([]ScheduleRun, error) {
	return list[ScheduleRun](ctx, c, Ref{KindSchedule, id}, "ListRuns", limit)
}

// RemoveSchedule removes a schedule and its timer.
func (c *Client) RemoveSchedule(ctx context.Context, id string) error {
	return c.object(ctx, Ref{KindSchedule, id}, "Remove", []any{EncodeOptions(NoOptions{})})
}

// AssignDomain assigns an offering, by name or id, to a domain.
func (c *Client) AssignDomain(ctx context.Context, uuid, offering string) error {
	return c.object(ctx, Ref{KindDomain, uuid}, "Assign", []any{offering, EncodeOptions(NoOptions{})})
}

// UnassignDomain takes a domain's offering away.
func (c *Client) UnassignDomain(ctx context.Context, uuid string) error {
	return c.object(ctx, Ref{KindDomain, uuid}, "Unassign", []any{EncodeOptions(NoOptions{})})
}

// BackupDomain backs a domain up.
func (c *Client) BackupDomain(ctx context.Context, uuid string, o BackupOptions) (job string, err error) {
	return c.job(ctx, Ref{KindDomain, uuid}, "Backup", EncodeOptions(o))
}

// FinishChain ends a domain's open chain.
func (c *Client) FinishChain(ctx context.Context, uuid string) error {
	return c.object(ctx, Ref{KindDomain, uuid}, "FinishChain", []any{EncodeOptions(NoOptions{})})
}

// DeleteDomainBackups deletes all backups of a domain, and returns them and
// their bytes; there are no jobs for a dry run.
func (c *Client) DeleteDomainBackups(ctx context.Context, uuid string, o DeleteDomainBackupsOptions) (backups []string, bytes uint64, jobs []string, err error) {
	var paths []godbus.ObjectPath
	if err := c.object(ctx, Ref{KindDomain, uuid}, "DeleteBackups", []any{EncodeOptions(o)}, &backups, &bytes, &paths); err != nil {
		return nil, 0, nil, err
	}
	for _, p := range paths {
		job, err := idOf(p, KindJob)
		if err != nil {
			return nil, 0, nil, err
		}
		jobs = append(jobs, job)
	}
	return backups, bytes, jobs, nil
}

// SetOverrides sets and unsets what a domain has in place of its offering's settings.
func (c *Client) SetOverrides(ctx context.Context, uuid string, o Overrides, unset []string) error {
	return c.object(ctx, Ref{KindDomain, uuid}, "SetOverrides", []any{EncodeOptions(o), append([]string{}, unset...), EncodeOptions(NoOptions{})})
}

// DomainSettings returns the settings that are in force for a domain.
func (c *Client) DomainSettings(ctx context.Context, uuid string) ([]EffectiveSetting, error) {
	return list[EffectiveSetting](ctx, c, Ref{KindDomain, uuid}, "ListSettings")
}

// PruneDomain removes those of a domain's backups that need not stay, and
// returns what becomes of each.
func (c *Client) PruneDomain(ctx context.Context, uuid string, o PruneOptions) (plan []PruneEntry, jobs []string, err error) {
	var entries []map[string]godbus.Variant
	var paths []godbus.ObjectPath
	if err := c.object(ctx, Ref{KindDomain, uuid}, "Prune", []any{EncodeOptions(o)}, &entries, &paths); err != nil {
		return nil, nil, err
	}
	plan = make([]PruneEntry, len(entries))
	for i, e := range entries {
		if err := DecodeRecord(e, &plan[i]); err != nil {
			return nil, nil, err
		}
	}
	for _, p := range paths {
		id, err := idOf(p, KindJob)
		if err != nil {
			return nil, nil, err
		}
		jobs = append(jobs, id)
	}
	return plan, jobs, nil
}

// HoldBackup has a backup stay, and ReleaseBackup lets it go again.
func (c *Client) HoldBackup(ctx context.Context, id, reason string) error {
	return c.object(ctx, Ref{KindBackup, id}, "Hold", []any{reason, EncodeOptions(NoOptions{})})
}

// ReleaseBackup takes the hold of a backup away.
func (c *Client) ReleaseBackup(ctx context.Context, id string) error {
	return c.object(ctx, Ref{KindBackup, id}, "Release", []any{EncodeOptions(NoOptions{})})
}

// DomainTracking returns how a domain's next backups would find what changed.
func (c *Client) DomainTracking(ctx context.Context, uuid string) ([]DomainTracking, error) {
	return list[DomainTracking](ctx, c, Ref{KindDomain, uuid}, "ListTracking")
}

// DomainMarks returns what was seen of a domain's disks, newest first; limit
// as of the API.
func (c *Client) DomainMarks(ctx context.Context, uuid string, limit uint32) ([]Mark, error) {
	return list[Mark](ctx, c, Ref{KindDomain, uuid}, "ListMarks", limit)
}

// VerifyChain checks every backup of a chain.
func (c *Client) VerifyChain(ctx context.Context, id string) (job string, err error) {
	return c.job(ctx, Ref{KindChain, id}, "Verify", EncodeOptions(NoOptions{}))
}

// DeleteChain deletes a chain. It returns the backups that go; the job is
// empty for a dry run.
func (c *Client) DeleteChain(ctx context.Context, id string, o DeleteChainOptions) (backups []string, job string, err error) {
	return c.remove(ctx, Ref{KindChain, id}, EncodeOptions(o))
}

// DeleteBackup deletes a backup, and returns as DeleteChain does.
func (c *Client) DeleteBackup(ctx context.Context, id string, o DeleteBackupOptions) (backups []string, job string, err error) {
	return c.remove(ctx, Ref{KindBackup, id}, EncodeOptions(o))
}

func (c *Client) remove(ctx context.Context, ref Ref, options map[string]godbus.Variant) ([]string, string, error) {
	var backups []string
	var path godbus.ObjectPath
	if err := c.object(ctx, ref, "Delete", []any{options}, &backups, &path); err != nil {
		return nil, "", err
	}
	job, err := idOf(path, KindJob)
	return backups, job, err
}

// VerifyBackup checks a backup and all it builds on.
func (c *Client) VerifyBackup(ctx context.Context, id string) (job string, err error) {
	return c.job(ctx, Ref{KindBackup, id}, "Verify", EncodeOptions(NoOptions{}))
}

// ValidateBackup tries a backup by starting it.
func (c *Client) ValidateBackup(ctx context.Context, id string, o ValidateOptions) (job string, err error) {
	return c.job(ctx, Ref{KindBackup, id}, "Validate", EncodeOptions(o))
}

// RepairBackup repairs a damaged backup with what others hold of the same.
func (c *Client) RepairBackup(ctx context.Context, id string, o RepairOptions) (job string, err error) {
	return c.job(ctx, Ref{KindBackup, id}, "Repair", EncodeOptions(o))
}

// CompressBackup compresses a backup.
func (c *Client) CompressBackup(ctx context.Context, id string, o CompressOptions) (job string, err error) {
	return c.job(ctx, Ref{KindBackup, id}, "Compress", EncodeOptions(o))
}

// Validations returns what came of trying a backup, newest first; limit as of the API.
func (c *Client) Validations(ctx context.Context, id string, limit uint32) ([]ValidationRecord, error) {
	return list[ValidationRecord](ctx, c, Ref{KindBackup, id}, "ListValidations", limit)
}

// Screenshot returns the newest screenshot of a backup's guest, as PNG.
func (c *Client) Screenshot(ctx context.Context, id string) (png []byte, err error) {
	err = c.object(ctx, Ref{KindBackup, id}, "ReadScreenshot", []any{EncodeOptions(NoOptions{})}, &png)
	return png, err
}

// RestoreBackup restores a backup as a new domain.
func (c *Client) RestoreBackup(ctx context.Context, id, name string, o RestoreOptions) (job string, err error) {
	return c.job(ctx, Ref{KindBackup, id}, "Restore", name, EncodeOptions(o))
}

// RestoreInPlace writes a backup over the disks of its own domain.
func (c *Client) RestoreInPlace(ctx context.Context, id string, o RestoreInPlaceOptions) (job string, err error) {
	return c.job(ctx, Ref{KindBackup, id}, "RestoreInPlace", EncodeOptions(o))
}

// PlanRestore tells what a restore would do.
func (c *Client) PlanRestore(ctx context.Context, id string, o PlanRestoreOptions) (RestorePlan, error) {
	var values map[string]godbus.Variant
	var plan RestorePlan
	if err := c.object(ctx, Ref{KindBackup, id}, "PlanRestore", []any{EncodeOptions(o)}, &values); err != nil {
		return plan, err
	}
	return plan, DecodeRecord(values, &plan)
}

// BackupGroup backs domains up, by names or UUIDs, as one job.
func (c *Client) BackupGroup(ctx context.Context, domains []string, o GroupOptions) (job string, err error) {
	return c.job(ctx, Ref{Kind: KindManager}, "BackupGroup", append([]string{}, domains...), EncodeOptions(o))
}

// RetryJob does again what failed, or was cancelled, of a job.
func (c *Client) RetryJob(ctx context.Context, id string) (job string, err error) {
	return c.job(ctx, Ref{KindJob, id}, "Retry", EncodeOptions(NoOptions{}))
}

// Inhibitors returns what holds jobs back, oldest first.
func (c *Client) Inhibitors(ctx context.Context) ([]Inhibitor, error) {
	return list[Inhibitor](ctx, c, Ref{Kind: KindManager}, "ListInhibitors")
}

// CancelJob asks a job to stop.
func (c *Client) CancelJob(ctx context.Context, id string) error {
	return c.object(ctx, Ref{KindJob, id}, "Cancel", []any{EncodeOptions(NoOptions{})})
}

// JobLog returns the newest messages of a job, oldest first; all for 0.
func (c *Client) JobLog(ctx context.Context, id string, limit uint32) ([]LogMessage, error) {
	return list[LogMessage](ctx, c, Ref{KindJob, id}, "Log", limit)
}

// list calls a method that returns aa{sv}.
func list[T any](ctx context.Context, c *Client, ref Ref, member string, args ...any) ([]T, error) {
	var values []map[string]godbus.Variant
	if err := c.object(ctx, ref, member, args, &values); err != nil {
		return nil, err
	}
	out := make([]T, len(values))
	for i, m := range values {
		if err := DecodeRecord(m, &out[i]); err != nil {
			return nil, err
		}
	}
	return out, nil
}
