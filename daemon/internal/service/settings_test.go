package service

import (
	"testing"

	"github.com/virtbackup/virtbackup/daemon/internal/bus"
	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/dbus"
)

// withRepositories adds repositories of these names; their ids are the names with "ID-" before.
func withRepositories(t *testing.T, s *Service, names ...string) {
	t.Helper()
	for _, name := range names {
		if err := s.Catalog.CreateRepository(t.Context(), catalog.Repository{ID: "ID-" + name, Name: name, Path: "/" + name}); err != nil {
			t.Fatal(err)
		}
	}
}

// makeOffering makes an offering and returns its id.
func makeOffering(t *testing.T, s *Service, name, repository string, settings dbus.Settings) string {
	t.Helper()
	id, err := s.CreateOffering(t.Context(), bus.Caller{}, name, repository, settings)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func offering(t *testing.T, s *Service, id string) dbus.OfferingProperties {
	t.Helper()
	r, err := s.Object(t.Context(), dbus.Ref{Kind: dbus.KindOffering, ID: id})
	if err != nil {
		t.Fatal(err)
	}
	return r.(dbus.OfferingProperties)
}

func TestOfferingTellsHowChangesAreFound(t *testing.T) {
	s, _ := newService(t)
	withRepositories(t, s, "nas")
	id := makeOffering(t, s, "daily", "nas", dbus.Settings{})
	if o := offering(t, s, id); o.Tracking != dbus.TrackingCBT || o.Fallback != dbus.FallbackDigest || o.QuiescePolicy != dbus.QuiesceRequire {
		t.Errorf("of nothing said: %+v", o)
	}
	for _, tracking := range []dbus.Tracking{dbus.TrackingSnapshot, dbus.TrackingDigest} {
		if err := s.UpdateOffering(t.Context(), bus.Caller{}, id, dbus.UpdateOfferingOptions{Settings: dbus.Settings{Tracking: &tracking}}); err != nil {
			t.Fatal(err)
		}
		if o := offering(t, s, id); o.Tracking != tracking || o.Fallback != dbus.FallbackDigest || o.QuiescePolicy != dbus.QuiesceRequire {
			t.Errorf("%s: %+v", tracking, o)
		}
	}
	fallback, policy := dbus.FallbackFull, dbus.QuiescePrefer
	id = makeOffering(t, s, "weekly", "nas", dbus.Settings{Fallback: &fallback, QuiescePolicy: &policy})
	if o := offering(t, s, id); o.Tracking != dbus.TrackingCBT || o.Fallback != fallback || o.QuiescePolicy != policy {
		t.Errorf("%+v", o)
	}
}
