//go:build lab

package labtest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/virtbackup/virtbackup/dbus"
	"github.com/virtbackup/virtbackup/dbus/bustest"
)

// oddNames are none of anything.
var oddNames = []string{
	"nobody", "", ".", "..", "a/b", "/etc/passwd", "../../etc/passwd", "a\nb", "a\tb", `'"`, "</name>", "<!ENTITY x>", "%s%n", "$(reboot)",
	"-rf", " ", "%", "_", "\u202eevil", strings.Repeat("x", 5000),
}

// TestInputNames asks for what is not there, and tries the names as new ones.
func TestInputNames(t *testing.T) {
	h, ctx := newHost(t), t.Context()
	// One of each: an empty name must not mean the only one.
	h.backup(startBare(t, "input-names", bareDisk(t, "vda", "qcow2", "")), dbus.BackupOptions{})
	for _, name := range oddNames {
		what := fmt.Sprintf("%.20q", name)
		for kind, find := range map[string]func() (string, error){
			"domain":     func() (string, error) { return h.FindDomain(ctx, name) },
			"repository": func() (string, error) { return h.FindRepository(ctx, name) },
			"offering":   func() (string, error) { return h.FindOffering(ctx, name) },
			"backup":     func() (string, error) { return h.FindBackup(ctx, name) },
		} {
			_, err := find()
			refuses(t, "find "+kind+" "+what, err, dbus.ErrNotFound, "no "+kind, fmt.Sprintf("%q", name))
		}
		_, err := h.CreateOffering(ctx, "fresh", name, dbus.OfferingOptions{})
		refuses(t, "offering with repository "+what, err, dbus.ErrNotFound, "repository", fmt.Sprintf("%q", name))
		if name == "nobody" {
			continue // it is a good one
		}
		_, _, err = h.CreateRepository(ctx, name, "dir", "/srv/never", dbus.CreateRepositoryOptions{})
		refuses(t, "repository "+what, err, dbus.ErrInvalidArgument, "name", fmt.Sprintf("%q", name), "letters")
		_, err = h.CreateOffering(ctx, name, h.offering, dbus.OfferingOptions{})
		refuses(t, "offering "+what, err, dbus.ErrInvalidArgument, "name", fmt.Sprintf("%q", name), "letters")
	}
	_, err := h.CreateOffering(ctx, h.offering, h.offering, dbus.OfferingOptions{})
	refuses(t, "offering of a name that is taken", err, dbus.ErrExists, h.offering)
	_, _, err = h.CreateRepository(ctx, h.offering, "dir", "/srv/never", dbus.CreateRepositoryOptions{})
	refuses(t, "repository of a name that is taken", err, dbus.ErrExists, h.offering)
	if _, err := os.Stat("/srv/never"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("something was made: %v", err)
	}
}

