package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"libvirt.org/go/libvirt"
	"libvirt.org/go/libvirtxml"
)

// SocketDirectory is where the sockets of our backup jobs live. By it our jobs
// are told from others': EndBackup never ends a job with another socket.
const SocketDirectory = "/run/virtbackup/nbd"

// Begin describes a backup job.
type Begin struct {
	Socket          string      // in SocketDirectory; QEMU binds it
	Disks           []BeginDisk // disks not named here take no part
	Checkpoint      string      // name of the checkpoint made at the same moment; "" = none
	CheckpointDisks []string    // targets that carry the checkpoint's bitmap: qcow2 only
}

// BeginDisk is one disk in a backup job.
type BeginDisk struct {
	Target      string
	Scratch     string // path of an empty qcow2 image of the disk's size that QEMU may write
	Export      string // NBD export name; "" = the target
	Bitmap      string // name of the exported dirty bitmap (qemu:dirty-bitmap:NAME); "" = backup-TARGET
	Incremental string // checkpoint whose changes are offered; "" = full
}

// BeginBackup starts a pull mode backup job of a running domain and makes the
// checkpoint: one point in time for all disks, fixed when the call returns.
// The scratch images must exist: QEMU 7.2 dies on an assertion when its block
// nodes are queried while it creates them itself. When the call fails no job
// is left, but the checkpoint may be: Delete it.
func (h *Hypervisor) BeginBackup(ctx context.Context, uuid string, b Begin) error {
	if filepath.Dir(filepath.Clean(b.Socket)) != SocketDirectory {
		return fmt.Errorf("cannot begin a backup of domain %s: the socket %q is not in %s", uuid, b.Socket, SocketDirectory)
	}
	return h.onDomain(ctx, uuid, "begin a backup of", func(d *libvirt.Domain) error {
		if active, err := d.IsActive(); err != nil {
			return err
		} else if !active {
			return ErrNotRunning
		}
		doc, err := d.GetXMLDesc(0)
		if err != nil {
			return err
		}
		targets, err := diskTargets(doc)
		if err != nil {
			return err
		}
		backup, checkpoint, err := b.documents(targets)
		if err != nil {
			return err
		}
		return d.BackupBegin(backup, checkpoint, libvirt.DOMAIN_BACKUP_BEGIN_REUSE_EXTERNAL)
	})
}

// diskTargets returns the targets of all disks in a domain's definition.
func diskTargets(doc string) ([]string, error) {
	var def libvirtxml.Domain
	if err := def.Unmarshal(doc); err != nil {
		return nil, fmt.Errorf("cannot parse the domain's definition: %w", err)
	}
	var targets []string
	if def.Devices != nil {
		for _, k := range def.Devices.Disks {
			if k.Target != nil {
				targets = append(targets, k.Target.Dev)
			}
		}
	}
	return targets, nil
}

// documents returns the XML of the job and of the checkpoint ("" when there is
// none). Every disk of the domain is named in both: libvirt's defaults for
// disks that are not named would write beside live images, or refuse raw ones.
func (b Begin) documents(targets []string) (backup, checkpoint string, err error) {
	if len(b.Disks) == 0 {
		return "", "", errors.New("no disk to back up")
	}
	taking := make(map[string]BeginDisk)
	for _, k := range b.Disks {
		taking[k.Target] = k
	}
	pull := &libvirtxml.DomainBackupPull{
		Server: &libvirtxml.DomainBackupPullServer{UNIX: &libvirtxml.DomainBackupPullServerUNIX{Socket: b.Socket}},
		Disks:  &libvirtxml.DomainBackupPullDisks{},
	}
	for _, target := range targets {
		k, ok := taking[target]
		if !ok {
			pull.Disks.Disks = append(pull.Disks.Disks, libvirtxml.DomainBackupPullDisk{Name: target, Backup: "no"})
			continue
		}
		delete(taking, target)
		pull.Disks.Disks = append(pull.Disks.Disks, k.element())
	}
	for target := range taking {
		return "", "", fmt.Errorf("the domain has no disk %s", target)
	}
	if backup, err = (&libvirtxml.DomainBackup{Pull: pull}).Marshal(); err != nil {
		return "", "", fmt.Errorf("cannot write the job's description: %w", err)
	}
	if b.Checkpoint == "" {
		return backup, "", nil
	}
	checkpoint, err = newCheckpoint(b.Checkpoint, time.Time{}, targets, b.CheckpointDisks)
	return backup, checkpoint, err
}

