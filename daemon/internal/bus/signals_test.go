package bus

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	godbus "github.com/godbus/dbus/v5"
	"github.com/google/go-cmp/cmp"
	"github.com/virtbackup/virtbackup/dbus"
	"github.com/virtbackup/virtbackup/dbus/bustest"
	"github.com/virtbackup/virtbackup/policy"
)

// listen returns what the daemon tells from now on, in order.
func listen(t *testing.T, address string) <-chan *godbus.Signal {
	t.Helper()
	conn, err := godbus.Connect(address, godbus.WithSignalHandler(godbus.NewSequentialSignalHandler()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	signals := make(chan *godbus.Signal, 1000)
	conn.Signal(signals)
	if err := conn.AddMatchSignal(godbus.WithMatchPathNamespace(dbus.Root)); err != nil {
		t.Fatal(err)
	}
	return signals
}

// next returns the next signal of the daemon.
func next(t *testing.T, signals <-chan *godbus.Signal) *godbus.Signal {
	t.Helper()
	for {
		select {
		case s := <-signals:
			if s.Name != "org.freedesktop.DBus.NameAcquired" {
				return s
			}
		case <-time.After(30 * time.Second):
			t.Fatal("no signal came")
		}
	}
}

func TestSignalsNameWhatChangedAndCarryNoValues(t *testing.T) {
	address, m := bustest.Start(t), newMemory()
	s := serve(t, address, m, authorize(everybody))
	signals := listen(t, address)
	job := dbus.JobProperties{ID: "J2", Operation: dbus.OperationBackup, State: dbus.JobQueued, DomainName: "secret"}
	path := job.Ref().Path()
	m.set(job)
	s.JobNew(job.ID)
	s.Added(job.Ref())
	const changed, manager, objects = "org.freedesktop.DBus.Properties.PropertiesChanged", "org.virtbackup1.Manager.", "org.freedesktop.DBus.ObjectManager."
	var told []string
	tell := func() {
		t.Helper()
		signal := next(t, signals)
		told = append(told, signal.Name)
		for _, arg := range signal.Body {
			switch arg := arg.(type) {
			case map[string]godbus.Variant:
				if len(arg) > 0 {
					t.Errorf("%s tells %v", signal.Name, arg)
				}
			case map[string]map[string]godbus.Variant:
				if _, ok := arg["org.virtbackup1.Job"]; !ok || len(arg) != 1 || len(arg["org.virtbackup1.Job"]) > 0 {
					t.Errorf("%s tells %v", signal.Name, arg)
				}
			case []string:
				// What cannot change is not told.
				if slices.Contains(arg, "State") != (signal.Name == changed) || slices.Contains(arg, "Id") {
					t.Errorf("%s tells %v", signal.Name, arg)
				}
			case godbus.ObjectPath:
				if arg != path {
					t.Errorf("%s is about %s", signal.Name, arg)
				}
			}
		}
	}
	tell()
	tell()
	job.State, job.Phase = dbus.JobRunning, "copying"
	m.set(job)
	s.Changed(job.Ref())
	tell()
	job.State = dbus.JobSucceeded
	m.set(job)
	s.Changed(job.Ref())
	s.JobRemoved(job.ID, dbus.JobSucceeded)
	s.Removed(job.Ref())
	tell()
	tell()
	tell()
	want := []string{
		manager + "JobNew", objects + "InterfacesAdded", changed, changed,
		manager + "JobRemoved", objects + "InterfacesRemoved",
	}
	if diff := cmp.Diff(want, told); diff != "" {
		t.Error(diff)
	}
}

func TestChangesAreBatched(t *testing.T) {
	address, m := bustest.Start(t), newMemory()
	s := serve(t, address, m, authorize(everybody))
	signals := listen(t, address)
	start := time.Now()
	job := dbus.JobProperties{ID: "J2", State: dbus.JobRunning}
	const changes = 5000
	for i := range changes {
		job.BytesDone = uint64(i)
		m.set(job)
		s.Changed(job.Ref())
	}
	s.JobRemoved(job.ID, dbus.JobFailed)
	var batches int
	for next(t, signals).Name == dbus.InterfaceProperties+".PropertiesChanged" {
		batches++
	}
	// One when it began, one for every quiet time, one before JobRemoved.
	if most := 2 + int(time.Since(start)/quiet); batches > most || batches == 0 {
		t.Errorf("%d changes became %d signals, and at most %d are wanted", changes, batches, most)
	}
}

func TestWatchJobFollowsAJobOverARestart(t *testing.T) {
	address, m := bustest.Start(t), newMemory()
	first := serve(t, address, m, authorize(everybody))
	job := dbus.JobProperties{ID: jobID, State: dbus.JobRunning, Phase: "opening"}
	m.set(job)
	updates := make(chan dbus.JobUpdate)
	type end struct {
		job dbus.JobProperties
		err error
	}
	ended := make(chan end, 1)
	c := client(t, address)
	go func() {
		job, err := c.WatchJob(t.Context(), jobID, func(u dbus.JobUpdate) { updates <- u })
		ended <- end{job, err}
	}()
	until := func(what string, enough func(dbus.JobUpdate) bool) {
		t.Helper()
		for {
			select {
			case u := <-updates:
				if enough(u) {
					return
				}
			case e := <-ended:
				t.Fatalf("%s: it ended with %v", what, e)
			}
		}
	}
	until("the first reading", func(u dbus.JobUpdate) bool { return u.Job.Phase == "opening" })
	job.Phase = "copying"
	m.set(job)
	first.Changed(job.Ref())
	until("a change", func(u dbus.JobUpdate) bool { return u.Job.Phase == "copying" })
	stopped := make(chan struct{})
	go func() {
		stop(t, first)
		close(stopped)
	}()
	until("the daemon went", func(u dbus.JobUpdate) bool { return u.Away && u.Job.Phase == "copying" })
	<-stopped
	job.State, job.Error, job.ErrorMessage = dbus.JobFailed, dbus.ErrRepositoryFull, "no space is left"
	m.set(job)
	serve(t, address, m, authorize(everybody))
	until("the daemon came back", func(u dbus.JobUpdate) bool { return !u.Away && u.Job.State == dbus.JobFailed })
	e := <-ended
	if e.err != nil || !errors.Is(e.job.Err(), dbus.ErrRepositoryFull) {
		t.Errorf("%+v", e)
	}
}

// TestWatchJobMissesNoEnd lets many jobs end while they are being looked at
// for the first time.
func TestWatchJobMissesNoEnd(t *testing.T) {
	address, m := bustest.Start(t), newMemory()
	var onRead atomic.Pointer[func()]
	s := serve(t, address, m, authorize(func(context.Context, policy.Request) error {
		if do := onRead.Swap(nil); do != nil {
			go (*do)()
		}
		return nil
	}))
	c := client(t, address)
	for i := range 200 {
		job := dbus.JobProperties{ID: fmt.Sprintf("J%d", i), State: dbus.JobRunning}
		m.set(job)
		end := func() {
			job.State = dbus.JobSucceeded
			m.set(job)
			s.Changed(job.Ref())
		}
		onRead.Store(&end)
		ctx, stop := context.WithTimeout(t.Context(), time.Minute)
		done, err := c.WatchJob(ctx, job.ID, func(dbus.JobUpdate) {})
		stop()
		if err != nil || done.State != dbus.JobSucceeded {
			t.Fatal(done.State, err)
		}
	}
}

func TestWatchJobEndsWhenItCannotGoOn(t *testing.T) {
	address, m := bustest.Start(t), newMemory()
	serve(t, address, m, authorize(everybody))
	c := client(t, address)
	if _, err := c.WatchJob(t.Context(), "J7", func(dbus.JobUpdate) {}); !errors.Is(err, dbus.ErrNotFound) {
		t.Errorf("a job that is not there: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	if _, err := c.WatchJob(ctx, jobID, func(dbus.JobUpdate) { cancel() }); !errors.Is(err, context.Canceled) {
		t.Errorf("given up: %v", err)
	}
	if _, err := c.WatchJob(t.Context(), jobID, func(dbus.JobUpdate) { _ = c.Close() }); err == nil {
		t.Error("it goes on without a bus")
	}
}

func TestNameIsNeitherSharedNorTaken(t *testing.T) {
	address := bustest.Start(t)
	serve(t, address, newMemory(), authorize(everybody))
	second, err := New(Config{Address: address, Authorizer: authorize(everybody), Log: testLog(t)})
	if err != nil {
		t.Fatal(err)
	}
	if err := second.Start(t.Context(), newMemory()); err == nil {
		t.Error("two daemons have the name")
	}
	conn := rawClient(t, address)
	reply, err := conn.RequestName(dbus.BusName, godbus.NameFlagReplaceExisting|godbus.NameFlagDoNotQueue)
	if err != nil || reply != godbus.RequestNameReplyExists {
		t.Errorf("somebody else got the name: %v, %v", reply, err)
	}
}

// TestBusPolicy is T7: our policy file on a bus that is closed by default.
func TestBusPolicy(t *testing.T) {
	address, m := bustest.StartWithPolicy(t, "../../../dbus/org.virtbackup1.conf"), newMemory()
	other := bustest.DialAs(t, address, nobody)
	if reply, err := other.RequestName(dbus.BusName, godbus.NameFlagDoNotQueue); err == nil {
		t.Errorf("nobody took the name: %v", reply)
	}
	s := serve(t, address, m, authorize(everybody))
	root := rawClient(t, address)
	name := s.conn.Names()[0]
	const set, get = dbus.InterfaceProperties + ".Set", dbus.InterfaceProperties + ".GetAll"
	level := []any{dbus.InterfaceLogControl, "LogLevel", godbus.MakeVariant("debug")}
	for _, c := range []struct {
		conn    *godbus.Conn
		path    godbus.ObjectPath
		method  string
		args    []any
		allowed bool
	}{
		{other, dbus.Root, get, []any{"org.virtbackup1.Manager"}, true},
		{other, dbus.Root, getManagedObjects, nil, true},
		{other, dbus.Root, dbus.InterfaceIntrospectable + ".Introspect", nil, true},
		{other, dbus.Root, "org.freedesktop.DBus.Peer.Ping", nil, true},
		{other, dbus.Root, "Introspect", nil, false},
		{other, dbus.Root, "org.example.Other.Call", nil, false},
		{other, dbus.LogControlPath, get, []any{dbus.InterfaceLogControl}, true},
		{other, dbus.LogControlPath, set, level, false},
		{root, dbus.LogControlPath, set, level, true},
	} {
		for _, destination := range []string{dbus.BusName, name} {
			err := c.conn.Object(destination, c.path).Call(c.method, 0, c.args...).Err
			var remote godbus.Error
			refused := errors.As(err, &remote) && remote.Name == "org.freedesktop.DBus.Error.AccessDenied"
			if refused == c.allowed || c.allowed && err != nil {
				t.Errorf("%s to %s: %v", c.method, destination, err)
			}
		}
	}
	interfaces, err := dbus.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range interfaces {
		err := other.Object(dbus.BusName, dbus.Root).Call(i.Name+".Explode", 0).Err
		var remote godbus.Error
		if !errors.As(err, &remote) || !slices.Contains([]string{string(unknownMethod), string(unknownInterface)}, remote.Name) {
			t.Errorf("%s is not let through: %v", i.Name, err)
		}
	}
}

func TestLogControl(t *testing.T) {
	address := bustest.Start(t)
	s := serve(t, address, newMemory(), polkit(t, address))
	set := func(conn *godbus.Conn, name, value string) error {
		return conn.Object(dbus.BusName, dbus.LogControlPath).
			Call(dbus.InterfaceProperties+".Set", 0, dbus.InterfaceLogControl, name, godbus.MakeVariant(value)).Err
	}
	root := rawClient(t, address)
	for _, level := range []string{"debug", "info", "warning", "err"} {
		if err := set(root, "LogLevel", level); err != nil {
			t.Error(err)
		}
		if got := s.logControl()["LogLevel"].Value(); got != level {
			t.Errorf("the level is %v after setting %s", got, level)
		}
	}
	if err := set(root, "LogLevel", "loud"); err == nil {
		t.Error("a level that does not exist was set")
	}
	if err := set(root, "LogTarget", "console"); err == nil {
		t.Error("LogTarget was set")
	}
	if err := set(bustest.DialAs(t, address, nobody), "LogLevel", "debug"); !denied(err) {
		t.Errorf("nobody set the level: %v", err)
	}
}

// TestBusctlReadsTheIntrospection has a tool of systemd look at every kind of
// object, properties and all.
func TestBusctlReadsTheIntrospection(t *testing.T) {
	address, m := bustest.Start(t), newMemory()
	serve(t, address, m, authorize(everybody))
	paths := []godbus.ObjectPath{dbus.Root, dbus.LogControlPath}
	for ref := range m.objects {
		paths = append(paths, ref.Path())
	}
	for _, path := range paths {
		out, err := exec.CommandContext(t.Context(), "busctl", "--address="+address, "introspect", dbus.BusName, string(path)).CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v\n%s", path, err, out)
		}
	}
	tree, err := exec.CommandContext(t.Context(), "busctl", "--address="+address, "--list", "tree", dbus.BusName).CombinedOutput()
	for ref := range m.objects {
		if listed := strings.Contains(string(tree), string(ref.Path())+"\n"); listed != ref.Kind.Managed() {
			t.Errorf("%s is listed: %v (%v)\n%s", ref, listed, err, tree)
		}
	}
}
