package hypervisor

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"libvirt.org/go/libvirt"
)

func TestLookup(t *testing.T) {
	h := testDriver(t)
	d, err := h.Lookup(t.Context(), "test")
	if err != nil {
		t.Fatal(err)
	}
	if d.Name != "test" || d.State != StateRunning || !d.Active || !d.Persistent || d.Firmware.Type != "bios" {
		t.Errorf("got %+v", d)
	}
	same, err := h.Lookup(t.Context(), d.UUID)
	if err != nil || same.Name != "test" {
		t.Errorf("by UUID: %+v, %v", same, err)
	}
	all, err := h.Domains(t.Context())
	if err != nil || len(all) != 1 {
		t.Errorf("all: %+v, %v", all, err)
	}
	for _, name := range []string{"nobody", "", "a/b", "a\nb", "</name>", "6695eb01-f6a4-8304-79aa-97f2502e1930"} {
		if _, err := h.Lookup(t.Context(), name); !errors.Is(err, ErrNoDomain) {
			t.Errorf("%q: %v", name, err)
		}
	}
}

// A domain may bear another's UUID as its name.
func TestByUUIDTakesNoName(t *testing.T) {
	h := testDriver(t)
	const gone = "6695eb01-f6a4-8304-79aa-97f2502e1930"
	uuid, err := h.Define(t.Context(), `<domain type="test"><name>`+gone+`</name><memory>1024</memory><os><type>hvm</type></os></domain>`)
	if err != nil {
		t.Fatal(err)
	}
	if d, err := h.Lookup(t.Context(), gone); err != nil || d.UUID != uuid {
		t.Errorf("by name: %+v, %v", d, err)
	}
	if d, err := h.ByUUID(t.Context(), gone); !errors.Is(err, ErrNoDomain) {
		t.Errorf("by UUID: %+v, %v", d, err)
	}
	if d, err := h.ByUUID(t.Context(), uuid); err != nil || d.Name != gone {
		t.Errorf("by its UUID: %+v, %v", d, err)
	}
	if _, err := h.ByUUID(t.Context(), "test"); err == nil {
		t.Error("found a domain by its name")
	}
}

func TestEvents(t *testing.T) {
	h := testDriver(t)
	ctx, cancel := context.WithCancel(t.Context())
	events := h.Subscribe(ctx)
	d, err := h.Lookup(ctx, "test")
	if err != nil {
		t.Fatal(err)
	}
	next := func() Event {
		for e := range events { // libvirt may still tell of domains of the tests before
			if e.UUID == d.UUID {
				return e
			}
		}
		return Event{}
	}
	if err := h.Suspend(ctx, d.UUID); err != nil {
		t.Fatal(err)
	}
	want := Event{Kind: EventLifecycle, UUID: d.UUID, Name: "test", Action: "suspended", Detail: "paused"}
	if got := next(); got != want {
		t.Errorf("got %+v", got)
	}
	name, reason, err := h.State(ctx, d.UUID)
	if err != nil || name != StatePaused || reason != ReasonPausedBy {
		t.Errorf("state %s (%s), %v", name, reason, err)
	}
	if err := h.Resume(ctx, d.UUID); err != nil {
		t.Fatal(err)
	}
	if got := next(); got.Action != "resumed" || got.Detail != "unpaused" {
		t.Errorf("got %+v", got)
	}
	_, err = withDomain(ctx, h, d.UUID, "name", func(d *libvirt.Domain) (struct{}, error) {
		return struct{}{}, d.SetMetadata(libvirt.DOMAIN_METADATA_TITLE, "a title", "", "", libvirt.DOMAIN_AFFECT_LIVE)
	})
	if err != nil {
		t.Fatal(err)
	}
	if got := next(); got.Kind != EventMetadata || got.Action != "title" {
		t.Errorf("got %+v", got)
	}
	cancel()
	for range events { // it ends
	}
}

func TestSlowSubscriberIsToldThatItMissed(t *testing.T) {
	h := &Hypervisor{}
	events := h.Subscribe(t.Context())
	for range 2 * subscriberBuffer {
		h.subs.publish(Event{Kind: EventReboot})
	}
	got := 0
	for len(events) > 0 {
		if e := <-events; e.Kind == EventReboot {
			got++
		}
	}
	if got == 0 || got >= 2*subscriberBuffer {
		t.Fatalf("got %d events", got)
	}
	h.subs.publish(Event{Kind: EventAgent})
	if a, b := <-events, <-events; a.Kind != EventMissed || b.Kind != EventAgent {
		t.Errorf("got %+v, then %+v", a, b)
	}
}

