//go:build lab

package labtest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/virtbackup/virtbackup/dbus"
)

// failed tells whether systemd has a failed unit of a job.
func failed(job string) bool {
	return exec.Command("systemctl", "--quiet", "is-failed", failedUnit(job)).Run() == nil
}

// so is an error unless something holds.
func so(holds bool) error {
	if !holds {
		return errors.New("it is not so")
	}
	return nil
}

// failedUnit is the unit of a job's failure.
func failedUnit(job string) string { return "virtbackup-failed@" + job + ".service" }

// The ids of messages, which are not to change: others wait for them.
const (
	messageBackupFailed    = "3e119becfb6444e1b52e6367b4d2fff9"
	messageBackupSucceeded = "85084edf41ee499c9cc318c2a81961b2"
)

// TestFailureIsTold has a backup fail, and an admin who wants to be told.
func TestFailureIsTold(t *testing.T) {
	h, g := newHost(t), newPausedGuest(t, "qcow2:4M")
	told := fresh(t, "/run/lab")
	for path, text := range map[string]string{
		"/run/systemd/system/virtbackup-failed@.service.d/told-test.conf": "[Unit]\nOnFailure=told-test@%i.service\n",
		"/run/systemd/system/told-test@.service":                          "[Service]\nType=oneshot\nExecStart=/usr/bin/touch " + told + "/%i\n",
	} {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.Remove(path) })
	}
	command(t, "", "systemctl", "daemon-reload")
	// Those of other tests' domains stay.
	units := func() string {
		return command(t, "", "systemctl", "list-units", "--all", "--no-legend", "--plain", "virtbackup-failed@*")
	}
	others := units()
	h.backup(g, dbus.BackupOptions{})
	away := func() { command(t, "", "mv", h.path, h.path+".away") }
	back := func() { command(t, "", "mv", h.path+".away", h.path) }
	fail := func() string {
		t.Helper()
		job := h.start(g, dbus.BackupOptions{})
		failsAs(t, h.end(job), dbus.ErrRepositoryUnavailable)
		return job
	}
	away()
	first := fail()
	eventually(t, "the admin is told", func() error { _, err := os.Stat(filepath.Join(told, first)); return err })
	if !failed(first) {
		t.Error("the unit has not failed: ", command(t, "", "systemctl", "show", failedUnit(first)))
	}
	said := command(t, "", "journalctl", "--no-pager", "--output=cat", "--unit="+failedUnit(first))
	if want := "backup of " + g.name + ": repository"; !strings.Contains(said, want) {
		t.Errorf("%q is not in %s", want, said)
	}
	explained := command(t, "", "journalctl", "--no-pager", "--catalog", "MESSAGE_ID="+messageBackupFailed, "VIRTBACKUP_JOB="+first, "VIRTBACKUP_DOMAIN="+g.uuid)
	for _, want := range []string{"backup of domain " + g.name + " failed: repository", "Subject: Backup of domain " + g.name + " failed", "put OnFailure= into a drop-in"} {
		if !strings.Contains(explained, want) {
			t.Errorf("%q is not in %s", want, explained)
		}
	}
	second := fail()
	eventually(t, "the newer failure takes the place of the older", func() error {
		return so(failed(second) && !failed(first))
	})
	systemdRefuses(t, h, fail)
	back()
	done := h.end(h.start(g, dbus.BackupOptions{}))
	h.made(done)
	eventually(t, "a success clears it", func() error {
		return so(units() == others)
	})
	if out := command(t, "", "journalctl", "--no-pager", "--output=cat", "MESSAGE_ID="+messageBackupSucceeded, "VIRTBACKUP_JOB="+done.ID); out == "" {
		t.Error("the journal does not tell of the success")
	}
}

// systemdRefuses has a backup fail while systemd refuses to start the unit: it
// fails for its own reason, and the daemon goes on.
func systemdRefuses(t *testing.T, h *host, fail func() string) {
	t.Helper()
	const unit = "virtbackup-failed@.service"
	command(t, "", "systemctl", "mask", "--quiet", "--runtime", unit)
	defer command(t, "", "systemctl", "unmask", "--quiet", "--runtime", unit)
	job := fail()
	eventually(t, "the journal tells that systemd refused", func() error {
		said := command(t, "", "journalctl", "--no-pager", "--output=cat", "--unit=virtbackupd", "VIRTBACKUP_JOB="+job)
		return so(strings.Contains(said, "cannot have systemd know of a failed backup"))
	})
	if _, err := dbus.Get[dbus.ManagerProperties](t.Context(), h.Client, ""); err != nil {
		t.Error(err)
	}
}

// value is what the metrics say of one series.
func value(t *testing.T, text, series string) string {
	t.Helper()
	for line := range strings.Lines(text) {
		if of, ok := strings.CutPrefix(line, series+" "); ok {
			return strings.TrimSpace(of)
		}
	}
	t.Fatalf("%s is not in the metrics", series)
	return ""
}

