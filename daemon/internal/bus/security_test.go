package bus

import (
	"context"
	"errors"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	godbus "github.com/godbus/dbus/v5"
	"github.com/virtbackup/virtbackup/dbus"
	"github.com/virtbackup/virtbackup/dbus/bustest"
	"github.com/virtbackup/virtbackup/policy"
)

func denied(err error) bool {
	var remote godbus.Error
	return errors.Is(err, dbus.ErrNotAuthorized) || errors.As(err, &remote) && remote.Name == string(dbus.ErrNotAuthorized)
}

// TestEveryIntrospectedMethodIsRefusedToNobody is T3 of THREATS.md.
func TestEveryIntrospectedMethodIsRefusedToNobody(t *testing.T) {
	address, m := bustest.Start(t), newMemory()
	serve(t, address, m, polkit(t, address))
	other := bustest.DialAs(t, address, nobody)
	paths := []godbus.ObjectPath{dbus.Root, dbus.LogControlPath}
	for ref := range m.objects {
		paths = append(paths, ref.Path())
	}
	var asked int
	for _, path := range paths {
		for _, c := range bustest.Calls(t, other, path) {
			asked++
			if err := c.Do(other); !denied(err) {
				t.Errorf("%s at %s: %v", c.Method, c.Path, err)
			}
		}
	}
	if got := m.requests(); asked < len(policy.Methods()) || len(got) > 0 {
		t.Errorf("%d methods were called, and the backend saw %v", asked, got)
	}
}

// TestWhatDoesNotExistIsRefusedAlike is T8: nobody learns what there is.
func TestWhatDoesNotExistIsRefusedAlike(t *testing.T) {
	address, m := bustest.Start(t), newMemory()
	serve(t, address, m, polkit(t, address))
	other := dbus.NewClient(bustest.DialAs(t, address, nobody))
	ctx := t.Context()
	find := func(name string) error {
		_, err := other.FindDomain(ctx, name)
		return err
	}
	remove := func(id string) error {
		_, _, err := other.DeleteBackup(ctx, id, dbus.DeleteBackupOptions{})
		return err
	}
	for there, missing := range map[error]error{
		find("web"):      find("nothing"),
		remove(backupID): remove("01JD8Q4M6Z3V5W7X9YZZZZZZZZ"),
		other.AssignDomain(ctx, webUUID, "daily"):                         other.AssignDomain(ctx, webUUID, "hourly"),
		other.AssignDomain(ctx, webUUID, "daily"):                         other.AssignDomain(ctx, "6a1f4d5e", "daily"),
		other.RemoveRepository(ctx, "R1", dbus.RemoveRepositoryOptions{}): other.RemoveRepository(ctx, "R7", dbus.RemoveRepositoryOptions{}),
	} {
		if !denied(there) || !denied(missing) || there.Error() != missing.Error() {
			t.Errorf("%v, but %v", there, missing)
		}
	}
}

// TestDetailsAreOfWhatIsUsed is T5: what a rule sees is what the call is about.
func TestDetailsAreOfWhatIsUsed(t *testing.T) {
	address, m := bustest.Start(t), newMemory()
	var mu sync.Mutex
	var last policy.Request
	serve(t, address, m, authorize(func(_ context.Context, r policy.Request) error {
		mu.Lock()
		defer mu.Unlock()
		last = r
		return nil
	}))
	c, ctx := client(t, address), t.Context()
	c.Interactive = true
	for _, step := range []struct {
		do   func() error
		want string
	}{
		{func() error { _, err := c.BackupDomain(ctx, webUUID, dbus.BackupOptions{}); return err }, "web/" + webUUID + "/nas/daily/"},
		{func() error {
			_, err := c.BackupDomain(ctx, webUUID, dbus.BackupOptions{Offering: "O2"})
			return err
		}, "web/" + webUUID + "/tape/weekly/"},
		{func() error {
			_, err := c.BackupDomain(ctx, webUUID, dbus.BackupOptions{Repository: "tape"})
			return err
		}, "web/" + webUUID + "/tape//"},
		{func() error { return c.AssignDomain(ctx, mailUUID, "weekly") }, "mail/" + mailUUID + "/tape/weekly/"},
		{func() error { _, err := c.VerifyBackup(ctx, backupID); return err }, "web/" + webUUID + "/nas/daily/" + backupID},
		{func() error { _, err := c.FindBackup(ctx, "01JD8Q4M6Z3V5W7X9YA"); return err }, "web/" + webUUID + "/nas/daily/" + backupID},
		{func() error { _, err := c.FindDomain(ctx, mailUUID); return err }, "mail/" + mailUUID + "///"},
		{func() error { return c.CancelJob(ctx, jobID) }, "web/" + webUUID + "///"},
		{func() error { _, err := c.CreateOffering(ctx, "hourly", "R2", dbus.OfferingOptions{}); return err }, "//tape/hourly/"},
		{func() error {
			_, _, err := c.CreateRepository(ctx, "new", "dir", "/x", dbus.CreateRepositoryOptions{})
			return err
		}, "//new//"},
		{func() error { _, err := dbus.Get[dbus.DomainProperties](ctx, c, webUUID); return err }, "web/" + webUUID + "/nas/daily/"},
		{func() error { _, err := c.Objects(ctx); return err }, "////"},
	} {
		if err := step.do(); err != nil {
			t.Error(err)
		}
		mu.Lock()
		d := last.Details
		got := strings.Join([]string{d[dbus.DetailDomainName], d[dbus.DetailDomainUUID], d[dbus.DetailRepository], d[dbus.DetailOffering], d[dbus.DetailBackup]}, "/")
		if got != step.want || last.UID != 0 || !last.Interactive || !strings.HasPrefix(last.Sender, ":1.") {
			t.Errorf("%s: details %s, want %s (%+v)", last.Method, got, step.want, last)
		}
		mu.Unlock()
	}
}

