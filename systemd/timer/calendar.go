package timer

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"
)

// ErrCalendar says that systemd does not take a calendar, or that it is over for ever.
var ErrCalendar = errors.New("not a calendar as in systemd.time(7)")

// analyzeLimit bounds one run of systemd's parser, which answers at once.
const analyzeLimit = 30 * time.Second

// Elapses returns the next times after a moment at which one of the calendars elapses, in their order, count at most.
// systemd's own parser tells. ErrCalendar: it does not understand one of them, or one never elapses any more.
func Elapses(ctx context.Context, calendars []string, after time.Time, count int) ([]time.Time, error) {
	if err := checkCalendars(calendars); err != nil {
		return nil, err
	}
	var all []time.Time
	for _, c := range calendars {
		times, err := elapses(ctx, c, after, count)
		if err != nil {
			return nil, err
		}
		all = append(all, times...)
	}
	slices.SortFunc(all, time.Time.Compare)
	all = slices.CompactFunc(all, time.Time.Equal)
	return all[:min(count, len(all))], nil
}

// elapses asks about one calendar at a time, so that an error is about that one.
func elapses(ctx context.Context, calendar string, after time.Time, count int) ([]time.Time, error) {
	ctx, cancel := context.WithTimeout(ctx, analyzeLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, "systemd-analyze", "calendar", "--iterations="+strconv.Itoa(count),
		"--base-time=@"+strconv.FormatInt(after.Unix(), 10), "--", calendar)
	// Not TZ: the calendar is in the time of the host, as it is for systemd itself.
	cmd.Env = []string{"LC_ALL=C", "SYSTEMD_COLORS=0", "SYSTEMD_PAGER="}
	var complaint strings.Builder
	cmd.Stderr = &complaint
	out, err := cmd.Output()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && ctx.Err() == nil {
		return nil, fmt.Errorf("%w: %q: %s", ErrCalendar, calendar, strings.TrimSpace(complaint.String()))
	}
	if err != nil {
		return nil, fmt.Errorf("cannot ask systemd-analyze about calendar %q: %w", calendar, err)
	}
	times, err := parseElapses(string(out))
	if err != nil {
		return nil, fmt.Errorf("cannot read what systemd-analyze says of calendar %q: %w", calendar, err)
	}
	if len(times) == 0 {
		return nil, fmt.Errorf("%w: %q never elapses any more", ErrCalendar, calendar)
	}
	return times, nil
}

// parseElapses reads the times of systemd-analyze calendar: each in local time, and in UTC below if that is another.
func parseElapses(out string) ([]time.Time, error) {
	const utc = "Mon 2006-01-02 15:04:05 UTC"
	var times []time.Time
	pending := "" // a time of which the zone is not known
	settle := func() error {
		if pending == "" || pending == "never" {
			pending = ""
			return nil
		}
		t, err := time.Parse(utc, pending)
		pending = ""
		times = append(times, t)
		return err
	}
	for line := range strings.Lines(out) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
		switch {
		case key == "Next elapse" || strings.HasPrefix(key, "Iter"):
			if err := settle(); err != nil {
				return nil, err
			}
			pending = value
		case key == "(in UTC)":
			pending = value
		}
	}
	return times, settle()
}
