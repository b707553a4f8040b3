//go:build lab

package labtest

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/virtbackup/virtbackup/dbus"
	"github.com/virtbackup/virtbackup/dbus/bustest"
)

// grant has polkit allow labuser everything that these actions are for.
func grant(t *testing.T, actions ...string) {
	t.Helper()
	const file = "/etc/polkit-1/rules.d/50-test.rules"
	list, err := json.Marshal(actions)
	if err == nil {
		err = os.WriteFile(file, []byte(`polkit.addRule(function(action, subject) {
    if (subject.user == "labuser" && `+string(list)+`.indexOf(action.id) >= 0) { return polkit.Result.YES; }
});`), 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	restart := func() { command(t, "", "systemctl", "restart", "polkit.service") }
	t.Cleanup(func() {
		_ = os.Remove(file)
		restart()
	})
	restart()
}

// set changes the host's offering.
func (h *host) set(o dbus.OfferingOptions) {
	h.t.Helper()
	id, err := h.FindOffering(h.t.Context(), h.offering)
	if err == nil {
		err = h.UpdateOffering(h.t.Context(), id, dbus.UpdateOfferingOptions{OfferingOptions: o})
	}
	if err != nil {
		h.t.Fatal(err)
	}
}

// TestOfferingForSome has a user whom polkit lets do everything with domains,
// and offerings that are for others, or are a service level.
func TestOfferingForSome(t *testing.T) {
	h, g, ctx := newHost(t), defineGuest(t, "qcow2:8M"), t.Context()
	grant(t, "org.virtbackup1.view", "org.virtbackup1.backup", "org.virtbackup1.manage-domains")
	user := dbus.NewClient(bustest.DialAs(t, systemBus, labuser))
	backup := func(o dbus.BackupOptions) error { _, err := user.BackupDomain(ctx, g.uuid, o); return err }
	h.set(dbus.OfferingOptions{Users: new([]string{"root", "@nogroup"})})
	refuses(t, "assign another's offering", user.AssignDomain(ctx, g.uuid, h.offering), dbus.ErrNotAuthorized, h.offering, "not for you")
	refuses(t, "back up with it", backup(dbus.BackupOptions{Offering: h.offering}), dbus.ErrNotAuthorized, h.offering, "not for you")
	h.set(dbus.OfferingOptions{Users: new([]string{"@" + command(t, "", "id", "-gn", "labuser")})})
	if err := user.AssignDomain(ctx, g.uuid, h.offering); err != nil {
		t.Fatalf("an offering for the user's group: %v", err)
	}
	if err := h.outcome(user.BackupDomain(ctx, g.uuid, dbus.BackupOptions{})); err != nil {
		t.Errorf("a backup of the user's own: %v", err)
	}
	h.set(dbus.OfferingOptions{Overrides: dbus.Overrides{Rights: dbus.Rights{AllowUserBackups: new(false)}}})
	other := newHostAt(t, fresh(t, "/srv"))
	for what, o := range map[string]dbus.BackupOptions{
		"with it": {}, "named": {Offering: h.offering}, "with another": {Offering: other.offering}, "ad hoc": {Repository: other.offering},
		"isolated, with settings": {Isolated: true, Settings: dbus.Settings{Mode: new(dbus.ModeFull)}},
	} {
		refuses(t, "service level, backup "+what, backup(o), dbus.ErrNotAuthorized, h.offering, "schedules")
	}
	own := dbus.Overrides{Rights: dbus.Rights{AllowUserBackups: new(true)}}
	if err := user.SetOverrides(ctx, g.uuid, own, nil); !errors.Is(err, dbus.ErrNotAuthorized) {
		t.Errorf("the user gives itself the right: %v", err)
	}
	h.backup(g, dbus.BackupOptions{}) // root may
	h.set(dbus.OfferingOptions{Disabled: new(true)})
	refuses(t, "a disabled one, by root", h.try(g, dbus.BackupOptions{}), dbus.ErrInvalidArgument, h.offering, "disabled")
}

// settingsOf are those in force for a domain, as "value, source".
func (h *host) settingsOf(g *guest) map[string]string {
	h.t.Helper()
	all, err := h.DomainSettings(h.t.Context(), g.uuid)
	if err != nil {
		h.t.Fatal(err)
	}
	out := map[string]string{}
	for _, s := range all {
		out[s.Key] = s.Value + ", " + s.Source
	}
	return out
}

// TestDomainOfItsOwnSettings leaves a disk out of a chain, and takes it in again.
func TestDomainOfItsOwnSettings(t *testing.T) {
	h := newHost(t)
	g := newPausedGuest(t, "qcow2:8M", "qcow2:8M")
	if err := h.AssignDomain(t.Context(), g.uuid, h.offering); err != nil {
		t.Fatal(err)
	}
	g.io("vda", "write -P 1 0 64k")
	g.io("vdb", "write -P 2 0 64k")
	targets := func(b dbus.BackupProperties) string {
		var all []string
		for _, d := range b.Disks {
			all = append(all, d.Target+" "+string(d.Kind))
		}
		return string(b.Kind) + ": " + strings.Join(all, ", ")
	}
	own := dbus.BackupOptions{Offering: h.offering}
	if got := targets(h.backup(g, own)); got != "full: vda full, vdb full" {
		t.Fatal(got)
	}
	command(t, "", "virtbackupctl", "domain", "set", g.name, "--exclude-disks", "vdb", "--keep-last", "30", "--compression", "zstd", "--compression-time", "deferred")
	s := h.settingsOf(g)
	for key, want := range map[string]string{
		"exclude_disks": "vdb, domain", "keep_last": "30, domain", "chain_size": "0, offering", "tracking": "cbt, default", "compression_time": "deferred, domain",
	} {
		if s[key] != want {
			t.Errorf("%s is %s instead of %s", key, s[key], want)
		}
	}
	if shown := command(t, "", "virtbackupctl", "domain", "show", g.name); !strings.Contains(shown, "no: it is excluded") {
		t.Errorf("it is not shown why vdb is left out:\n%s", shown)
	}
	g.io("vda", "write -P 3 64k 64k")
	without := h.backup(g, own)
	if got := targets(without); got != "incremental: vda incremental" || without.Compression != dbus.CompressionNone {
		t.Errorf("%s, %s", got, without.Compression)
	}
	if _, err := os.Stat(h.image(without, "vdb")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the excluded disk has an image: %v", err)
	}
	h.restoreIsExact(without, g.snapshot("vda"))
	command(t, "", "virtbackupctl", "domain", "set", g.name, "--unset", "exclude-disks,compression,compression_time")
	g.io("vdb", "write -P 4 64k 64k")
	again := h.backup(g, own)
	if got := targets(again); got != "incremental: vda incremental, vdb full" {
		t.Errorf("%s", got)
	}
	h.restoreIsExact(again, g.snapshot("vda", "vdb"))
	// What a call says goes before the domain's own.
	o := own
	o.IncludeDisks = new([]string{"vdb"})
	if got := targets(h.backup(g, o)); got != "incremental: vdb incremental" {
		t.Error(got)
	}
	o.IncludeDisks = new([]string{"vdz"})
	refuses(t, "no disk is included", h.try(g, o), dbus.ErrUnsupported, g.name, "vda", "not among those that are included")
}

// TestVolatileDisks backs up a disk whose changes are lost when the domain
// stops, as far as libvirt lets us: not while it runs.
func TestVolatileDisks(t *testing.T) {
	h := newHost(t)
	g := defineBare(t, "volatile", bareDisk(t, "vda", "qcow2", ""), bareDisk(t, "vdb", "qcow2", "<transient/>"))
	h.set(settingsOnly(dbus.Settings{VolatileDisks: new(true)}))
	g.edit("vda", "write -P 1 0 64k")
	g.edit("vdb", "write -P 2 0 64k")
	off := h.backup(g, dbus.BackupOptions{})
	if len(off.Disks) != 2 {
		t.Errorf("of a domain that is off: %+v", off.Disks)
	}
	h.restoreIsExact(off, g.snapshot("vda", "vdb"))
	virsh(t, "start", "--paused", g.name)
	job := h.end(h.start(g, dbus.BackupOptions{}))
	if on := h.made(job); len(on.Disks) != 1 {
		t.Errorf("of one that runs: %+v", on.Disks)
	}
	if len(job.Warnings) != 1 || !strings.Contains(job.Warnings[0], "vdb") || !strings.Contains(job.Warnings[0], "transient") {
		t.Errorf("the job does not warn of the disk that it leaves out: %q", job.Warnings)
	}
}

// TestOfferingFiles has configuration management make an offering.
func TestOfferingFiles(t *testing.T) {
	h := newHost(t)
	const directory = "/etc/virtbackup/offerings.d"
	if err := os.MkdirAll(directory, 0o755); err != nil {
		t.Fatal(err)
	}
	name := h.offering + "-gold"
	file := filepath.Join(directory, name+".toml")
	reload := func(text string) error {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return h.Reload(t.Context())
	}
	t.Cleanup(func() { _ = os.Remove(file) })
	show := func() dbus.OfferingProperties {
		t.Helper()
		id, err := h.FindOffering(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		o, err := dbus.Get[dbus.OfferingProperties](t.Context(), h.Client, id)
		if err != nil {
			t.Fatal(err)
		}
		return o
	}
	good := "repository = \"" + h.offering + "\"\nkeep_last = 14\nusers = [\"ann\"]\n"
	if err := reload(good); err != nil {
		t.Fatal(err)
	}
	if o := show(); o.KeepLast != 14 || o.Origin != file || o.Repository != h.offering {
		t.Errorf("%+v", o)
	}
	for _, words := range [][]string{{"update", name, "--keep-last", "1"}, {"remove", name}, {"remove", name, "--forced"}} {
		if out, err := exec.Command("virtbackupctl", append([]string{"offering"}, words...)...).CombinedOutput(); err == nil || !strings.Contains(string(out), file) {
			t.Errorf("%v of an offering that is a file: %v, %s", words, err, out)
		}
	}
	err := reload(good + "moode = \"full\"\n")
	refuses(t, "a wrong file", err, dbus.ErrInvalidArgument, file+":4", "moode")
	if out, err := exec.Command("systemctl", "reload", "virtbackupd").CombinedOutput(); err == nil {
		t.Errorf("systemctl reload is content with a wrong file: %s", out)
	}
	if o := show(); o.KeepLast != 14 || o.Disabled {
		t.Errorf("of a wrong file: %+v", o)
	}
	if err := reload(strings.Replace(good, "14", "3", 1)); err != nil {
		t.Fatal(err)
	}
	if o := show(); o.KeepLast != 3 {
		t.Errorf("of a file that was changed: %+v", o)
	}
	command(t, "", "systemctl", "restart", "virtbackupd")
	if o := show(); o.KeepLast != 3 || o.Origin != file {
		t.Errorf("after a restart: %+v", o)
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if err := h.Reload(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := h.FindOffering(t.Context(), name); !errors.Is(err, dbus.ErrNotFound) {
		t.Errorf("of a file that is gone: %v", err)
	}
}

// TestGoneByForce takes an offering, and then all backups, from a domain.
func TestGoneByForce(t *testing.T) {
	h, g, ctx := newHost(t), defineGuest(t, "qcow2:8M"), t.Context()
	if err := h.AssignDomain(ctx, g.uuid, h.offering); err != nil {
		t.Fatal(err)
	}
	h.backup(g, dbus.BackupOptions{})
	h.backup(g, dbus.BackupOptions{})
	h.backup(g, dbus.BackupOptions{Isolated: true})
	out, err := exec.Command("virtbackupctl", "offering", "remove", h.offering).CombinedOutput()
	if err == nil || !strings.Contains(string(out), g.name) || !strings.Contains(string(out), "force") {
		t.Errorf("an offering in use is removed, or it is not told whom it would hit: %v, %s", err, out)
	}
	var hit struct{ Domains []string }
	if err := json.Unmarshal([]byte(command(t, "", "virtbackupctl", "offering", "remove", h.offering, "--forced", "--dry-run", "--json=short")), &hit); err != nil || len(hit.Domains) != 1 || hit.Domains[0] != g.name {
		t.Errorf("dry run: %v, %v", hit, err)
	}
	command(t, "", "virtbackupctl", "offering", "remove", h.offering, "--forced", "--yes")
	if p, err := dbus.Get[dbus.DomainProperties](ctx, h.Client, g.uuid); err != nil || p.Offering != "" || p.Chain != "" || p.LastBackup == "" {
		t.Errorf("after its offering went: %+v, %v", p, err)
	}
	var would struct {
		Backups     []string
		StoredBytes uint64 `json:"stored_bytes"`
	}
	dry := command(t, "", "virtbackupctl", "domain", "unassign", g.name, "--forced", "--dry-run", "--json=short")
	if err := json.Unmarshal([]byte(dry), &would); err != nil || len(would.Backups) != 3 || would.StoredBytes == 0 {
		t.Errorf("dry run: %s, %v", dry, err)
	}
	if entries, err := os.ReadDir(filepath.Join(h.path, g.uuid)); err != nil || len(entries) < 3 {
		t.Errorf("a dry run deleted backups: %v, %v", entries, err)
	}
	command(t, "", "virtbackupctl", "domain", "unassign", g.name, "--forced", "--yes")
	for b, err := range h.Backups(ctx, dbus.BackupFilter{Domain: g.uuid}) {
		t.Errorf("left is %s, %v", b.ID, err)
	}
	for _, id := range would.Backups {
		if _, err := os.Stat(filepath.Join(h.path, g.uuid, id)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("backup %s is still in the repository: %v", id, err)
		}
	}
}
