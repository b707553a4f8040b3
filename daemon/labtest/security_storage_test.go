//go:build lab

package labtest

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/virtbackup/virtbackup/dbus"
	"github.com/virtbackup/virtbackup/dbus/bustest"
)

// TestNothingChangesWhenAUserIsRefused calls every method of one real object of
// each kind.
func TestNothingChangesWhenAUserIsRefused(t *testing.T) {
	h, ctx := newHost(t), t.Context()
	g := startBare(t, "refused", bareDisk(t, "vda", "qcow2", ""))
	if err := h.AssignDomain(ctx, g.uuid, h.offering); err != nil {
		t.Fatal(err)
	}
	job := h.end(h.start(g, dbus.BackupOptions{}))
	b := h.made(job)
	offering, err := h.FindOffering(ctx, h.offering)
	if err != nil {
		t.Fatal(err)
	}
	schedule := h.schedule("refused", "2190-01-01", dbus.CreateScheduleOptions{Domain: g.uuid})
	before := h.everything(g)
	user := bustest.DialAs(t, systemBus, labuser)
	for _, ref := range []dbus.Ref{
		{Kind: dbus.KindManager}, {Kind: dbus.KindRepository, ID: h.repository}, {Kind: dbus.KindOffering, ID: offering}, {Kind: dbus.KindSchedule, ID: schedule},
		{Kind: dbus.KindDomain, ID: g.uuid}, {Kind: dbus.KindChain, ID: b.Chain}, {Kind: dbus.KindBackup, ID: b.ID}, {Kind: dbus.KindJob, ID: job.ID},
	} {
		calls := bustest.Calls(t, user, ref.Path())
		if len(calls) < 3 {
			t.Errorf("%s has the methods %v only", ref, calls)
		}
		for _, c := range calls {
			err := c.Do(user)
			if !refused(err) {
				t.Errorf("%s of %s: %v", c.Method, ref, err)
			} else if strings.Contains(err.Error(), g.name) || strings.Contains(err.Error(), h.path) {
				t.Errorf("%s of %s tells whom it refuses: %v", c.Method, ref, err)
			}
		}
	}
	if after := h.everything(g); after != before {
		t.Errorf("something has changed, from\n%s\nto\n%s", before, after)
	}
}

// everything tells all that a refused call could have changed.
func (h *host) everything(g *guest) string {
	h.t.Helper()
	o, err := h.Objects(h.t.Context())
	if err != nil {
		h.t.Fatal(err)
	}
	var text strings.Builder
	for _, r := range o.Repositories {
		// What is found of storage changes by itself.
		fmt.Fprintln(&text, r.ID, r.Name, r.Type, r.Path, r.Address, r.MountOptions, r.MinimumFree, r.Created)
	}
	fmt.Fprintln(&text, o.Offerings, o.Schedules, len(o.Jobs))
	for c, err := range h.Chains(h.t.Context(), dbus.ChainFilter{Domain: g.uuid}) {
		fmt.Fprintln(&text, c, err)
	}
	for b, err := range h.Backups(h.t.Context(), dbus.BackupFilter{Domain: g.uuid}) {
		fmt.Fprintln(&text, b, err)
	}
	p, err := dbus.Get[dbus.DomainProperties](h.t.Context(), h.Client, g.uuid)
	fmt.Fprintln(&text, p.Offering, p.Chain, p.LastBackup, err)
	return text.String()
}

