//go:build lab

package labtest

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/virtbackup/virtbackup/dbus"
)

// limit bounds every wait. It is for a machine that is busy with much else; no
// test measures time by it.
const limit = 3 * time.Minute

// host is a repository and an offering of its own, and the daemon that serves them.
type host struct {
	*dbus.Client
	t          *testing.T
	repository string // id
	path       string // of the repository
	offering   string // name
}

// newHost makes a repository in a fresh directory, and an offering with it.
func newHost(t *testing.T) *host {
	t.Helper()
	return newHostAt(t, fresh(t, "/srv"))
}

func newHostAt(t *testing.T, repository string) *host {
	t.Helper()
	h := &host{Client: rootClient(t), t: t, path: repository, offering: filepath.Base(repository)}
	none, nothing := dbus.QuiesceNone, uint64(0)
	id, job, err := h.CreateRepository(t.Context(), h.offering, "dir", repository, dbus.CreateRepositoryOptions{MinimumFree: &nothing})
	if err == nil {
		err = h.end(job).Err()
	}
	if err == nil {
		_, err = h.CreateOffering(t.Context(), h.offering, id, settingsOnly(dbus.Settings{Quiesce: &none, ChainSize: new(uint32(0))}))
	}
	if err != nil {
		t.Fatalf("cannot set up a host: %v", err)
	}
	h.repository = id
	return h
}

// settingsOnly are an offering's options with nothing but settings.
func settingsOnly(s dbus.Settings) dbus.OfferingOptions {
	return dbus.OfferingOptions{Overrides: dbus.Overrides{Settings: s}}
}

