// Package window knows the maintenance window: the hours of the week in which
// the daemon begins work that nobody waits for.
package window

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// Window is a span of time on some days of the week. One that ends before it
// begins goes on into the next day.
type Window struct {
	days     [7]bool // by time.Weekday, on which it begins
	from, to int     // minutes of the day
}

var pattern = regexp.MustCompile(`^(?:([A-Za-z.,]+) )?(\d\d):(\d\d)-(\d\d):(\d\d)$`)

// Parse reads a window as "Mon..Fri 22:00-06:00", "Sat,Sun 00:00-24:00" or
// "22:00-06:00", in the time of this host.
func Parse(text string) (Window, error) {
	m := pattern.FindStringSubmatch(text)
	if m == nil {
		return Window{}, fmt.Errorf("%q is not a window, as \"Mon..Fri 22:00-06:00\"", text)
	}
	var w Window
	var err error
	if w.days, err = parseDays(m[1]); err != nil {
		return Window{}, err
	}
	if w.from, err = parseMinute(m[2], m[3]); err != nil {
		return Window{}, err
	}
	if w.to, err = parseMinute(m[4], m[5]); err != nil {
		return Window{}, err
	}
	if w.from == w.to || w.from == endOfDay {
		return Window{}, fmt.Errorf("%q is no time at all: \"00:00-24:00\" is the whole day", text)
	}
	return w, nil
}

const endOfDay = 24 * 60

func parseMinute(hour, minute string) (int, error) {
	h, _ := strconv.Atoi(hour)
	m, _ := strconv.Atoi(minute)
	if m > 59 || h*60+m > endOfDay {
		return 0, fmt.Errorf("%s:%s is no time of the day", hour, minute)
	}
	return h*60 + m, nil
}

// parseDays reads a list of days and ranges of them; "" are all.
func parseDays(text string) (days [7]bool, err error) {
	if text == "" {
		text = "Mon..Sun"
	}
	for part := range strings.SplitSeq(text, ",") {
		first, last, isRange := strings.Cut(part, "..")
		if !isRange {
			last = first
		}
		from, err := parseDay(first)
		if err != nil {
			return days, err
		}
		to, err := parseDay(last)
		if err != nil {
			return days, err
		}
		for d := from; ; d = (d + 1) % 7 {
			days[d] = true
			if d == to {
				break
			}
		}
	}
	return days, nil
}

func parseDay(text string) (time.Weekday, error) {
	for d := time.Sunday; d <= time.Saturday; d++ {
		if name := d.String(); strings.EqualFold(text, name) || strings.EqualFold(text, name[:3]) {
			return d, nil
		}
	}
	return 0, fmt.Errorf("%q is no day of the week, as Mon", text)
}

// on returns when the window that begins on a day opens and closes.
func (w Window) on(year int, month time.Month, day int, place *time.Location) (opens, closes time.Time) {
	to := w.to
	if to < w.from {
		to += endOfDay
	}
	return time.Date(year, month, day, 0, w.from, 0, 0, place), time.Date(year, month, day, 0, to, 0, 0, place)
}

// next returns when it opens next; t itself when it is open.
func (w Window) next(t time.Time) time.Time {
	year, month, day := t.Date()
	for d := -1; ; d++ { // since yesterday: that one may still be open
		opens, closes := w.on(year, month, day+d, t.Location())
		if !w.days[time.Date(year, month, day+d, 12, 0, 0, 0, t.Location()).Weekday()] || !t.Before(closes) {
			continue
		}
		if opens.Before(t) {
			return t
		}
		return opens
	}
}

// Windows are open when one of them is. Without any it is always open.
type Windows []Window

// ParseAll reads several.
func ParseAll(texts []string) (Windows, error) {
	var all Windows
	for _, text := range texts {
		w, err := Parse(text)
		if err != nil {
			return nil, err
		}
		all = append(all, w)
	}
	return all, nil
}

// Next returns when one of them opens next; t itself when one is open.
func (all Windows) Next(t time.Time) time.Time {
	var first time.Time
	for _, w := range all {
		if n := w.next(t); first.IsZero() || n.Before(first) {
			first = n
		}
	}
	if first.IsZero() {
		return t
	}
	return first
}
