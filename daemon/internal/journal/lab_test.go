//go:build lab

package journal

import (
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// The test binary, when asked by this variable, logs as a service does.
const serviceVariable = "JOURNAL_TEST_SERVICE"

func TestMain(m *testing.M) {
	if os.Getenv(serviceVariable) == "" {
		os.Exit(m.Run())
	}
	log := slog.New(NewHandler(os.Stderr, slog.LevelInfo)).With(Job, "01JTEST")
	log.Error("cannot back up", MessageID, BackupFailed, Domain, "a\nPRIORITY=0", DomainName, "web", Error, errors.New("disk\nis full"))
	log.Info(strings.Repeat("long ", 100_000)) // more than a datagram holds
	log.Debug("not wanted")
}

// TestJournald logs from a real service to the real journal and reads that.
func TestJournald(t *testing.T) {
	const unit = "journal-test.service"
	run := func(name string, arguments ...string) []byte {
		t.Helper()
		out, err := exec.CommandContext(t.Context(), name, arguments...).Output()
		if err != nil {
			t.Fatalf("%s %v: %v", name, arguments, err)
		}
		return out
	}
	binary, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	run("systemd-run", "--quiet", "--wait", "--unit="+unit, "--setenv="+serviceVariable+"=1", binary)
	run("journalctl", "--sync")
	out := run("journalctl", "--output=json", "--all", "VIRTBACKUP_JOB=01JTEST", "_SYSTEMD_UNIT="+unit)
	var got []map[string]any
	for line := range strings.Lines(string(out)) {
		var entry map[string]any
		if err := json.Unmarshal([]byte(line), &entry); err != nil {
			t.Fatal(err)
		}
		kept := map[string]any{}
		for key, value := range entry {
			if key == "MESSAGE" || key == "PRIORITY" || key == messageField || strings.HasPrefix(key, fieldPrefix) {
				kept[key] = value
			}
		}
		got = append(got, kept)
	}
	want := []map[string]any{
		{"MESSAGE": "cannot back up: disk\nis full", "PRIORITY": "3", "VIRTBACKUP_JOB": "01JTEST",
			"VIRTBACKUP_DOMAIN": "a\nPRIORITY=0", "VIRTBACKUP_DOMAIN_NAME": "web", "VIRTBACKUP_ERROR": "disk\nis full", "MESSAGE_ID": string(BackupFailed)},
		{"MESSAGE": strings.Repeat("long ", 100_000), "PRIORITY": "6", "VIRTBACKUP_JOB": "01JTEST"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	// Of the file here: that of a package may be another.
	run("install", "-D", "-m", "644", catalogFile, "/etc/systemd/catalog/virtbackup-test.catalog")
	run("journalctl", "--update-catalog")
	explained := string(run("journalctl", "--catalog", "--no-pager", "MESSAGE_ID="+string(BackupFailed), "_SYSTEMD_UNIT="+unit))
	for _, want := range []string{"Subject: Backup of domain web failed", "could not back up the domain web", "put OnFailure= into a drop-in"} {
		if !strings.Contains(explained, want) {
			t.Errorf("%q is not in %s", want, explained)
		}
	}
	if listed := string(run("journalctl", "--list-catalog", string(GuestHeld))); !strings.Contains(listed, "virtbackup") {
		t.Error(listed)
	}
}
