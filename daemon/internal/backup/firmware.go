package backup

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/daemon/internal/repository"
	"github.com/virtbackup/virtbackup/daemon/internal/transfer"
)

// Names of a backup's files besides the images.
const (
	definitionFile = "domain.xml"
	nvramFile      = "nvram"
	tpmDirectory   = "tpm/" // and the name that swtpm gives it
)

// withoutMissing forgets the files of a stopped domain that are not there: libvirt
// makes them when it is started for the first time.
func withoutMissing(d hypervisor.Domain) hypervisor.Domain {
	if d.Active {
		return d
	}
	for _, path := range []*string{&d.Firmware.NVRAM, &d.TPM.State} {
		if _, err := os.Stat(*path); errors.Is(err, fs.ErrNotExist) {
			*path = ""
		}
	}
	return d
}

// files are those of the backup besides the images.
func (p Plan) files() []transfer.FileSpec {
	all := []transfer.FileSpec{{Name: definitionFile, Content: []byte(p.Definition)}}
	if p.NVRAM != "" {
		all = append(all, transfer.FileSpec{Name: nvramFile, Path: p.NVRAM})
	}
	if p.TPM != "" {
		all = append(all, transfer.FileSpec{Name: tpmDirectory + filepath.Base(p.TPM), Path: p.TPM})
	}
	return all
}

// secretsOf are those that what is copied as it is is encrypted with.
func secretsOf(d hypervisor.Domain) []repository.Secret {
	var all []repository.Secret
	if d.TPM.Secret != "" && d.TPM.State != "" {
		all = append(all, repository.Secret{For: repository.SecretForTPM, UUID: d.TPM.Secret})
	}
	for _, k := range d.Disks {
		if containerFormat(d, k.Target) != "" {
			all = append(all, repository.Secret{For: k.Target, UUID: k.Encryption.Secret.UUID, Usage: k.Encryption.Secret.Usage})
		}
	}
	return all
}
