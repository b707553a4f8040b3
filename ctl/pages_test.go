package main

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/virtbackup/virtbackup/dbus"
)

// text returns what a page shows.
func text(write func(p *page)) string {
	p := &page{legend: true}
	write(p)
	return p.buf.String()
}

func TestBackupPageTellsHowChangesWereFound(t *testing.T) {
	b := dbus.BackupProperties{
		ID: "01B", DomainName: "web", DomainUUID: "u", State: dbus.BackupComplete, Kind: dbus.KindIncremental, Repository: "nas", Offering: "daily",
		Chain: "01A", Parent: "01A", Consistency: dbus.ConsistencyCrash, Quiesce: dbus.QuiesceAgent, Shortfall: "the guest agent does not answer",
		HeldUsec: 84_100, SizeBytes: 3 << 30, ReadBytes: 1<<30 + 5<<20, StoredBytes: 3 << 20, Host: "lab", Version: "1.0",
		Compression: dbus.CompressionZstd, Causes: []string{"vdb: changed-while-off", "vdc: disk-attached"},
		Disks: []dbus.BackupDisk{
			{Target: "vda", File: "vda.qcow2", Size: 1 << 30, ReadBytes: 4 << 20, StoredBytes: 1 << 20, Kind: dbus.KindIncremental, Changes: dbus.TrackingCBT, Tracking: dbus.TrackingCBT},
			{Target: "vdb", File: "vdb.qcow2", Size: 1 << 30, ReadBytes: 1 << 30, StoredBytes: 1 << 20, Kind: dbus.KindIncremental, Changes: dbus.TrackingDigest, Tracking: dbus.TrackingCBT, Cause: "changed-while-off"},
			{Target: "vdc", File: "vdc.qcow2", Size: 1 << 30, ReadBytes: 1 << 20, StoredBytes: 1 << 20, Kind: dbus.KindFull, Tracking: dbus.TrackingCBT, Cause: "disk-attached"},
		},
	}
	want := `     Backup: 01B
     Domain: web (u)
      State: complete
       Kind: incremental
Consistency: asked for agent, got crash: the guest agent does not answer, held 85 ms
 Repository: nas
   Offering: daily
      Chain: 01A
     Parent: 01A
Compression: zstd
       Size: 3.0 GiB
       Read: 1.0 GiB
     Stored: 3.0 MiB
   Verified: when it was made
    Made by: virtbackup 1.0 on lab

DISK  KIND         CHANGES     SIZE     READ   STORED  FILE       CAUSE
vda   incremental  cbt      1.0 GiB  4.0 MiB  1.0 MiB  vda.qcow2
vdb   incremental  digest   1.0 GiB  1.0 GiB  1.0 MiB  vdb.qcow2  the disk was changed while the domain was off
vdc   full                  1.0 GiB  1.0 MiB  1.0 MiB  vdc.qcow2  the disk was not in the backup before
`
	if diff := cmp.Diff(want, text(func(p *page) { backupPage(p, b) })); diff != "" {
		t.Error(diff)
	}
}

func TestBackupPageTellsWhyItIsFull(t *testing.T) {
	for want, causes := range map[string][]string{
		"the domain has no chain in this repository yet":    {"first-backup"},
		"none of the disks can go on, for different causes": {"no-disk-tracked", "vda: disk-attached", "vdb: disk-resized"},
		"": {"vdb: unseen"},
	} {
		if got := backupCause(dbus.BackupProperties{Causes: causes}); got != want {
			t.Errorf("%q: %q", causes, got)
		}
	}
}

func TestConsistencySaysWhatWasAskedFor(t *testing.T) {
	for want, b := range map[string]dbus.BackupProperties{
		"crash": {Consistency: dbus.ConsistencyCrash, Quiesce: dbus.QuiesceNone},
		"filesystem (asked for agent), held 85 ms":  {Consistency: dbus.ConsistencyFilesystem, Quiesce: dbus.QuiesceAgent, HeldUsec: 85_000},
		"suspended (asked for suspend), held 1.5 s": {Consistency: dbus.ConsistencySuspended, Quiesce: dbus.QuiesceSuspend, HeldUsec: 1_500_000},
		"off: the domain was shut off":              {Consistency: dbus.ConsistencyOff, Quiesce: dbus.QuiesceAgent},
	} {
		if got := consistency(b); got != want {
			t.Errorf("%q; %q is expected", got, want)
		}
	}
}

