package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/chain"
	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/hooks/fingerprint"
	"github.com/virtbackup/virtbackup/hooks/spool"
)

// newKeeper makes a Keeper with an empty catalog.
func newKeeper(t *testing.T, d Domains, directory, hook string) *Keeper {
	t.Helper()
	c, err := catalog.Open(t.Context(), filepath.Join(t.TempDir(), "catalog.sqlite"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return New(Deps{Catalog: c, Domains: d, SpoolDirectory: directory, HookPath: hook,
		Log: slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))})
}

// bench is a domain that is off, of libvirt's test driver, with a disk in a
// file, and what keeps watch over it.
type bench struct {
	*Keeper
	t     *testing.T
	h     *hypervisor.Hypervisor
	d     hypervisor.Domain
	image string
	after int64
}

func newBench(t *testing.T) *bench {
	t.Helper()
	h, err := hypervisor.Connect(t.Context(), "test:///default", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.Close)
	b := &bench{Keeper: newKeeper(t, h, t.TempDir(), "/nowhere"), t: t, h: h, image: filepath.Join(t.TempDir(), "vda.raw")}
	b.write("as it was")
	uuid, err := h.Define(t.Context(), fmt.Sprintf(`<domain type="test"><name>%s</name><memory>1024</memory><os><type>hvm</type></os><devices>
		<disk type="file"><driver name="qemu" type="raw"/><source file=%q/><target dev="vda" bus="virtio"/></disk></devices></domain>`,
		strings.ReplaceAll(t.Name(), "/", "-"), b.image))
	if err != nil {
		t.Fatal(err)
	}
	if b.d, err = h.ByUUID(t.Context(), uuid); err != nil {
		t.Fatal(err)
	}
	b.want(string(chain.Unseen)) // it was never looked at before
	return b
}

func (b *bench) write(text string) {
	b.t.Helper()
	if err := os.WriteFile(b.image, []byte(text), 0o600); err != nil {
		b.t.Fatal(err)
	}
}

// want looks at the domain: these are all marks since it was looked at last.
func (b *bench) want(marks ...string) {
	b.t.Helper()
	last, newest, err := b.Observe(b.t.Context(), b.d)
	if err != nil {
		b.t.Fatal(err)
	}
	got := []string{}
	for _, m := range newest {
		if m.Number > b.after {
			got = append(got, strings.TrimSpace(m.Target+" "+string(m.Cause)))
		}
	}
	b.after = last
	if fmt.Sprint(got) != fmt.Sprint(marks) {
		b.t.Errorf("there are the marks %q, not %q", got, marks)
	}
}

// tell has the hook record something, and returns the path of the record.
func (b *bench) tell(operation string, id int) string {
	b.t.Helper()
	boot, err := spool.BootID()
	if err != nil {
		b.t.Fatal(err)
	}
	r := spool.Record{Version: spool.Version, Time: time.Now().UnixMicro(), Boot: boot, Libvirt: "1@1", Domain: b.d.UUID, Name: b.d.Name,
		DomainID: id, Operation: operation, XML: b.d.XML}
	if operation == "prepare" || operation == "release" {
		sources, err := fingerprint.Sources([]byte(b.d.XML))
		if err != nil {
			b.t.Fatal(err)
		}
		r.Disks = []fingerprint.Disk{fingerprint.Take(b.t.Context(), sources[0])}
	}
	n, err := spool.Write(b.SpoolDirectory, r)
	if err != nil {
		b.t.Fatal(err)
	}
	return filepath.Join(b.SpoolDirectory, fmt.Sprintf("%020d.json", n))
}

// run has the hook tell of a run, from start to end.
func (b *bench) run() {
	b.t.Helper()
	b.tell("prepare", 5)
	b.tell("start", 5)
	b.tell("started", 5)
	b.tell("stopped", 0)
	b.tell("release", 0)
}

func (b *bench) phase() Phase {
	b.t.Helper()
	e, err := b.load(b.t.Context(), b.d.UUID)
	if err != nil {
		b.t.Fatal(err)
	}
	return e.Phase
}

