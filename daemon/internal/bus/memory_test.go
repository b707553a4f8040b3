package bus

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/virtbackup/virtbackup/dbus"
)

const (
	webUUID  = "6a1f4d5e-0c0b-4b6e-9f1e-3a0d2c9b8f77"
	mailUUID = "00000000-0c0b-4b6e-9f1e-3a0d2c9b8f77"
	backupID = "01JD8Q4M6Z3V5W7X9YABCDEFGH"
	jobID    = "01JD8Q4M6Z3V5W7X9YJJJJJJJJ"
)

// memory is a Backend that keeps its objects in memory, and notes what it was
// asked to do, and by whom.
type memory struct {
	mu      sync.Mutex
	manager dbus.ManagerProperties
	objects map[dbus.Ref]dbus.Record
	asked   []string
	fail    error
}

func newMemory() *memory {
	m := &memory{objects: make(map[dbus.Ref]dbus.Record), manager: dbus.ManagerProperties{Version: "1.0", Host: "lab", LibvirtConnected: true, HookState: dbus.HookActive, HookLast: time.UnixMicro(1_700_000_000_000_000)}}
	for _, r := range []dbus.Record{
		dbus.RepositoryProperties{ID: "R1", Name: "nas", Type: "dir", Path: "/srv/nas", State: dbus.RepositoryOnline},
		dbus.RepositoryProperties{ID: "R2", Name: "tape", Type: "dir", Path: "/srv/tape"},
		dbus.OfferingProperties{ID: "O1", Name: "daily", Repository: "nas", Mode: dbus.ModeIncremental, Domains: []string{webUUID}},
		dbus.OfferingProperties{ID: "O2", Name: "weekly", Repository: "tape", Mode: dbus.ModeFull},
		dbus.ScheduleProperties{ID: "S1", Name: "nightly", Offering: "daily", Calendars: []string{"daily"}, Enabled: true},
		dbus.DomainProperties{UUID: webUUID, Name: "web", State: "running", Offering: "daily", Disks: []dbus.DomainDisk{{Target: "vda"}}},
		dbus.DomainProperties{UUID: mailUUID, Name: "mail", State: "shutoff"},
		dbus.ChainProperties{ID: "C1", DomainUUID: webUUID, DomainName: "web", Repository: "nas", Offering: "daily", State: dbus.ChainOpen},
		dbus.JobProperties{ID: jobID, Operation: dbus.OperationBackup, State: dbus.JobRunning, DomainUUID: webUUID, DomainName: "web"},
		dbus.BackupProperties{
			ID: backupID, DomainUUID: webUUID, DomainName: "web", Repository: "nas", Offering: "daily", Chain: "C1", Kind: dbus.KindFull,
			Created: time.UnixMicro(1_700_000_000_000_000), Disks: []dbus.BackupDisk{{Target: "vda", Size: 1 << 30}},
		},
	} {
		m.objects[r.Ref()] = r
	}
	return m
}

// set puts an object in place of what has its Ref.
func (m *memory) set(r dbus.Record) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.objects[r.Ref()] = r
}

// note notes a request, and returns how it goes.
func (m *memory) note(c Caller, format string, args ...any) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.asked = append(m.asked, fmt.Sprintf("%d ", c.UID)+fmt.Sprintf(format, args...))
	return m.fail
}

// failing makes requests fail.
func (m *memory) failing(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.fail = err
}

func (m *memory) requests() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.asked)
}

func (m *memory) Manager(context.Context) (dbus.ManagerProperties, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.manager, nil
}

func (m *memory) Objects(context.Context) ([]dbus.Record, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var all []dbus.Record
	for ref, r := range m.objects {
		if ref.Kind.Managed() {
			all = append(all, r)
		}
	}
	return all, nil
}

func (m *memory) Object(_ context.Context, ref dbus.Ref) (dbus.Record, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if r, ok := m.objects[ref]; ok {
		return r, nil
	}
	return nil, dbus.Errorf(dbus.ErrNotFound, "there is no %s", ref)
}