// fresh makes a directory that no other test has.
func fresh(t *testing.T, parent string) string {
	t.Helper()
	name := strings.ToLower(strings.NewReplacer("/", "-", "_", "-", ",", "").Replace(t.Name()))
	path, err := os.MkdirTemp(parent, name[:min(len(name), 40)]+"-")
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// start starts a backup, with the host's offering unless the options name another.
func (h *host) start(g *guest, o dbus.BackupOptions) (job string) {
	h.t.Helper()
	if o.Offering == "" && o.Repository == "" {
		o.Offering = h.offering
	}
	job, err := h.BackupDomain(h.t.Context(), g.uuid, o)
	if err != nil {
		h.t.Fatalf("cannot start a backup: %v", err)
	}
	return job
}

// end follows a job to its end, over restarts of the daemon too.
func (h *host) end(job string) dbus.JobProperties {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(h.t.Context(), limit)
	defer cancel()
	p, err := h.WatchJob(ctx, job, func(dbus.JobUpdate) {})
	if err != nil {
		h.t.Fatalf("job %s (%s, phase %q) did not come to its end: %v", job, p.State, p.Phase, err)
	}
	return p
}

// backup makes a backup, which has to succeed.
func (h *host) backup(g *guest, o dbus.BackupOptions) dbus.BackupProperties {
	h.t.Helper()
	return h.made(h.end(h.start(g, o)))
}

// made is the backup of a job that has succeeded.
func (h *host) made(j dbus.JobProperties) dbus.BackupProperties {
	h.t.Helper()
	if err := j.Err(); err != nil {
		h.t.Fatalf("job %s (%s) failed: %v", j.ID, j.Operation, err)
	}
	b, err := dbus.Get[dbus.BackupProperties](h.t.Context(), h.Client, j.Backup)
	if err != nil {
		h.t.Fatal(err)
	}
	if b.State != dbus.BackupComplete {
		h.t.Fatalf("backup %s of a job that succeeded is %s", b.ID, b.State)
	}
	return b
}

// image is the path of a disk's image in a backup.
func (h *host) image(b dbus.BackupProperties, target string) string {
	return filepath.Join(h.path, b.DomainUUID, b.ID, target+".qcow2")
}

// chainIsExact has QEMU compare each image, and all that it is built on, with
// what its disk held. Disks that were not wanted are not looked at.
func (h *host) chainIsExact(b dbus.BackupProperties, want snapshot) {
	h.t.Helper()
	for target, file := range want {
		image := h.image(b, target)
		command(h.t, "", "qemu-img", "check", "-q", "-f", "qcow2", image)
		sameContent(h.t, fmt.Sprintf("%s of backup %s (%s)", target, b.ID, b.Kind), "qcow2", image, file)
	}
}

// restoreIsExact restores a backup as a new domain, compares its disks, and
// removes it again.
func (h *host) restoreIsExact(b dbus.BackupProperties, want snapshot) {
	h.t.Helper()
	name := "restored-" + strings.ToLower(b.ID)
	job, err := h.RestoreBackup(h.t.Context(), b.ID, name, dbus.RestoreOptions{})
	if err != nil {
		h.t.Fatalf("cannot restore backup %s: %v", b.ID, err)
	}
	if err := h.end(job).Err(); err != nil {
		h.t.Fatalf("cannot restore backup %s: %v", b.ID, err)
	}
	disks := disksOf(h.t, name)
	if len(disks) != len(want) {
		h.t.Errorf("%d disks were restored of backup %s instead of %d", len(disks), b.ID, len(want))
	}
	for _, d := range disks {
		if d.format == "qcow2" {
			command(h.t, "", "qemu-img", "check", "-q", "-f", "qcow2", d.file)
		}
		sameContent(h.t, fmt.Sprintf("%s restored of backup %s (%s)", d.target, b.ID, b.Kind), d.format, d.file, want[d.target])
	}
	command(h.t, "", "virsh", "-q", "undefine", name, "--nvram")
	for _, d := range disks {
		if err := os.Remove(d.file); err != nil {
			h.t.Error(err)
		}
	}
}

// sameContent has QEMU compare an image with a raw file, their sizes included.
func sameContent(t *testing.T, what, format, image, raw string) {
	t.Helper()
	var info struct {
		Size int64 `json:"virtual-size"`
	}
	if err := json.Unmarshal([]byte(command(t, "", "qemu-img", "info", "-U", "--output=json", "-f", format, image)), &info); err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(raw)
	if err != nil {
		t.Fatal(err)
	}
	if info.Size != st.Size() {
		t.Errorf("%s: %d bytes instead of %d", what, info.Size, st.Size())
	}
	out, err := exec.Command("qemu-img", "compare", "-U", "-f", format, "-F", "raw", image, raw).CombinedOutput()
	if err != nil {
		t.Errorf("%s differs from the disk: %v: %s", what, err, out)
	}
}

// guest is a domain that lab-domain made.
type guest struct {
	t    *testing.T
	name string
	uuid string
}

// newGuest makes a guest with disks as lab-domain takes them, as "qcow2:64M",
// and starts it. It boots in some seconds and answers its agent then.
func newGuest(t *testing.T, disks ...string) *guest {
	t.Helper()
	g := defineGuest(t, disks...)
	g.boot()
	return g
}

// newPausedGuest is newGuest without a system in it: it stays paused, and only
// io writes to its disks.
func newPausedGuest(t *testing.T, disks ...string) *guest {
	t.Helper()
	g := defineGuest(t, disks...)
	command(t, "", "virsh", "-q", "start", "--paused", g.name)
	return g
}

// defineGuest makes a guest that does not run.
func defineGuest(t *testing.T, disks ...string) *guest {
	t.Helper()
	g := &guest{t: t, name: filepath.Base(fresh(t, "/run/lab"))}
	args := []string{"create", g.name}
	for _, d := range disks {
		args = append(args, "--disk", d)
	}
	command(t, "", "lab-domain", args...)
	t.Cleanup(func() { command(t, "", "lab-domain", "remove", g.name) })
	g.uuid = command(t, "", "virsh", "domuuid", g.name)
	awaitDomain(t, g.name)
	return g
}

func (g *guest) boot() { g.t.Helper(); command(g.t, "", "lab-domain", "start", g.name) }
func (g *guest) state() string {
	g.t.Helper()
	return command(g.t, "", "virsh", "-q", "domstate", g.name)
}

// run runs a command in the guest.
func (g *guest) run(args ...string) string {
	g.t.Helper()
	return command(g.t, "", "lab-domain", append([]string{"exec", g.name, "--"}, args...)...)
}

// disk is one disk of a domain.
type disk struct{ target, file, format string }

func (g *guest) disks() []disk { g.t.Helper(); return disksOf(g.t, g.name) }

func disksOf(t *testing.T, domain string) []disk {
	t.Helper()
	var definition struct {
		Disks []struct {
			Device string `xml:"device,attr"`
			Driver struct {
				Type string `xml:"type,attr"`
			} `xml:"driver"`
			Source struct {
				File string `xml:"file,attr"`
			} `xml:"source"`
			Target struct {
				Dev string `xml:"dev,attr"`
			} `xml:"target"`
		} `xml:"devices>disk"`
	}
	if err := xml.Unmarshal([]byte(command(t, "", "virsh", "-q", "dumpxml", domain)), &definition); err != nil {
		t.Fatal(err)
	}
	var all []disk
	for _, d := range definition.Disks {
		if d.Device != "disk" { // a drive
			continue
		}
		all = append(all, disk{target: d.Target.Dev, file: d.Source.File, format: d.Driver.Type})
	}
	return all
}

// monitor sends a command to QEMU's monitor (QMP) and stores what it returns.
func (g *guest) monitor(execute string, result any) error {
	out, err := exec.Command("virsh", "-q", "qemu-monitor-command", g.name, fmt.Sprintf(`{"execute":%q}`, execute)).CombinedOutput()
	if err != nil {
		return fmt.Errorf("virsh qemu-monitor-command %s: %w: %s", execute, err, out)
	}
	return json.Unmarshal(out, &struct{ Return any }{result})
}

// drive is what QEMU says of a disk (query-block).
type drive struct {
	QDev     string `json:"qdev"`
	Inserted struct {
		Image   struct{ Filename string }
		Bitmaps []struct{ Name string } `json:"dirty-bitmaps"`
	}
}

// io has QEMU carry out qemu-io commands, as "write -P 7 0 64k", on a disk, as
// if the guest did, and flush.
func (g *guest) io(target string, commands ...string) {
	g.t.Helper()
	var drives []drive
	if err := g.monitor("query-block", &drives); err != nil {
		g.t.Fatal(err)
	}
	disks := g.disks()
	device := slices.IndexFunc(drives, func(d drive) bool {
		name := d.Inserted.Image.Filename // of an encrypted one as JSON
		return slices.ContainsFunc(disks, func(k disk) bool {
			return k.target == target && (k.file == name || strings.HasPrefix(name, "json:") && strings.Contains(name, `"`+k.file+`"`))
		})
	})
	if device < 0 {
		g.t.Fatalf("QEMU has no drive for disk %s: %+v", target, drives)
	}
	var script strings.Builder
	for _, c := range append(commands, "flush") {
		fmt.Fprintf(&script, "qemu-monitor-command %s --hmp 'qemu-io -d %s \"%s\"'\n", g.name, drives[device].QDev, c)
	}
	// An error of a command is told to QEMU's log only.
	log := filepath.Join("/var/log/libvirt/qemu", g.name+".log")
	before, err := os.ReadFile(log)
	if err != nil {
		g.t.Fatal(err)
	}
	if out := command(g.t, script.String(), "virsh", "-q"); strings.Contains(strings.ToLower(out), "error") {
		g.t.Fatalf("%s of %s: %s", target, g.name, out)
	}
	after, err := os.ReadFile(log)
	if err != nil {
		g.t.Fatal(err)
	}
	if bytes.Contains(after[len(before):], []byte("failed")) {
		g.t.Fatalf("%s of %s: %s", target, g.name, after[len(before):])
	}
}

// snapshot is what each disk held at one moment: target → raw file.
type snapshot map[string]string

// snapshot copies the guest's disks, and holds it still meanwhile. Without
// targets all are meant.
func (g *guest) snapshot(targets ...string) snapshot {
	g.t.Helper()
	if g.state() == "running" {
		command(g.t, "", "virsh", "-q", "suspend", g.name)
		defer command(g.t, "", "virsh", "-q", "resume", g.name)
	}
	directory, all := g.t.TempDir(), snapshot{}
	for _, d := range g.disks() {
		if len(targets) > 0 && !slices.Contains(targets, d.target) {
			continue
		}
		all[d.target] = filepath.Join(directory, d.target)
		command(g.t, "", "qemu-img", "convert", "-U", "-f", d.format, "-O", "raw", d.file, all[d.target])
	}
	return all
}

// nothingLeft waits until no trace of a job is on the host, and the guest, if
// it is to be running, runs unharmed. It fails when that does not come about.
func (h *host) nothingLeft(g *guest) {
	h.t.Helper()
	eventually(h.t, "nothing is left of the job", func() error {
		return errors.Join(h.noJob(), noFiles(), noUnits(), h.noGarbage(), g.noTrace())
	})
}

// eventually waits until a condition holds.
func eventually(t *testing.T, what string, holds func() error) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for {
		err := holds()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("it does not come about that %s: %v", what, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func (h *host) noJob() error {
	m, err := dbus.Get[dbus.ManagerProperties](h.t.Context(), h.Client, "")
	if err == nil && m.JobsRunning+m.JobsQueued > 0 {
		return fmt.Errorf("%d jobs run, %d wait", m.JobsRunning, m.JobsQueued)
	}
	return err
}

func noFiles() error {
	var left []string
	for _, directory := range []string{"/run/virtbackup/jobs", "/run/virtbackup/nbd", "/run/virtbackup/exports", "/run/virtbackup/frozen", "/var/lib/virtbackup/scratch"} {
		files, err := filepath.Glob(filepath.Join(directory, "*"))
		if err != nil {
			return err
		}
		left = append(left, files...)
	}
	staging, err := filepath.Glob("/var/lib/libvirt/images/.virtbackup-*")
	if left = append(left, staging...); len(left) > 0 {
		return fmt.Errorf("files are left: %v", left)
	}
	return err
}

func noUnits() error {
	out, err := exec.Command("systemctl", "list-units", "--all", "--no-legend", "--plain", "virtbackup-job-*", "virtbackup-export-*").CombinedOutput()
	if err == nil && len(bytes.TrimSpace(out)) > 0 {
		return fmt.Errorf("units are left: %s", out)
	}
	return err
}

// noGarbage says what is in the repository and belongs to no backup.
func (h *host) noGarbage() error {
	left, err := filepath.Glob(filepath.Join(h.path, ".staging", "*"))
	if err != nil {
		return err
	}
	backups, err := filepath.Glob(filepath.Join(h.path, "*-*-*-*", "[0-9A-Z]*"))
	if err != nil {
		return err
	}
	for _, b := range backups {
		if _, err := os.Stat(filepath.Join(b, "manifest.json")); err != nil {
			left = append(left, b)
		}
	}
	if len(left) > 0 {
		return fmt.Errorf("garbage is in the repository: %v", left)
	}
	return nil
}

// noTrace says what is left in libvirt and QEMU.
func (g *guest) noTrace() error {
	state := g.state()
	if state == "shut off" {
		return nil
	}
	info, err := tryVirsh("domjobinfo", g.name)
	if err == nil && !strings.Contains(info, "None") {
		err = fmt.Errorf("libvirt has a job: %s", info)
	}
	if err != nil {
		return err
	}
	checkpoints, err := tryVirsh("checkpoint-list", g.name, "--name")
	if err == nil && strings.Contains(checkpoints, "virtbackup-") {
		err = fmt.Errorf("libvirt has checkpoints of ours: %s", checkpoints)
	}
	if err != nil {
		return err
	}
	var drives []drive
	var exports []any
	if err := errors.Join(g.monitor("query-block", &drives), g.monitor("query-block-exports", &exports)); err != nil {
		return err
	}
	for _, d := range drives {
		if len(d.Inserted.Bitmaps) > 1 {
			return fmt.Errorf("more than one bitmap is left: %+v", d)
		}
	}
	if len(exports) > 0 {
		return fmt.Errorf("QEMU exports disks: %v", exports)
	}
	if state != "running" {
		return nil
	}
	frozen, err := tryVirsh("qemu-agent-command", "--timeout", "10", g.name, `{"execute":"guest-fsfreeze-status"}`)
	if err == nil && !strings.Contains(frozen, "thawed") {
		err = fmt.Errorf("the guest is not thawed: %s", frozen)
	}
	return err
}

// tryVirsh is for what may fail; command is for what may not.
func tryVirsh(args ...string) (string, error) {
	out, err := exec.Command("virsh", append([]string{"-q"}, args...)...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("virsh %s: %w: %s", args[0], err, out)
	}
	return string(out), nil
}
