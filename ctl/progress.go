package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/term"

	"github.com/virtbackup/virtbackup/dbus"
)

// reporter shows how jobs go on. Its calls come one at a time.
type reporter interface {
	update(job int, u dbus.JobUpdate)
	close()
}

// newReporter returns bars on a terminal, lines elsewhere, and nothing for programs.
func (a *app) newReporter(jobs int) reporter {
	switch f, _ := a.err.(*os.File); {
	case a.json != jsonOff:
		return silence{}
	case isTerminal(a.err) && a.getenv("TERM") != "dumb":
		return &bars{out: a.err, updates: make([]dbus.JobUpdate, jobs), size: func() (int, int) {
			width, height, err := term.GetSize(int(f.Fd()))
			if err != nil || width < 1 || height < 1 {
				return 80, 24
			}
			return width, height
		}}
	}
	return &lines{out: a.err, last: make([]string, jobs)}
}

type silence struct{}

func (silence) update(int, dbus.JobUpdate) {}
func (silence) close()                     {}

const awayText = "virtbackupd does not answer; the job goes on, waiting for it"

// lines writes a line when a job enters a phase, and for each further tenth.
type lines struct {
	out  io.Writer
	last []string
}

func (l *lines) update(i int, u dbus.JobUpdate) {
	if u.Job.State.Final() {
		return // the outcome says more
	}
	line := fmt.Sprintf("%s: %s", title(u.Job), phase(u.Job))
	if tenths := int(u.Job.Progress * 10); tenths > 0 && u.Job.BytesTotal > 0 {
		line += fmt.Sprintf(" %d%%", tenths*10)
	}
	if u.Away {
		line = awayText
	}
	if line != l.last[i] {
		l.last[i] = line
		fmt.Fprintln(l.out, clean(line))
	}
}

func (l *lines) close() {}

// bars keeps a line with a bar for each job at the end of a terminal.
type bars struct {
	out     io.Writer
	updates []dbus.JobUpdate
	size    func() (width, height int)
	drawn   int // lines that stand there
}

func (b *bars) update(i int, u dbus.JobUpdate) {
	b.updates[i] = u
	width, height := b.size()
	var shown []string
	for _, u := range b.updates {
		if u.Job.ID != "" && !u.Job.State.Final() {
			shown = append(shown, bar(u, width, time.Now()))
		}
	}
	// What scrolled away could not be drawn over.
	if most := max(height-1, 1); len(shown) > most {
		shown = append(shown[:most-1], fmt.Sprintf("… and %d more", len(shown)-most+1))
	}
	b.clear()
	for _, line := range shown {
		fmt.Fprintf(b.out, "%s\n", line)
	}
	b.drawn = len(shown)
}

// clear takes away what was drawn.
func (b *bars) clear() {
	if b.drawn > 0 {
		fmt.Fprintf(b.out, "\x1b[%dA\r\x1b[J", b.drawn)
	}
	b.drawn = 0
}

func (b *bars) close() { b.clear() }

const barWidth = 20

// bar draws the line of a job, not wider than the terminal.
func bar(u dbus.JobUpdate, width int, now time.Time) string {
	job := u.Job
	line := clean(fmt.Sprintf("%s: %s", title(job), phase(job)))
	if u.Away {
		line = clean(title(job)) + ": " + awayText
	} else if job.BytesTotal > 0 {
		part := min(max(job.Progress, 0), 1)
		full := int(part * barWidth)
		line += fmt.Sprintf(" [%s%s] %3.0f%% %s of %s", strings.Repeat("#", full), strings.Repeat("-", barWidth-full),
			part*100, size(job.BytesDone), size(job.BytesTotal))
		if job.Rate > 0 {
			line += fmt.Sprintf(", %s/s", size(job.Rate))
		}
		if left := job.ETA.Sub(now); !job.ETA.IsZero() && left > 0 {
			line += ", " + span(left) + " left"
		}
	}
	if runes := []rune(line); len(runes) >= width {
		line = string(runes[:width-1])
	}
	return line
}

// phase says what a job is at.
func phase(job dbus.JobProperties) string {
	text := job.Phase
	if job.State != dbus.JobRunning || text == "" {
		text = string(job.State)
	}
	if job.Waiting != "" {
		text += ": " + job.Waiting
	}
	return text
}
