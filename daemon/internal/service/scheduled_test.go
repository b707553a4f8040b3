package service

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/bus"
	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/dbus"
)

// libvirt has these domains, by UUID, and nothing happens.
type libvirt map[string]hypervisor.Domain

func (l libvirt) Lookup(_ context.Context, uuid string) (hypervisor.Domain, error) {
	if d, ok := l[uuid]; ok {
		return d, nil
	}
	return hypervisor.Domain{}, hypervisor.ErrNoDomain
}
func (l libvirt) Domains(context.Context) ([]hypervisor.Domain, error) { return nil, nil }
func (l libvirt) Subscribe(context.Context) <-chan hypervisor.Event    { return nil }

// TestWhatAScheduleBacksUp has schedules find their domains, how each is backed
// up, and what is in the way.
func TestWhatAScheduleBacksUp(t *testing.T) {
	s, _ := newService(t)
	s.People = people
	s.Domains = libvirt{"d1": {UUID: "d1", Name: "web"}, "d3": {UUID: "d3", Name: "free"}}
	withRepositories(t, s, "nas", "tape", "away")
	ctx := t.Context()
	if err := s.Catalog.FoundRepository(ctx, "ID-away", catalog.Finding{State: "gone", Problem: "no such directory", Checked: time.Now()}); err != nil {
		t.Fatal(err)
	}
	gold := makeOffering(t, s, "gold", "nas", dbus.Settings{ChainSize: new(uint32(3)), Quiesce: new(dbus.QuiesceAgent)})
	makeOffering(t, s, "empty", "nas", dbus.Settings{})
	for uuid, name := range map[string]string{"d1": "web", "d2": "mail"} {
		if err := s.Catalog.AssignDomain(ctx, uuid, name, "gold"); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Catalog.SeenDomain(ctx, "d3", "free"); err != nil {
		t.Fatal(err)
	}
	change := func(o dbus.OfferingOptions) {
		t.Helper()
		if err := s.UpdateOffering(ctx, bus.Caller{}, gold, dbus.UpdateOfferingOptions{OfferingOptions: o}); err != nil {
			t.Fatal(err)
		}
	}
	blocked := func(what string, c catalog.Schedule, passing bool, reason string) {
		t.Helper()
		if _, o := s.Prepare(ctx, c); o == nil || o.Passing != passing || !strings.Contains(o.Reason, reason) {
			t.Errorf("%s: %+v instead of %q", what, o, reason)
		}
	}

	w, o := s.Prepare(ctx, catalog.Schedule{Offering: "gold"})
	if o != nil || len(w.LeftOut) != 1 || w.LeftOut[0] != "mail is left out: the domain is gone" {
		t.Errorf("%+v, %+v", w, o)
	}
	web := catalog.Domain{UUID: "d1", Name: "web", Offering: "gold"}
	b, err := s.scheduledBackup(ctx, catalog.Schedule{Domain: "d1", Repository: "ID-tape", Isolated: true, Quiesce: "none"}, web)
	if err != nil || b.request.Repository != "ID-tape" || b.request.Offering != "gold" || b.request.ChainSize != 3 || b.request.Quiesce != "none" || !b.request.Isolated {
		t.Errorf("to another repository: %+v, %v", b.request, err)
	}
	b, err = s.scheduledBackup(ctx, catalog.Schedule{Offering: "gold"}, web)
	if err != nil || b.request.Repository != "ID-nas" || b.request.Quiesce != "agent" || b.request.Isolated {
		t.Errorf("to its own: %+v, %v", b.request, err)
	}
	if _, o := s.Prepare(ctx, catalog.Schedule{Domain: "d3", Repository: "ID-nas"}); o != nil {
		t.Errorf("of no offering, to a repository: %+v", o)
	}
	blocked("gone", catalog.Schedule{Domain: "d2"}, false, "the domain is gone")
	blocked("of no offering", catalog.Schedule{Domain: "d3"}, false, "assigned to no offering")
	blocked("away", catalog.Schedule{Domain: "d1", Repository: "ID-away"}, true, `"away" is away: no such directory`)
	blocked("no domains", catalog.Schedule{Offering: "empty"}, false, "no domain is assigned")
	blocked("no offering", catalog.Schedule{Offering: "none"}, false, `offering "none" is gone`)

	if !s.recheck("ID-nas") || s.recheck("ID-nas") || !s.recheck("ID-tape") {
		t.Error("a repository is looked at again and again, or not at all")
	}

	// Its own schedules are what an offering is for, but not those of users.
	none := false
	change(dbus.OfferingOptions{Overrides: dbus.Overrides{Rights: dbus.Rights{AllowUserSchedules: &none}}})
	blocked("of a user", catalog.Schedule{Domain: "d1", UID: ann.UID}, false, "no schedules of users")
	if _, o := s.Prepare(ctx, catalog.Schedule{Domain: "d1"}); o != nil {
		t.Errorf("of root: %+v", o)
	}
	yes := true
	change(dbus.OfferingOptions{Disabled: &yes})
	blocked("disabled", catalog.Schedule{Offering: "gold"}, false, `offering "gold" is disabled`)
	blocked("disabled", catalog.Schedule{Domain: "d1"}, false, `offering "gold" is disabled`)
}
