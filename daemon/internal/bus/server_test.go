package bus

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"testing"
	"time"

	godbus "github.com/godbus/dbus/v5"
	"github.com/google/go-cmp/cmp"
	"github.com/virtbackup/virtbackup/dbus"
	"github.com/virtbackup/virtbackup/dbus/bustest"
	"github.com/virtbackup/virtbackup/policy"
)

const nobody = 65534

// authorize is an Authorizer of a test.
type authorize func(ctx context.Context, r policy.Request) error

func (a authorize) Authorize(ctx context.Context, r policy.Request) error { return a(ctx, r) }

func everybody(context.Context, policy.Request) error { return nil }

func testLog(t *testing.T) *slog.Logger { return slog.New(slog.NewTextHandler(t.Output(), nil)) }

// serve puts a Server on the bus at address, for as long as the test runs.
func serve(t *testing.T, address string, b Backend, a Authorizer) *Server {
	t.Helper()
	s, err := New(Config{Address: address, Authorizer: a, Log: testLog(t), Level: new(slog.LevelVar)})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Start(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if s.conn.Connected() {
			stop(t, s)
		}
	})
	return s
}

func stop(t *testing.T, s *Server) {
	t.Helper()
	if err := s.Stop(context.Background()); err != nil {
		t.Error(err)
	}
}

// polkit starts the real polkitd on the bus at address.
func polkit(t *testing.T, address string, rules ...string) *policy.Polkit {
	t.Helper()
	bustest.StartPolkit(t, address, "../../../policy/org.virtbackup1.policy", rules...)
	return policy.NewPolkit(rawClient(t, address), testLog(t))
}

