package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/virtbackup/virtbackup/dbus"
)

func TestScreenshotIsNotWrittenOverAnything(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.png")
	write := func(content string, force bool) error { return writeNew(path, []byte(content), force) }
	if err := write("first", false); err != nil {
		t.Fatal(err)
	}
	if err := write("second", false); err == nil || !strings.Contains(err.Error(), "--force") {
		t.Errorf("over a file that is there: %v", err)
	}
	if b, _ := os.ReadFile(path); string(b) != "first" {
		t.Errorf("the file is %q", b)
	}
	if err := write("third", true); err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(path); string(b) != "third" {
		t.Errorf("the file is %q", b)
	}
	if left, _ := os.ReadDir(filepath.Dir(path)); len(left) != 1 {
		t.Errorf("left over: %v", left)
	}
	if err := writeNew(filepath.Join(path, "x"), nil, false); err == nil {
		t.Error("a file in a file was written")
	}
}

func TestFindingsAreShown(t *testing.T) {
	v := dbus.ValidationRecord{HasScreenshot: true, Findings: []dbus.ValidationFinding{
		{Step: "wait_for_boot", Verdict: dbus.VerdictNotValid, Cause: "the guest agent did not answer within 30s", TookUsec: 30_000_000},
		{Step: "check_port", Verdict: dbus.VerdictSkipped, Cause: "an earlier step did not get as far"},
		{Step: "judge_screen", Verdict: dbus.VerdictNotValid, Cause: "the screen shows a kernel panic", Output: "[ 1.0] Kernel panic\x1b[2J\nnot syncing\n", TookUsec: 1500},
	}}
	want := `
STEP           VERDICT    TOOK  CAUSE
wait_for_boot  not-valid  30 s  the guest agent did not answer within 30s
check_port     skipped          an earlier step did not get as far
judge_screen   not-valid  2 ms  the screen shows a kernel panic

What judge_screen saw:
  [ 1.0] Kernel panic\x1b[2J
  not syncing

There is a screenshot: --screenshot FILE writes it.
`
	if diff := cmp.Diff(want, text(func(p *page) { findingTable(p, v) })); diff != "" {
		t.Error(diff)
	}
}

func TestValidationIsTold(t *testing.T) {
	at := time.Date(2026, 3, 4, 5, 6, 7, 0, time.Local)
	for want, b := range map[string]dbus.BackupProperties{
		"":                     {},
		"valid, " + moment(at): {ValidationResult: dbus.ValidationValid, Validated: at},
		"not-valid, " + moment(at) + ", by judge_screen: it is blank": {ValidationResult: dbus.ValidationNotValid, Validated: at, ValidationStep: "judge_screen", ValidationCause: "it is blank"},
	} {
		if got := validated(b); got != want {
			t.Errorf("%q; %q is expected", got, want)
		}
	}
}