// TestEachOfManyIsAuthorized has the bus ask about each backup of a group: who
// may back one domain up gets no other by naming it beside that.
func TestEachOfManyIsAuthorized(t *testing.T) {
	address, m := bustest.Start(t), newMemory()
	var mu sync.Mutex
	var seen []string
	serve(t, address, m, authorize(func(_ context.Context, r policy.Request) error {
		mu.Lock()
		defer mu.Unlock()
		seen = append(seen, r.Details[dbus.DetailDomainName]+"/"+r.Details[dbus.DetailRepository])
		if r.Details[dbus.DetailDomainName] == "web" {
			return nil
		}
		return dbus.Errorf(dbus.ErrNotAuthorized, "no")
	}))
	c, ctx := client(t, address), t.Context()
	group := func(repository string, names ...string) error {
		_, err := c.BackupGroup(ctx, names, dbus.GroupOptions{BackupOptions: dbus.BackupOptions{Repository: repository, Priority: new(uint32(1))}})
		return err
	}
	_, retry := c.RetryJob(ctx, jobID)
	_, missing := c.RetryJob(ctx, "01JD8Q4M6Z3V5W7X9YZZZZZZZZ")
	for i, err := range []error{group("", "web", "mail"), group("", "mail", "web"), group("tape", "web", "nothing"), group(""), retry, missing} {
		if !errors.Is(err, dbus.ErrNotAuthorized) {
			t.Errorf("%d: %v", i, err)
		}
	}
	if err := group("tape", "web"); err != nil {
		t.Error(err)
	}
	mu.Lock()
	defer mu.Unlock()
	if last := seen[len(seen)-1]; last != "web/tape" || len(m.requests()) != 1 {
		t.Errorf("asked about %v, done: %v", seen, m.requests())
	}
}

// TestInhibitorsGoWithTheirCallers has jobs held back until the connection is closed.
func TestInhibitorsGoWithTheirCallers(t *testing.T) {
	address, m := bustest.Start(t), newMemory()
	serve(t, address, m, authorize(func(context.Context, policy.Request) error { return nil }))
	c := client(t, address)
	if err := c.Inhibit(t.Context(), nil, "apt", "an upgrade", func(err error) { t.Error(err) }); err != nil {
		t.Fatal(err)
	}
	if all, err := c.Inhibitors(t.Context()); err != nil || len(all) != 1 || all[0].Who != "apt" || all[0].UID != 7 {
		t.Errorf("got %+v, %v", all, err)
	}
	if len(m.requests()) != 1 {
		t.Errorf("got %v", m.requests())
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); len(m.requests()) < 2; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("got %v", m.requests())
		}
	}
}

