package service

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/lifecycle"
	"github.com/virtbackup/virtbackup/dbus"
	"github.com/virtbackup/virtbackup/hooks/spool"
)

func manager(t *testing.T, s *Service) dbus.ManagerProperties {
	t.Helper()
	m, err := s.Manager(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestManagerTellsOfTheHook(t *testing.T) {
	s, _ := newService(t)
	if m := manager(t, s); m.HookState != "" || !m.HookLast.IsZero() {
		t.Errorf("where nobody looks: %+v", m)
	}
	if err := s.NotifyHook(t.Context()); !errors.Is(err, dbus.ErrUnavailable) {
		t.Errorf("where nobody takes over what it says: %v", err)
	}
	path, records := filepath.Join(t.TempDir(), "virtbackup"), t.TempDir()
	s.Lifecycle = lifecycle.New(lifecycle.Deps{Catalog: s.Catalog, SpoolDirectory: records, HookPath: path, Log: s.Log})
	if m := manager(t, s); m.HookState != dbus.HookMissing {
		t.Errorf("without a hook: %+v", m)
	}
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if m := manager(t, s); m.HookState == dbus.HookMissing || !m.HookLast.IsZero() {
		t.Errorf("with a hook: %+v", m)
	}
	told := time.UnixMicro(1_700_000_000_000_000)
	if _, err := spool.Write(records, spool.Record{
		Version: 1, Time: told.UnixMicro(), Domain: domainUUID, Name: "web", Operation: "started",
	}); err != nil {
		t.Fatal(err)
	}
	if err := s.NotifyHook(t.Context()); err != nil {
		t.Fatal(err)
	}
	if m := manager(t, s); !m.HookLast.Equal(told) {
		t.Errorf("after it spoke: %+v", m)
	}
}
