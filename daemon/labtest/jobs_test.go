//go:build lab

package labtest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/virtbackup/virtbackup/dbus"
)

// children returns the jobs of a group by the names of their domains.
func (h *host) children(group string) map[string]dbus.JobProperties {
	h.t.Helper()
	all := map[string]dbus.JobProperties{}
	for j, err := range h.Jobs(h.t.Context(), dbus.JobFilter{Parent: group}) {
		if err != nil {
			h.t.Fatal(err)
		}
		all[j.DomainName] = j
	}
	return all
}

// waits waits until a job waits for what says so.
func (h *host) waits(job, says string) dbus.JobProperties {
	h.t.Helper()
	var p dbus.JobProperties
	eventually(h.t, "the job waits: "+says, func() (err error) {
		if p, err = dbus.Get[dbus.JobProperties](h.t.Context(), h.Client, job); err == nil && !strings.Contains(p.Waiting, says) {
			err = fmt.Errorf("it is %s, %q, %q", p.State, p.Waiting, p.ErrorMessage)
		}
		return err
	})
	return p
}

// TestGroupIsRetried backs three domains up as one, of which one fails, and
// makes that one again, in one slot.
func TestGroupIsRetried(t *testing.T) {
	configure(t, "[limits]\nconcurrent_backups = 1\n")
	h := newHost(t)
	var names []string
	guests := map[string]*guest{}
	for range 3 {
		g := defineGuest(t, "qcow2:8M")
		names, guests[g.name] = append(names, g.name), g
	}
	bad := guests[names[1]].disks()[0].file
	if err := os.Rename(bad, bad+".away"); err != nil {
		t.Fatal(err)
	}
	job, err := h.BackupGroup(t.Context(), names, dbus.GroupOptions{BackupOptions: dbus.BackupOptions{Offering: h.offering, Priority: new(uint32(70))}})
	if err != nil {
		t.Fatal(err)
	}
	p := h.end(job)
	if p.State != dbus.JobFailed || p.Operation != dbus.OperationGroup || !strings.HasPrefix(p.ErrorMessage, "1 of 3 failed: "+names[1]+": ") {
		t.Errorf("got %+v", p)
	}
	first := h.children(job)
	for i, name := range names {
		if j := first[name]; (j.State == dbus.JobSucceeded) != (i != 1) || j.Parent != job || j.Priority != 70 {
			t.Errorf("%s: %+v", name, j)
		}
	}
	if err := os.Rename(bad+".away", bad); err != nil {
		t.Fatal(err)
	}
	out := command(t, "", "virtbackupctl", "retry", job)
	if !strings.Contains(out, "backup of "+names[1]) || strings.Contains(out, names[0]) {
		t.Errorf("retry says %q", out)
	}
	for _, g := range guests {
		made := 0
		for _, err := range h.Backups(t.Context(), dbus.BackupFilter{Domain: g.uuid}) {
			if err != nil {
				t.Fatal(err)
			}
			made++
		}
		if made != 1 {
			t.Errorf("%d backups of %s", made, g.name)
		}
	}
	_, err = h.RetryJob(t.Context(), first[names[0]].ID)
	refuses(t, "retry what has succeeded", err, dbus.ErrInvalidArgument, "nothing to retry")
	command(t, "", "virtbackupctl", "backup", "--sequential", "--offering", h.offering, names[0], names[2])
}

// TestQueueOutlivesTheDaemon holds jobs back, cancels one of them while it
// waits, and kills the daemon. The inhibitor is gone then.
func TestQueueOutlivesTheDaemon(t *testing.T) {
	h, other := newHost(t), rootClient(t)
	g := defineGuest(t, "qcow2:8M")
	once, stop := context.WithCancel(t.Context())
	if err := other.Inhibit(once, []string{"backup"}, "a test", "to see that it holds", func(err error) { t.Error(err) }); err != nil {
		t.Fatal(err)
	}
	stop() // it is not held again after the restart
	kept, cancelled := h.start(g, dbus.BackupOptions{}), h.start(g, dbus.BackupOptions{})
	for _, job := range []string{kept, cancelled} {
		h.waits(job, "held back by a test: to see that it holds")
	}
	if out := command(t, "", "virtbackupctl", "jobs"); !strings.Contains(out, "held back by a test") {
		t.Errorf("jobs says %q", out)
	}
	if err := h.CancelJob(t.Context(), cancelled); err != nil {
		t.Fatal(err)
	}
	if p := h.end(cancelled); p.State != dbus.JobCancelled {
		t.Errorf("got %+v", p)
	}
	command(t, "", "systemctl", "kill", "--signal=KILL", "--kill-whom=main", "virtbackupd.service")
	h.made(h.end(kept))

	var ended *exec.ExitError
	err := exec.Command("virtbackupctl", "inhibit", "--why", "a test", "--", "sh", "-c", "virtbackupctl inhibit --list | grep -q 'a test' && exit 7").Run()
	if !errors.As(err, &ended) || ended.ExitCode() != 7 {
		t.Errorf("inhibit ended with %v", err)
	}
	if all, err := h.Inhibitors(t.Context()); err != nil || len(all) > 0 {
		t.Errorf("%+v are left, %v", all, err)
	}
}

// TestRetryUntilTheRepositoryIsBack tries a backup again and again, also over
// a kill of the daemon, until its repository is back.
func TestRetryUntilTheRepositoryIsBack(t *testing.T) {
	configure(t, "[jobs]\nretry_delay = \"1s\"\n")
	h := newHost(t)
	g := defineGuest(t, "qcow2:8M")
	if err := os.Rename(h.path, h.path+".away"); err != nil {
		t.Fatal(err)
	}
	job := h.start(g, dbus.BackupOptions{Attempts: new(uint32(20))})
	p := h.waits(job, "of 20 is at ")
	if p.State != dbus.JobQueued || p.Error != dbus.ErrRepositoryUnavailable || p.NextTry.IsZero() || !p.Started.IsZero() || p.Attempt == 0 {
		t.Errorf("got %+v", p)
	}
	command(t, "", "systemctl", "kill", "--signal=KILL", "--kill-whom=main", "virtbackupd.service")
	h.waits(job, "try 3 of 20 is at ")
	if err := os.Rename(h.path+".away", h.path); err != nil {
		t.Fatal(err)
	}
	p = h.end(job)
	b := h.made(p)
	if p.Attempt < 3 || p.ErrorMessage != "" || b.ID != p.Backup {
		t.Errorf("got %+v", p)
	}
	h.nothingLeft(g)
}

// TestStallIsToldAndEnded stops a worker just before it copies: that is told,
// the try is ended, and the next one makes the backup.
func TestStallIsToldAndEnded(t *testing.T) {
	configure(t, "[jobs]\nstall_limit = \"6s\"\nretry_delay = \"1s\"\n")
	h := newHost(t)
	g := startBare(t, "stall", bareDisk(t, "vda", "qcow2", ""))
	goOn := stopWorkers(t)
	o := suspended()
	o.Attempts = new(uint32(2))
	job := h.start(g, o)
	h.waits(job, "makes no progress since ")
	p := h.waits(job, "try 2 of 2 is at ")
	goOn()
	if p.Error != dbus.ErrStalled || !strings.Contains(p.ErrorMessage, "no progress for 6s") {
		t.Errorf("got %+v", p)
	}
	if p = h.end(job); p.Attempt != 2 {
		t.Errorf("got %+v", p)
	}
	h.made(p)
	eventually(t, "nothing is left of the tries", func() error {
		return errors.Join(h.noJob(), noFiles(), noUnits(), h.noGarbage())
	})
}