// TestUserOfOneDomain is T5: a rule gives a user the backup of one domain.
func TestUserOfOneDomain(t *testing.T) {
	h, ctx := newHost(t), t.Context()
	mine := startBare(t, "users-own", bareDisk(t, "vda", "qcow2", ""))
	other := startBare(t, "users-other", bareDisk(t, "vda", "qcow2", ""))
	allow(t, "org.virtbackup1.backup", mine.uuid)
	user := dbus.NewClient(bustest.DialAs(t, systemBus, labuser))
	o := dbus.BackupOptions{Offering: h.offering}
	job, err := user.BackupDomain(ctx, mine.uuid, o)
	if err != nil {
		t.Fatalf("the user's own domain: %v", err)
	}
	p := h.end(job)
	b := h.made(p)
	if p.UID != labuser {
		t.Errorf("the job was started by uid %d", p.UID)
	}
	_, another := user.BackupDomain(ctx, other.uuid, o)
	_, restore := user.RestoreBackup(ctx, b.ID, "users-copy", dbus.RestoreOptions{})
	_, _, remove := user.DeleteBackup(ctx, b.ID, dbus.DeleteBackupOptions{})
	_, read := dbus.Get[dbus.BackupProperties](ctx, user, b.ID)
	for what, err := range map[string]error{
		"another's domain": another, "restore": restore, "delete": remove, "cancel": user.CancelJob(ctx, job), "read": read,
	} {
		refuses(t, what, err, dbus.ErrNotAuthorized)
	}
}

// TestSecretsStayWhereTheyAre is T12: a password of a domain, and the key that
// authenticates manifests, appear nowhere.
func TestSecretsStayWhereTheyAre(t *testing.T) {
	const password = "canary12" // VNC takes eight characters
	h := newHost(t)
	g := startBare(t, "secrets", bareDisk(t, "vda", "qcow2", ""), `<graphics type='vnc' port='-1' autoport='yes' passwd='`+password+`'/>`)
	if !strings.Contains(virsh(t, "dumpxml", g.name, "--security-info"), password) {
		t.Fatal("libvirt does not have the password")
	}
	want := g.snapshot()
	b := h.backup(g, dbus.BackupOptions{})
	h.restoreIsExact(b, want)
	key, err := os.ReadFile("/var/lib/virtbackup/manifest.key")
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat("/var/lib/virtbackup/manifest.key"); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("the key's mode is %v, %v", st.Mode(), err)
	}
	secrets := [][]byte{[]byte(password), bytes.TrimSpace(key)}
	if raw, err := hex.DecodeString(string(bytes.TrimSpace(key))); err == nil {
		secrets = append(secrets, raw)
	}
	h.holdsNoSecret(secrets...)
}

// holdsNoSecret looks for secrets where virtbackup writes, and in the command
// lines of all processes.
func (h *host) holdsNoSecret(secrets ...[]byte) {
	t := h.t
	t.Helper()
	hold := func(where string, content []byte) {
		for i, s := range secrets {
			if bytes.Contains(content, s) {
				t.Errorf("secret %d is in %s", i, where)
			}
		}
	}
	journal := []byte(command(t, "", "journalctl", "--output=export", "--unit=virtbackupd", "--unit=virtbackup-*"))
	if len(journal) == 0 {
		t.Error("the journal is empty")
	}
	hold("the journal", journal)
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil || len(lines) == 0 {
		t.Errorf("there are the processes %v, %v", lines, err)
	}
	for _, path := range lines {
		if content, err := os.ReadFile(path); err == nil { // else it has ended
			hold(path, content)
		}
	}
	for _, root := range []string{h.path, "/var/lib/virtbackup", "/run/virtbackup"} {
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() || path == "/var/lib/virtbackup/manifest.key" {
				return err
			}
			content, err := os.ReadFile(path)
			hold(path, content)
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	}
}

// hostileBacking are backing files that an image may not have.
func hostileBacking(t *testing.T) map[string][]string {
	t.Helper()
	secret := filepath.Join(fresh(t, "/srv"), "secret")
	if err := os.WriteFile(secret, bytes.Repeat([]byte("the host's own secret\n"), 1000), 0o600); err != nil {
		t.Fatal(err)
	}
	return map[string][]string{
		"absolute path": {"-b", secret, "-F", "raw"},
		"json":          {"-b", `json:{"driver":"raw","file":{"driver":"file","filename":"` + secret + `"}}`, "-F", "raw"},
		"nbd":           {"-b", "nbd://127.0.0.1:1/x", "-F", "raw"},
		"relative path": {"-b", "../../../../" + strings.TrimPrefix(secret, "/"), "-F", "raw"},
		"data file":     {"-o", "data_file=" + filepath.Join(t.TempDir(), "data"), "-o", "data_file_raw=on"},
	}
}

