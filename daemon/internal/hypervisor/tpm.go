package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"libvirt.org/go/libvirt"
	"libvirt.org/go/libvirtxml"
)

// TPM is a domain's emulated TPM, which swtpm does for libvirt.
type TPM struct {
	Version string // "1.2" or "2.0"; "" = the domain has none
	State   string // path of the file that swtpm keeps its lasting state in; "" when that is not known to be such a file
	Secret  string // UUID of the secret that it is encrypted with; "" = it is not
}

// TPMDirectory is where libvirt keeps the state of TPMs: below it a directory
// for each domain, named by its UUID (qemu_tpm.c, qemuTPMEmulatorStorageBuildPath).
const TPMDirectory = "/var/lib/libvirt/swtpm"

// tpmFiles are the names of the file with the lasting state, by version (swtpm,
// swtpm_nvstore_dir.c). swtpm makes it anew and renames it, so that whoever
// opens it has one state. What else it keeps is for a QEMU that is saved or
// migrated, and is not used by one that boots.
var tpmFiles = map[string]struct{ directory, name string }{
	"1.2": {"tpm1.2", "tpm-00.permall"},
	"2.0": {"tpm2", "tpm2-00.permall"},
}

// TPMStateFile is where libvirt has the state of a domain's TPM; "" for a
// version that is not known.
func TPMStateFile(uuid, version string) string {
	f, known := tpmFiles[version]
	if !known {
		return ""
	}
	return filepath.Join(TPMDirectory, uuid, f.directory, f.name)
}

// TPMVersion tells by the name of a file with the state of a TPM what version it
// is of; "" if it is none.
func TPMVersion(name string) string {
	for version, f := range tpmFiles {
		if f.name == name {
			return version
		}
	}
	return ""
}

// tpm returns the domain's emulated TPM; there is at most one.
func tpm(def *libvirtxml.Domain) TPM {
	if def.Devices == nil {
		return TPM{}
	}
	for _, t := range def.Devices.TPMs {
		if t.Backend == nil || t.Backend.Emulator == nil {
			continue
		}
		e := t.Backend.Emulator
		out := TPM{Version: e.Version, State: TPMStateFile(def.UUID, e.Version)}
		if e.Encryption != nil {
			out.Secret = e.Encryption.Secret
		}
		if e.Source != nil {
			f, known := tpmFiles[e.Version]
			out.State = "" // a file has another form than those in a directory
			if e.Source.Dir != nil && known {
				out.State = filepath.Join(e.Source.Dir.Path, f.name)
			}
		}
		return out
	}
	return TPM{}
}

// qemuSettings is the configuration of libvirt's QEMU driver.
const qemuSettings = "/etc/libvirt/qemu.conf"

// TPMOwner returns who swtpm runs as, which is who must own the state of a TPM:
// libvirt gives it the directory, but not the file.
func TPMOwner() (uid, gid int, err error) {
	content, err := settings()
	if err == nil {
		uid, gid, err = tpmOwner(content)
	}
	if err != nil {
		return 0, 0, fmt.Errorf("cannot find out who swtpm runs as: %w", err)
	}
	return uid, gid, nil
}

// settings reads libvirt's settings, which need not be there.
func settings() ([]byte, error) {
	content, err := os.ReadFile(qemuSettings)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return content, err
}

// tpmOwner is TPMOwner by the content of the settings.
func tpmOwner(settings []byte) (uid, gid int, err error) {
	if uid, err = lookupUser(setting(settings, "swtpm_user", "tss")); err != nil {
		return 0, 0, err
	}
	gid, err = lookupGroup(setting(settings, "swtpm_group", "tss"))
	return uid, gid, err
}

func lookupUser(name string) (int, error) {
	return lookupID(name, func(name string) (string, error) {
		u, err := user.Lookup(name)
		if err != nil {
			return "", err
		}
		return u.Uid, nil
	})
}

func lookupGroup(name string) (int, error) {
	return lookupID(name, func(name string) (string, error) {
		g, err := user.LookupGroup(name)
		if err != nil {
			return "", err
		}
		return g.Gid, nil
	})
}

// setting returns a word from libvirt's settings, or what it is without one.
func setting(settings []byte, name, without string) string {
	m := regexp.MustCompile(`(?m)^[ \t]*` + name + `[ \t]*=[ \t]*["']([^"'\n]+)["']`).FindSubmatch(settings)
	if m == nil {
		return without
	}
	return string(m[1])
}

// lookupID finds the number of a name, which may be one already; with a plus
// sign it is (virGetUserID).
func lookupID(name string, find func(string) (string, error)) (int, error) {
	number, forced := strings.CutPrefix(name, "+")
	if !forced {
		if found, err := find(name); err == nil {
			number = found
		}
	}
	id, err := strconv.ParseUint(number, 10, 31)
	if err != nil {
		return 0, fmt.Errorf("there is no %q", name)
	}
	return int(id), nil
}

// HasSecret tells whether libvirt knows a secret: of a disk, if it is named by
// what it is for.
func (h *Hypervisor) HasSecret(ctx context.Context, which Secret) (bool, error) {
	return withConnect(ctx, h, "look up a secret", func(c *libvirt.Connect) (bool, error) {
		s, err := (*libvirt.Secret)(nil), error(nil)
		if which.UUID != "" {
			s, err = c.LookupSecretByUUIDString(which.UUID)
		} else {
			s, err = c.LookupSecretByUsage(libvirt.SECRET_USAGE_TYPE_VOLUME, which.Usage)
		}
		if isCode(err, libvirt.ERR_NO_SECRET) {
			return false, nil
		}
		if err != nil {
			return false, err
		}
		_ = s.Free()
		return true, nil
	})
}
