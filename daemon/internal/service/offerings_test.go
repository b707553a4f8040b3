package service

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/bus"
	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/chain"
	"github.com/virtbackup/virtbackup/dbus"
)

// recorded records a backup of a domain that is complete, or still running.
func recorded(t *testing.T, s *Service, b catalog.Backup, complete bool) {
	t.Helper()
	job := "JOB-" + b.ID
	for _, err := range []error{
		s.Catalog.CreateJob(t.Context(), catalog.Job{ID: job, Kind: "backup", Domain: b.Domain, Created: time.Now()}),
		s.Catalog.StartJob(t.Context(), job, time.Now()),
		s.Catalog.CreateBackup(t.Context(), b, "", catalog.Step{Job: job, Name: "planned"}),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if complete {
		if err := s.Catalog.CommitBackup(t.Context(), b.ID, catalog.Commit{Finished: time.Now(), Images: []catalog.Image{{Target: "vda", Kind: b.Kind, Tracking: chain.Digest, StoredBytes: 10}}}); err != nil {
			t.Fatal(err)
		}
	}
}

func TestOfferingInUseIsRemovedOnlyByForce(t *testing.T) {
	s, _ := newService(t)
	withRepositories(t, s, "nas")
	id := makeOffering(t, s, "daily", "nas", dbus.Settings{})
	for _, uuid := range []string{"d1", "d2"} {
		if err := s.Catalog.AssignDomain(t.Context(), uuid, "web-"+uuid, "daily"); err != nil {
			t.Fatal(err)
		}
	}
	recorded(t, s, catalog.Backup{ID: "A1", Domain: "d1", DomainName: "web-d1", Repository: "ID-nas", Kind: chain.Full, Offering: "daily"}, true)
	remove := func(o dbus.RemoveOfferingOptions) ([]string, error) {
		return s.RemoveOffering(t.Context(), bus.Caller{}, id, o)
	}
	if _, err := remove(dbus.RemoveOfferingOptions{}); !errors.Is(err, dbus.ErrBusy) || !strings.Contains(err.Error(), `"web-d1", "web-d2"`) {
		t.Errorf("without force: %v", err)
	}
	for _, forced := range []bool{false, true} {
		if hit, err := remove(dbus.RemoveOfferingOptions{DryRun: true, Forced: forced}); !slices.Equal(hit, []string{"d1", "d2"}) || err != nil {
			t.Errorf("dry run: %v, %v", hit, err)
		}
	}
	if o := offering(t, s, id); len(o.Domains) != 2 {
		t.Fatalf("a dry run took it from domains: %v", o.Domains)
	}
	if hit, err := remove(dbus.RemoveOfferingOptions{Forced: true}); !slices.Equal(hit, []string{"d1", "d2"}) || err != nil {
		t.Fatalf("forced: %v, %v", hit, err)
	}
	if _, err := s.Object(t.Context(), dbus.Ref{Kind: dbus.KindOffering, ID: id}); !errors.Is(err, dbus.ErrNotFound) {
		t.Errorf("it is still there: %v", err)
	}
	if d, err := s.Catalog.Domain(t.Context(), "d2"); err != nil || d.Offering != "" {
		t.Errorf("%+v, %v", d, err)
	}
	if c, err := s.Catalog.Chain(t.Context(), "A1"); err != nil || c.State != chain.Finished {
		t.Errorf("the chain goes on: %+v, %v", c, err)
	}
}

func TestOfferingWithAScheduleIsInUse(t *testing.T) {
	s, _ := newService(t)
	withRepositories(t, s, "nas")
	id := makeOffering(t, s, "daily", "nas", dbus.Settings{})
	if err := s.Catalog.CreateSchedule(t.Context(), catalog.Schedule{ID: "S1", Name: "nightly", Offering: "daily", Overlap: catalog.OverlapSkip}); err != nil {
		t.Fatal(err)
	}
	if err := removeOffering(t, s, id, dbus.RemoveOfferingOptions{}); !errors.Is(err, dbus.ErrBusy) || !strings.Contains(err.Error(), `"nightly"`) {
		t.Errorf("without force: %v", err)
	}
	if err := removeOffering(t, s, id, dbus.RemoveOfferingOptions{Forced: true}); err != nil {
		t.Errorf("forced: %v", err)
	}
}

func TestAllBackupsOfADomainAreForeseen(t *testing.T) {
	s, _ := newService(t)
	withRepositories(t, s, "nas", "tape")
	full := catalog.Backup{ID: "A1", Domain: "d1", DomainName: "web", Repository: "ID-nas", Kind: chain.Full}
	child := full
	child.ID, child.Kind, child.Chain, child.Parent = "B1", chain.Incremental, "A1", "A1"
	elsewhere := full
	elsewhere.ID, elsewhere.Repository = "C1", "ID-tape"
	other := full
	other.ID, other.Domain = "D1", "d2"
	for _, b := range []catalog.Backup{full, child, elsewhere, other} {
		recorded(t, s, b, true)
	}
	foresee := func() ([]string, uint64, []string, error) {
		return s.DeleteDomainBackups(t.Context(), bus.Caller{}, "d1", dbus.DeleteDomainBackupsOptions{DryRun: true})
	}
	ids, bytes, jobs, err := foresee()
	if !slices.Equal(ids, []string{"C1", "B1", "A1"}) || bytes != 30 || len(jobs) > 0 || err != nil {
		t.Errorf("%v, %d bytes, jobs %v, %v", ids, bytes, jobs, err)
	}
	for _, id := range ids {
		if b, err := s.Catalog.Backup(t.Context(), id); err != nil || b.State != chain.Complete {
			t.Errorf("a dry run touched %s: %s, %v", id, b.State, err)
		}
	}
	if err := s.Catalog.HoldBackup(t.Context(), "B1", "for the auditor"); err != nil {
		t.Fatal(err)
	}
	if _, _, _, err := foresee(); !errors.Is(err, dbus.ErrBusy) || !strings.Contains(err.Error(), "for the auditor") {
		t.Errorf("while one is held: %v", err)
	}
	if err := s.Catalog.HoldBackup(t.Context(), "B1", ""); err != nil {
		t.Fatal(err)
	}
	running := child
	running.ID, running.Parent = "B2", "B1"
	recorded(t, s, running, false)
	if _, _, _, err := foresee(); !errors.Is(err, dbus.ErrBusy) {
		t.Errorf("while one is being made: %v", err)
	}
}