func TestCallsEndWithTheirContext(t *testing.T) {
	h := testDriver(t)
	ctx, cancel := context.WithCancel(t.Context())
	hung := make(chan struct{})
	defer close(hung)
	done := make(chan error)
	go func() {
		_, err := withConnect(ctx, h, "hang", func(*libvirt.Connect) (int, error) { cancel(); <-hung; return 0, nil })
		done <- err
	}()
	if err := <-done; !errors.Is(err, context.Canceled) || !errors.Is(err, ErrUnavailable) {
		t.Error(err)
	}
	_, err := withConnect(ctx, h, "begin", func(*libvirt.Connect) (int, error) {
		t.Error("a call was begun whose context had ended")
		return 0, nil
	})
	if !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestConnectFails(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	h, err := Connect(ctx, "qemu+unix:///system?socket=/nonexistent", nil)
	if !errors.Is(err, ErrUnavailable) {
		t.Errorf("got %v, %v", h, err)
	}
}

func TestBeginDocuments(t *testing.T) {
	b := Begin{
		Socket: SocketDirectory + "/a'<&>.sock",
		Disks: []BeginDisk{
			{Target: "vda", Scratch: "/s/vda", Incremental: "virtbackup-1", Bitmap: "b"},
			{Target: "vdb", Scratch: "/s/vdb"},
		},
		Checkpoint: "virtbackup-2", CheckpointDisks: []string{"vda"},
	}
	backup, checkpoint, err := b.documents([]string{"vda", "vdb", "sda"})
	if err != nil {
		t.Fatal(err)
	}
	wantBackup := `<domainbackup mode="pull">
  <server transport="unix" socket="/run/virtbackup/nbd/a&#39;&lt;&amp;&gt;.sock"></server>
  <disks>
    <disk type="file" name="vda" backup="yes" backupmode="incremental" incremental="virtbackup-1" exportbitmap="b">
      <driver type="qcow2"></driver>
      <scratch file="/s/vda"></scratch>
    </disk>
    <disk type="file" name="vdb" backup="yes" backupmode="full">
      <driver type="qcow2"></driver>
      <scratch file="/s/vdb"></scratch>
    </disk>
    <disk name="sda" backup="no"></disk>
  </disks>
</domainbackup>`
	wantCheckpoint := `<domaincheckpoint>
  <name>virtbackup-2</name>
  <disks>
    <disk name="vda" checkpoint="bitmap"></disk>
    <disk name="vdb" checkpoint="no"></disk>
    <disk name="sda" checkpoint="no"></disk>
  </disks>
</domaincheckpoint>`
	if diff := cmp.Diff(wantBackup, backup); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(wantCheckpoint, checkpoint); diff != "" {
		t.Error(diff)
	}
}

func TestBeginRefuses(t *testing.T) {
	disk := []BeginDisk{{Target: "vda", Scratch: "/s"}}
	for want, b := range map[string]Begin{
		"no disk to back up":    {},
		"has no disk vdz":       {Disks: []BeginDisk{{Target: "vdz"}}},
		"on no disk":            {Disks: disk, Checkpoint: "c"},
		"c: the domain has no ": {Disks: disk, Checkpoint: "c", CheckpointDisks: []string{"vdz"}},
	} {
		if _, _, err := b.documents([]string{"vda"}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("want %q, got %v", want, err)
		}
	}
	h := testDriver(t)
	for _, socket := range []string{"", "/tmp/x", SocketDirectory, SocketDirectory + "/../x", SocketDirectory + "/a/b"} {
		if err := h.BeginBackup(t.Context(), "x", Begin{Socket: socket, Disks: disk}); err == nil || !strings.Contains(err.Error(), "socket") {
			t.Errorf("socket %q: %v", socket, err)
		}
	}
}

func TestCheckpointDocuments(t *testing.T) {
	const doc = `<domaincheckpoint><name>virtbackup-2</name><parent><name>virtbackup-1</name></parent><creationTime>5</creationTime>
		<disks><disk name='vda' checkpoint='bitmap' bitmap='virtbackup-2' size='0'/><disk name='vdb' checkpoint='bitmap' bitmap='virtbackup-2'/><disk name='vdc' checkpoint='no'/></disks>
		<domain type='qemu'><name>a</name></domain></domaincheckpoint>`
	got, err := usable(doc)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(map[string]bool{"vda": true, "vdb": false}, got); diff != "" {
		t.Error(diff)
	}
	out, err := orphan(doc, []string{"vdb"})
	if err != nil {
		t.Fatal(err)
	}
	for text, want := range map[string]bool{
		"parent": false, `<disk name="vda" checkpoint="no">`: true, `<disk name="vdb" checkpoint="bitmap" bitmap="virtbackup-2">`: true,
		"<creationTime>5<": true, "domain type": false,
	} {
		if strings.Contains(out, text) != want {
			t.Errorf("%q: not %v in\n%s", text, want, out)
		}
	}
}

func TestSnapshotIsInternal(t *testing.T) {
	for doc, want := range map[string]bool{
		`<domainsnapshot><name>s</name><memory snapshot='internal'/></domainsnapshot>`:                                                                true,
		`<domainsnapshot><name>s</name><memory snapshot='no'/><disks><disk name='vda' snapshot='internal'/></disks></domainsnapshot>`:                 true,
		`<domainsnapshot><name>s</name><memory snapshot='external' file='/m'/><disks><disk name='vda' snapshot='external'/></disks></domainsnapshot>`: false,
	} {
		if s, err := parseSnapshot(doc); err != nil || s.Internal != want || s.Name != "s" {
			t.Errorf("%s: %+v, %v", doc, s, err)
		}
	}
}

func TestAgentAnswers(t *testing.T) {
	for text, want := range map[string]FilesystemStatus{
		`{"return":"thawed"}`: Thawed, `{"return":"frozen"}`: Frozen,
		`{"return":"both"}`: "", `{}`: "", `{"return":{}}`: "", `x`: "", ``: "", `{"return":null}`: "",
	} {
		got, err := parseStatus(text)
		if got != want || (err == nil) != (want != "") || err != nil && !errors.Is(err, ErrAgent) {
			t.Errorf("%q: %q, %v", text, got, err)
		}
	}
}
