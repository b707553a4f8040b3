package main

import (
	"testing"

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
