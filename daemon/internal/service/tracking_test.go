package service

import (
	"context"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/chain"
	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/dbus"
)

// The domain of the tests: two disks that are backed up, and a CD-ROM.
func web() hypervisor.Domain {
	return hypervisor.Domain{UUID: domainUUID, Name: "web", State: hypervisor.StateShutoff, Disks: []hypervisor.Disk{
		{Target: "vda", Device: "disk", SourceType: "file", Source: "/d/a", Format: "qcow2", Capacity: 1 << 30},
		{Target: "vdb", Device: "disk", SourceType: "file", Source: "/d/b", Format: "qcow2", Capacity: 1 << 30},
		{Target: "sda", Device: "cdrom", SourceType: "file", Source: "/d/c", Format: "raw", Capacity: 1 << 20},
	}}
}

var created = time.UnixMicro(1_700_000_000_000_000)

// backedUp records a full backup of the domain, of which both disks have a
// checkpoint; its id is the repository's with "00-" before.
func backedUp(t *testing.T, s *Service, repository, offering string, at time.Time) string {
	t.Helper()
	id := "00-" + repository // before any ULID of now
	backedUpAs(t, s, id, catalog.Domain{UUID: domainUUID, Name: "web"}, repository, offering, at)
	return id
}

func backedUpAs(t *testing.T, s *Service, id string, of catalog.Domain, repository, offering string, at time.Time) {
	t.Helper()
	var images []catalog.Image
	for _, d := range web().Disks[:2] {
		images = append(images, catalog.Image{
			Target: d.Target, Kind: chain.Full, Cause: chain.FirstBackup, Tracking: chain.CBT, Source: d.Source, Format: d.Format, Size: d.Capacity,
			StoredBytes: 10, DataBytes: 20, ReadBytes: 30,
		})
	}
	ended(t, s, "JOB-"+id, func(ctx context.Context) {
		mark, err := s.Catalog.LastMark(ctx)
		if err != nil {
			t.Fatal(err)
		}
		b := catalog.Backup{
			ID: id, Domain: of.UUID, DomainName: of.Name, Repository: repository, Kind: chain.Full, Cause: chain.FirstBackup,
			Created: at, Offering: offering, Settings: defaultSettings(), Mark: mark, Images: images,
		}
		b.Quiesce = string(dbus.QuiesceAgent)
		if err := s.Catalog.CreateBackup(ctx, b, "virtbackup-"+id, catalog.Step{Job: "JOB-" + id, Name: "planned"}); err != nil {
			t.Fatal(err)
		}
		if err := s.Catalog.CommitBackup(ctx, id, catalog.Commit{
			Finished: at, Images: images, Held: 85 * time.Millisecond, Consistency: string(dbus.ConsistencyCrash), Shortfall: "nobody answers",
		}); err != nil {
			t.Fatal(err)
		}
	})
}

func mark(t *testing.T, s *Service, marks ...catalog.Mark) {
	t.Helper()
	if err := s.Catalog.SetTracking(t.Context(), domainUUID, []byte("{}"), marks); err != nil {
		t.Fatal(err)
	}
}

