package journal

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"testing"

	"github.com/coreos/go-systemd/v22/journal"
	"github.com/google/go-cmp/cmp"
)

// entry is what reached the library that speaks to journald.
type entry struct {
	Message  string
	Priority journal.Priority
	Fields   map[string]string
}

func recorder(level slog.Leveler) (*slog.Logger, *[]entry) {
	var sent []entry
	h := &handler{level: level, send: func(m string, p journal.Priority, f map[string]string) error {
		sent = append(sent, entry{m, p, f})
		return nil
	}}
	return slog.New(h), &sent
}

func TestFields(t *testing.T) {
	log, sent := recorder(slog.LevelInfo)
	base := log.With(Job, "01J", "kind", "backup")
	base.With(Domain, "uuid-1").Error("cannot back up", Error, errors.New("disk\nis full"), slog.Group("disk", "target", "vda", "size", 10))
	base.With(Domain, "uuid-2").WithGroup("worker").Info("started", "Unit-name", "x.service", slog.Group("", "inline", true))
	base.Debug("not wanted")
	log.Warn("plain", "ääh=\n", "x", "", "no key")
	base.WithGroup("g").With(MessageID, JobFailed).Error("failed")
	want := []entry{
		{"cannot back up: disk\nis full", journal.PriErr, map[string]string{"VIRTBACKUP_JOB": "01J", "VIRTBACKUP_KIND": "backup",
			"VIRTBACKUP_DOMAIN": "uuid-1", "VIRTBACKUP_ERROR": "disk\nis full", "VIRTBACKUP_DISK_TARGET": "vda", "VIRTBACKUP_DISK_SIZE": "10"}},
		{"started", journal.PriInfo, map[string]string{"VIRTBACKUP_JOB": "01J", "VIRTBACKUP_KIND": "backup", "VIRTBACKUP_DOMAIN": "uuid-2",
			"VIRTBACKUP_WORKER_UNIT_NAME": "x.service", "VIRTBACKUP_WORKER_INLINE": "true"}},
		{"plain", journal.PriWarning, map[string]string{"VIRTBACKUP___H__": "x"}},
		{"failed", journal.PriErr, map[string]string{"VIRTBACKUP_JOB": "01J", "VIRTBACKUP_KIND": "backup", "MESSAGE_ID": string(JobFailed)}},
	}
	if diff := cmp.Diff(want, *sent); diff != "" {
		t.Error(diff)
	}
}

func TestLevelChangesWhileRunning(t *testing.T) {
	var level slog.LevelVar
	log, sent := recorder(&level)
	log.Debug("one")
	level.Set(slog.LevelDebug)
	log.Debug("two")
	if len(*sent) != 1 || (*sent)[0].Message != "two" || (*sent)[0].Priority != journal.PriDebug {
		t.Errorf("got %+v", *sent)
	}
}

func TestFieldNamesAreValid(t *testing.T) {
	for _, key := range []string{"a", "_", "9", "a.b", strings.Repeat("x", 200), "\x00\n="} {
		name := fieldName(key)
		if len(name) > 64 || strings.Trim(name, "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_") != "" {
			t.Errorf("%q gives %q", key, name)
		}
	}
}

func TestTextWithoutJournal(t *testing.T) {
	t.Setenv("JOURNAL_STREAM", "") // as if started from a terminal
	var out bytes.Buffer
	log := slog.New(NewHandler(&out, slog.LevelInfo))
	log.Info("started", "version", "1.0", MessageID, Ready)
	log.With(Job, "01J").Warn("two\nlines <0>", Error, errors.New("a\n<0>b"))
	log.WithGroup("g").Error("failed", "level", "kept")
	log.Debug("not wanted")
	want := `<6>msg=started version=1.0
<4>msg="two\nlines <0>" job=01J error="a\n<0>b"
<3>msg=failed g.level=kept
`
	if diff := cmp.Diff(want, out.String()); diff != "" {
		t.Error(diff)
	}
}