func (m *memory) Find(_ context.Context, kind dbus.Kind, name string) (dbus.Ref, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for ref, r := range m.objects {
		if ref.Kind == kind && (ref.ID == name || nameOf(r) == name || kind == dbus.KindBackup && strings.HasPrefix(ref.ID, name)) {
			return ref, nil
		}
	}
	return dbus.Ref{}, dbus.Errorf(dbus.ErrNotFound, "there is no %s %q", kind, name)
}

func nameOf(r dbus.Record) string {
	switch r := r.(type) {
	case dbus.RepositoryProperties:
		return r.Name
	case dbus.OfferingProperties:
		return r.Name
	case dbus.ScheduleProperties:
		return r.Name
	case dbus.DomainProperties:
		return r.Name
	}
	return ""
}

func (m *memory) ListBackups(_ context.Context, f dbus.BackupFilter, cursor string, limit int) ([]dbus.BackupProperties, string, error) {
	if f.Domain != "" && f.Domain != "web" {
		return nil, "", nil
	}
	// Three pages of the same backup.
	one := m.objects[dbus.Ref{Kind: dbus.KindBackup, ID: backupID}].(dbus.BackupProperties)
	next := map[string]string{"": "2", "2": "3"}[cursor]
	return slices.Repeat([]dbus.BackupProperties{one}, min(2, limit)), next, nil
}

func (m *memory) ListJobs(context.Context, dbus.JobFilter, string, int) ([]dbus.JobProperties, string, error) {
	r, err := m.Object(context.Background(), dbus.Ref{Kind: dbus.KindJob, ID: jobID})
	return []dbus.JobProperties{r.(dbus.JobProperties)}, "", err
}

func (m *memory) ListRepositories(context.Context) ([]dbus.RepositoryProperties, error) {
	return []dbus.RepositoryProperties{m.objects[dbus.Ref{Kind: dbus.KindRepository, ID: "R1"}].(dbus.RepositoryProperties)}, nil
}

func (m *memory) ListSchedules(context.Context) ([]dbus.ScheduleProperties, error) {
	return []dbus.ScheduleProperties{m.objects[dbus.Ref{Kind: dbus.KindSchedule, ID: "S1"}].(dbus.ScheduleProperties)}, nil
}

func (m *memory) ListOfferings(context.Context) ([]dbus.OfferingProperties, error) {
	return []dbus.OfferingProperties{m.objects[dbus.Ref{Kind: dbus.KindOffering, ID: "O1"}].(dbus.OfferingProperties)}, nil
}

func (m *memory) ListDomains(_ context.Context, f dbus.DomainFilter, cursor string, limit int) (dbus.DomainPage, error) {
	// Two pages of the same domain.
	one := m.objects[dbus.Ref{Kind: dbus.KindDomain, ID: webUUID}].(dbus.DomainProperties)
	one.Offering = f.Offering
	next := map[string]string{"": fmt.Sprint("after ", limit)}[cursor]
	return dbus.DomainPage{Domains: []dbus.DomainProperties{one}, Counts: map[dbus.Protection]uint32{*f.Protection: 2}, Next: next}, nil
}

func (m *memory) ListChains(_ context.Context, f dbus.ChainFilter, _ string, _ int) ([]dbus.ChainProperties, string, error) {
	one := m.objects[dbus.Ref{Kind: dbus.KindChain, ID: "C1"}].(dbus.ChainProperties)
	one.State = *f.State
	return []dbus.ChainProperties{one}, "", nil
}

func (m *memory) EffectiveConfiguration(context.Context) ([]dbus.Setting, error) {
	return []dbus.Setting{{Key: "jobs.max", Value: "2", Source: "default"}}, nil
}

func (m *memory) NotifyHook(context.Context) error { return m.note(Caller{}, "notify hook") }

func (m *memory) Reload(_ context.Context, c Caller) error { return m.note(c, "reload") }