func rawClient(t *testing.T, address string) *godbus.Conn {
	t.Helper()
	conn, err := godbus.Connect(address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func client(t *testing.T, address string) *dbus.Client {
	t.Helper()
	c, err := dbus.Connect(t.Context(), address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func TestClientReachesEveryCallOfTheBackend(t *testing.T) {
	address, m := bustest.Start(t), newMemory()
	serve(t, address, m, authorize(everybody))
	c, ctx := client(t, address), t.Context()
	mode, tape := dbus.ModeFull, "tape"
	job := func(id string, err error) {
		t.Helper()
		if id != jobID || err != nil {
			t.Errorf("job %q, %v", id, err)
		}
	}
	ok := func(err error) {
		t.Helper()
		if err != nil {
			t.Error(err)
		}
	}
	repository, probe, err := c.CreateRepository(ctx, "new", "dir", "/srv/new", dbus.CreateRepositoryOptions{Existing: true})
	if repository != "R9" || probe != jobID || err != nil {
		t.Error(repository, probe, err)
	}
	if id, err := c.CreateOffering(ctx, "monthly", "nas", dbus.OfferingOptions{Overrides: dbus.Overrides{Settings: dbus.Settings{Mode: &mode}}}); id != "O9" || err != nil {
		t.Error(id, err)
	}
	ok(c.Reload(ctx))
	ok(c.NotifyHook(ctx))
	job(c.CheckRepository(ctx, "R1", dbus.CheckRepositoryOptions{}))
	ok(c.RemoveRepository(ctx, "R1", dbus.RemoveRepositoryOptions{}))
	ok(c.UpdateOffering(ctx, "O1", dbus.UpdateOfferingOptions{Repository: &tape}))
	if domains, err := c.RemoveOffering(ctx, "O1", dbus.RemoveOfferingOptions{Forced: true}); !slices.Equal(domains, []string{webUUID}) || err != nil {
		t.Error(domains, err)
	}
	if id, err := c.CreateSchedule(ctx, "gold", []string{"daily", "Mon"}, dbus.CreateScheduleOptions{Offering: "weekly"}); id != "S9" || err != nil {
		t.Error(id, err)
	}
	ok(c.UpdateSchedule(ctx, "S1", dbus.UpdateScheduleOptions{Calendars: &[]string{"weekly"}, Repository: &tape}))
	ok(c.EnableSchedule(ctx, "S1"))
	ok(c.DisableSchedule(ctx, "S1"))
	if state, reason, ids, err := c.TriggerSchedule(ctx, "S1", dbus.TriggerOptions{Timer: true}); state != dbus.RunRunning || reason != "but" ||
		!slices.Equal(ids, []string{jobID}) || err != nil {
		t.Error(state, reason, ids, err)
	}
	ok(c.RemoveSchedule(ctx, "S1"))
	ok(c.AssignDomain(ctx, webUUID, "daily"))
	ok(c.UnassignDomain(ctx, webUUID))
	job(c.BackupDomain(ctx, webUUID, dbus.BackupOptions{Repository: "tape", Full: true}))
	ok(c.FinishChain(ctx, webUUID))
	ok(c.SetOverrides(ctx, webUUID, dbus.Overrides{Settings: dbus.Settings{Mode: &mode}, Retention: dbus.Retention{KeepLast: new(uint32(4))}}, []string{"threads"}))
	if ids, bytes, jobs, err := c.DeleteDomainBackups(ctx, webUUID, dbus.DeleteDomainBackupsOptions{DryRun: true}); !slices.Equal(ids, []string{backupID}) || bytes != 3 || !slices.Equal(jobs, []string{jobID}) || err != nil {
		t.Error(ids, bytes, jobs, err)
	}
	job(c.VerifyChain(ctx, "C1"))
	if ids, id, err := c.DeleteChain(ctx, "C1", dbus.DeleteChainOptions{DryRun: true}); !slices.Equal(ids, []string{backupID}) || id != "" || err != nil {
		t.Error(ids, id, err)
	}
	if ids, id, err := c.DeleteBackup(ctx, backupID, dbus.DeleteBackupOptions{WithChildren: true}); !slices.Equal(ids, []string{backupID}) || id != jobID || err != nil {
		t.Error(ids, id, err)
	}
	job(c.VerifyBackup(ctx, backupID))
	job(c.ValidateBackup(ctx, backupID, dbus.ValidateOptions{Steps: []string{"screenshot"}}))
	job(c.RepairBackup(ctx, backupID, dbus.RepairOptions{DryRun: true}))
	job(c.CompressBackup(ctx, backupID, dbus.CompressOptions{Compression: new(dbus.CompressionZstd)}))
	job(c.RestoreBackup(ctx, backupID, "copy", dbus.RestoreOptions{Disks: []string{"vda"}}))
	job(c.RestoreInPlace(ctx, backupID, dbus.RestoreInPlaceOptions{Start: true}))
	ok(c.CancelJob(ctx, jobID))
	job(c.BackupGroup(ctx, []string{"mail", webUUID}, dbus.GroupOptions{Sequential: true, BackupOptions: dbus.BackupOptions{Priority: new(uint32(99))}}))
	job(c.RetryJob(ctx, jobID))
	ok(c.Inhibit(ctx, []string{"backup"}, "apt", "an upgrade", func(err error) { t.Error(err) }))
	want := []string{
		"create repository new dir /srv/new true", "create offering monthly nas true", "reload", "notify hook", "check R1",
		"remove repository R1", "update O1 to tape", "remove offering O1 true", "create schedule gold [daily Mon] for weekly",
		"update S1 to [weekly]", "enable S1", "disable S1", "trigger S1 true", "remove schedule S1", "assign " + webUUID + " daily", "unassign " + webUUID,
		"back up " + webUUID + ` offering="" repository="tape" full=true`, "finish " + webUUID, "override " + webUUID + " 4 of full, unset [threads]", "delete backups of " + webUUID + " true", "verify chain C1", "delete chain C1 true",
		"delete " + backupID + " true", "verify " + backupID, "validate " + backupID + " by [screenshot]", "repair " + backupID + " by true", "compress " + backupID + " by zstd", "restore " + backupID + " as copy [vda]",
		"restore " + backupID + " in place true", "cancel " + jobID,
		"back up [" + mailUUID + " " + webUUID + "] sequential=true priority=99", "retry " + jobID, "inhibit [backup]: apt: an upgrade",
	}
	for i := range want {
		want[i] = "0 " + want[i]
	}
	if diff := cmp.Diff(want, m.requests()); diff != "" {
		t.Error(diff)
	}
}

func TestClientReadsWhatTheBackendSays(t *testing.T) {
	address, m := bustest.Start(t), newMemory()
	serve(t, address, m, authorize(everybody))
	c, ctx := client(t, address), t.Context()
	manager, err := dbus.Get[dbus.ManagerProperties](ctx, c, "")
	if err != nil || manager != m.manager {
		t.Error(manager, err)
	}
	objects, err := c.Objects(ctx)
	if err != nil || len(objects.Repositories) != 2 || len(objects.Offerings) != 2 || len(objects.Schedules) != 1 || len(objects.Domains) != 2 || len(objects.Jobs) != 1 {
		t.Errorf("%+v, %v", objects, err)
	}
	for _, f := range []struct {
		find       func(context.Context, string) (string, error)
		name, want string
	}{
		{c.FindRepository, "nas", "R1"}, {c.FindOffering, "daily", "O1"}, {c.FindSchedule, "nightly", "S1"},
		{c.FindDomain, "web", webUUID}, {c.FindBackup, "01JD8Q4M6Z3V5W7X9YA", backupID},
	} {
		if id, err := f.find(ctx, f.name); id != f.want || err != nil {
			t.Errorf("%s: %q, %v", f.name, id, err)
		}
	}
	for _, preview := range []func() ([]time.Time, error){
		func() ([]time.Time, error) { return c.PreviewSchedule(ctx, slices.Repeat([]string{"daily"}, 7), 0) },
		func() ([]time.Time, error) { return c.PreviewOf(ctx, "S1", 10) },
	} {
		if times, err := preview(); len(times) != 10 || !times[9].Equal(time.UnixMicro(7)) || err != nil {
			t.Error(times, err)
		}
	}
	if schedules, err := c.Schedules(ctx); len(schedules) != 1 || schedules[0].Name != "nightly" || err != nil {
		t.Errorf("%+v, %v", schedules, err)
	}
	runs, err := c.ScheduleRuns(ctx, "S1", 5)
	if len(runs) != 1 || runs[0].ID != "S1" || runs[0].State != dbus.RunSkipped || runs[0].Reason != "limit 5" || !runs[0].Created.Equal(time.UnixMicro(8)) || err != nil {
		t.Errorf("%+v, %v", runs, err)
	}
	backup, err := dbus.Get[dbus.BackupProperties](ctx, c, backupID)
	want := m.objects[dbus.Ref{Kind: dbus.KindBackup, ID: backupID}].(dbus.BackupProperties)
	want.Causes, want.Children, want.Damage = []string{}, []string{}, []dbus.BackupDamage{}
	if diff := cmp.Diff(want, backup); diff != "" || err != nil {
		t.Error(diff, err)
	}
	failing, broken := dbus.ProtectionFailing, dbus.ChainBroken
	domains := dbus.DomainFilter{Offering: "daily", Protection: &failing}
	page, err := c.DomainPage(ctx, domains, "", 7)
	if err != nil || len(page.Domains) != 1 || page.Domains[0].UUID != webUUID || page.Domains[0].Offering != "daily" || page.Counts[failing] != 2 || page.Next != "after 7" {
		t.Errorf("%+v, %v", page, err)
	}
	all := 0
	for d, err := range c.Domains(ctx, domains) {
		if err != nil || d.UUID != webUUID {
			t.Error(d, err)
		}
		all++
	}
	for chain, err := range c.Chains(ctx, dbus.ChainFilter{Domain: "web", Repository: "nas", State: &broken}) {
		if err != nil || chain.ID != "C1" || chain.State != broken {
			t.Error(chain, err)
		}
		all++
	}
	if all != 3 {
		t.Errorf("%d domains and chains were listed", all)
	}
	if got, err := c.Repositories(ctx); err != nil || len(got) != 1 || got[0].ID != "R1" {
		t.Error(got, err)
	}
	if got, err := c.Offerings(ctx); err != nil || len(got) != 1 || got[0].ID != "O1" {
		t.Error(got, err)
	}
	var listed int
	for b, err := range c.Backups(ctx, dbus.BackupFilter{Domain: "web"}) {
		if err != nil || b.ID != backupID {
			t.Error(b, err)
		}
		listed++
	}
	if listed != 6 {
		t.Errorf("%d backups came in 3 pages of 2", listed)
	}
	for j, err := range c.Jobs(ctx, dbus.JobFilter{}) {
		if err != nil || j.ID != jobID {
			t.Error(j, err)
		}
	}
	if s, err := c.EffectiveConfiguration(ctx); err != nil || len(s) != 1 || s[0].Key != "jobs.max" {
		t.Error(s, err)
	}
	if l, err := c.JobLog(ctx, jobID, 7); err != nil || len(l) != 1 || l[0].Message != "limit 7" {
		t.Error(l, err)
	}
	if got, err := c.DomainTracking(ctx, webUUID); err != nil || len(got) != 1 || got[0].Target != webUUID || got[0].Tracking != dbus.TrackingDigest ||
		got[0].Cause != "unseen" || got[0].Since.UnixMicro() != 1_700_000_000_000_000 {
		t.Error(got, err)
	}
	for limit, want := range map[uint32]string{0: "limit 100", 7: "limit 7"} {
		if got, err := c.DomainMarks(ctx, webUUID, limit); err != nil || len(got) != 1 || got[0].Target != webUUID || got[0].Detail != want {
			t.Error(got, err)
		}
	}
	if got, err := c.Validations(ctx, backupID, 7); err != nil || len(got) != 1 || got[0].Result != dbus.ValidationNotValid || got[0].Cause != "limit 7" ||
		len(got[0].Findings) != 1 || got[0].Findings[0] != (dbus.ValidationFinding{Step: "judge_screen", Verdict: dbus.VerdictNotValid, Output: "kernel panic", TookUsec: 7}) {
		t.Error(got, err)
	}
	if got, err := c.Screenshot(ctx, backupID); err != nil || string(got) != "PNG of "+backupID {
		t.Errorf("%q, %v", got, err)
	}
	if p, err := c.PlanRestore(ctx, backupID, dbus.PlanRestoreOptions{Name: "copy"}); err != nil || p.DomainName != "copy" || len(p.Disks) != 1 {
		t.Error(p, err)
	}
}

// A client that follows a job must not take a restart for a refusal.
func TestCallThatIsBeingAuthorizedWhenTheDaemonStopsIsNotRefused(t *testing.T) {
	address := bustest.Start(t)
	asked := make(chan struct{})
	s := serve(t, address, newMemory(), authorize(func(ctx context.Context, _ policy.Request) error {
		close(asked)
		<-ctx.Done()
		return dbus.Errorf(dbus.ErrNotAuthorized, "polkit could not be asked")
	}))
	c := client(t, address)
	failed := make(chan error)
	go func() { failed <- c.Reload(t.Context()) }()
	<-asked
	stop(t, s)
	if err := <-failed; !errors.Is(err, dbus.ErrNoDaemon) {
		t.Errorf("%v", err)
	}
}

func TestErrorsKeepTheirNames(t *testing.T) {
	address, m := bustest.Start(t), newMemory()
	serve(t, address, m, authorize(everybody))
	c, ctx := client(t, address), t.Context()
	for _, name := range dbus.ErrorNames() {
		want := dbus.Errorf(name, "because of %s", name)
		m.failing(want)
		err := c.Reload(ctx)
		if !errors.Is(err, name) || err.Error() != want.Error() {
			t.Errorf("%s became %v", name, err)
		}
	}
	m.failing(errors.New("something else"))
	if err := c.Reload(ctx); !errors.Is(err, dbus.ErrFailed) || err.Error() != "something else" {
		t.Error(err)
	}
	m.failing(nil)
	for what, err := range map[string]error{
		"a repository that is not there": c.RemoveRepository(ctx, "R7", dbus.RemoveRepositoryOptions{}),
		"an offering that is not there":  c.AssignDomain(ctx, webUUID, "hourly"),
		"an id that is none":             c.CancelJob(ctx, "../x"),
	} {
		if !errors.Is(err, dbus.ErrNotFound) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if got := m.requests(); len(got) != len(dbus.ErrorNames())+1 {
		t.Errorf("the backend was asked about what is not there: %v", got)
	}
}

func TestMalformedCallsAreRefused(t *testing.T) {
	address, m := bustest.Start(t), newMemory()
	serve(t, address, m, authorize(everybody))
	conn := rawClient(t, address)
	domain := dbus.Ref{Kind: dbus.KindDomain, ID: webUUID}.Path()
	type options = map[string]godbus.Variant
	for _, c := range []struct {
		path   godbus.ObjectPath
		method string
		args   []any
		want   dbus.ErrorName
	}{
		{"/org/virtbackup1/nothing", "org.virtbackup1.Domain.Backup", []any{options{}}, unknownObject},
		{"/", "org.virtbackup1.Manager.Reload", []any{options{}}, unknownObject},
		{dbus.Root, "org.virtbackup1.Domain.Backup", []any{options{}}, unknownInterface},
		{domain, "Backup", []any{options{}}, unknownInterface},
		{domain, "org.virtbackup1.Domain.Explode", []any{options{}}, unknownMethod},
		{domain, "org.virtbackup1.Domain.Backup", nil, invalidArgs},
		{domain, "org.virtbackup1.Domain.Backup", []any{map[string]string{}}, invalidArgs},
		{domain, "org.virtbackup1.Domain.Backup", []any{options{}, "more"}, invalidArgs},
		{domain, "org.virtbackup1.Domain.Backup", []any{options{"fulll": godbus.MakeVariant(true)}}, dbus.ErrInvalidArgument},
		{domain, "org.virtbackup1.Domain.Backup", []any{options{"offering": godbus.MakeVariant("daily"), "repository": godbus.MakeVariant("nas")}}, dbus.ErrInvalidArgument},
		{dbus.Root, "org.virtbackup1.Manager.ListBackups", []any{options{}, "", uint32(1001)}, dbus.ErrInvalidArgument},
		{domain, "org.virtbackup1.Domain.ListMarks", []any{uint32(1001)}, dbus.ErrInvalidArgument},
		{domain, dbus.InterfaceProperties + ".Get", []any{"org.virtbackup1.Domain", "Colour"}, unknownProperty},
		{domain, dbus.InterfaceProperties + ".GetAll", []any{"org.virtbackup1.Job"}, unknownInterface},
		{domain, dbus.InterfaceProperties + ".Set", []any{"org.virtbackup1.Domain", "Name", godbus.MakeVariant("x")}, propertyReadOnly},
		{domain, getManagedObjects, nil, unknownInterface},
	} {
		err := conn.Object(dbus.BusName, c.path).Call(c.method, 0, c.args...).Err
		var remote godbus.Error
		if !errors.As(err, &remote) || remote.Name != string(c.want) {
			t.Errorf("%s %s%v: %v", c.path, c.method, c.args, err)
		}
	}
	if got := m.requests(); len(got) > 0 {
		t.Errorf("the backend was asked: %v", got)
	}
}