// TestHeaderOnRawDisk is T13: a guest writes a qcow2 header to its raw disk.
// The disk is what its definition says.
func TestHeaderOnRawDisk(t *testing.T) {
	h := newHost(t)
	g := startBare(t, "raw-header", bareDisk(t, "vda", "raw", ""))
	backing := hostileBacking(t)["absolute path"]
	image := filepath.Join(t.TempDir(), "image")
	command(t, "", "qemu-img", append([]string{"create", "-q", "-u", "-f", "qcow2", "-o", "cluster_size=512"}, append(backing, image, "8M")...)...)
	header, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	pattern := filepath.Join("/var/lib/libvirt/images", "raw-header-pattern")
	if err := os.WriteFile(pattern, header[:min(len(header), 64<<10)/512*512], 0o644); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Remove(pattern) })
	g.io("vda", fmt.Sprintf("write -s %s 0 %d", pattern, min(len(header), 64<<10)/512*512))
	want := g.snapshot()
	if start, err := os.ReadFile(want["vda"]); err != nil || !bytes.HasPrefix(start, []byte("QFI\xfb")) {
		t.Fatalf("the disk has no such header: %v", err)
	}
	b := h.backup(g, dbus.BackupOptions{})
	h.chainIsExact(b, want)
	h.restoreIsExact(b, want)
}

// TestHostileImages is T14: somebody who may write to the repository plants an
// image that makes QEMU open a file of the host, or connect.
func TestHostileImages(t *testing.T) {
	h := newHost(t)
	g := startBare(t, "hostile-images", bareDisk(t, "vda", "qcow2", ""))
	for what, options := range hostileBacking(t) {
		t.Run(what, func(t *testing.T) {
			h := h.in(t)
			b := h.backup(g, dbus.BackupOptions{Isolated: true})
			image := h.image(b, "vda")
			st, err := os.Stat(image)
			if err != nil {
				t.Fatal(err)
			}
			command(t, "", "qemu-img", append([]string{"create", "-q", "-u", "-f", "qcow2"}, append(options, image, "8M")...)...)
			if err := os.Truncate(image, st.Size()); err != nil { // or its size alone would tell
				t.Fatal(err)
			}
			h.isDamaged(b)
		})
	}
}

// TestForgedFiles is T16 and T18: a definition that was poisoned, and manifests
// that this host did not write.
func TestForgedFiles(t *testing.T) {
	h := newHost(t)
	g := startBare(t, "forged", bareDisk(t, "vda", "qcow2", ""))
	older := h.backup(g, dbus.BackupOptions{Isolated: true})
	for what, forge := range map[string]struct {
		file   string
		change func(content []byte) []byte
	}{
		"definition": {"domain.xml", func(c []byte) []byte {
			return bytes.Replace(c, []byte("<devices>"), []byte("<devices><emulator>/bin/sh</emulator>"), 1)
		}},
		"digests":                {"vda.digests", func(c []byte) []byte { c[len(c)/2] ^= 1; return c }},
		"manifest, its name":     {"manifest.json", func(c []byte) []byte { return bytes.ReplaceAll(c, []byte("forged"), []byte("forgot")) }},
		"manifest, its code":     {"manifest.json", func(c []byte) []byte { return mirrored(c, `"hmac": "`) }},
		"manifest, cut":          {"manifest.json", func(c []byte) []byte { return c[:len(c)/2] }},
		"manifest, empty":        {"manifest.json", func([]byte) []byte { return nil }},
		"manifest, spaced":       {"manifest.json", func(c []byte) []byte { return append(c, ' ') }},
		"manifest of an older":   {"manifest.json", func([]byte) []byte { return h.file(older, "manifest.json") }},
		"definition, only space": {"domain.xml", func(c []byte) []byte { return append(c, '\n') }},
	} {
		t.Run(what, func(t *testing.T) {
			h := h.in(t)
			b := h.backup(g, dbus.BackupOptions{Isolated: true})
			before := h.file(b, forge.file)
			after := forge.change(slices.Clone(before))
			if bytes.Equal(before, after) {
				t.Fatal("nothing was forged")
			}
			if err := os.WriteFile(filepath.Join(h.path, b.DomainUUID, b.ID, forge.file), after, 0o600); err != nil {
				t.Fatal(err)
			}
			h.isDamaged(b)
		})
	}
}

