package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"strconv"
	"strings"
)

// MakeImage makes an empty qcow2 image for QEMU alone.
func MakeImage(ctx context.Context, path string, size uint64, uid, gid int) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err == nil {
		err = f.Close()
	}
	if err != nil {
		return fmt.Errorf("cannot make a scratch image: %w", err)
	}
	out, err := exec.CommandContext(ctx, "qemu-img", "create", "-q", "-f", "qcow2", path, strconv.FormatUint(size, 10)).CombinedOutput()
	if err != nil {
		return fmt.Errorf("cannot make the scratch image %s: qemu-img: %w: %s", path, err, strings.TrimSpace(string(out)))
	}
	if err := os.Chown(path, uid, gid); err != nil {
		return fmt.Errorf("cannot give a scratch image to QEMU: %w", err)
	}
	return nil
}

// User is the user as which libvirt's system instance runs QEMU: the one that its
// settings name, else on Debian and its kin libvirt-qemu, elsewhere qemu.
func User() (uid, gid int, err error) {
	content, err := settings()
	if err == nil {
		uid, gid, err = qemuUser(content)
	}
	if err != nil {
		return 0, 0, fmt.Errorf("cannot find out who QEMU runs as: %w", err)
	}
	return uid, gid, nil
}

// qemuUser is User by the content of the settings.
func qemuUser(settings []byte) (uid, gid int, err error) {
	name, group := setting(settings, "user", ""), setting(settings, "group", "")
	if name == "" || group == "" {
		if uid, gid, err = usualUser(); err != nil {
			return 0, 0, err
		}
	}
	if name != "" {
		if uid, err = lookupUser(name); err != nil {
			return 0, 0, err
		}
	}
	if group != "" {
		gid, err = lookupGroup(group)
	}
	return uid, gid, err
}

// usualUser is the one that distributions build libvirt with.
func usualUser() (uid, gid int, err error) {
	for _, name := range []string{"libvirt-qemu", "qemu"} {
		u, err := user.Lookup(name)
		if err != nil {
			continue
		}
		uid, err1 := strconv.Atoi(u.Uid)
		gid, err2 := strconv.Atoi(u.Gid)
		return uid, gid, errors.Join(err1, err2)
	}
	return 0, 0, errors.New("there is neither a user libvirt-qemu nor qemu: set user and group in " + qemuSettings)
}
