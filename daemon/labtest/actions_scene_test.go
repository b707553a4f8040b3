//go:build lab

package labtest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/virtbackup/virtbackup/dbus"
)

// The states of a domain, as virsh has them.
const (
	running = "running"
	off     = "shut off"
)

// scene is a domain to which actions are done. Its disks are on SCSI, where a
// disk can be unplugged although no system of the guest agrees.
type scene struct {
	*guest
	directory string            // of its files
	files     int               // that were made
	copies    map[string]string // target → a copy that was kept of its image
	told      []string          // what virsh said to each command
	lenient   bool              // a command may fail
}

// newScene makes a domain with qcow2 disks and, after those, raw ones.
func newScene(t *testing.T, qcow2, raw int) *scene {
	t.Helper()
	s := newUndefined(t)
	var devices strings.Builder
	for i := range qcow2 + raw {
		target, format := fmt.Sprintf("sd%c", 'a'+i), "qcow2"
		if i >= qcow2 {
			format = "raw"
		}
		file := filepath.Join(s.directory, target+"."+format)
		makeImage(t, file, format)
		devices.WriteString(scsiDisk(file, target, format))
	}
	s.define(fmt.Sprintf(bareXML, s.name, devices.String()+
		"<controller type='scsi' model='virtio-scsi'/><disk type='file' device='cdrom'><target dev='sdz' bus='sata'/><readonly/></disk>"))
	s.virsh("start", s.name)
	return s
}

// newUndefined is a scene for a domain that is not there yet.
func newUndefined(t *testing.T) *scene {
	t.Helper()
	directory := fresh(t, "/var/lib/libvirt/images")
	if err := os.Chmod(directory, 0o711); err != nil {
		t.Fatal(err)
	}
	s := &scene{guest: &guest{t: t, name: filepath.Base(directory)}, directory: directory, copies: map[string]string{}}
	t.Cleanup(func() {
		s.t, s.lenient = t, true
		s.virsh("destroy", s.uuid)
		s.lenient = false
		s.virsh("undefine", s.uuid, "--nvram", "--checkpoints-metadata", "--snapshots-metadata", "--managed-save")
		if err := os.RemoveAll(directory); err != nil {
			t.Error(err)
		}
	})
	return s
}

// newSystem is a scene with a system in its guest, which can shut down.
func newSystem(t *testing.T) *scene {
	t.Helper()
	return &scene{guest: newGuest(t, "qcow2:16M:bus=scsi", "qcow2:16M:bus=scsi"), directory: fresh(t, "/var/lib/libvirt/images")}
}

func (s *scene) define(definition string) {
	s.t.Helper()
	s.virshWith(definition, "define", "/dev/stdin")
	s.uuid = s.virsh("domuuid", s.name)
	awaitDomain(s.t, s.name)
}

func scsiDisk(file, target, format string) string {
	return fmt.Sprintf(`<disk type='file' device='disk'><driver name='qemu' type='%s' discard='unmap'/><source file='%s'/><target dev='%s' bus='scsi'/></disk>`,
		format, file, target)
}

// virsh runs virsh, and keeps what it says.
func (s *scene) virsh(args ...string) string {
	s.t.Helper()
	return s.virshWith("", args...)
}

func (s *scene) virshWith(stdin string, args ...string) string {
	s.t.Helper()
	cmd := exec.Command("virsh", append([]string{"-q"}, args...)...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	said := strings.TrimSpace(string(out))
	if s.told = append(s.told, fmt.Sprintf("virsh %s: %v: %s", strings.Join(args, " "), err, said)); err != nil && !s.lenient {
		s.t.Fatal(s.told[len(s.told)-1])
	}
	return said
}

// disk is a disk as the domain has it now.
func (s *scene) disk(target string) disk {
	s.t.Helper()
	all := s.disks()
	i := slices.IndexFunc(all, func(d disk) bool { return d.target == target })
	if i < 0 {
		s.t.Fatalf("%s has no disk %s", s.name, target)
	}
	return all[i]
}

// another is a path for a file that nobody has.
func (s *scene) another(suffix string) string {
	s.files++
	return filepath.Join(s.directory, fmt.Sprintf("%d.%s", s.files, suffix))
}

// bring starts or destroys the domain, if it is not in that state.
func (s *scene) bring(state string) {
	s.t.Helper()
	switch now := s.state(); {
	case now == state:
	case state == off:
		s.virsh("destroy", s.name)
	default:
		s.virsh("start", s.name)
	}
}

// attach attaches an image as a disk of the domain.
func (s *scene) attach(file, target, format string, flags ...string) {
	s.t.Helper()
	s.virshWith(scsiDisk(file, target, format), append([]string{"attach-device", s.name, "/dev/stdin"}, flags...)...)
}

// detach detaches a disk from a running domain.
func (s *scene) detach(target string) disk {
	s.t.Helper()
	d := s.disk(target)
	s.virsh("detach-disk", s.name, target, "--live", "--config")
	return d
}

// sized makes an image of the size of a disk, with other content.
func (s *scene) sized(d disk) string {
	s.t.Helper()
	file := s.another(d.format)
	makeImage(s.t, file, d.format)
	command(s.t, "", "qemu-img", "resize", "-q", "-f", d.format, file, fmt.Sprint(s.size(d)))
	return file
}

// size is that of a disk for the guest, in bytes.
func (s *scene) size(d disk) int64 {
	s.t.Helper()
	var info struct {
		Size int64 `json:"virtual-size"`
	}
	decode(s.t, command(s.t, "", "qemu-img", "info", "-U", "--output=json", "-f", d.format, d.file), &info)
	return info.Size
}

// layers is how many images a disk consists of.
func (s *scene) layers(target string) int {
	s.t.Helper()
	var layers []any
	d := s.disk(target)
	decode(s.t, command(s.t, "", "qemu-img", "info", "-U", "--backing-chain", "--output=json", "-f", d.format, d.file), &layers)
	return len(layers)
}

// pid is QEMU's process.
func (s *scene) pid() string {
	s.t.Helper()
	pid, err := os.ReadFile(filepath.Join("/run/libvirt/qemu", s.name+".pid"))
	if err != nil {
		s.t.Fatal(err)
	}
	return strings.TrimSpace(string(pid))
}

// gone waits until a process is.
func (s *scene) gone(pid string) {
	s.t.Helper()
	eventually(s.t, "process "+pid+" ends", func() error {
		// Also as a zombie's it would not be sure that its files are closed.
		if _, err := os.Stat(filepath.Join("/proc", pid)); err == nil {
			return fmt.Errorf("it is there")
		}
		return nil
	})
}

// isOff waits until libvirt knows that the domain is off.
func (s *scene) isOff() {
	s.t.Helper()
	eventually(s.t, "the domain is off", func() error {
		if state := s.state(); state != off {
			return fmt.Errorf("it is %s", state)
		}
		return nil
	})
}

// verdictOf says how the changes of a disk were found in a backup, and why not by
// its bitmap: "cbt", "digest unseen", "full disk-attached".
func verdictOf(d dbus.BackupDisk) string {
	how := string(d.Kind)
	if d.Kind == dbus.KindIncremental {
		how = string(d.Changes)
	}
	return strings.TrimSpace(how + " " + d.Cause)
}