// mirrored exchanges the first two different characters of what follows a word.
func mirrored(content []byte, word string) []byte {
	for i := bytes.Index(content, []byte(word)) + len(word); i+1 < len(content); i++ {
		if content[i] != content[i+1] {
			content[i], content[i+1] = content[i+1], content[i]
			break
		}
	}
	return content
}

func (h *host) file(b dbus.BackupProperties, name string) []byte {
	h.t.Helper()
	content, err := os.ReadFile(filepath.Join(h.path, b.DomainUUID, b.ID, name))
	if err != nil {
		h.t.Fatal(err)
	}
	return content
}

// TestWorkerSandbox looks at a worker at work: it has what it needs, and
// nothing else of the host.
func TestWorkerSandbox(t *testing.T) {
	h := newHost(t)
	g := startBare(t, "sandboxed", bareDisk(t, "vda", "qcow2", ""))
	goOn := stopWorkers(t)
	job := h.start(g, suspended())
	g.inBackup()
	proc := filepath.Join("/proc", command(t, "", "systemctl", "show", "--property=MainPID", "--value", "virtbackup-job-"+job+".service"))
	status, err := os.ReadFile(filepath.Join(proc, "status"))
	if err != nil {
		t.Fatal(err)
	}
	// CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH and CAP_FOWNER.
	for _, line := range []string{"NoNewPrivs:\t1", "Seccomp:\t2", "CapBnd:\t000000000000000f", "CapEff:\t000000000000000f"} {
		if !strings.Contains(string(status), line) {
			t.Errorf("the worker does not have %q: %s", line, status)
		}
	}
	for _, namespace := range []string{"net", "mnt", "ipc"} {
		mine, _ := os.Readlink("/proc/self/ns/" + namespace)
		if its, err := os.Readlink(filepath.Join(proc, "ns", namespace)); err != nil || its == mine {
			t.Errorf("the worker shares the namespace %s: %v", its, err)
		}
	}
	const private = "/root/labtest"
	if err := os.WriteFile(private, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Remove(private) })
	for path, visible := range map[string]bool{
		h.path: true, "/run/virtbackup/jobs/" + job: true,
		"/etc/shadow": false, "/etc/virtbackup": false, private: false, "/home/labuser": false, "/run/libvirt": false, "/run/dbus": false,
		"/var/lib/virtbackup/catalog.sqlite": false, g.disks()[0].file: false, "/var/lib/virtbackup/scratch": false,
	} {
		if _, err := os.Stat(filepath.Join(proc, "root", path)); (err == nil) != visible {
			t.Errorf("%s, as the worker sees it: %v", path, err)
		}
	}
	if out, err := exec.Command("nsenter", "--target", filepath.Base(proc), "--net", "ip", "-brief", "address").CombinedOutput(); err == nil &&
		strings.Contains(string(out), "UP") {
		t.Errorf("the worker has a network: %s", out)
	}
	goOn()
	h.made(h.end(job))
}
