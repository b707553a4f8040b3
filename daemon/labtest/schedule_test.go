//go:build lab

package labtest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/virtbackup/virtbackup/dbus"
)

// repositoryAt makes one more repository, and returns its name.
func (h *host) repositoryAt(path string) string {
	h.t.Helper()
	nothing, name := uint64(0), strings.ReplaceAll(strings.Trim(path, "/"), "/", "-")
	_, job, err := h.CreateRepository(h.t.Context(), name, "dir", path, dbus.CreateRepositoryOptions{MinimumFree: &nothing})
	if err == nil {
		err = h.end(job).Err()
	}
	if err != nil {
		h.t.Fatal(err)
	}
	return name
}

// schedule makes a schedule that goes with the test, and returns its id.
func (h *host) schedule(name string, calendar string, o dbus.CreateScheduleOptions) string {
	h.t.Helper()
	id, err := h.CreateSchedule(h.t.Context(), name, []string{calendar}, o)
	if err != nil {
		h.t.Fatalf("cannot make a schedule: %v", err)
	}
	h.t.Cleanup(func() {
		if err := h.RemoveSchedule(context.Background(), id); err != nil && !errors.Is(err, dbus.ErrNotFound) {
			h.t.Error(err)
		}
	})
	return id
}

func (h *host) scheduled(id string) dbus.ScheduleProperties {
	h.t.Helper()
	s, err := dbus.Get[dbus.ScheduleProperties](h.t.Context(), h.Client, id)
	if err != nil {
		h.t.Fatal(err)
	}
	return s
}

// The gold offering keeps fewer backups in each repository than its schedules make.
const (
	goldRuns = 3
	goldKept = 2
)

// TestGoldOfferingRunsByItself has an offering with two schedules, to its own
// repository and another, back its three domains up, with the daemon stopped
// in between: a timer that is due starts it.
func TestGoldOfferingRunsByItself(t *testing.T) {
	h := newHost(t)
	second := h.repositoryAt(fresh(t, "/srv"))
	offering, err := h.FindOffering(t.Context(), h.offering)
	if err != nil {
		t.Fatal(err)
	}
	kept := uint32(goldKept)
	if err := h.UpdateOffering(t.Context(), offering, dbus.UpdateOfferingOptions{OfferingOptions: dbus.OfferingOptions{
		Overrides: dbus.Overrides{Retention: dbus.Retention{KeepLast: &kept}},
	}}); err != nil {
		t.Fatal(err)
	}
	guests := []*guest{newPausedGuest(t, "qcow2:16M"), defineGuest(t, "qcow2:16M"), defineGuest(t, "raw:16M")}
	for _, g := range guests {
		if err := h.AssignDomain(t.Context(), g.uuid, h.offering); err != nil {
			t.Fatal(err)
		}
	}
	guests[0].io("vda", "write -P 1 0 1M")
	queue := dbus.OverlapQueue
	ids := map[string]string{
		"":     h.schedule("gold", "*:*:0/10", dbus.CreateScheduleOptions{Offering: h.offering, Overlap: &queue}),
		second: h.schedule("gold-off-site", "*:*:5/10", dbus.CreateScheduleOptions{Offering: h.offering, Repository: second, Overlap: &queue}),
	}
	list := command(t, "", "systemctl", "list-timers", "--no-legend", "virtbackup-schedule-*")
	for _, id := range ids {
		if unit := h.scheduled(id).Unit; !strings.Contains(list, unit) {
			t.Errorf("list-timers does not have %s: %s", unit, list)
		}
	}
	for _, id := range ids {
		h.runs(id, dbus.RunSucceeded, 1)
	}
	command(t, "", "systemctl", "stop", "virtbackupd.service")
	guests[0].io("vda", "write -P 2 512k 1M")
	// Not asked, which would start it, too.
	eventually(t, "a timer starts the daemon", func() error {
		if state := command(t, "", "systemctl", "show", "-P", "ActiveState", "virtbackupd.service"); state != "active" {
			return errors.New(state)
		}
		return nil
	})
	for _, id := range ids {
		h.runs(id, dbus.RunSucceeded, goldRuns)
		if err := h.DisableSchedule(t.Context(), id); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "nothing runs any more", h.noJob)
	for _, g := range guests {
		now := g.snapshot()
		for repository, id := range ids {
			if repository == "" {
				repository = h.repository
			}
			h.pointsAreExact(g, repository, now, h.scheduled(id))
		}
	}
}

