package service

import (
	"errors"
	"testing"

	"github.com/virtbackup/virtbackup/daemon/internal/bus"
	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/chain"
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
	id, err := s.CreateOffering(t.Context(), bus.Caller{}, name, repository, settingsOnly(settings))
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
		if err := s.UpdateOffering(t.Context(), bus.Caller{}, id, dbus.UpdateOfferingOptions{OfferingOptions: settingsOnly(dbus.Settings{Tracking: &tracking})}); err != nil {
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

func settingsOnly(s dbus.Settings) dbus.OfferingOptions {
	return dbus.OfferingOptions{Overrides: dbus.Overrides{Settings: s}}
}

func TestDomainsOwnSettingsGoBeforeItsOfferings(t *testing.T) {
	s, _ := newService(t)
	withRepositories(t, s, "nas")
	makeOffering(t, s, "daily", "nas", dbus.Settings{ChainSize: new(uint32(3))})
	const uuid = "d1"
	if err := s.Catalog.AssignDomain(t.Context(), uuid, "web", "daily"); err != nil {
		t.Fatal(err)
	}
	of := func(key string) string {
		t.Helper()
		all, err := s.DomainSettings(t.Context(), uuid)
		if err != nil {
			t.Fatal(err)
		}
		for _, one := range all {
			if one.Key == key {
				return one.Value + " of the " + one.Source
			}
		}
		t.Fatalf("no %s among %v", key, all)
		return ""
	}
	set := func(o dbus.Overrides, unset ...string) error {
		return s.SetOverrides(t.Context(), bus.Caller{}, uuid, o, unset)
	}
	own := dbus.Overrides{Settings: dbus.Settings{Mode: new(dbus.ModeFull), ExcludeDisks: new([]string{"vdb", "vdc"})}, Retention: dbus.Retention{KeepLast: new(uint32(4))}}
	if err := set(own); err != nil {
		t.Fatal(err)
	}
	for key, want := range map[string]string{
		"mode": "full of the domain", "chain_size": "3 of the offering", "exclude_disks": "vdb, vdc of the domain", "keep_last": "4 of the domain",
	} {
		if got := of(key); got != want {
			t.Errorf("%s: %s, and not %s", key, got, want)
		}
	}
	if r, err := s.EffectiveRetention(t.Context(), uuid); err != nil || r != (chain.Retention{Last: 4}) {
		t.Errorf("kept are %+v, %v", r, err)
	}
	if err := set(dbus.Overrides{}, "mode", "keep_last"); err != nil {
		t.Fatal(err)
	}
	if got := of("mode") + ", " + of("keep_last") + ", " + of("exclude_disks"); got != "incremental of the default, 0 of the default, vdb, vdc of the domain" {
		t.Error(got)
	}
	for name, err := range map[string]error{
		"disk":    set(dbus.Overrides{Settings: dbus.Settings{IncludeDisks: new([]string{"../x"})}}),
		"both":    set(dbus.Overrides{Settings: dbus.Settings{IncludeDisks: new([]string{"vdb"})}}),
		"key":     set(dbus.Overrides{}, "size"),
		"step":    set(dbus.Overrides{Validation: dbus.Validation{ValidationSteps: new([]string{"rm"})}}),
		"too far": set(dbus.Overrides{Retention: dbus.Retention{KeepDaily: new(uint32(1 << 30))}}),
	} {
		if !errors.Is(err, dbus.ErrInvalidArgument) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestOfferingThatChangesLeavesDomainsReadable has a domain with a level that
// the offering's compression comes to have no longer.
func TestOfferingThatChangesLeavesDomainsReadable(t *testing.T) {
	s, _ := newService(t)
	withRepositories(t, s, "nas")
	id := makeOffering(t, s, "daily", "nas", dbus.Settings{Compression: new(dbus.CompressionZstd)})
	if err := s.Catalog.AssignDomain(t.Context(), "d1", "web", "daily"); err != nil {
		t.Fatal(err)
	}
	level := func(n uint32) dbus.Overrides { return dbus.Overrides{Settings: dbus.Settings{CompressionLevel: &n}} }
	if err := s.SetOverrides(t.Context(), bus.Caller{}, "d1", level(23), nil); !errors.Is(err, dbus.ErrInvalidArgument) {
		t.Errorf("a level that no compression has: %v", err)
	}
	if err := s.SetOverrides(t.Context(), bus.Caller{}, "d1", level(15), nil); err != nil {
		t.Fatal(err)
	}
	if err := s.UpdateOffering(t.Context(), bus.Caller{}, id, dbus.UpdateOfferingOptions{
		OfferingOptions: settingsOnly(dbus.Settings{Compression: new(dbus.CompressionZlib)}),
	}); err != nil {
		t.Fatal(err)
	}
	d, o, err := s.assigned(t.Context(), "d1")
	if err != nil {
		t.Fatal(err)
	}
	if e, err := effectiveOf(o, d); err != nil || e.Level != 9 || e.Compression != "zlib" {
		t.Errorf("level %d of %s, %v", e.Level, e.Compression, err)
	}
	if _, err := s.Objects(t.Context()); err != nil {
		t.Errorf("nothing can be listed: %v", err)
	}
}
