package backup

import (
	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/failure"
	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/dbus"
)

// An encrypted disk is backed up encrypted: no repository gets to hold in clear
// what the host's own storage does not. What a QEMU with the key exports is in
// clear, so only the file of a domain that is off can be copied: as a raw disk,
// byte by byte, whatever is in it. That knows nothing of bitmaps; changes are
// found by comparing.

// container is what of an encrypted disk is copied.
func container(k hypervisor.Disk) hypervisor.Disk {
	k.Format, k.Capacity = "raw", k.Physical
	return k
}

// containerFormat is the format of the encrypted image that a disk is; "" if it
// is none, or is left out.
func containerFormat(d hypervisor.Domain, target string) string {
	k, any := d.Disk(target)
	if !any || !k.Encrypted || Skip(k, catalog.Settings{Volatile: true}, d.Active) != "" {
		return ""
	}
	return k.Format
}

// checkContainer refuses an encrypted disk that cannot be copied as it is.
func checkContainer(d hypervisor.Domain, k hypervisor.Disk) error {
	switch {
	case d.Active:
		return failure.Errorf(dbus.ErrUnsupported, "disk %s of domain %q is encrypted, and its QEMU would give it to the backup in clear: shut the domain off, and its disks are backed up encrypted as they are",
			k.Target, d.Name)
	case k.Encryption.Format == "":
		return failure.Errorf(dbus.ErrUnsupported, "disk %s of domain %q is encrypted in a way that virtbackup does not know: only LUKS with one passphrase is supported", k.Target, d.Name)
	case k.Source == "" || k.Physical == 0:
		return failure.Errorf(dbus.ErrUnsupported, "disk %s of domain %q is encrypted, and on no path of this host: it cannot be backed up as it is", k.Target, d.Name)
	}
	return nil
}