// TestInputOptions gives options that are not known, not of their type, or
// beyond what they may be.
func TestInputOptions(t *testing.T) {
	h, ctx := newHost(t), t.Context()
	g := startBare(t, "input-options", bareDisk(t, "vda", "qcow2", ""))
	b := h.backup(g, dbus.BackupOptions{})
	bus := bustest.DialAs(t, systemBus, 0)
	domain := dbus.Ref{Kind: dbus.KindDomain, ID: g.uuid}
	backup := dbus.Ref{Kind: dbus.KindBackup, ID: b.ID}
	manager := dbus.Ref{Kind: dbus.KindManager}
	call := func(about dbus.Ref, method string, options any, args ...any) error {
		return bustest.Call{Path: about.Path(), Method: about.Kind.Interface() + "." + method, Args: append(args, dbus.EncodeOptions(options))}.Do(bus)
	}
	type unknown struct {
		Key string `dbus:"no_such_option"`
	}
	type wrong struct {
		Full  string   `dbus:"full"`
		Disks string   `dbus:"disks"`
		Dry   uint32   `dbus:"dry_run"`
		Level string   `dbus:"compression_level"`
		Free  []string `dbus:"minimum_free"`
	}
	type mode struct {
		Mode string `dbus:"mode"`
	}
	for _, c := range []struct {
		what string
		err  error
		word string
	}{
		{"backup, unknown", call(domain, "Backup", unknown{"x"}), "no_such_option"},
		{"backup, type", call(domain, "Backup", wrong{Full: "yes"}), `"full"`},
		{"backup, value", call(domain, "Backup", mode{"differential"}), `"mode"`},
		{"assign, unknown", call(domain, "Assign", unknown{"x"}, h.offering), "no_such_option"},
		{"delete, unknown", call(backup, "Delete", unknown{"x"}), "no_such_option"},
		{"delete, type", call(backup, "Delete", wrong{Dry: 1}), `"dry_run"`},
		{"restore, type", call(backup, "Restore", wrong{Disks: "vda"}, "name"), `"disks"`},
		{"restore in place, unknown", call(backup, "RestoreInPlace", unknown{"x"}), "no_such_option"},
		{"offering, type", call(manager, "CreateOffering", wrong{Level: "9"}, "fresh", h.offering), `"compression_level"`},
		{"repository, type", call(manager, "CreateRepository", wrong{Free: []string{"1"}}, "fresh", "dir", "/srv/never"), `"minimum_free"`},
		{"reload, unknown", call(manager, "Reload", unknown{"x"}), "no_such_option"},
	} {
		refuses(t, c.what, c.err, dbus.ErrInvalidArgument, c.word)
	}
	for _, s := range []struct {
		what        string
		compression dbus.Compression
		level       uint32
		threads     uint32
		size        uint32
	}{
		{"compression_level", dbus.CompressionNone, 1, 0, 0},
		{"compression_level", dbus.CompressionZlib, 10, 0, 0},
		{"compression_level", dbus.CompressionZstd, 23, 0, 0},
		{"compression_level", dbus.CompressionZstd, 1<<32 - 1, 0, 0},
		{"threads", dbus.CompressionZstd, 1, 257, 0},
		{"chain_size", dbus.CompressionZstd, 1, 1, 10001},
	} {
		settings := dbus.Settings{Compression: &s.compression, CompressionLevel: &s.level, Threads: &s.threads, ChainSize: &s.size}
		_, err := h.CreateOffering(ctx, "fresh", h.offering, settingsOnly(settings))
		refuses(t, fmt.Sprintf("offering with %+v", s), err, dbus.ErrInvalidArgument, s.what, "at most")
		err = h.try(g, dbus.BackupOptions{Settings: settings})
		refuses(t, fmt.Sprintf("backup with %+v", s), err, dbus.ErrInvalidArgument, s.what, "at most")
	}
	_, err := h.BackupDomain(ctx, g.uuid, dbus.BackupOptions{})
	refuses(t, "backup with nothing said", err, dbus.ErrInvalidArgument, `"input-options"`, "assign")
	_, err = h.BackupDomain(ctx, g.uuid, dbus.BackupOptions{Offering: h.offering, Repository: h.offering})
	refuses(t, "backup with both", err, dbus.ErrInvalidArgument, "not both")
	_, err = h.BackupDomain(ctx, g.uuid, dbus.BackupOptions{Offering: "nothing"})
	refuses(t, "backup with an unknown offering", err, dbus.ErrNotFound, `offering "nothing"`)
	_, err = h.BackupDomain(ctx, g.uuid, dbus.BackupOptions{Repository: "nowhere"})
	refuses(t, "backup to an unknown repository", err, dbus.ErrNotFound, `repository "nowhere"`)
	refuses(t, "assign an unknown offering", h.AssignDomain(ctx, g.uuid, "nothing"), dbus.ErrNotFound, `offering "nothing"`)
	refuses(t, "assign to an unknown domain", h.AssignDomain(ctx, "00000000-0000-0000-0000-000000000000", h.offering), dbus.ErrNotFound, "domain")
	refuses(t, "unassign what is not assigned", h.UnassignDomain(ctx, g.uuid), dbus.ErrNotFound, "assigned to no offering")
	_, err = h.BackupDomain(ctx, "00000000-0000-0000-0000-000000000000", dbus.BackupOptions{Offering: h.offering})
	refuses(t, "backup of an unknown domain", err, dbus.ErrNotFound, "domain")
}

// TestInputUse tries to remove what something else uses.
func TestInputUse(t *testing.T) {
	h, ctx := newHost(t), t.Context()
	g := startBare(t, "input-use", bareDisk(t, "vda", "qcow2", ""))
	offering, err := h.FindOffering(ctx, h.offering)
	if err != nil {
		t.Fatal(err)
	}
	if err := h.AssignDomain(ctx, g.uuid, h.offering); err != nil {
		t.Fatal(err)
	}
	elsewhere := "nowhere"
	refuses(t, "update to an unknown repository", h.UpdateOffering(ctx, offering, dbus.UpdateOfferingOptions{Repository: &elsewhere}),
		dbus.ErrNotFound, `repository "nowhere"`)
	_, err = h.RemoveOffering(ctx, offering, dbus.RemoveOfferingOptions{})
	refuses(t, "remove an assigned offering", err, dbus.ErrBusy, `"input-use"`, h.offering, "unassign")
	refuses(t, "remove a repository with an offering", h.RemoveRepository(ctx, h.repository, dbus.RemoveRepositoryOptions{}), dbus.ErrBusy, "offering", h.offering)
	full := h.backup(g, dbus.BackupOptions{})
	g.io("vda", "write -P 3 1M 64k")
	h.backup(g, dbus.BackupOptions{})
	_, _, err = h.DeleteBackup(ctx, full.ID, dbus.DeleteBackupOptions{})
	refuses(t, "delete with children", err, dbus.ErrBusy, full.ID, "with_children")
	going, job, err := h.DeleteBackup(ctx, full.ID, dbus.DeleteBackupOptions{WithChildren: true, DryRun: true})
	if err != nil || job != "" || len(going) != 2 {
		t.Errorf("dry run: %v, %q, %v", going, job, err)
	}
	err = h.UnassignDomain(ctx, g.uuid)
	if err == nil {
		_, err = h.RemoveOffering(ctx, offering, dbus.RemoveOfferingOptions{})
	}
	if err != nil {
		t.Fatal(err)
	}
	refuses(t, "remove a repository with backups", h.RemoveRepository(ctx, h.repository, dbus.RemoveRepositoryOptions{}), dbus.ErrBusy, "backups", h.offering, "delete")
	_, job, err = h.DeleteBackup(ctx, full.ID, dbus.DeleteBackupOptions{WithChildren: true})
	if err := h.outcome(job, err); err != nil {
		t.Fatal(err)
	}
	_, _, err = h.DeleteBackup(ctx, full.ID, dbus.DeleteBackupOptions{})
	refuses(t, "delete what is deleted", err, dbus.ErrNotFound, full.ID)
	_, err = h.VerifyBackup(ctx, full.ID)
	refuses(t, "verify what is deleted", err, dbus.ErrNotFound, full.ID)
	refuses(t, "cancel what has ended", h.CancelJob(ctx, job), dbus.ErrBusy, job, "ended")
	if err := h.RemoveRepository(ctx, h.repository, dbus.RemoveRepositoryOptions{}); err != nil {
		t.Error(err)
	}
}