func (m *memory) CreateRepository(_ context.Context, c Caller, name, typ, path string, o dbus.CreateRepositoryOptions) (string, string, error) {
	return "R9", jobID, m.note(c, "create repository %s %s %s %v", name, typ, path, o.Existing)
}

func (m *memory) CheckRepository(_ context.Context, c Caller, id string, _ dbus.CheckRepositoryOptions) (string, error) {
	return jobID, m.note(c, "check %s", id)
}

func (m *memory) ScanRepository(_ context.Context, c Caller, id string, o dbus.ScanRepositoryOptions) (string, error) {
	return jobID, m.note(c, "scan %s foreign %v dry %v", id, o.ImportForeign, o.DryRun)
}

func (m *memory) UpdateRepository(_ context.Context, c Caller, id string, o dbus.UpdateRepositoryOptions) (string, error) {
	return jobID, m.note(c, "update repository %s: %v", id, o.Address != nil)
}

func (m *memory) RemoveRepository(_ context.Context, c Caller, id string, _ dbus.RemoveRepositoryOptions) error {
	return m.note(c, "remove repository %s", id)
}

func (m *memory) CreateOffering(_ context.Context, c Caller, name, repository string, s dbus.OfferingOptions) (string, error) {
	return "O9", m.note(c, "create offering %s %s %v", name, repository, s.Mode != nil)
}

func (m *memory) UpdateOffering(_ context.Context, c Caller, id string, o dbus.UpdateOfferingOptions) error {
	return m.note(c, "update %s to %s", id, *o.Repository)
}

func (m *memory) RemoveOffering(_ context.Context, c Caller, id string, o dbus.RemoveOfferingOptions) ([]string, error) {
	return []string{webUUID}, m.note(c, "remove offering %s %v", id, o.Forced)
}

func (m *memory) CreateSchedule(_ context.Context, c Caller, name string, calendars []string, o dbus.CreateScheduleOptions) (string, error) {
	return "S9", m.note(c, "create schedule %s %v for %s%s", name, calendars, o.Domain, o.Offering)
}

func (m *memory) UpdateSchedule(_ context.Context, c Caller, id string, o dbus.UpdateScheduleOptions) error {
	return m.note(c, "update %s to %v", id, *o.Calendars)
}

func (m *memory) EnableSchedule(_ context.Context, c Caller, id string) error {
	return m.note(c, "enable %s", id)
}

func (m *memory) DisableSchedule(_ context.Context, c Caller, id string) error {
	return m.note(c, "disable %s", id)
}

func (m *memory) RemoveSchedule(_ context.Context, c Caller, id string) error {
	return m.note(c, "remove schedule %s", id)
}

func (m *memory) TriggerSchedule(_ context.Context, c Caller, id string, o dbus.TriggerOptions) (dbus.ScheduleRun, error) {
	return dbus.ScheduleRun{State: dbus.RunRunning, Reason: "but", Jobs: []string{jobID}}, m.note(c, "trigger %s %v", id, o.Timer)
}

func (m *memory) PreviewCalendars(_ context.Context, calendars []string, count int) ([]time.Time, error) {
	return slices.Repeat([]time.Time{time.UnixMicro(int64(len(calendars)))}, count), nil
}

func (m *memory) PreviewSchedule(_ context.Context, _ string, count int) ([]time.Time, error) {
	return slices.Repeat([]time.Time{time.UnixMicro(7)}, count), nil
}

func (m *memory) ScheduleRuns(_ context.Context, id string, limit int) ([]dbus.ScheduleRun, error) {
	return []dbus.ScheduleRun{{ID: id, State: dbus.RunSkipped, Reason: fmt.Sprintf("limit %d", limit), Created: time.UnixMicro(8)}}, nil
}

func (m *memory) AssignDomain(_ context.Context, c Caller, uuid, offering string) error {
	return m.note(c, "assign %s %s", uuid, offering)
}

func (m *memory) UnassignDomain(_ context.Context, c Caller, uuid string) error {
	return m.note(c, "unassign %s", uuid)
}

