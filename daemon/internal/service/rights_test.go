package service

import (
	"errors"
	"testing"

	"github.com/virtbackup/virtbackup/daemon/internal/bus"
	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/dbus"
)

// ann is a user in the group ops; bob is one who is in none; nobody knows any other.
var ann, bob, stranger = bus.Caller{UID: 1001}, bus.Caller{UID: 1002}, bus.Caller{UID: 1003}

func people(uid uint32) ([]string, error) {
	switch uid {
	case ann.UID:
		return []string{"ann", "@ops"}, nil
	case bob.UID:
		return []string{"bob"}, nil
	}
	return nil, errors.New("no such user")
}

func TestOfferingIsForThoseItNames(t *testing.T) {
	s, _ := newService(t)
	s.People = people
	for _, c := range []struct {
		users    []string
		disabled bool
		allowed  []bus.Caller
		refused  map[bus.Caller]dbus.ErrorName
	}{
		{nil, false, []bus.Caller{{}, ann, bob, stranger}, nil},
		{[]string{"ann"}, false, []bus.Caller{{}, ann}, map[bus.Caller]dbus.ErrorName{bob: dbus.ErrNotAuthorized, stranger: dbus.ErrNotAuthorized}},
		{[]string{"@ops", "bob"}, false, []bus.Caller{{}, ann, bob}, map[bus.Caller]dbus.ErrorName{stranger: dbus.ErrNotAuthorized}},
		{[]string{"ops", "@bob"}, false, []bus.Caller{{}}, map[bus.Caller]dbus.ErrorName{ann: dbus.ErrNotAuthorized, bob: dbus.ErrNotAuthorized}},
		{nil, true, nil, map[bus.Caller]dbus.ErrorName{{}: dbus.ErrInvalidArgument, ann: dbus.ErrInvalidArgument}},
	} {
		o := catalog.Offering{Name: "gold", Disabled: c.disabled, Rights: catalog.Rights{Users: c.users}}
		for _, who := range c.allowed {
			if err := s.mayUse(who, o); err != nil {
				t.Errorf("for %v, to uid %d: %v", c.users, who.UID, err)
			}
		}
		for who, want := range c.refused {
			if err := s.mayUse(who, o); !errors.Is(err, want) {
				t.Errorf("for %v, to uid %d: %v instead of %v", c.users, who.UID, err, want)
			}
		}
	}
}

// TestServiceLevelIsKept has a domain in an offering that makes all its
// backups: no other offering or repository that its user names is a way around.
func TestServiceLevelIsKept(t *testing.T) {
	s, _ := newService(t)
	s.People = people
	withRepositories(t, s, "nas")
	makeOffering(t, s, "open", "nas", dbus.Settings{})
	id := makeOffering(t, s, "gold", "nas", dbus.Settings{})
	none, ops := false, []string{"@ops"}
	if err := s.UpdateOffering(t.Context(), bus.Caller{}, id, dbus.UpdateOfferingOptions{OfferingOptions: dbus.OfferingOptions{
		Users: &ops, Overrides: dbus.Overrides{Rights: dbus.Rights{AllowUserBackups: &none}},
	}}); err != nil {
		t.Fatal(err)
	}
	for uuid, offering := range map[string]string{"d1": "gold", "d2": "open"} {
		if err := s.Catalog.AssignDomain(t.Context(), uuid, uuid, offering); err != nil {
			t.Fatal(err)
		}
	}
	offer := func(name string) *catalog.Offering {
		if name == "" {
			return nil
		}
		o, err := s.Catalog.Offering(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		return &o
	}
	for _, c := range []struct {
		what         string
		who          bus.Caller
		domain       string
		named        string
		backUp, plan error
	}{
		{"root", bus.Caller{}, "d1", "gold", nil, nil},
		{"its own", ann, "d1", "gold", dbus.ErrNotAuthorized, nil},
		{"ad hoc", ann, "d1", "", dbus.ErrNotAuthorized, nil},
		{"another", ann, "d1", "open", dbus.ErrNotAuthorized, nil},
		{"its own, which is for others", bob, "d1", "gold", dbus.ErrNotAuthorized, nil},
		{"of an open one", bob, "d2", "open", nil, nil},
		{"of an open one, ad hoc", bob, "d2", "", nil, nil},
		{"named, which is for others", bob, "d2", "gold", dbus.ErrNotAuthorized, dbus.ErrNotAuthorized},
		{"named", ann, "d2", "gold", dbus.ErrNotAuthorized, nil},
		{"of no offering", bob, "d3", "", nil, nil},
	} {
		if err := s.mayBackUp(t.Context(), c.who, c.domain, offer(c.named)); !errors.Is(err, c.backUp) || c.backUp == nil && err != nil {
			t.Errorf("%s, backup: %v instead of %v", c.what, err, c.backUp)
		}
		if err := s.MaySchedule(t.Context(), c.who, c.domain, offer(c.named)); !errors.Is(err, c.plan) || c.plan == nil && err != nil {
			t.Errorf("%s, schedule: %v instead of %v", c.what, err, c.plan)
		}
	}
	yes := true
	if err := s.SetOverrides(t.Context(), bus.Caller{}, "d1", dbus.Overrides{Rights: dbus.Rights{AllowUserBackups: &yes}}, nil); err != nil {
		t.Fatal(err)
	}
	if err := s.mayBackUp(t.Context(), ann, "d1", offer("gold")); err != nil {
		t.Errorf("a domain that may: %v", err)
	}
}