func TestRecordsAreTakenInOrder(t *testing.T) {
	b := newBench(t)
	b.run()
	b.write("edited")
	b.run()
	b.want("vda " + string(chain.ChangedWhileOff))
	if left, err := spool.Read(b.SpoolDirectory); err != nil || len(left) > 0 {
		t.Errorf("left: %+v, %v", left, err)
	}
	b.run()
	b.want()
}

// TestARecordIsTakenOnce has the daemon die between taking a record and removing it.
func TestARecordIsTakenOnce(t *testing.T) {
	b := newBench(t)
	b.write("edited")
	record := b.tell("prepare", 5)
	text, err := os.ReadFile(record)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := os.WriteFile(record, text, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := b.Replay(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	b.tell("stopped", 0)
	b.tell("release", 0)
	all, err := b.Catalog.Marks(t.Context(), b.d.UUID, b.after)
	if err != nil || len(all) != 1 {
		t.Errorf("marks: %+v, %v", all, err)
	}
	b.want("vda " + string(chain.ChangedWhileOff))
}

// TestNumbersBeginAnew has somebody empty the spool: what comes then is no less new.
func TestNumbersBeginAnew(t *testing.T) {
	b := newBench(t)
	b.run()
	b.want()
	if err := os.RemoveAll(b.SpoolDirectory); err != nil {
		t.Fatal(err)
	}
	b.write("edited")
	b.run()
	b.want("vda " + string(chain.ChangedWhileOff))
}

func TestAnUnreadableRecordMakesAllUnknown(t *testing.T) {
	b := newBench(t)
	if err := os.Truncate(b.tell("restore", 0), 10); err != nil {
		t.Fatal(err)
	}
	if err := b.Replay(t.Context()); err != nil || b.phase() != Unknown {
		t.Errorf("%q, %v", b.phase(), err)
	}
	b.want(string(chain.Unseen))
	b.want()
}

func TestOwnWork(t *testing.T) {
	b := newBench(t)
	if err := b.OwnWork(t.Context(), b.d, []string{"vda"}, func() error { b.write("ours"); return nil }); err != nil {
		t.Fatal(err)
	}
	b.want()

	b.write("edited")
	if err := b.OwnWork(t.Context(), b.d, []string{"vda"}, func() error { b.write("ours again"); return nil }); err != nil {
		t.Fatal(err)
	}
	b.want("vda " + string(chain.ChangedWhileOff))

	// It is started while we are at work, and stops before we look.
	if err := b.OwnWork(t.Context(), b.d, []string{"vda"}, func() error { b.write("edited"); b.run(); return nil }); err != nil {
		t.Fatal(err)
	}
	b.want("vda " + string(chain.ChangedWhileOff))

	// Somebody changes a disk that the work is not about.
	if err := b.OwnWork(t.Context(), b.d, []string{"vdb"}, func() error { b.write("edited"); return nil }); err != nil {
		t.Fatal(err)
	}
	b.want("vda " + string(chain.ChangedWhileOff))

	failed := errors.New("no space left")
	if err := b.OwnWork(t.Context(), b.d, []string{"vda"}, func() error { b.write("half"); return failed }); !errors.Is(err, failed) {
		t.Error(err)
	}
	b.want()
}

// TestOwnWorkKeepsNobodyElseWaiting has own work that takes long, as on storage
// that hangs: another domain is looked at meanwhile, and only the hook of the
// domain that it is at waits.
func TestOwnWorkKeepsNobodyElseWaiting(t *testing.T) {
	b := newBench(t)
	other := b.d
	other.UUID = "11111111-1111-4111-8111-111111111111"
	hook := make(chan error, 1)
	err := b.OwnWork(t.Context(), b.d, []string{"vda"}, func() error {
		if _, _, err := b.Observe(t.Context(), other); err != nil {
			t.Error(err)
		}
		if err := b.Replay(t.Context()); err != nil {
			t.Error(err)
		}
		b.tell("prepare", 5)
		b.write("ours")
		if err := b.replayIdle(t.Context()); err != nil {
			t.Error(err)
		}
		waiting, cancel := context.WithCancelCause(t.Context())
		cancel(errStopped)
		if _, _, err := b.Observe(waiting, b.d); !errors.Is(err, errStopped) {
			t.Errorf("it was looked at in the midst of the work: %v", err)
		}
		if err := b.Replay(waiting); !errors.Is(err, errStopped) {
			t.Errorf("the hook was not kept waiting: %v", err)
		}
		go func() { hook <- b.Replay(t.Context()) }()
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	if err := <-hook; err != nil || b.phase() != Running {
		t.Errorf("%q, %v", b.phase(), err)
	}
	b.tell("stopped", 0)
	b.tell("release", 0)
	b.want() // it was started before the work changed anything
}

var errStopped = errors.New("stopped")

// TestUnknownDuringOwnWork loses a record while own work is at a domain: what
// it left is not taken for known.
func TestUnknownDuringOwnWork(t *testing.T) {
	b := newBench(t)
	err := b.OwnWork(t.Context(), b.d, []string{"vda"}, func() error {
		if err := os.Truncate(b.tell("restore", 0), 10); err != nil {
			t.Error(err)
		}
		return b.Replay(t.Context())
	})
	if err != nil {
		t.Fatal(err)
	}
	b.want(string(chain.Unseen))
}

// TestUnseen has several backups, each with its own view of the same marks.
func TestUnseen(t *testing.T) {
	marks := []catalog.Mark{{Number: 7, Target: "vda"}, {Number: 5}, {Number: 3, Target: "vdb"}}
	for _, c := range []struct {
		target string
		after  int64
		want   int64 // 0: none
	}{{"vda", 0, 7}, {"vda", 6, 7}, {"vda", 7, 0}, {"vdb", 0, 5}, {"vdb", 4, 5}, {"vdb", 5, 0}, {"vdc", 0, 5}, {"vdc", 9, 0}} {
		if m, ok := Unseen(marks, c.target, c.after); m.Number != c.want || ok != (c.want != 0) {
			t.Errorf("%+v: got %+v, %v", c, m, ok)
		}
	}
}

// TestRunForgetsDomainsThatAreGone has one domain in the catalog, and one that
// only the hook told of.
func TestRunForgetsDomainsThatAreGone(t *testing.T) {
	b := newBench(t)
	const gone, kept = "11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222"
	for _, uuid := range []string{gone, kept} {
		if err := b.save(t.Context(), uuid, entry{}, []Finding{{Cause: chain.Unseen, Detail: "x"}}, time.Now()); err != nil {
			t.Fatal(err)
		}
	}
	for _, uuid := range []string{kept, b.d.UUID} {
		if err := b.Catalog.SeenDomain(t.Context(), uuid, "some"); err != nil {
			t.Fatal(err)
		}
	}
	b.write("edited")
	if err := b.catchUp(t.Context(), true, nil); err != nil {
		t.Fatal(err)
	}
	all, err := b.Catalog.TrackedDomains(t.Context())
	if err != nil || len(all) != 2 || all[0] != kept && all[1] != kept {
		t.Errorf("known are %v, %v", all, err)
	}
	if marks, err := b.Catalog.Marks(t.Context(), gone, 0); err != nil || len(marks) > 0 {
		t.Errorf("its marks: %+v, %v", marks, err)
	}
	marks, err := b.Catalog.Marks(t.Context(), b.d.UUID, b.after)
	if err != nil || len(marks) != 1 || marks[0].Cause != chain.ChangedWhileOff {
		t.Errorf("of the one that was edited: %+v, %v", marks, err)
	}
}

func TestHookIsMissing(t *testing.T) {
	b := newBench(t)
	b.HookPath = filepath.Join(t.TempDir(), "virtbackup")
	check := func(want HookStatus) {
		t.Helper()
		if s, err := b.Hook(t.Context()); err != nil || s.Status != want {
			t.Errorf("%+v, %v", s, err)
		}
	}
	check(HookMissing)
	if err := os.WriteFile(b.HookPath, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	check(HookMissing)
	before := time.Now().Truncate(time.Microsecond)
	b.run()
	b.want()
	if s, err := b.Hook(t.Context()); err != nil || s.Last.Before(before) {
		t.Errorf("it told something last at %v, %v", s.Last, err)
	}
}