func (m *memory) BackupDomain(_ context.Context, c Caller, uuid string, o dbus.BackupOptions) (string, error) {
	return jobID, m.note(c, "back up %s offering=%q repository=%q full=%v", uuid, o.Offering, o.Repository, o.Full)
}

func (m *memory) FinishChain(_ context.Context, c Caller, uuid string) error {
	return m.note(c, "finish %s", uuid)
}

func (m *memory) DomainTracking(_ context.Context, uuid string) ([]dbus.DomainTracking, error) {
	return []dbus.DomainTracking{{Target: uuid, Tracking: dbus.TrackingDigest, Cause: "unseen", Since: time.UnixMicro(1_700_000_000_000_000)}}, nil
}

func (m *memory) DomainMarks(_ context.Context, uuid string, limit int) ([]dbus.Mark, error) {
	return []dbus.Mark{{Target: uuid, Detail: fmt.Sprintf("limit %d", limit)}}, nil
}

func (m *memory) VerifyChain(_ context.Context, c Caller, id string) (string, error) {
	return jobID, m.note(c, "verify chain %s", id)
}

func (m *memory) DeleteChain(_ context.Context, c Caller, id string, o dbus.DeleteChainOptions) ([]string, string, error) {
	return []string{backupID}, "", m.note(c, "delete chain %s %v", id, o.DryRun)
}

func (m *memory) DeleteBackup(_ context.Context, c Caller, id string, o dbus.DeleteBackupOptions) ([]string, string, error) {
	return []string{id}, jobID, m.note(c, "delete %s %v", id, o.WithChildren)
}

func (m *memory) VerifyBackup(_ context.Context, c Caller, id string) (string, error) {
	return jobID, m.note(c, "verify %s", id)
}

func (m *memory) ValidateBackup(_ context.Context, c Caller, id string, o dbus.ValidateOptions) (string, error) {
	return jobID, m.note(c, "validate %s by %v", id, o.Steps)
}

func (m *memory) RepairBackup(_ context.Context, c Caller, id string, o dbus.RepairOptions) (string, error) {
	return jobID, m.note(c, "repair %s by %t", id, o.DryRun)
}

func (m *memory) CompressBackup(_ context.Context, c Caller, id string, o dbus.CompressOptions) (string, error) {
	return jobID, m.note(c, "compress %s by %s", id, *o.Compression)
}

func (m *memory) BackupValidations(_ context.Context, id string, limit int) ([]dbus.ValidationRecord, error) {
	return []dbus.ValidationRecord{{ID: id, Result: dbus.ValidationNotValid, Step: "judge_screen", Cause: fmt.Sprintf("limit %d", limit),
		Findings: []dbus.ValidationFinding{{Step: "judge_screen", Verdict: dbus.VerdictNotValid, Output: "kernel panic", TookUsec: 7}}}}, nil
}

func (m *memory) BackupScreenshot(_ context.Context, id string) ([]byte, error) {
	return []byte("PNG of " + id), nil
}

func (m *memory) RestoreBackup(_ context.Context, c Caller, id, name string, o dbus.RestoreOptions) (string, error) {
	return jobID, m.note(c, "restore %s as %s %v", id, name, o.Disks)
}

func (m *memory) RestoreInPlace(_ context.Context, c Caller, id string, o dbus.RestoreInPlaceOptions) (string, error) {
	return jobID, m.note(c, "restore %s in place %v", id, o.Start)
}

func (m *memory) PlanRestore(_ context.Context, _ string, o dbus.PlanRestoreOptions) (dbus.RestorePlan, error) {
	return dbus.RestorePlan{DomainName: o.Name, Disks: []dbus.PlanDisk{{Target: "vda", Images: []string{backupID}}}}, nil
}

func (m *memory) BackupGroup(_ context.Context, c Caller, uuids []string, o dbus.GroupOptions) (string, error) {
	return jobID, m.note(c, "back up %v sequential=%v priority=%d", uuids, o.Sequential, *o.Priority)
}

func (m *memory) RetryJob(_ context.Context, c Caller, id string) (string, error) {
	return jobID, m.note(c, "retry %s", id)
}

