package timer

import (
	"errors"
	"os/exec"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestFile(t *testing.T) {
	const want = `# Made by virtbackupd, which puts it back when it starts: change it with "virtbackupctl schedule".

[Unit]
Description=Backup schedule gold
Documentation=man:virtbackupctl(1)

[Timer]
Unit=virtbackup-schedule@01ABC.service
OnCalendar=daily
OnCalendar=Mon..Fri *-*-* 12:00:00 Europe/Berlin
AccuracySec=1s
RandomizedDelaySec=90000000us
Persistent=yes

[Install]
WantedBy=timers.target
`
	timer := Timer{ID: "01ABC", Name: "gold", Calendars: []string{"daily", "Mon..Fri *-*-* 12:00:00 Europe/Berlin"},
		RandomizedDelay: 90 * time.Second, Persistent: true}
	if err := timer.check(); err != nil || string(timer.file()) != want {
		t.Errorf("%v\n%s", err, timer.file())
	}
	if id, ok := idOf(path("01ABC")); id != "01ABC" || !ok {
		t.Error(id, ok)
	}
	for _, other := range []string{"virtbackup-schedule-.timer", "virtbackup-schedule-a-b.timer", "virtbackup-schedule@a.timer", "virtbackup-schedule-a.service"} {
		if id, ok := idOf(other); ok {
			t.Errorf("%s is taken for the timer of %s", other, id)
		}
	}
}

// TestNothingGetsIntoTheFile has whatever the check lets through be no more
// than one line of the file, without specifiers.
func TestNothingGetsIntoTheFile(t *testing.T) {
	nasty := []string{"daily\nUnit=evil.service", "daily\r", "da%ily", "", " daily", "-h", "--version", "daily\x00", "daily;", "daily\\", `"daily"`, "#daily", "täglich",
		strings.Repeat("1", 201)}
	for _, c := range nasty {
		if err := checkCalendars([]string{"daily", c}); !errors.Is(err, ErrCalendar) {
			t.Errorf("%q is let through: %v", c, err)
		}
	}
	if checkCalendars(nil) == nil || checkCalendars(make([]string, MaximumCalendars+1)) == nil {
		t.Error("no calendars, or too many, are let through")
	}
	plainLines := strings.Count(string(Timer{ID: "a", Name: "b", Calendars: []string{"daily"}}.file()), "\n")
	rapid.Check(t, func(t *rapid.T) {
		timer := Timer{ID: rapid.String().Draw(t, "id"), Name: rapid.String().Draw(t, "name"),
			Calendars: []string{rapid.OneOf(rapid.String(), rapid.StringMatching(`[A-Z0-9a-z*%:\n .-]{1,9}`)).Draw(t, "calendar")}}
		if timer.check() != nil {
			timer.ID, timer.Name = "a", "b"
		}
		if timer.check() != nil {
			return
		}
		if file := string(timer.file()); strings.Count(file, "\n") != plainLines || strings.ContainsAny(file, "%\\\r\x00") {
			t.Errorf("%q", file)
		}
	})
	for _, bad := range []Timer{
		{ID: "a/b", Name: "b"}, {ID: "", Name: "b"}, {ID: "a", Name: "%i"}, {ID: "a", Name: "b c"}, {ID: "a", Name: "b", RandomizedDelay: -1},
		{ID: "a", Name: "b", RandomizedDelay: MaximumDelay + 1},
	} {
		bad.Calendars = []string{"daily"}
		if bad.check() == nil {
			t.Errorf("%+v is let through", bad)
		}
	}
}

func TestParseElapses(t *testing.T) {
	const berlin = `  Original form: 02:30
Normalized form: *-*-* 02:30:00
    Next elapse: Sun 2026-10-25 02:30:00 CEST
       (in UTC): Sun 2026-10-25 00:30:00 UTC
       From now: 1 month 4 days ago
       Iter. #2: Mon 2026-10-26 02:30:00 CET
       (in UTC): Mon 2026-10-26 01:30:00 UTC
       From now: 1 month 3 days ago
`
	const utc = `Normalized form: *-*-* *:*:00/10
    Next elapse: Sat 2026-11-28 13:03:40 UTC
       From now: 8s left
       Iter. #2: Sat 2026-11-28 13:03:50 UTC
       From now: 18s left
`
	at := func(text string) time.Time {
		when, err := time.Parse(time.DateTime, text)
		if err != nil {
			t.Fatal(err)
		}
		return when
	}
	for out, want := range map[string][]time.Time{
		berlin:                     {at("2026-10-25 00:30:00"), at("2026-10-26 01:30:00")},
		utc:                        {at("2026-11-28 13:03:40"), at("2026-11-28 13:03:50")},
		"    Next elapse: never\n": nil,
	} {
		got, err := parseElapses(out)
		if err != nil || len(got) != len(want) {
			t.Fatal(got, err)
		}
		for i := range want {
			if !got[i].Equal(want[i]) {
				t.Errorf("%s instead of %s", got[i], want[i])
			}
		}
	}
	if _, err := parseElapses("    Next elapse: Sat 2026-11-28 13:03:40 CET\n"); err == nil {
		t.Error("a time of an unknown zone is taken for UTC")
	}
}

// TestElapses asks the real parser.
func TestElapses(t *testing.T) {
	if _, err := exec.LookPath("systemd-analyze"); err != nil {
		t.Skip(err)
	}
	after := time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC)
	got, err := Elapses(t.Context(), []string{"*-*-* 12:00:00 UTC", "*-*-* 00/12:00:00 UTC"}, after, 3)
	if err != nil || len(got) != 3 {
		t.Fatal(got, err)
	}
	for i, hours := range []time.Duration{12, 24, 36} {
		if want := after.Add(hours * time.Hour); !got[i].Equal(want) {
			t.Errorf("%s instead of %s", got[i], want)
		}
	}
	for _, bad := range []string{"often", "2020-01-01", "Mon..", "25:00"} {
		if _, err := Elapses(t.Context(), []string{"daily", bad}, after.AddDate(10, 0, 0), 1); !errors.Is(err, ErrCalendar) || !strings.Contains(err.Error(), bad) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}
