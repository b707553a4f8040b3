package restore

import (
	"context"
	"fmt"
	"slices"

	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/daemon/internal/repository"
)

// opened is the format with which QEMU opens the restored disk.
func (d Disk) opened() string {
	if d.Container != "" {
		return d.Container
	}
	return d.Format
}

// planContainers notes which disks are encrypted images that are restored as
// they are.
func (p *Plan) planContainers(m repository.Manifest) {
	for i := range p.Disks {
		d := &p.Disks[i]
		if stored, any := m.Disk(d.Target); any && stored.Container != "" {
			d.Container, d.Encryption.Format = stored.Container, "luks"
		}
		for _, s := range m.Secrets {
			if s.For == d.Target {
				d.Encryption.Secret = hypervisor.Secret{UUID: s.UUID, Usage: s.Usage}
			}
		}
	}
}

// planSecrets says which of libvirt's secrets the restored domain needs: no
// backup has their values.
func (k *Kind) planSecrets(ctx context.Context, m repository.Manifest, p *Plan) error {
	for _, s := range m.Secrets {
		var what string
		switch {
		case slices.ContainsFunc(p.Disks, func(d Disk) bool { return d.Target == s.For }):
			what = "disk " + s.For
		case s.For == repository.SecretForTPM && slices.ContainsFunc(p.Files, OnlyFile.isTPM):
			what = "the TPM's state"
		default:
			continue
		}
		secret, same := s.UUID, "that UUID"
		if s.UUID == "" {
			secret, same = fmt.Sprintf("of usage %q", s.Usage), "that usage"
		}
		text := fmt.Sprintf("%s is encrypted with libvirt's secret %s", what, secret)
		known, err := k.Hypervisor.HasSecret(ctx, hypervisor.Secret{UUID: s.UUID, Usage: s.Usage})
		if err != nil {
			return err
		}
		if !known {
			text += ", which is not here: define it with " + same + " before the domain is started (virsh secret-define, secret-set-value)"
		}
		p.Secrets = append(p.Secrets, text)
	}
	p.Warnings = append(p.Warnings, p.Secrets...)
	return nil
}
