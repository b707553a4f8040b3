//go:build nas

package nastest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/virtbackup/virtbackup/dbus"
)

// limit bounds every wait; no test measures time by it.
const limit = 3 * time.Minute

// settings let go of storage soon, and look again soon at what is not online.
const settings = `[repositories]
unmount_after = "15s"
mount_timeout = "20s"
look_every = "5s"
look_idle = "1h"
hung_after = "10s"
`

func TestMain(m *testing.M) {
	err := os.MkdirAll("/etc/virtbackup", 0o755)
	if err == nil {
		err = os.WriteFile("/etc/virtbackup/virtbackupd.toml", []byte(settings), 0o644)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// command runs a command that has to succeed, and returns what it prints.
func command(t *testing.T, stdin, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// ctl runs virtbackupctl, which may fail.
func ctl(args ...string) (string, error) {
	out, err := exec.Command("virtbackupctl", append(args, "--no-ask-password")...).CombinedOutput()
	if err != nil {
		err = fmt.Errorf("virtbackupctl %v: %w: %s", args, err, out)
	}
	return string(out), err
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
		time.Sleep(200 * time.Millisecond)
	}
}

// write puts a file in its place.
func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// volume makes a file system of so many MiB to be exported, and returns where it is.
func volume(t *testing.T, name string, mebibytes int) string {
	t.Helper()
	image, point := filepath.Join("/run", name+".ext4"), filepath.Join("/export", name)
	command(t, "", "truncate", fmt.Sprintf("--size=%dM", mebibytes), image)
	command(t, "", "mkfs.ext4", "-q", image)
	command(t, "", "mkdir", "-p", point)
	command(t, "", "mount", "-o", "loop", image, point)
	return point
}

// repository is one on shared storage, with an offering of the same name.
type repository struct {
	*dbus.Client
	t    *testing.T
	name string
	id   string
}

// add makes a repository with these arguments of "virtbackupctl repository add".
func add(t *testing.T, name string, args ...string) *repository {
	t.Helper()
	c, err := dbus.ConnectSystem(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	r := &repository{Client: c, t: t, name: name}
	r.ctl(append([]string{"repository", "add", name, "--minimum-free", "0"}, args...)...)
	r.ctl("offering", "create", name, "--repository", name, "--quiesce", "none")
	if r.id, err = c.FindRepository(t.Context(), name); err != nil {
		t.Fatal(err)
	}
	return r
}

func (r *repository) ctl(args ...string) string {
	r.t.Helper()
	out, err := ctl(args...)
	if err != nil {
		r.t.Fatal(err)
	}
	return out
}

func (r *repository) properties() dbus.RepositoryProperties {
	r.t.Helper()
	p, err := dbus.Get[dbus.RepositoryProperties](r.t.Context(), r.Client, r.id)
	if err != nil {
		r.t.Fatal(err)
	}
	return p
}

// point is where the repository is mounted.
func (r *repository) point() string { return "/run/virtbackup/mounts/" + r.id }

// isUnmounted waits until nothing is mounted there any more.
func (r *repository) isUnmounted() {
	r.t.Helper()
	eventually(r.t, "it is unmounted when nothing uses it", func() error {
		if out, err := exec.Command("findmnt", "-n", r.point()).Output(); err == nil {
			return errors.New(string(out))
		}
		return nil
	})
}

// disk is the one disk of a domain of this name that is shut off.
func disk(domain string) string { return "/var/lib/libvirt/images/" + domain + "-vda.qcow2" }

// newDomain defines a domain with a disk, which stays off.
func newDomain(t *testing.T, name string, size string) {
	t.Helper()
	command(t, "", "lab-domain", "create", name, "--disk", "qcow2:"+size)
	t.Cleanup(func() { command(t, "", "lab-domain", "remove", name) })
	eventually(t, name+" is known", func() error { _, err := ctl("show", name); return err })
}

// change writes to a domain's disk, and returns a copy of what it holds then.
func change(t *testing.T, domain string, commands ...string) (raw string) {
	t.Helper()
	args := []string{"-f", "qcow2"}
	for _, c := range append(commands, "flush") {
		args = append(args, "-c", c)
	}
	if out := command(t, "", "qemu-io", append(args, disk(domain))...); strings.Contains(out, "failed") {
		t.Fatal(out)
	}
	raw = filepath.Join(t.TempDir(), domain)
	command(t, "", "qemu-img", "convert", "-O", "raw", disk(domain), raw)
	return raw
}

// backUp backs a domain up, and returns the backup's id.
func (r *repository) backUp(domain string) string {
	r.t.Helper()
	r.ctl("backup", domain, "--offering", r.name)
	uuid := command(r.t, "", "virsh", "domuuid", domain)
	for b, err := range r.Backups(r.t.Context(), dbus.BackupFilter{Domain: uuid, Repository: r.id}) {
		if err != nil {
			r.t.Fatal(err)
		}
		return b.ID // the newest comes first
	}
	r.t.Fatal("there is no backup")
	return ""
}

// restoresTo restores a backup, and has QEMU compare it with what the disk held.
func (r *repository) restoresTo(backup, raw string) {
	r.t.Helper()
	name := "restored-" + strings.ToLower(backup)
	r.ctl("restore", backup, "--name", name)
	var file string
	for _, line := range strings.Split(command(r.t, "", "lab-domain", "disks", name), "\n") {
		_, file, _ = strings.Cut(line, " ")
	}
	command(r.t, "", "qemu-img", "compare", "-f", "qcow2", "-F", "raw", file, raw)
	command(r.t, "", "virsh", "-q", "undefine", name)
	if err := os.Remove(file); err != nil {
		r.t.Error(err)
	}
}
