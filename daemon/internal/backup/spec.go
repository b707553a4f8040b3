package backup

import (
	"path/filepath"

	"github.com/virtbackup/virtbackup/daemon/internal/chain"
	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/daemon/internal/repository"
	"github.com/virtbackup/virtbackup/daemon/internal/transfer"
	"github.com/virtbackup/virtbackup/dbus"
)

// exportedBitmap is what NBD calls an exported bitmap (QEMU docs/interop/nbd.txt).
func exportedBitmap(name string) string { return "qemu:dirty-bitmap:" + name }

func (p Plan) socket() string {
	return filepath.Join(hypervisor.SocketDirectory, p.Backup+socketSuffix)
}

// scratch is the path of a disk's scratch image.
func (p Plan) scratch(directory, target string) string {
	return filepath.Join(directory, p.Backup, target+".qcow2")
}

// backupSpec is what the worker is asked to copy from a server of exports.
func (p Plan) backupSpec(version string, from server) *transfer.BackupSpec {
	b := &transfer.BackupSpec{
		Confirm: from.confirm, Manifest: p.manifest(version), Compression: p.written(), Level: p.level(), Threads: p.Threads,
		Files: p.files(), Expected: p.expected(),
	}
	for _, k := range p.Disks {
		one := transfer.BackupDisk{Target: k.Target, Socket: from.socket, Export: k.Target, Size: k.Size}
		switch k.Changes {
		case chain.CBT:
			one.Bitmap = exportedBitmap(from.bitmap(k.Target))
		case chain.Digest:
			one.Compare = true
		case chain.Snapshot:
			one.Layer = true
		}
		b.Disks = append(b.Disks, one)
	}
	return b
}

// written is how data is compressed while it is copied: not at all if that is
// for later.
func (p Plan) written() string {
	if p.CompressionTime == string(dbus.CompressionDeferred) {
		return string(dbus.CompressionNone)
	}
	return p.Compression
}

func (p Plan) level() int {
	if p.written() == string(dbus.CompressionNone) {
		return 0
	}
	return p.Level
}

// manifest is what is known of it before the copy.
func (p Plan) manifest(version string) repository.Manifest {
	m := repository.Manifest{
		Format: repository.Format, Repository: repository.ID(p.Repository.Identity),
		Domain: repository.Domain{UUID: p.Domain, Name: p.DomainName},
		Backup: p.Backup, Parent: p.Parent, Chain: p.Chain, Kind: string(p.Kind), Isolated: p.Isolated,
		Version: version, Quiesce: p.Quiesce, Secrets: p.Secrets,
		Offering: repository.Offering{ID: p.Offering, Name: p.Offering, Compression: p.written(), Level: p.level()},
	}
	for _, k := range p.Disks {
		d := repository.Disk{
			Target: k.Target, File: repository.ImageName(k.Target), Size: k.Size, Kind: string(k.Kind),
			Tracking: string(k.Tracking), Format: k.Own.Format, SectorSize: k.SectorSize, Source: k.Own.Source,
			Container: k.Container,
		}
		if k.Tracking == chain.CBT {
			d.Checkpoint = p.Checkpoint
		}
		m.Disks = append(m.Disks, d)
	}
	return m
}

// spec is the worker's.
func (r *run) spec() transfer.Spec {
	return transfer.Spec{
		Job: r.job.Job().ID, Operation: transfer.OperationBackup, Repository: r.Errands.Repository(r.Plan.Repository),
		Domain: r.Plan.Domain, Backup: r.Plan.backupSpec(r.Version, r.source().server()),
	}
}

// begin is what libvirt is asked for.
func (p Plan) begin(scratchDirectory string) hypervisor.Begin {
	b := hypervisor.Begin{Socket: p.socket(), Checkpoint: p.Checkpoint}
	for _, k := range p.Disks {
		one := hypervisor.BeginDisk{Target: k.Target, Scratch: p.scratch(scratchDirectory, k.Target), Export: k.Target}
		if k.Changes == chain.CBT {
			one.Incremental = p.Base
		}
		b.Disks = append(b.Disks, one)
		if k.Tracking == chain.CBT {
			b.CheckpointDisks = append(b.CheckpointDisks, k.Target)
		}
	}
	return b
}