func (m *memory) RetryDetails(_ context.Context, id string) ([]map[string]string, error) {
	if id != jobID {
		return nil, dbus.Errorf(dbus.ErrNotFound, "there is no job %s", id)
	}
	return []map[string]string{{dbus.DetailDomainName: "web"}, {dbus.DetailDomainName: "mail"}}, nil
}

func (m *memory) Inhibit(ctx context.Context, c Caller, what []string, who, why string) error {
	context.AfterFunc(ctx, func() { _ = m.note(c, "no longer inhibit %v", what) })
	return m.note(c, "inhibit %v: %s: %s", what, who, why)
}

func (m *memory) ListInhibitors(context.Context) ([]dbus.Inhibitor, error) {
	return []dbus.Inhibitor{{ID: "I1", What: []string{"backup"}, Who: "apt", Why: "an upgrade", UID: 7, Since: time.UnixMicro(1_700_000_000_000_000)}}, nil
}

func (m *memory) CancelJob(_ context.Context, c Caller, id string) error {
	return m.note(c, "cancel %s", id)
}

func (m *memory) JobLog(_ context.Context, _ string, limit int) ([]dbus.LogMessage, error) {
	return []dbus.LogMessage{{Level: "info", Message: fmt.Sprintf("limit %d", limit)}}, nil
}

func (m *memory) DeleteDomainBackups(_ context.Context, c Caller, uuid string, o dbus.DeleteDomainBackupsOptions) ([]string, uint64, []string, error) {
	return []string{backupID}, 3, []string{jobID}, m.note(c, "delete backups of %s %v", uuid, o.DryRun)
}

func (m *memory) SetOverrides(_ context.Context, c Caller, uuid string, o dbus.Overrides, unset []string) error {
	return m.note(c, "override %s %d of %s, unset %v", uuid, *o.KeepLast, *o.Mode, unset)
}

func (m *memory) DomainSettings(context.Context, string) ([]dbus.EffectiveSetting, error) {
	return []dbus.EffectiveSetting{{Key: "keep_last", Value: "4", Source: "domain"}}, nil
}

func (m *memory) Metrics(context.Context) (string, error) {
	return "virtbackup_libvirt_connected 1\n", nil
}

func (m *memory) ListUsage(_ context.Context, by dbus.UsageBy) ([]dbus.Usage, error) {
	return []dbus.Usage{{Of: string(by), Backups: 3, StoredBytes: 1 << 40, Newest: time.UnixMicro(1_700_000_000_000_000)}}, nil
}

func (m *memory) ListQuotas(context.Context) ([]dbus.Quota, error) {
	return []dbus.Quota{{Kind: dbus.QuotaUser, Of: "7", Bytes: 1 << 40, UsedChains: 2}}, nil
}

func (m *memory) SetQuota(_ context.Context, c Caller, kind dbus.QuotaKind, name string, o dbus.QuotaOptions) error {
	return m.note(c, "quota of %s %s bytes=%v backups=%v", kind, name, *o.Bytes, o.Backups == nil)
}

func (m *memory) RemoveQuota(_ context.Context, c Caller, kind dbus.QuotaKind, name string) error {
	return m.note(c, "no quota of %s %s", kind, name)
}

func (m *memory) PruneDomain(_ context.Context, c Caller, uuid string, o dbus.PruneOptions) ([]dbus.PruneEntry, []string, error) {
	return []dbus.PruneEntry{{Repository: "nas", Backup: backupID, Action: dbus.PruneKeep, Reasons: []string{"it is held"}}}, []string{"J1"},
		m.note(c, "prune %s in %q dry %v", uuid, o.Repository, o.DryRun)
}

func (m *memory) HoldBackup(_ context.Context, c Caller, id, reason string) error {
	return m.note(c, "hold %s %s", id, reason)
}

func (m *memory) ReleaseBackup(_ context.Context, c Caller, id string) error {
	return m.note(c, "release %s", id)
}