func TestDomainPageTellsWhatTheNextBackupWouldDo(t *testing.T) {
	seen := time.Date(2026, 3, 4, 5, 6, 7, 0, time.Local)
	s := domainView{
		domain: dbus.DomainProperties{
			Name: "web", UUID: "u", State: "shutoff", Offering: "daily", Protection: dbus.ProtectionProtected, Chain: "01A", ChainLength: 3,
			Disks: []dbus.DomainDisk{
				{Target: "vda", Format: "qcow2", Size: 1 << 30, Source: "/d/a.qcow2", Included: true},
				{Target: "vdb", Format: "qcow2", Size: 1 << 30, Source: "/d/b.qcow2", Included: true},
				{Target: "sda", Format: "raw", Size: 1 << 20, Cause: "it is a cdrom"},
			},
		},
		tracking: []dbus.DomainTracking{
			{Repository: "nas", Target: "vda", Tracking: dbus.TrackingCBT, Since: seen.Add(-time.Hour)},
			{Repository: "nas", Target: "vdb", Tracking: dbus.TrackingDigest, Cause: "changed-while-off", Since: seen},
			{Repository: "tape", Target: "vda", Tracking: dbus.TrackingNone, Cause: "first-backup"},
		},
		marks: []dbus.Mark{
			{Time: seen, Target: "vdb", Cause: "changed-while-off", Detail: "/d/b.qcow2: size 5, was 4"},
			{Time: seen.Add(-2 * time.Hour), Cause: "host-restarted", Detail: "the host went down while the domain ran"},
		},
	}
	want := `    Domain: web
      UUID: u
     State: shutoff
  Offering: daily
Protection: protected
     Chain: 01A, backups: 3

DISK  FORMAT     SIZE  SOURCE      INCLUDED
vda   qcow2   1.0 GiB  /d/a.qcow2  yes
vdb   qcow2   1.0 GiB  /d/b.qcow2  yes
sda   raw     1.0 MiB              no: it is a cdrom

NEXT BACKUP TO  DISK  TRACKING  SINCE                CAUSE
nas             vda   cbt       2026-03-04 04:06:07
nas             vdb   digest    2026-03-04 05:06:07  the disk was changed while the domain was off
tape            vda   none                           the domain has no chain in this repository yet

SEEN                 DISK  CAUSE                                          DETAIL
2026-03-04 05:06:07  vdb   the disk was changed while the domain was off  /d/b.qcow2: size 5, was 4
2026-03-04 03:06:07  all   the host went down while the domain ran
`
	if diff := cmp.Diff(want, text(func(p *page) { domainPage(p, s) })); diff != "" {
		t.Error(diff)
	}
	const bare = "Domain: web\n  UUID: u\n State: undefined\n\nDISK  FORMAT  SIZE  SOURCE  INCLUDED\n"
	if diff := cmp.Diff(bare, text(func(p *page) {
		domainPage(p, domainView{domain: dbus.DomainProperties{Name: "web", UUID: "u", State: "undefined"}})
	})); diff != "" {
		t.Error(diff)
	}
}

func TestDomainHasAllAsJSON(t *testing.T) {
	var b bytes.Buffer
	a := &app{out: &b, json: jsonShort}
	all := append(members(dbus.DomainProperties{UUID: "u"}), member{"tracking", []dbus.DomainTracking{{Target: "vda"}}}, member{"marks", []dbus.Mark(nil)})
	if err := a.show(all, nil); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`{"uuid":"u",`, `"last_backup_time":null`, `"tracking":[{"repository":"","offering":"","chain":"","target":"vda","tracking":"","cause":"","since":null}],"marks":[]}`} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("%s is not in %s", want, b.String())
		}
	}
}

func TestStatusTellsOfTheHook(t *testing.T) {
	now := time.Now()
	for want, m := range map[string]dbus.ManagerProperties{
		"active, last spoke 3 s ago": {HookState: dbus.HookActive, HookLast: now.Add(-3 * time.Second)},
		"active, last spoke 0 s ago": {HookState: dbus.HookActive, HookLast: now.Add(time.Second)}, // another host's clock
		"active":                     {HookState: dbus.HookActive},
		"installed, but libvirtd, which is older, has not called it yet: systemctl reload libvirtd, once": {HookState: dbus.HookInstalled},
		`not installed: "make install" puts it to /etc/libvirt/hooks/qemu.d/virtbackup`:                   {HookState: dbus.HookMissing},
		"": {},
	} {
		if got := hook(m, now); got != want {
			t.Errorf("%q; %q is expected", got, want)
		}
	}
}

func TestSchedulePageTellsWhatBecameOfRuns(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.Local)
	s := dbus.ScheduleProperties{
		ID: "01S", Name: "gold", Offering: "gold", Repository: "tape", Calendars: []string{"daily", "Mon 12:00"}, RandomizedDelay: 90_000_000, Persistent: true,
		Quiesce: dbus.ScheduleQuiesceOffering, Overlap: dbus.OverlapQueue, Enabled: true, Unit: "u.timer", NextElapse: at, LastSuccess: at, Created: at,
	}
	runs := []dbus.ScheduleRun{
		{ID: "2", State: dbus.RunSkipped, Reason: "the run of 03:04 still goes on", Timer: true, Created: at, Finished: at},
		{ID: "1", State: dbus.RunRunning, Jobs: []string{"a", "b"}, UID: 7, Created: at},
	}
	want := `    Schedule: gold
          Id: 01S
    Offering: gold
  Repository: tape
   Calendars: daily, Mon 12:00
       Delay: up to 1 min 30 s
  Persistent: yes: a run that was missed is made up for
    Isolated: no
     Quiesce: offering
     Overlap: queue
        Next: 2026-01-02 03:04:05
Last success: 2026-01-02 03:04:05
       Timer: u.timer
     Created: 2026-01-02 03:04:05 by uid 0

RUN                  BY     STATE    FINISHED             JOBS  REASON
2026-01-02 03:04:05  timer  skipped  2026-01-02 03:04:05     0  the run of 03:04 still goes on
2026-01-02 03:04:05  uid 7  running                          2
`
	if diff := cmp.Diff(want, text(func(p *page) { schedulePage(p, s, runs) })); diff != "" {
		t.Error(diff)
	}
	want = `SCHEDULE  FOR            CALENDARS         REPOSITORY       NEXT      LAST  STATE  REASON
gold      offering gold  daily, Mon 12:00  of the offering  disabled
web                      daily             tape             never                  its timer does not run
`
	s.Enabled, s.Repository = false, ""
	other := dbus.ScheduleProperties{Name: "web", Calendars: []string{"daily"}, Repository: "tape", Enabled: true, Problem: "its timer does not run"}
	if diff := cmp.Diff(want, text(func(p *page) { scheduleTable(p, []dbus.ScheduleProperties{s, other}) })); diff != "" {
		t.Error(diff)
	}
}
