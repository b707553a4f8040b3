package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/virtbackup/virtbackup/dbus"
)

func TestTableIsAligned(t *testing.T) {
	p := &page{legend: true}
	p.table([]string{"NAME", ">SIZE", "STATE", "NOTE"}, [][]string{{"a", "1 B", "ready", ""}, {"größer", "10.0 KiB", "unavailable", "x"}})
	want := "NAME        SIZE  STATE        NOTE\n" +
		"a            1 B  ready\n" +
		"größer  10.0 KiB  unavailable  x\n"
	if got := p.buf.String(); got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
	plain := &page{color: true}
	plain.table([]string{"STATE", "NOTE"}, [][]string{{"ready", "x"}, {"odd", "y"}})
	if got, want := plain.buf.String(), "\x1b[32mready\x1b[0m  x\nodd    y\n"; got != want {
		t.Errorf("with colors: %q; %q is expected", got, want)
	}
}

func TestFieldsWithoutAValueAreLeftOut(t *testing.T) {
	p := &page{}
	p.fields("Name", "a", "Much longer", "", "State", "ready")
	if got, want := p.buf.String(), " Name: a\nState: ready\n"; got != want {
		t.Errorf("%q; %q is expected", got, want)
	}
}

func TestNothingFromElsewhereReachesTheTerminalAsItIs(t *testing.T) {
	const evil = "a\x1b[2J\nb\u202e\x9b\xff"
	p := &page{legend: true}
	p.table([]string{"NAME"}, [][]string{{evil}})
	p.fields("Name", evil)
	p.line("%s", evil)
	p.buf.WriteString(bar(dbus.JobUpdate{Job: dbus.JobProperties{Operation: dbus.OperationBackup, DomainName: evil, Phase: evil, State: dbus.JobRunning}}, 500, time.Now()))
	for _, r := range strings.ReplaceAll(p.buf.String(), "\n", "") {
		if control(r) {
			t.Fatalf("%q has %q", p.buf.String(), r)
		}
	}
	if lines := strings.Count(p.buf.String(), "\n"); lines != 4 {
		t.Errorf("%d lines of %q", lines, p.buf.String())
	}
}

func TestJSONHasThePropertiesInSnakeCase(t *testing.T) {
	for mode, want := range map[jsonMode]string{
		jsonShort: `[{"uuid":"u","name":"<a>","state":"","offering":"","protection":"","last_backup":"","last_backup_time":"2026-01-02T03:04:05.000006Z",` +
			`"last_error":"","next_run":null,"chain":"","chain_length":2,"job":"","disks":[{"target":"vda","source":"","format":"","size":7,"included":true,"cause":""}]}]` + "\n",
		jsonPretty: "[\n  {\n    \"uuid\": \"u\",\n",
	} {
		var b bytes.Buffer
		d := dbus.DomainProperties{
			UUID: "u", Name: "<a>", LastBackupTime: time.Date(2026, 1, 2, 3, 4, 5, 6000, time.UTC), ChainLength: 2,
			Disks: []dbus.DomainDisk{{Target: "vda", Size: 7, Included: true}},
		}
		if err := writeJSON(&b, mode, []dbus.DomainProperties{d}); err != nil || !strings.HasPrefix(b.String(), want) {
			t.Errorf("%s: %v\n%s", mode, err, b.String())
		}
	}
	var b bytes.Buffer
	if err := writeJSON(&b, jsonShort, object{{"jobs", []dbus.JobProperties(nil)}, {"chain", dbus.ChainProperties{}}}); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`{"jobs":[],"chain":{"id":"","domain_uuid":""`, `"backups":[]`, `"created":null`} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("%s is not in %s", want, b.String())
		}
	}
}

func backupJob(id string, progress float64) dbus.JobUpdate {
	return dbus.JobUpdate{Job: dbus.JobProperties{
		ID: id, Operation: dbus.OperationBackup, State: dbus.JobRunning, Phase: "copying", DomainName: "web" + id,
		Progress: progress, BytesDone: uint64(progress * (1 << 30)), BytesTotal: 1 << 30, Rate: 100 << 20,
	}}
}

