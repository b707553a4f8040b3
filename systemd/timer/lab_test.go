//go:build lab

package timer

import (
	"context"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

func systemctl(args ...string) string {
	out, _ := exec.Command("systemctl", args...).CombinedOutput()
	return strings.TrimSpace(string(out))
}

// TestTimerUnits has a timer made, changed, stopped and removed by the real
// systemd, and looks at it as an admin does.
func TestTimerUnits(t *testing.T) {
	m := New(t.Context())
	t.Cleanup(m.Close)
	timer := Timer{ID: "01LABTEST", Name: "lab", Calendars: []string{"*-*-* 03:00:00"}, Persistent: true}
	unit := UnitName(timer.ID)
	t.Cleanup(func() { _ = m.Remove(context.Background(), timer.ID) })
	set := func(enabled bool) State {
		t.Helper()
		if err := m.Set(t.Context(), timer, enabled); err != nil {
			t.Fatal(err)
		}
		s, err := m.State(t.Context(), timer.ID)
		if err != nil || s.Active != enabled || s.Next.IsZero() == enabled {
			t.Fatalf("%+v, %v: %s", s, err, systemctl("status", unit))
		}
		return s
	}
	next := func(s State) {
		t.Helper()
		want, err := Elapses(t.Context(), timer.Calendars, time.Now(), 1)
		if err != nil || !want[0].Equal(s.Next) {
			t.Errorf("it is due at %s, and systemd-analyze says %v, %v", s.Next, want, err)
		}
	}
	if s, err := m.State(t.Context(), timer.ID); err != nil || s.Active {
		t.Fatalf("before it is made: %+v, %v", s, err)
	}
	next(set(true))
	if list := systemctl("list-timers", "--no-legend"); !strings.Contains(list, unit) {
		t.Errorf("list-timers: %s", list)
	}
	if is := systemctl("is-enabled", unit); is != "enabled" {
		t.Error(is)
	}
	before, err := os.Stat(path(timer.ID))
	if err != nil {
		t.Fatal(err)
	}
	if before.Mode() != 0o644 {
		t.Errorf("the file's mode is %s", before.Mode())
	}
	set(true)
	if after, err := os.Stat(path(timer.ID)); err != nil || !os.SameFile(before, after) {
		t.Errorf("a timer that is as it is to be was written again, %v", err)
	}

	// More often, and never before: nothing was missed, so nothing is made up for.
	timer.Calendars = []string{"hourly", "*-*-* 03:30:00"}
	next(set(true))
	if since := systemctl("show", "-P", "LastTriggerUSec", unit); since != "" && since != "n/a" {
		t.Errorf("a timer that was changed elapsed at once: %s", since)
	}
	set(false)
	if is := systemctl("is-enabled", unit); is != "disabled" {
		t.Error(is)
	}
	// Somebody takes the file away, and an older one stays behind.
	set(true)
	if err := os.Remove(path(timer.ID)); err != nil {
		t.Fatal(err)
	}
	systemctl("daemon-reload")
	next(set(true))
	if ids, err := m.IDs(); err != nil || len(ids) != 1 || ids[0] != timer.ID {
		t.Error(ids, err)
	}
	for range 2 {
		if err := m.Remove(t.Context(), timer.ID); err != nil {
			t.Fatal(err)
		}
	}
	if left := systemctl("list-unit-files", "--no-legend", "virtbackup-schedule-*") + systemctl("list-units", "--all", "--no-legend", unit); left != "" {
		t.Errorf("it is left: %s", left)
	}
	if _, err := os.Stat(stamp(timer.ID)); err == nil {
		t.Error("its stamp is left")
	}
}