// pointsAreExact restores the newest backup of a guest in a repository, which
// is of a chain of its own there, and looks at which were kept.
func (h *host) pointsAreExact(g *guest, repository string, now snapshot, s dbus.ScheduleProperties) {
	h.t.Helper()
	var all []dbus.BackupProperties
	for b, err := range h.Backups(h.t.Context(), dbus.BackupFilter{Domain: g.uuid, Repository: repository}) {
		if err != nil {
			h.t.Fatal(err)
		}
		all = append(all, b)
	}
	if len(all) != goldKept {
		h.t.Fatalf("of what schedule %s made of %s, %d are kept: %+v", s.Name, g.name, len(all), all)
	}
	for i, b := range all {
		if b.Offering != h.offering || b.Chain != all[0].Chain || (b.Kind == dbus.KindFull) != (i == len(all)-1) {
			h.t.Errorf("backup %d of %s: %+v", i, g.name, b)
		}
	}
	h.restoreIsExact(all[0], now)
}

// TestScheduleRules has what is in the way of a run skip it, or let it wait,
// with the reason told.
func TestScheduleRules(t *testing.T) {
	h := newHost(t)
	path := fresh(t, "/srv")
	away := h.repositoryAt(path)
	g := defineGuest(t, "qcow2:16M")
	if err := h.AssignDomain(t.Context(), g.uuid, h.offering); err != nil {
		t.Fatal(err)
	}
	const never = "2190-01-01"
	queue := dbus.OverlapQueue
	waits := h.schedule("waits", never, dbus.CreateScheduleOptions{Domain: g.uuid, Repository: away, Overlap: &queue})
	skips := h.schedule("skips", never, dbus.CreateScheduleOptions{Domain: g.uuid, Repository: away})
	trigger := func(id string, want dbus.RunState, reason string) {
		t.Helper()
		state, why, jobs, err := h.TriggerSchedule(t.Context(), id, dbus.TriggerOptions{})
		if err != nil || state != want || !strings.Contains(why, reason) || (len(jobs) > 0) != (want == dbus.RunRunning) {
			t.Errorf("the run is %s (%s), jobs %v, %v, and not %s (%s)", state, why, jobs, err, want, reason)
		}
	}
	moved := path + ".away"
	if err := os.Rename(path, moved); err != nil {
		t.Fatal(err)
	}
	id, err := h.FindRepository(t.Context(), away)
	if err != nil {
		t.Fatal(err)
	}
	look := func() {
		t.Helper()
		job, err := h.CheckRepository(t.Context(), id, dbus.CheckRepositoryOptions{})
		if err != nil {
			t.Fatal(err)
		}
		h.end(job)
	}
	look()
	trigger(skips, dbus.RunSkipped, "is away")
	trigger(waits, dbus.RunWaiting, "is away")
	trigger(waits, dbus.RunSkipped, "waits already")
	if s := h.scheduled(skips); s.LastState != dbus.RunSkipped || !strings.Contains(s.LastReason, "is away") {
		t.Errorf("%+v", s)
	}
	journal := command(t, "", "journalctl", "-u", "virtbackupd", "-o", "cat", "--since", "-5min")
	if !strings.Contains(journal, "is away") {
		t.Error("the journal does not tell why a run was skipped")
	}
	if err := os.Rename(moved, path); err != nil {
		t.Fatal(err)
	}
	look() // and what waits begins
	h.runs(waits, dbus.RunSucceeded, 1)

	// A timer that is due while the daemon cannot be started tells it later.
	command(t, "", "systemctl", "mask", "--runtime", "--now", "virtbackupd.service")
	unmask := func() { command(t, "", "systemctl", "unmask", "--runtime", "virtbackupd.service") }
	t.Cleanup(unmask)
	due := "virtbackup-schedule@" + waits + ".service"
	command(t, "", "systemctl", "start", "--no-block", due)
	eventually(t, "the daemon cannot be told", func() error {
		if n := command(t, "", "systemctl", "show", "-P", "SubState", due); n != "auto-restart" {
			return errors.New(n)
		}
		return nil
	})
	unmask()
	h.runs(waits, dbus.RunSucceeded, 2)

	// A domain that is gone, and a schedule whose timer somebody took away.
	gone := defineGuest(t, "qcow2:16M")
	orphaned := h.schedule("gone", never, dbus.CreateScheduleOptions{Domain: gone.uuid, Repository: away})
	definition := command(t, "", "virsh", "-q", "dumpxml", gone.name)
	command(t, "", "virsh", "-q", "undefine", gone.name)
	t.Cleanup(func() { command(t, definition, "virsh", "-q", "define", "/dev/stdin") })
	trigger(orphaned, dbus.RunSkipped, "is gone")
	unit := h.scheduled(orphaned).Unit
	command(t, "", "systemctl", "disable", "--now", unit)
	eventually(t, "the schedule tells that its timer does not run", func() error {
		if s := h.scheduled(orphaned); !strings.Contains(s.Problem, "does not run") {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
	stray := "/etc/systemd/system/virtbackup-schedule-01STRAY.timer"
	if err := os.WriteFile(stray, []byte("[Timer]\nOnCalendar=daily\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	command(t, "", "systemctl", "restart", "virtbackupd.service")
	eventually(t, "timers are as the catalog says", func() error {
		if _, err := os.Stat(stray); err == nil {
			return errors.New("a timer of nobody's is left")
		}
		if state := command(t, "", "systemctl", "show", "-P", "ActiveState", unit); state != "active" {
			return errors.New(state)
		}
		return nil
	})
}

// runs waits until so many runs of a schedule have ended in a state.
func (h *host) runs(id string, state dbus.RunState, n int) {
	h.t.Helper()
	eventually(h.t, fmt.Sprintf("%d runs are %s", n, state), func() error {
		all, err := h.ScheduleRuns(h.t.Context(), id, 100)
		found := 0
		for _, r := range all {
			if r.State == state {
				found++
			}
		}
		if err == nil && found < n {
			err = fmt.Errorf("%+v", all)
		}
		return err
	})
}

// TestScheduleRefusals has nothing get into a unit file that is no calendar.
func TestScheduleRefusals(t *testing.T) {
	h := newHost(t)
	for _, calendar := range []string{"daily\nUnit=evil.service", "da%ily", "often", "2020-01-01", "", "--version"} {
		_, err := h.CreateSchedule(t.Context(), "bad", []string{calendar}, dbus.CreateScheduleOptions{Offering: h.offering})
		if !errors.Is(err, dbus.ErrInvalidArgument) {
			t.Errorf("%q: %v", calendar, err)
		}
	}
	if times, err := h.PreviewSchedule(t.Context(), []string{"*-*-* 12:00:00", "*-*-* 00:00:00"}, 4); err != nil || len(times) != 4 ||
		times[3].Sub(times[1]) != 24*time.Hour {
		t.Error(times, err)
	}
	if files := command(t, "", "sh", "-c", "ls /etc/systemd/system/virtbackup-schedule-* 2>/dev/null | wc -l"); files != "0" {
		t.Errorf("%s unit files are there", files)
	}
}