// TestUsageAddsUp compares what list, usage and the metrics say, and has quotas
// refuse what goes beyond.
func TestUsageAddsUp(t *testing.T) {
	h, g := newHost(t), newPausedGuest(t, "qcow2:8M")
	g.io("vda", "write -P 1 0 1M")
	h.backup(g, dbus.BackupOptions{})
	g.io("vda", "write -P 2 2M 64k")
	last := h.backup(g, dbus.BackupOptions{})
	var count, bytes uint64
	for b, err := range h.Backups(t.Context(), dbus.BackupFilter{Domain: g.uuid}) {
		if err != nil {
			t.Fatal(err)
		}
		count, bytes = count+1, bytes+b.StoredBytes
	}
	if count != 2 || bytes == 0 {
		t.Fatalf("%d backups, %d bytes", count, bytes)
	}
	for by, of := range map[dbus.UsageBy]string{dbus.UsageByDomain: g.uuid, dbus.UsageByOffering: h.offering, dbus.UsageByRepository: h.repository} {
		all, err := h.Usage(t.Context(), by)
		if err != nil {
			t.Fatal(err)
		}
		found := false
		for _, u := range all {
			if u.Of != of {
				continue
			}
			found = true
			if u.Backups != 2 || u.Chains != 1 || u.StoredBytes != bytes || u.ProtectedBytes != 8<<20 || !u.Newest.Equal(last.Created) {
				t.Errorf("by %s: %+v", by, u)
			}
		}
		if !found {
			t.Errorf("%s is not among the usage by %s: %+v", of, by, all)
		}
	}
	text := command(t, "", "virtbackupctl", "metrics")
	of := fmt.Sprintf(`{domain=%q,uuid=%q}`, g.name, g.uuid)
	for series, want := range map[string]float64{
		"virtbackup_domain_stored_bytes" + of: float64(bytes), "virtbackup_domain_backups" + of: 2, "virtbackup_domain_last_backup_succeeded" + of: 1,
		fmt.Sprintf("virtbackup_repository_stored_bytes{repository=%q}", h.offering): float64(bytes),
		"virtbackup_domain_last_success_timestamp_seconds" + of:                      float64(last.Created.UnixMicro()) / 1e6,
	} {
		var got float64
		if _, err := fmt.Sscan(value(t, text, series), &got); err != nil || got != want {
			t.Errorf("%s is %v, and not %v", series, got, want)
		}
	}
	textfile(t, h, g)
	quotaRefuses(t, h, g)
}

// textfile has the daemon write the metrics for others.
func textfile(t *testing.T, h *host, g *guest) {
	t.Helper()
	const settings = "/etc/virtbackup/virtbackupd.toml"
	before, err := os.ReadFile(settings)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	path := filepath.Join(fresh(t, "/var/tmp"), "virtbackup.prom")
	text := fmt.Sprintf("%s\n[metrics]\ntextfile = %q\ninterval = \"1s\"\n", before, path)
	if err := os.WriteFile(settings, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := errors.Join(os.WriteFile(settings, before, 0o644), h.Reload(t.Context())); err != nil {
			t.Error(err)
		}
	}()
	if err := h.Reload(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the file is written", func() error {
		written, err := os.ReadFile(path)
		return errors.Join(err, so(strings.Contains(string(written), g.uuid)))
	})
	if st, err := os.Stat(path); err != nil || st.Mode() != 0o644 {
		t.Error(st.Mode(), err)
	}
}

// quotaRefuses has the domain's two backups, and room for one more.
func quotaRefuses(t *testing.T, h *host, g *guest) {
	t.Helper()
	allowed := h.start(g, dbus.BackupOptions{})
	late := h.start(g, dbus.BackupOptions{}) // it waits for the one before
	command(t, "", "virtbackupctl", "quota", "set", "domain", g.name, "--backups", "3")
	h.made(h.end(allowed))
	failsAs(t, h.end(late), dbus.ErrQuotaExceeded)
	if _, err := h.BackupDomain(t.Context(), g.uuid, dbus.BackupOptions{Offering: h.offering}); !errors.Is(err, dbus.ErrQuotaExceeded) ||
		!strings.Contains(err.Error(), "3 of 3 backups are used") {
		t.Errorf("it is asked for: %v", err)
	}
	if out := command(t, "", "virtbackupctl", "--no-legend", "quota", "list"); !strings.Contains(out, g.name) || !strings.Contains(out, "3 of 3") {
		t.Error(out)
	}
	command(t, "", "virtbackupctl", "quota", "remove", "domain", g.name)
	h.backup(g, dbus.BackupOptions{})
	h.nothingLeft(g)
}