func (k BeginDisk) element() libvirtxml.DomainBackupPullDisk {
	mode := "full"
	if k.Incremental != "" {
		mode = "incremental"
	}
	return libvirtxml.DomainBackupPullDisk{
		Name: k.Target, Backup: "yes", BackupMode: mode, Incremental: k.Incremental,
		ExportName: k.Export, ExportBitmap: k.Bitmap,
		Driver:  &libvirtxml.DomainBackupDiskDriver{Type: "qcow2"},
		Scratch: &libvirtxml.DomainDiskSource{File: &libvirtxml.DomainDiskSourceFile{File: k.Scratch}},
	}
}

// BackupJob is the active backup job of a domain. The zero value: there is none.
type BackupJob struct {
	Active bool
	// Beginning: libvirt is at work on a call to begin a backup, of which
	// nothing more is known yet. Its caller may be dead.
	Beginning bool
	Ours      bool   // its socket is in SocketDirectory
	Socket    string // "" for push mode, and for TCP
	Disks     []string
}

// BackupJob returns the domain's active backup job.
func (h *Hypervisor) BackupJob(ctx context.Context, uuid string) (BackupJob, error) {
	return withDomain(ctx, h, uuid, "ask for the backup job of", backupJob)
}

func backupJob(d *libvirt.Domain) (BackupJob, error) {
	doc, err := d.BackupGetXMLDesc(0)
	if isCode(err, libvirt.ERR_NO_DOMAIN_BACKUP) {
		beginning, err := beginning(d)
		return BackupJob{Beginning: beginning}, err
	}
	if isCode(err, libvirt.ERR_OPERATION_INVALID) {
		return BackupJob{}, nil // not running
	}
	if err != nil {
		return BackupJob{}, err
	}
	var x libvirtxml.DomainBackup
	if err := x.Unmarshal(doc); err != nil {
		return BackupJob{}, fmt.Errorf("cannot parse the backup job: %w", err)
	}
	job := BackupJob{Active: true}
	if x.Pull == nil {
		return job, nil
	}
	if x.Pull.Server != nil && x.Pull.Server.UNIX != nil {
		job.Socket = x.Pull.Server.UNIX.Socket
		job.Ours = strings.HasPrefix(filepath.Clean(job.Socket), SocketDirectory+"/")
	}
	if x.Pull.Disks != nil {
		for _, k := range x.Pull.Disks.Disks {
			if k.Backup == "yes" {
				job.Disks = append(job.Disks, k.Name)
			}
		}
	}
	return job, nil
}

// beginning tells whether libvirt's own job of the domain, in which no backup
// is to be seen yet, is that of a backup.
func beginning(d *libvirt.Domain) (bool, error) {
	info, err := d.GetJobStats(0)
	switch {
	case isCode(err, libvirt.ERR_OPERATION_TIMEOUT):
		return true, nil // QEMU does not answer, and libvirt waits for it
	case isCode(err, libvirt.ERR_OPERATION_INVALID):
		return false, nil // not running
	case err != nil:
		return false, err
	}
	return info.Type != libvirt.DOMAIN_JOB_NONE && info.OperationSet && info.Operation == libvirt.DOMAIN_JOB_OPERATION_BACKUP, nil
}

// endPoll is how often EndBackup looks whether the job is gone. The event
// that tells could be lost with the connection.
const endPoll = 20 * time.Millisecond

// EndBackup ends our backup job and waits until it is gone. It is fine when
// there is no job, or no such domain any more. A domain that the job left
// paused by an I/O error (its scratch was full) is resumed. The error is
// ErrForeignJob when another's backup job is active.
func (h *Hypervisor) EndBackup(ctx context.Context, uuid string) error {
	_, err := withDomain(ctx, h, uuid, "end the backup of", func(d *libvirt.Domain) (struct{}, error) {
		aborted := false
		for {
			job, err := backupJob(d)
			switch {
			case err != nil:
				return struct{}{}, err
			case job.Beginning: // it would be there after us
			case !job.Active:
				return struct{}{}, resumeAfterIOError(d)
			case !job.Ours:
				return struct{}{}, ErrForeignJob
			}
			if job.Active && !aborted {
				// A job that ended by itself meanwhile is found gone in the next round.
				if err := d.AbortJob(); err != nil && !isCode(err, libvirt.ERR_OPERATION_INVALID) {
					return struct{}{}, err
				}
				aborted = true
			}
			select {
			case <-ctx.Done():
				return struct{}{}, context.Cause(ctx)
			case <-time.After(endPoll):
			}
		}
	})
	if errors.Is(err, ErrNoDomain) {
		return nil
	}
	return err
}

func resumeAfterIOError(d *libvirt.Domain) error {
	name, reason, err := state(d)
	if err != nil {
		return err
	}
	if name == StatePaused && reason == ReasonIOError {
		return d.Resume()
	}
	return nil
}
