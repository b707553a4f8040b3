package quiesce

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
)

const someUUID = "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee"

func create(t *testing.T, directory string) *heldMarker {
	t.Helper()
	m, err := createMarker(directory, Marker{UUID: someUUID, Mode: Agent, Deadline: time.Now().Add(time.Hour)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.unlock)
	return m
}

func TestMarkerIsOnePerGuest(t *testing.T) {
	directory := filepath.Join(t.TempDir(), "frozen")
	m := create(t, directory)
	if _, err := createMarker(directory, m.Marker); !errors.Is(err, errBusy) {
		t.Errorf("a second one: %v", err)
	}
	entries, err := os.ReadDir(directory)
	if err != nil || len(entries) != 1 || entries[0].Name() != someUUID {
		t.Errorf("%v, %v", entries, err)
	}
	if err := m.remove(); err != nil {
		t.Fatal(err)
	}
	if m.present() {
		t.Error("it is still there")
	}
	again := create(t, directory)
	if m.present() {
		t.Error("another's marker is taken for it")
	}
	if err := m.remove(); err != nil || !again.present() {
		t.Errorf("another's marker was removed: %v", err)
	}
}

func TestMarkerPassesToWhoWaits(t *testing.T) {
	m := create(t, t.TempDir())
	other, err := openMarker(m.path)
	if err != nil {
		t.Fatal(err)
	}
	defer other.unlock()
	if locked, err := other.tryLock(); locked || err != nil {
		t.Fatalf("two hold the lock: %v", err)
	}
	if other.Held || !other.Deadline.Equal(m.Deadline) || other.Mode != Agent || other.UUID != someUUID {
		t.Errorf("%+v", other.Marker)
	}
	if err := m.markHeld(); err != nil {
		t.Fatal(err)
	}
	m.unlock() // as its death does
	if err := lock(other.file); err != nil {
		t.Fatal(err)
	}
	if other.reread(); !other.Held || !other.present() {
		t.Errorf("%+v", other.Marker)
	}
}

func TestMarkerNames(t *testing.T) {
	for _, uuid := range []string{"", "../" + someUUID, "AAAAAAAA-bbbb-cccc-dddd-eeeeeeeeeeee", someUUID + "\n", "x"} {
		if m, err := createMarker(t.TempDir(), Marker{UUID: uuid}); err == nil {
			t.Errorf("%q became %s", uuid, m.path)
		}
	}
	directory := t.TempDir()
	for _, name := range []string{someUUID, ".hidden", "readme"} {
		if err := os.WriteFile(filepath.Join(directory, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	paths, err := markers(directory)
	if err != nil || len(paths) != 1 || filepath.Base(paths[0]) != someUUID {
		t.Errorf("%v, %v", paths, err)
	}
	if paths, err := markers(filepath.Join(directory, "none")); err != nil || paths != nil {
		t.Errorf("%v, %v", paths, err)
	}
}

// The watchdog that comes when all is over says so, and ends.
func TestWatchWithoutMarker(t *testing.T) {
	var guest hypervisor.Hypervisor // not connected: it must not be asked
	ready := false
	err := Watch(t.Context(), &guest, filepath.Join(t.TempDir(), someUUID), nil, func() error { ready = true; return nil })
	if err != nil || !ready {
		t.Errorf("ready %v, %v", ready, err)
	}
}