// TestCallersThatGoAreNotServed is T2: a client that drops its connection while
// polkit thinks about its call.
func TestCallersThatGoAreNotServed(t *testing.T) {
	address, m := bustest.Start(t), newMemory()
	asked, refused := make(chan struct{}), make(chan struct{})
	serve(t, address, m, authorize(func(ctx context.Context, _ policy.Request) error {
		asked <- struct{}{}
		<-ctx.Done()
		refused <- struct{}{}
		return dbus.Errorf(dbus.ErrNotAuthorized, "gone")
	}))
	for range 1000 {
		conn := rawClient(t, address)
		call := conn.Object(dbus.BusName, dbus.Root).Go("org.virtbackup1.Manager.Reload", 0, nil, map[string]godbus.Variant{})
		<-asked
		if err := conn.Close(); err != nil {
			t.Fatal(err)
		}
		<-refused
		if (<-call.Done).Err == nil {
			t.Fatal("a call of a closed connection succeeded")
		}
	}
	if got := m.requests(); len(got) > 0 {
		t.Errorf("the backend saw %v", got)
	}
}

// TestArgumentsAreThoseThatWereAuthorized is T4: while polkit stalls, another
// call goes out; each is judged, and done, by its own arguments.
func TestArgumentsAreThoseThatWereAuthorized(t *testing.T) {
	address, m := bustest.Start(t), newMemory()
	rule, err := os.ReadFile("../../../policy/examples/50-one-user-one-domain.rules")
	if err != nil {
		t.Fatal(err)
	}
	bustestPolkit := bustest.StartPolkit(t, address, "../../../policy/org.virtbackup1.policy",
		strings.ReplaceAll(string(rule), `"alice"`, `"nobody"`))
	p := policy.NewPolkit(rawClient(t, address), testLog(t))
	waiting := make(chan struct{}, 2)
	serve(t, address, m, authorize(func(ctx context.Context, r policy.Request) error {
		waiting <- struct{}{}
		return p.Authorize(ctx, r)
	}))
	alice := bustest.DialAs(t, address, nobody)
	if err := bustestPolkit.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	options := map[string]godbus.Variant{}
	backup := func(uuid string) *godbus.Call {
		path := dbus.Ref{Kind: dbus.KindDomain, ID: uuid}.Path()
		return alice.Object(dbus.BusName, path).Go("org.virtbackup1.Domain.Backup", 0, nil, options)
	}
	hers := backup(webUUID)
	<-waiting
	options["full"] = godbus.MakeVariant(true)
	others := backup(mailUUID)
	<-waiting
	if err := bustestPolkit.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if err := (<-hers.Done).Err; err != nil {
		t.Errorf("her own domain: %v", err)
	}
	if err := (<-others.Done).Err; !denied(err) {
		t.Errorf("another's domain: %v", err)
	}
	want := []string{"65534 back up " + webUUID + ` offering="" repository="" full=false`}
	if got := m.requests(); !slices.Equal(got, want) {
		t.Errorf("the backend saw %v", got)
	}
}

// TestFloodsAreCutOff is T20: one user's calls that hang leave room for others.
func TestFloodsAreCutOff(t *testing.T) {
	address, m := bustest.Start(t), newMemory()
	release := make(chan struct{})
	arrived := make(chan struct{}, 10_000)
	serve(t, address, m, authorize(func(_ context.Context, r policy.Request) error {
		if r.UID != 0 {
			arrived <- struct{}{}
			select {
			case <-release:
			case <-t.Context().Done():
			}
		}
		return nil
	}))
	const flood = 100 // dbus-daemon itself stops a connection at 128
	for range callsPerUser / callsPerSender {
		conn := bustest.DialAs(t, address, nobody)
		done := make(chan *godbus.Call, flood)
		for range flood {
			conn.Object(dbus.BusName, dbus.Root).Go("org.virtbackup1.Manager.Reload", 0, done, map[string]godbus.Variant{})
		}
		for range flood - callsPerSender {
			var remote godbus.Error
			if err := (<-done).Err; !errors.As(err, &remote) || remote.Name != string(dbus.ErrLimitsExceeded) {
				t.Fatalf("a call too many: %v", err)
			}
		}
	}
	for range callsPerUser {
		<-arrived
	}
	third := dbus.NewClient(bustest.DialAs(t, address, nobody))
	if err := third.Reload(t.Context()); !errors.Is(err, dbus.ErrLimitsExceeded) {
		t.Errorf("a third connection of the user: %v", err)
	}
	if _, err := dbus.Get[dbus.ManagerProperties](t.Context(), client(t, address), ""); err != nil {
		t.Errorf("root is locked out: %v", err)
	}
	close(release)
	if len(arrived) > 0 {
		t.Errorf("%d calls of one user more than %d were let in", len(arrived), callsPerUser)
	}
}
