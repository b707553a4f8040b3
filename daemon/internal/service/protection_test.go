package service

import (
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/dbus"
)

// manyDomains has nine domains: of each state of protection two, and one more
// that libvirt alone knows.
func manyDomains(t *testing.T, s *Service) {
	t.Helper()
	withRepositories(t, s, "nas")
	makeOffering(t, s, "daily", "nas", dbus.Settings{})
	ctx := t.Context()
	for i, state := range []string{"protected", "failing", "pending", "unassigned"} {
		for j := range 2 {
			uuid, name := fmt.Sprintf("u%d%d", i, j), fmt.Sprintf("%s-%d", state, j)
			if err := s.Catalog.SeenDomain(ctx, uuid, name); err != nil {
				t.Fatal(err)
			}
			if state != "unassigned" {
				if err := s.Catalog.AssignDomain(ctx, uuid, name, "daily"); err != nil {
					t.Fatal(err)
				}
			}
			if state == "protected" {
				backedUpAs(t, s, "00-"+uuid, catalog.Domain{UUID: uuid, Name: name}, "ID-nas", "daily", created)
			}
			if state == "failing" {
				job := "job-" + name
				if err := s.Catalog.CreateJob(ctx, catalog.Job{ID: job, Kind: "backup", Domain: uuid, Created: created}); err != nil {
					t.Fatal(err)
				}
				if err := s.Catalog.EndJob(ctx, job, catalog.JobEnd{State: catalog.JobFailed, ErrorMessage: "no space", Finished: time.Now()}); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	s.domains["live"] = hypervisor.Domain{UUID: "live", Name: "a name\nof two lines", State: "running"}
}

func TestDomainsInNeedAreListedFirst(t *testing.T) {
	s, _ := newService(t)
	manyDomains(t, s)
	want := []string{"failing-0", "failing-1", "pending-0", "pending-1", "a name\nof two lines", "unassigned-0", "unassigned-1", "protected-0", "protected-1"}
	for limit := 1; limit <= 10; limit++ {
		var got []string
		cursor, pages := "", 0
		for {
			page, err := s.ListDomains(t.Context(), dbus.DomainFilter{}, cursor, limit)
			if err != nil {
				t.Fatal(err)
			}
			counts := map[dbus.Protection]uint32{dbus.ProtectionFailing: 2, dbus.ProtectionPending: 2, dbus.ProtectionUnassigned: 3, dbus.ProtectionProtected: 2}
			if !maps.Equal(page.Counts, counts) {
				t.Errorf("counted %v", page.Counts)
			}
			for _, d := range page.Domains {
				got = append(got, d.Name)
			}
			pages++
			if cursor = page.Next; cursor == "" {
				break
			}
		}
		if !slices.Equal(got, want) || pages != (len(want)+limit-1)/limit {
			t.Errorf("%d at a time: %d pages of %q", limit, pages, got)
		}
	}
	if _, err := s.ListDomains(t.Context(), dbus.DomainFilter{}, "nonsense", 1); err == nil {
		t.Error("a cursor of nothing was taken")
	}
}

func TestDomainsAreListedAsTheyAreRead(t *testing.T) {
	s, _ := newService(t)
	manyDomains(t, s)
	failing := dbus.ProtectionFailing
	for _, f := range []dbus.DomainFilter{{}, {Offering: "daily"}, {Offering: "daily", Protection: &failing}} {
		page, err := s.ListDomains(t.Context(), f, "", 100)
		if err != nil || len(page.Domains) == 0 {
			t.Fatal(page, err)
		}
		for _, d := range page.Domains {
			one, err := s.Object(t.Context(), d.Ref())
			if err != nil || fmt.Sprint(one) != fmt.Sprint(d) {
				t.Errorf("%+v, read alone: %+v, %v", d, one, err)
			}
			if f.Offering != "" && d.Offering != f.Offering || f.Protection != nil && d.Protection != *f.Protection {
				t.Errorf("%+v was not asked for", d)
			}
		}
	}
}

func TestChainsAndBackupsAreListedAsTheyAreRead(t *testing.T) {
	s, _ := newService(t)
	manyDomains(t, s)
	open := dbus.ChainOpen
	chains, next, err := s.ListChains(t.Context(), dbus.ChainFilter{Repository: "nas", State: &open}, "", 1)
	if err != nil || len(chains) != 1 || next == "" {
		t.Fatal(chains, next, err)
	}
	backups, _, err := s.ListBackups(t.Context(), dbus.BackupFilter{Chain: chains[0].ID}, "", 10)
	if err != nil || len(backups) != 1 {
		t.Fatal(backups, err)
	}
	for _, r := range []dbus.Record{chains[0], backups[0]} {
		if one, err := s.Object(t.Context(), r.Ref()); err != nil || fmt.Sprint(one) != fmt.Sprint(r) {
			t.Errorf("%+v, read alone: %+v, %v", r, one, err)
		}
	}
	if rest, next, err := s.ListChains(t.Context(), dbus.ChainFilter{}, next, 10); err != nil || len(rest) != 1 || next != "" || rest[0].ID == chains[0].ID {
		t.Error(rest, next, err)
	}
}