// TestChainsSideBySide has a disk change unseen after the backup in one
// repository and before that in another: only the first chain's bitmap is no
// good any more.
func TestChainsSideBySide(t *testing.T) {
	s, _ := newService(t)
	withRepositories(t, s, "nas", "tape", "old")
	makeOffering(t, s, "daily", "nas", dbus.Settings{})
	if err := s.Catalog.AssignDomain(t.Context(), domainUUID, "web", "daily"); err != nil {
		t.Fatal(err)
	}
	s.domains[domainUUID] = web()
	first := backedUp(t, s, "ID-nas", "daily", created)
	if err := s.Catalog.EndChain(t.Context(), backedUp(t, s, "ID-old", "", created), chain.Finished, chain.ChainFinished); err != nil {
		t.Fatal(err)
	}
	seen := created.Add(time.Hour)
	mark(t, s, catalog.Mark{Target: "vdb", Cause: chain.ChangedWhileOff, Detail: "size", Time: seen})
	second := backedUp(t, s, "ID-tape", "", seen.Add(time.Hour))

	got, err := s.DomainTracking(t.Context(), domainUUID)
	if err != nil {
		t.Fatal(err)
	}
	want := []dbus.DomainTracking{
		{Repository: "nas", Offering: "daily", Chain: first, Target: "vda", Tracking: dbus.TrackingCBT, Since: created},
		{Repository: "nas", Offering: "daily", Chain: first, Target: "vdb", Tracking: dbus.TrackingDigest, Cause: "changed-while-off", Since: seen},
		{Repository: "tape", Chain: second, Target: "vda", Tracking: dbus.TrackingCBT, Since: seen.Add(time.Hour)},
		{Repository: "tape", Chain: second, Target: "vdb", Tracking: dbus.TrackingCBT, Since: seen.Add(time.Hour)},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	d, err := s.domainRecord(t.Context(), domainUUID)
	if err != nil || d.Chain != first || d.ChainLength != 1 || d.State != "shutoff" || len(d.Disks) != 3 {
		t.Fatalf("%+v, %v", d, err)
	}
	for i, disk := range d.Disks[:2] {
		if disk.Target != want[i].Target || disk.Cause != "" || !disk.Included {
			t.Errorf("%+v", disk)
		}
	}
	if cdrom := d.Disks[2]; cdrom.Included || cdrom.Cause != "it is a cdrom" {
		t.Errorf("%+v", cdrom)
	}
}

func TestTrackingBeforeTheFirstBackup(t *testing.T) {
	s, _ := newService(t)
	withRepositories(t, s, "nas")
	s.domains[domainUUID] = web()
	if got, err := s.DomainTracking(t.Context(), domainUUID); len(got) > 0 || err != nil {
		t.Errorf("of a domain without an offering: %+v, %v", got, err)
	}
	makeOffering(t, s, "daily", "nas", dbus.Settings{})
	if err := s.Catalog.AssignDomain(t.Context(), domainUUID, "web", "daily"); err != nil {
		t.Fatal(err)
	}
	got, err := s.DomainTracking(t.Context(), domainUUID)
	want := []dbus.DomainTracking{
		{Repository: "nas", Offering: "daily", Target: "vda", Tracking: dbus.TrackingNone, Cause: "first-backup"},
		{Repository: "nas", Offering: "daily", Target: "vdb", Tracking: dbus.TrackingNone, Cause: "first-backup"},
	}
	if diff := cmp.Diff(want, got); diff != "" || err != nil {
		t.Error(diff, err)
	}
}

// TestTrackingFollowsTheOffering has what an offering asks for change what its
// domain's next backup would be.
func TestTrackingFollowsTheOffering(t *testing.T) {
	s, _ := newService(t)
	withRepositories(t, s, "nas")
	full, digest := dbus.FallbackFull, dbus.TrackingDigest
	makeOffering(t, s, "daily", "nas", dbus.Settings{})
	makeOffering(t, s, "full", "nas", dbus.Settings{Fallback: &full})
	makeOffering(t, s, "digest", "nas", dbus.Settings{Tracking: &digest})
	s.domains[domainUUID] = web()
	id := backedUp(t, s, "ID-nas", "full", created)
	mark(t, s, catalog.Mark{Cause: chain.Unseen, Time: created})
	for offering, want := range map[string]struct {
		chain, cause string
		tracking     dbus.Tracking
	}{
		"daily":  {"", "offering-changed", dbus.TrackingNone},
		"digest": {"", "offering-changed", dbus.TrackingNone},
		"full":   {"", "unseen", dbus.TrackingNone},
	} {
		if err := s.Catalog.AssignDomain(t.Context(), domainUUID, "web", offering); err != nil {
			t.Fatal(err)
		}
		got, err := s.DomainTracking(t.Context(), domainUUID)
		if err != nil || len(got) != 2 || got[0].Chain != want.chain || got[0].Cause != want.cause || got[0].Tracking != want.tracking {
			t.Errorf("%s after %s: %+v, %v", offering, id, got, err)
		}
	}
}

func TestMarksAreTheNewestFirst(t *testing.T) {
	s, _ := newService(t)
	mark(t, s, catalog.Mark{Target: "vda", Cause: chain.ChangedWhileOff, Detail: "size", Time: created})
	mark(t, s, catalog.Mark{Cause: chain.HostRestarted, Time: created.Add(time.Hour)})
	all := []dbus.Mark{
		{Time: created.Add(time.Hour), Cause: "host-restarted"},
		{Time: created, Target: "vda", Cause: "changed-while-off", Detail: "size"},
	}
	for limit := 1; limit <= 3; limit++ {
		got, err := s.DomainMarks(t.Context(), domainUUID, limit)
		if diff := cmp.Diff(all[:min(limit, 2)], got); diff != "" || err != nil {
			t.Error(limit, diff, err)
		}
	}
	if got, err := s.DomainMarks(t.Context(), "another", 10); len(got) > 0 || err != nil {
		t.Error(got, err)
	}
}

func TestBackupTellsWhatItIsWorth(t *testing.T) {
	s, _ := newService(t)
	withRepositories(t, s, "nas")
	r, err := s.Object(t.Context(), dbus.Ref{Kind: dbus.KindBackup, ID: backedUp(t, s, "ID-nas", "", created)})
	if err != nil {
		t.Fatal(err)
	}
	b := r.(dbus.BackupProperties)
	if b.Consistency != dbus.ConsistencyCrash || b.Quiesce != dbus.QuiesceAgent || b.Shortfall != "nobody answers" || b.HeldUsec != 85_000 {
		t.Errorf("%+v", b)
	}
	if b.ReadBytes != 60 || b.DataBytes != 40 || b.StoredBytes != 20 || len(b.Disks) != 2 || b.Disks[0].ReadBytes != 30 || b.Disks[0].Changes != "" {
		t.Errorf("%+v", b)
	}
	if !slices.Equal(b.Causes, []string{"first-backup"}) {
		t.Errorf("%q", b.Causes)
	}
}

func TestBackupsOfAnOfferingByNameAndByID(t *testing.T) {
	s, _ := newService(t)
	withRepositories(t, s, "nas", "tape")
	id := makeOffering(t, s, "daily", "nas", dbus.Settings{})
	want := backedUp(t, s, "ID-nas", "daily", created)
	backedUp(t, s, "ID-tape", "", created)
	for _, name := range []string{"daily", id} {
		got, _, err := s.ListBackups(t.Context(), dbus.BackupFilter{Offering: name}, "", 10)
		if err != nil || len(got) != 1 || got[0].ID != want {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
	if got, _, err := s.ListBackups(t.Context(), dbus.BackupFilter{Offering: "weekly"}, "", 10); err == nil {
		t.Errorf("of an offering that is not there: %+v", got)
	}
}
