package window

import (
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func at(t *testing.T, text string) time.Time {
	t.Helper()
	place, err := time.LoadLocation("Europe/Berlin")
	if err != nil {
		t.Skip(err)
	}
	v, err := time.ParseInLocation("2006-01-02 15:04", text, place)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestNext(t *testing.T) {
	for _, c := range []struct{ windows, now, want string }{
		{"", "2026-11-28 12:00", "2026-11-28 12:00"},
		{"22:00-06:00", "2026-11-28 12:00", "2026-11-28 22:00"},
		{"22:00-06:00", "2026-11-28 22:00", "2026-11-28 22:00"},
		{"22:00-06:00", "2026-11-28 05:59", "2026-11-28 05:59"},
		{"22:00-06:00", "2026-11-28 06:00", "2026-11-28 22:00"},
		{"Mon..Fri 22:00-06:00", "2026-11-28 05:00", "2026-11-28 05:00"}, // Saturday, of Friday's
		{"Mon..Fri 22:00-06:00", "2026-11-28 23:00", "2026-11-30 22:00"},
		{"fri..monday 01:00-02:00", "2026-12-01 00:30", "2026-12-04 01:00"},
		{"Wed 00:00-24:00", "2026-12-02 23:59", "2026-12-02 23:59"},
		{"Wed 00:00-24:00", "2026-12-03 00:00", "2026-12-09 00:00"},
		{"Sat,Sun 12:00-13:00;Wed 05:00-06:00", "2026-11-29 13:00", "2026-12-02 05:00"},
		{"02:15-02:45", "2026-03-29 01:00", "2026-03-29 03:15"}, // an hour that there is not
	} {
		var texts []string
		if c.windows != "" {
			texts = strings.Split(c.windows, ";")
		}
		all, err := ParseAll(texts)
		if err != nil {
			t.Fatal(err)
		}
		if got, want := all.Next(at(t, c.now)), at(t, c.want); !got.Equal(want) {
			t.Errorf("%q at %s: %v instead of %v", c.windows, c.now, got, want)
		}
	}
}

func TestRefused(t *testing.T) {
	for _, text := range []string{"", "22-06", "22:00", "22:00-22:00", "24:00-06:00", "24:01-06:00", "22:60-23:00", "Mon-Fri 22:00-06:00",
		"Mon..Fri  22:00-06:00", "Mo 22:00-06:00", "Mon,, 22:00-06:00", "Mon..Tue..Wed 22:00-06:00", "Mon 22:00-06:00 "} {
		if w, err := Parse(text); err == nil {
			t.Errorf("%q is %+v", text, w)
		}
	}
}

// TestNextIsOpen has the time at which a window is said to open be in it, and none before.
func TestNextIsOpen(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		w := Window{from: rapid.IntRange(0, endOfDay-1).Draw(rt, "from")}
		w.to = rapid.IntRange(0, endOfDay).Filter(func(m int) bool { return m != w.from }).Draw(rt, "to")
		w.days[rapid.IntRange(0, 6).Draw(rt, "day")] = true
		w.days[rapid.IntRange(0, 6).Draw(rt, "another")] = true
		now := time.Date(2026, 1, 1, 0, rapid.IntRange(0, 365*endOfDay).Draw(rt, "now"), 0, 0, time.UTC)
		next := w.next(now)
		if next.Before(now) || next.Sub(now) > 7*24*time.Hour || !w.next(next).Equal(next) {
			rt.Fatalf("%+v at %v: %v", w, now, next)
		}
		if next.After(now) {
			between := now.Add(time.Duration(rapid.Int64Range(0, int64(next.Sub(now))-1).Draw(rt, "between")))
			if got := w.next(between); !got.Equal(next) {
				rt.Fatalf("%+v at %v: %v, but at %v: %v", w, now, next, between, got)
			}
		}
	})
}
