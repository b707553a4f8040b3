package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// page collects what a verb tells people.
type page struct {
	buf    bytes.Buffer
	color  bool
	legend bool // heads of columns, and counts
}

// line writes one line.
func (p *page) line(format string, args ...any) {
	p.buf.WriteString(clean(fmt.Sprintf(format, args...)) + "\n")
}

// table writes rows in aligned columns. Heads that begin with ">" are of
// columns aligned to the right.
func (p *page) table(heads []string, rows [][]string) {
	width := make([]int, len(heads))
	right := make([]bool, len(heads))
	names := make([]string, len(heads))
	for i, h := range heads {
		names[i], right[i] = strings.CutPrefix(h, ">")
	}
	all := rows
	if p.legend {
		all = append([][]string{names}, rows...)
	}
	for _, row := range all {
		for i, cell := range row {
			width[i] = max(width[i], utf8.RuneCountInString(clean(cell)))
		}
	}
	for n, row := range all {
		var line strings.Builder
		for i, cell := range row {
			cell = clean(cell)
			space := strings.Repeat(" ", width[i]-utf8.RuneCountInString(cell))
			if !p.legend || n > 0 {
				cell = p.paint(cell)
			}
			switch {
			case right[i]:
				line.WriteString(space + cell)
			case i < len(row)-1:
				line.WriteString(cell + space)
			default:
				line.WriteString(cell)
			}
			if i < len(row)-1 {
				line.WriteString("  ")
			}
		}
		p.buf.WriteString(strings.TrimRight(line.String(), " ") + "\n")
	}
}

// fields writes names and values, the names aligned to the right. Fields
// without a value are left out.
func (p *page) fields(pairs ...string) {
	width := 0
	for i := 0; i < len(pairs); i += 2 {
		if pairs[i+1] != "" {
			width = max(width, len(pairs[i]))
		}
	}
	for i := 0; i < len(pairs); i += 2 {
		if pairs[i+1] != "" {
			fmt.Fprintf(&p.buf, "%*s: %s\n", width, pairs[i], p.paint(clean(pairs[i+1])))
		}
	}
}

// paint colors the words that say that something is well, or is not.
func (p *page) paint(word string) string {
	if !p.color {
		return word
	}
	color := ""
	switch strings.TrimSpace(word) {
	case "protected", "complete", "succeeded", "ready", "online", "connected":
		color = "32"
	case "failing", "failed", "damaged", "missing", "unavailable", "gone", "hung", "broken", "not connected":
		color = "1;31"
	case "pending", "cancelling", "cancelled", "deleting", "slow", "full", "read-only":
		color = "33"
	default:
		return word
	}
	return "\x1b[" + color + "m" + word + "\x1b[0m"
}

// clean makes a text harmless for a terminal: control characters, which names
// and messages from elsewhere may hold, are written as escapes.
func clean(text string) string {
	if strings.IndexFunc(text, control) < 0 {
		return text
	}
	var b strings.Builder
	for _, r := range text {
		if control(r) {
			quoted := strconv.QuoteRuneToASCII(r)
			b.WriteString(quoted[1 : len(quoted)-1])
		} else {
			b.WriteRune(r)
		}
	}
	return b.String()
}

// control tells what changes how other characters are shown: control
// characters and those that format, as for the direction of writing.
func control(r rune) bool {
	return unicode.IsControl(r) || unicode.Is(unicode.Cf, r) || r == utf8.RuneError
}

// size returns bytes with an IEC unit.
func size(n uint64) string {
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	value := float64(n)
	unit := -1
	// What rounds up to 1024.0 is shown in the next unit.
	for value >= 1023.95 && unit < len(units)-1 {
		value /= 1024
		unit++
	}
	return fmt.Sprintf("%.1f %ciB", value, units[unit])
}

const units = "KMGTPE"

// parseSize reads a size: bytes, or with a unit of powers of 1024, as 10G, 10GiB.
func parseSize(text string) (uint64, error) {
	number := strings.TrimRight(text, "iB")
	shift := 0
	if number != "" {
		if i := strings.IndexByte(units, number[len(number)-1]&^0x20); i >= 0 && number[len(number)-1] > '9' {
			number, shift = number[:len(number)-1], 10*(i+1)
		}
	}
	n, err := strconv.ParseUint(number, 10, 64)
	if err != nil || n<<shift>>shift != n {
		return 0, fmt.Errorf("%q is no size: say bytes, or a number with K, M, G or T", text)
	}
	return n << shift, nil
}

// moment returns a time for people, in their zone; empty for none.
func moment(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.Local().Format("2006-01-02 15:04:05")
}

// parseTime reads a point in time, in the zone of the person unless it says
// one, or how long ago it was.
func parseTime(text string, now time.Time) (time.Time, error) {
	for _, layout := range []string{time.RFC3339, "2006-01-02 15:04:05", "2006-01-02 15:04", "2006-01-02"} {
		if t, err := time.ParseInLocation(layout, text, time.Local); err == nil {
			return t, nil
		}
	}
	if days, ok := strings.CutSuffix(text, "d"); ok {
		if n, err := strconv.ParseUint(days, 10, 16); err == nil {
			return now.AddDate(0, 0, -int(n)), nil
		}
	}
	if ago, err := time.ParseDuration(text); err == nil && ago >= 0 {
		return now.Add(-ago), nil
	}
	return time.Time{}, fmt.Errorf("%q is no time: say one as 2026-01-31, \"2026-01-31 14:00\", or how long ago, as 7d or 12h", text)
}

// span returns how long something takes.
func span(d time.Duration) string {
	d = d.Round(time.Second)
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%d s", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%d min %02d s", int(d.Minutes()), int(d.Seconds())%60)
	}
	return fmt.Sprintf("%d h %02d min", int(d.Hours()), int(d.Minutes())%60)
}

// brief returns how long something took that should be short.
func brief(d time.Duration) string {
	if d < time.Second {
		return fmt.Sprintf("%d ms", (d + time.Millisecond - 1).Milliseconds())
	}
	return elapsed(d)
}

// elapsed returns how long something took: what was short, to the tenth.
func elapsed(d time.Duration) string {
	if d < 10*time.Second {
		return fmt.Sprintf("%.1f s", d.Seconds())
	}
	return span(d)
}

// runPager shows a text in a pager, less unless the person has another, and
// tells whether it could.
func runPager(pager string, out io.Writer, text []byte) bool {
	command := strings.Fields(pager)
	if len(command) == 0 {
		command = []string{"less"}
	}
	cmd := exec.Command(command[0], command[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(text), out, os.Stderr
	// As systemd's tools: end on one page, keep colors, leave the text; and
	// let nobody run commands from it.
	cmd.Env = append(os.Environ(), "LESS=FRSXMK", "LESSSECURE=1")
	if cmd.Start() != nil {
		return false
	}
	_ = cmd.Wait() // how a person left the pager does not matter
	return true
}