func TestLinesTellPhasesAndTenths(t *testing.T) {
	var b bytes.Buffer
	l := &lines{out: &b, last: make([]string, 2)}
	for _, progress := range []float64{0, 0.05, 0.1, 0.15, 0.2, 1} {
		l.update(0, backupJob("1", progress))
	}
	l.update(1, backupJob("2", 0))
	l.update(1, dbus.JobUpdate{Away: true})
	l.update(1, dbus.JobUpdate{Away: true})
	ended := backupJob("2", 1)
	ended.Job.State = dbus.JobSucceeded
	l.update(1, ended)
	l.close()
	want := "backup of web1: copying\nbackup of web1: copying 10%\nbackup of web1: copying 20%\nbackup of web1: copying 100%\nbackup of web2: copying\n" + awayText + "\n"
	if b.String() != want {
		t.Errorf("got\n%swant\n%s", b.String(), want)
	}
}

func TestBarsAreDrawnOverAndTakenAway(t *testing.T) {
	var b bytes.Buffer
	width, height := 200, 24
	bars := &bars{out: &b, updates: make([]dbus.JobUpdate, 3), size: func() (int, int) { return width, height }}
	bars.update(0, backupJob("1", 0.5))
	const half = "backup of web1: copying [##########----------]  50% 512.0 MiB of 1.0 GiB, 100.0 MiB/s\n"
	if got := b.String(); got != half {
		t.Errorf("the first: %q", got)
	}
	b.Reset()
	bars.update(1, backupJob("2", 0))
	if got := b.String(); !strings.HasPrefix(got, "\x1b[1A\r\x1b[J"+half+"backup of web2: copying [-") {
		t.Errorf("the second: %q", got)
	}
	b.Reset()
	width, height = 20, 3
	bars.update(2, backupJob("3", 0))
	if got, want := b.String(), "\x1b[2A\r\x1b[Jbackup of web1: cop\n… and 2 more\n"; got != want {
		t.Errorf("on a small terminal: %q; %q is expected", got, want)
	}
	b.Reset()
	bars.close()
	bars.close()
	if got, want := b.String(), "\x1b[2A\r\x1b[J"; got != want {
		t.Errorf("at the end: %q; %q is expected", got, want)
	}
}

func TestBarTellsWhatIsLeft(t *testing.T) {
	now := time.Now()
	u := backupJob("1", 0.25)
	u.Job.ETA = now.Add(90 * time.Second)
	if got := bar(u, 200, now); !strings.HasSuffix(got, ", 1 min 30 s left") {
		t.Error(got)
	}
	u.Away = true
	if got, want := bar(u, 200, now), "backup of web1: "+awayText; got != want {
		t.Errorf("%q; %q is expected", got, want)
	}
}

func TestDetachingTellsHowToGoOn(t *testing.T) {
	a := &app{host: "root@h"}
	err := a.detached([]string{"A", "B"}, []dbus.JobProperties{{State: dbus.JobSucceeded}, {}})
	want := `job B goes on: follow it with "virtbackupctl -H root@h watch B", stop it with "virtbackupctl -H root@h cancel B"`
	if err.Error() != want {
		t.Errorf("%q; %q is expected", err, want)
	}
}

func TestOnlyAYesConfirms(t *testing.T) {
	for answer, confirmed := range map[string]bool{"y\n": true, " YES\n": true, "\n": false, "": false, "n\n": false, "yup\n": false} {
		var b bytes.Buffer
		a := &app{in: strings.NewReader(answer), err: &b}
		if err := a.confirm(t.Context(), "Delete it?"); (err == nil) != confirmed {
			t.Errorf("%q: %v", answer, err)
		}
		if b.String() != "Delete it? [y/N] " {
			t.Errorf("%q is asked", b.String())
		}
	}
	ctx, stop := context.WithCancel(t.Context())
	stop()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	if err := (&app{in: r, err: &bytes.Buffer{}}).confirm(ctx, "?"); exitStatus(err) != exitInterrupted {
		t.Errorf("interrupted: %v", err)
	}
}

func TestPagerGetsTheText(t *testing.T) {
	file := filepath.Join(t.TempDir(), "paged")
	out, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	if !runPager("head -n 1", out, []byte("one\ntwo\n")) {
		t.Fatal("the pager is not run")
	}
	if got, err := os.ReadFile(file); err != nil || string(got) != "one\n" {
		t.Errorf("%q, %v", got, err)
	}
	if runPager("/does/not/exist", out, nil) {
		t.Error("a pager that is not there is run")
	}
}
