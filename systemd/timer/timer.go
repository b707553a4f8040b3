// Package timer keeps the timer units of schedules: real unit files in /etc/systemd/system, so that they show up in
// systemctl list-timers, survive a reboot, and start the companion command also while the daemon is down.
//
// It knows systemd's D-Bus API and its parser of calendars, systemd-analyze(1), and nothing of what a schedule does.
package timer

import (
	"fmt"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

// Directory is where the unit files are.
const Directory = "/etc/systemd/system"

// stamps is where systemd keeps when persistent timers elapsed last, systemd.timer(5).
const stamps = "/var/lib/systemd/timers"

const (
	prefix = "virtbackup-schedule-"
	suffix = ".timer"
)

// MaximumCalendars is how many calendars one timer has at most.
const MaximumCalendars = 16

// Timer is the timer of one schedule.
type Timer struct {
	ID              string // of the schedule: letters and digits
	Name            string // of the schedule, for people: letters, digits, dots, underscores and dashes
	Calendars       []string
	RandomizedDelay time.Duration
	Persistent      bool // an elapse that was missed is made up for
}

// UnitName is the name of the timer unit of a schedule.
func UnitName(id string) string { return prefix + id + suffix }

func path(id string) string { return filepath.Join(Directory, UnitName(id)) }

func stamp(id string) string { return filepath.Join(stamps, "stamp-"+UnitName(id)) }

// idOf is the inverse of UnitName, also for the path of a unit file.
func idOf(unit string) (string, bool) {
	id, ok := strings.CutPrefix(filepath.Base(unit), prefix)
	if !ok {
		return "", false
	}
	id, ok = strings.CutSuffix(id, suffix)
	return id, ok && identifier.MatchString(id)
}

// What may get into a unit file. Neither pattern has a line's end, a specifier's percent sign, a quote, or a backslash.
var (
	identifier = regexp.MustCompile(`^[A-Za-z0-9]{1,64}$`)
	plain      = regexp.MustCompile(`^[A-Za-z0-9._-]{1,64}$`)
	calendar   = regexp.MustCompile(`^[A-Za-z0-9*][A-Za-z0-9 *,./:~_+-]{0,199}$`)
)

// MaximumDelay of a timer is longer than any sensible one, and short enough for systemd to add it to a time.
const MaximumDelay = 365 * 24 * time.Hour

// check refuses what must not get into a unit file. Whether systemd understands the calendars is for Elapses to tell.
func (t Timer) check() error {
	switch {
	case !identifier.MatchString(t.ID):
		return fmt.Errorf("%q is not the id of a schedule", t.ID)
	case !plain.MatchString(t.Name):
		return fmt.Errorf("%q is not the name of a schedule", t.Name)
	case t.RandomizedDelay < 0 || t.RandomizedDelay > MaximumDelay:
		return fmt.Errorf("a randomized delay of %s is out of bounds: at most a year", t.RandomizedDelay)
	}
	return checkCalendars(t.Calendars)
}

func checkCalendars(calendars []string) error {
	if len(calendars) == 0 || len(calendars) > MaximumCalendars {
		return fmt.Errorf("%w: %d calendars are given, and 1 to %d can be", ErrCalendar, len(calendars), MaximumCalendars)
	}
	for _, c := range calendars {
		if !calendar.MatchString(c) {
			return fmt.Errorf("%w: %q has other characters than calendars have, or too many", ErrCalendar, c)
		}
	}
	return nil
}

// file is the unit file.
func (t Timer) file() []byte {
	var b strings.Builder
	fmt.Fprintf(&b, "# Made by virtbackupd, which puts it back when it starts: change it with \"virtbackupctl schedule\".\n\n"+
		"[Unit]\nDescription=Backup schedule %s\nDocumentation=man:virtbackupctl(1)\n\n"+
		"[Timer]\nUnit=virtbackup-schedule@%s.service\n", t.Name, t.ID)
	for _, c := range t.Calendars {
		fmt.Fprintf(&b, "OnCalendar=%s\n", c)
	}
	persistent := "no"
	if t.Persistent {
		persistent = "yes"
	}
	fmt.Fprintf(&b, "AccuracySec=1s\nRandomizedDelaySec=%dus\nPersistent=%s\n\n[Install]\nWantedBy=timers.target\n",
		t.RandomizedDelay.Microseconds(), persistent)
	return []byte(b.String())
}
