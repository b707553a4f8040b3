package restore

import (
	"errors"
	"fmt"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/daemon/internal/repository"
	"github.com/virtbackup/virtbackup/daemon/internal/transfer"
)

// tpmPrefix begins the name of the file with the state of a TPM; the rest is the
// name that swtpm gives it.
const tpmPrefix = "tpm/"

func (f OnlyFile) isTPM() bool { return strings.HasPrefix(f.Name, tpmPrefix) }

// tpmVersion is that of the TPM whose state the file is.
func (f OnlyFile) tpmVersion() string { return hypervisor.TPMVersion(path.Base(f.Name)) }

// tpmOf finds the state of a TPM in a backup.
func tpmOf(m repository.Manifest) (f OnlyFile, any bool) {
	i := slices.IndexFunc(m.Files, func(f repository.File) bool { return OnlyFile{Name: f.Name}.isTPM() })
	if i < 0 {
		return f, false
	}
	f = OnlyFile{Name: m.Files[i].Name, Placed: true}
	return f, f.tpmVersion() != ""
}

// planNewTPM plans the state of the new domain's TPM, whose place has its UUID.
func planNewTPM(m repository.Manifest, p *Plan, no *refusals) {
	f, any := tpmOf(m)
	if !any {
		return
	}
	var err error
	if f.Owner, err = tpmOwner(); err != nil {
		no.add("it has the state of a TPM: %v: is swtpm installed?", err)
		return
	}
	p.Files = append(p.Files, f)
}

// planTPMInPlace plans the exchange of the state of a domain's TPM.
func planTPMInPlace(m repository.Manifest, d hypervisor.Domain, p *Plan) {
	f, any := tpmOf(m)
	if !any || len(p.Skipped) > 0 {
		return
	}
	err := error(nil)
	switch {
	case d.TPM.Version != f.tpmVersion() || d.TPM.State == "":
		err = fmt.Errorf("domain %q has no TPM of version %s that keeps its state in a directory", d.Name, f.tpmVersion())
	default:
		f.Destination = d.TPM.State
		// Not as for disks: whoever runs swtpm may put a link into its place.
		if f.Owner, err = ownerOf(f.Destination); errors.Is(err, unix.ENOENT) { // undefined meanwhile, or never started
			f.Fresh = true
			f.Owner, err = tpmOwner()
		}
	}
	if err != nil {
		p.Warnings = append(p.Warnings, fmt.Sprintf("the TPM's state is not restored: %v", err))
		return
	}
	p.Files = append(p.Files, f)
}

// tpmOwner is who the state of a TPM belongs to, when there is none to tell.
func tpmOwner() (transfer.Owner, error) {
	uid, gid, err := hypervisor.TPMOwner()
	return transfer.Owner{UID: &uid, GID: &gid, Mode: 0o600}, err
}

// tpmStaging is the directory in which a job puts the state of a TPM: in the same
// file system, and not in one that swtpm may write to.
func tpmStaging(destination, name string) string {
	beside := filepath.Dir(filepath.Dir(destination))
	if filepath.Dir(beside) == hypervisor.TPMDirectory { // the domain's, which may not be there yet
		beside = hypervisor.TPMDirectory
	}
	return filepath.Join(beside, name)
}

// makeTPMDirectories makes those of a domain that had none, as libvirt does
// (qemu_tpm.c, qemuTPMEmulatorCreateStorage).
func makeTPMDirectories(p Plan) error {
	for _, f := range p.Files {
		if !f.isTPM() {
			continue
		}
		state := filepath.Dir(f.Destination)
		err := makeDirectory(filepath.Dir(state), transfer.Owner{Mode: 0o711})
		if err == nil {
			err = makeDirectory(state, transfer.Owner{UID: f.Owner.UID, GID: f.Owner.GID, Mode: 0o700})
		}
		if err != nil {
			return fmt.Errorf("cannot make the directory of the TPM's state: %w", err)
		}
	}
	return nil
}

// makeDirectory makes a directory unless it is there.
func makeDirectory(path string, o transfer.Owner) error {
	parent, err := openDirectory(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer parent.close()
	if err := unix.Mkdirat(parent.fd, filepath.Base(path), 0o700); errors.Is(err, unix.EEXIST) {
		return nil
	} else if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	made, err := openDirectory(path)
	if err != nil {
		return err
	}
	defer made.close()
	if o.UID != nil && o.GID != nil {
		err = unix.Fchown(made.fd, *o.UID, *o.GID)
	}
	if err == nil {
		err = unix.Fchmod(made.fd, o.Mode) // whatever our umask is
	}
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

// removeTPMDirectories removes those of a domain that has nothing in them. They
// are no loss: libvirt makes them when it needs them. What an admin made, as a
// place for it or a link to one, stays.
func removeTPMDirectories(p Plan) {
	for _, f := range p.Files {
		state := filepath.Dir(f.Destination)
		domain := filepath.Dir(state)
		if f.isTPM() && filepath.Dir(domain) == hypervisor.TPMDirectory {
			_ = unix.Rmdir(state)
			_ = unix.Rmdir(domain)
		}
	}
}
