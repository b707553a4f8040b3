package service

import (
	"errors"
	"strings"
	"testing"

	"github.com/virtbackup/virtbackup/daemon/internal/bus"
	"github.com/virtbackup/virtbackup/daemon/internal/config"
	"github.com/virtbackup/virtbackup/dbus"
)

// TestOfferingsAreWhatTheirFilesSay follows files through their life.
func TestOfferingsAreWhatTheirFilesSay(t *testing.T) {
	s, _ := newService(t)
	withRepositories(t, s, "nas")
	byHand := makeOffering(t, s, "daily", "nas", dbus.Settings{ChainSize: new(uint32(3))})
	var files []config.OfferingFile
	s.OfferingFiles = func() ([]config.OfferingFile, error) { return files, nil }
	file := func(name string, o dbus.Overrides) config.OfferingFile {
		return config.OfferingFile{Name: name, Path: "/etc/" + name, Options: dbus.UpdateOfferingOptions{
			Repository: new("nas"), OfferingOptions: dbus.OfferingOptions{Overrides: o},
		}}
	}
	load := func(all ...config.OfferingFile) error {
		files = all
		return s.LoadOfferings(t.Context())
	}
	named := func(name string) (o dbus.OfferingProperties, err error) {
		t.Helper()
		ref, err := s.Find(t.Context(), dbus.KindOffering, name)
		if err == nil {
			o = offering(t, s, ref.ID)
		}
		return o, err
	}

	gold := file("gold", dbus.Overrides{Retention: dbus.Retention{KeepLast: new(uint32(14))}})
	if err := load(gold); err != nil {
		t.Fatal(err)
	}
	o, err := named("gold")
	if err != nil || o.KeepLast != 14 || o.ChainSize != 8 || o.Origin != "/etc/gold" || !o.AllowUserBackups {
		t.Fatalf("made: %+v, %v", o, err)
	}
	for what, err := range map[string]error{
		"update": s.UpdateOffering(t.Context(), bus.Caller{}, o.ID, dbus.UpdateOfferingOptions{}),
		"remove": removeOffering(t, s, o.ID, dbus.RemoveOfferingOptions{}),
		"forced": removeOffering(t, s, o.ID, dbus.RemoveOfferingOptions{Forced: true}),
	} {
		if !errors.Is(err, dbus.ErrInvalidArgument) || !strings.Contains(err.Error(), "/etc/gold") {
			t.Errorf("%s: %v", what, err)
		}
	}

	// A file that says less than before, one that takes an offering over, and wrong ones.
	bad, lost := file("bad", dbus.Overrides{}), file("lost", dbus.Overrides{})
	bad.Err, lost.Options.Repository = errors.New("bad.toml:3: no"), new("nowhere")
	err = load(file("gold", dbus.Overrides{}), file("daily", dbus.Overrides{}), bad, lost, file("../x", dbus.Overrides{}))
	if err == nil || strings.Count(err.Error(), "\n") != 2 || !strings.Contains(err.Error(), "bad.toml:3: no") || !strings.Contains(err.Error(), `"nowhere"`) {
		t.Errorf("of wrong files: %v", err)
	}
	if o, err := named("gold"); err != nil || o.KeepLast != 0 {
		t.Errorf("changed: %+v, %v", o, err)
	}
	if o := offering(t, s, byHand); o.Origin != "/etc/daily" || o.ChainSize != 8 {
		t.Errorf("taken over: %+v", o)
	}

	// One that becomes wrong stays as it was; one that is gone goes, or is disabled.
	if err := s.Catalog.AssignDomain(t.Context(), "d1", "web", "daily"); err != nil {
		t.Fatal(err)
	}
	gold.Err = errors.New("gold.toml:1: no")
	if err := load(gold); err == nil {
		t.Error("a wrong file is nothing to tell")
	}
	if o, err := named("gold"); err != nil || o.Disabled {
		t.Errorf("of a file that became wrong: %+v, %v", o, err)
	}
	if o := offering(t, s, byHand); !o.Disabled || o.Origin != "" || len(o.Domains) != 1 {
		t.Errorf("of a file that is gone, in use: %+v", o)
	}
	if err := load(); err != nil {
		t.Fatal(err)
	}
	if _, err := named("gold"); !errors.Is(err, dbus.ErrNotFound) {
		t.Errorf("of a file that is gone: %v", err)
	}
}

func removeOffering(t *testing.T, s *Service, id string, o dbus.RemoveOfferingOptions) error {
	t.Helper()
	_, err := s.RemoveOffering(t.Context(), bus.Caller{}, id, o)
	return err
}