// configure restarts the daemon with other settings until the test ends.
func configure(t *testing.T, settings string) {
	t.Helper()
	const file = "/etc/virtbackup/virtbackupd.toml"
	command(t, "", "systemctl", "start", "virtbackupd.service") // whose start makes the directory
	before, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	restart := func() {
		// Tests restart it more often than a host does.
		command(t, "", "systemctl", "reset-failed", "virtbackupd.service")
		command(t, "", "systemctl", "restart", "virtbackupd.service")
	}
	t.Cleanup(func() {
		if err := os.WriteFile(file, before, 0o644); err != nil {
			t.Error(err)
		}
		restart()
	})
	if err := os.WriteFile(file, []byte(settings), 0o644); err != nil {
		t.Fatal(err)
	}
	restart()
}

// TestInputLimits lets a user have as many jobs as the settings say.
func TestInputLimits(t *testing.T) {
	h, ctx := newHost(t), t.Context()
	configure(t, "[limits]\nconcurrent_backups = 1\njobs_per_user = 2\n")
	first := startBare(t, "input-first", bareDisk(t, "vda", "qcow2", ""))
	g := startBare(t, "input-second", bareDisk(t, "vda", "qcow2", ""))
	allow(t, "org.virtbackup1.backup", g.uuid)
	user := dbus.NewClient(bustest.DialAs(t, systemBus, labuser))
	goOn := stopWorkers(t)
	jobs := []string{h.start(first, suspended())}
	first.inBackup()
	o := dbus.BackupOptions{Offering: h.offering}
	for range 2 {
		job, err := user.BackupDomain(ctx, g.uuid, o)
		if err != nil {
			t.Fatal(err)
		}
		jobs = append(jobs, job)
	}
	_, err := user.BackupDomain(ctx, g.uuid, o)
	refuses(t, "one more of the user", err, dbus.ErrLimitsExceeded, "too many", "2 are yours")
	jobs = append(jobs, h.start(g, o)) // root has no such limit
	goOn()
	for _, job := range jobs {
		h.made(h.end(job))
	}
}

// stopQEMU stops a domain's QEMU: what asks it waits. goOn, or the test's end,
// lets it go on.
func stopQEMU(t *testing.T, g *guest) (goOn func()) {
	t.Helper()
	pid, err := os.ReadFile("/run/libvirt/qemu/" + g.name + ".pid")
	if err != nil {
		t.Fatal(err)
	}
	signal := func(name string) { _ = exec.Command("kill", "-"+name, strings.TrimSpace(string(pid))).Run() }
	signal("STOP")
	goOn = func() { signal("CONT") }
	t.Cleanup(goOn)
	return goOn
}

// allow gives labuser an action on one domain until the test ends.
func allow(t *testing.T, action, uuid string) {
	t.Helper()
	rule(t, fmt.Sprintf(`polkit.addRule(function(action, subject) {
		if (subject.user == "labuser" && action.id == "%s" && action.lookup("domain.uuid") == "%s") return polkit.Result.YES;
	});`, action, uuid))
}

// rule adds a rule to polkit until the test ends. polkitd is started anew: it
// notices a changed rule by itself, but not at a moment that can be waited for.
func rule(t *testing.T, text string) {
	t.Helper()
	const file = "/etc/polkit-1/rules.d/50-test.rules"
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = os.Remove(file)
		command(t, "", "systemctl", "restart", "polkit.service")
	})
	command(t, "", "systemctl", "restart", "polkit.service")
}
