//go:build lab

package labtest

import (
	"crypto/rand"
	"encoding/xml"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/virtbackup/virtbackup/dbus"
)

// A bare domain has no operating system: its firmware finds nothing to boot.
// It runs within half a second and has whatever devices and name a test wants;
// only guest.io writes to its disks.
const bareXML = `<domain type='qemu'>
  <name>%s</name>
  <memory unit='MiB'>32</memory>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <cpu mode='maximum'/>
  <on_crash>preserve</on_crash>
  <devices>%s<controller type='usb' model='none'/><memballoon model='none'/></devices>
</domain>`

const bareDiskSize = 8 << 20 // bytes

// bareDisk makes an image of bareDiskSize with some data, and returns the
// element of a disk with it. inner is put into the element.
func bareDisk(t *testing.T, target, format, inner string) string {
	t.Helper()
	directory := fresh(t, "/var/lib/libvirt/images")
	t.Cleanup(func() { _ = os.RemoveAll(directory) })
	if err := os.Chmod(directory, 0o711); err != nil {
		t.Fatal(err)
	}
	return bareDiskAt(t, filepath.Join(directory, target+"."+format), target, format, inner)
}

func bareDiskAt(t *testing.T, file, target, format, inner string) string {
	t.Helper()
	makeImage(t, file, format)
	return diskXML(file, target, format, inner)
}

// makeImage makes an image with data in its first half and zeros in the other.
func makeImage(t *testing.T, file, format string) {
	t.Helper()
	content := make([]byte, bareDiskSize)
	if _, err := rand.Read(content[:len(content)/2]); err != nil {
		t.Fatal(err)
	}
	raw := filepath.Join(t.TempDir(), "content")
	if err := os.WriteFile(raw, content, 0o600); err != nil {
		t.Fatal(err)
	}
	command(t, "", "qemu-img", "convert", "-f", "raw", "-O", format, raw, file)
}

func diskXML(file, target, format, inner string) string {
	return fmt.Sprintf(`<disk type='file' device='disk'><driver name='qemu' type='%s'/><source file='%s'/><target dev='%s' bus='virtio'/>%s</disk>`,
		format, file, target, inner)
}

// startBare defines and starts a bare domain.
func startBare(t *testing.T, name string, devices ...string) *guest {
	t.Helper()
	g := defineBare(t, name, devices...)
	command(t, "", "virsh", "-q", "start", name)
	return g
}

func defineBare(t *testing.T, name string, devices ...string) *guest {
	t.Helper()
	return &guest{t: t, name: name, uuid: makeBare(t, "define", name, devices...)}
}

// makeBare defines or creates a domain, and returns its UUID.
func makeBare(t *testing.T, verb, name string, devices ...string) string {
	t.Helper()
	var escaped strings.Builder
	if err := xml.EscapeText(&escaped, []byte(name)); err != nil {
		t.Fatal(err)
	}
	document := fmt.Sprintf(bareXML, escaped.String(), strings.Join(devices, ""))
	command(t, document, "virsh", "-q", verb, "/dev/stdin")
	t.Cleanup(func() {
		_ = exec.Command("virsh", "-q", "destroy", name).Run()
		if verb == "define" {
			command(t, "", "virsh", "-q", "undefine", name, "--nvram", "--checkpoints-metadata", "--snapshots-metadata", "--managed-save")
		}
	})
	awaitDomain(t, name)
	return command(t, "", "virsh", "domuuid", name)
}

// in is the host for a part of a test.
func (h host) in(t *testing.T) *host {
	h.t = t
	return &h
}

// try makes a backup, and returns why there is none, whether the call or the
// job tells.
func (h *host) try(g *guest, o dbus.BackupOptions) error {
	h.t.Helper()
	if o.Offering == "" && o.Repository == "" {
		o.Offering = h.offering
	}
	return h.outcome(h.BackupDomain(h.t.Context(), g.uuid, o))
}

// outcome is how a job ends, or why there is none.
func (h *host) outcome(job string, err error) error {
	h.t.Helper()
	if err != nil {
		return err
	}
	return h.end(job).Err()
}

// refuses checks that there is an error of that name, whose sentence has all of
// these words.
func refuses(t *testing.T, what string, err error, name dbus.ErrorName, words ...string) {
	t.Helper()
	if !errors.Is(err, name) {
		t.Errorf("%s: %v, and not %s", what, described(err), name)
		return
	}
	for _, word := range words {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("%s: the error does not say %q: %v", what, word, err)
		}
	}
}

// described is an error with its name.
func described(err error) string {
	var named *dbus.Error
	if errors.As(err, &named) {
		return fmt.Sprintf("%s: %s", named.Name, named.Message)
	}
	return fmt.Sprint(err)
}

// bitmaps are those that QEMU has on a disk.
func (g *guest) bitmaps(target string) []string {
	g.t.Helper()
	var drives []drive
	if err := g.monitor("query-block", &drives); err != nil {
		g.t.Fatal(err)
	}
	var names []string
	for _, d := range drives {
		for _, k := range g.disks() {
			if k.target == target && k.file == d.Inserted.Image.Filename {
				for _, b := range d.Inserted.Bitmaps {
					names = append(names, b.Name)
				}
			}
		}
	}
	return names
}

// virsh runs virsh, which has to succeed.
func virsh(t *testing.T, args ...string) string {
	t.Helper()
	return command(t, "", "virsh", append([]string{"-q"}, args...)...)
}
