package repair

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/export"
	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/daemon/internal/job"
	"github.com/virtbackup/virtbackup/daemon/internal/transfer"
	"github.com/virtbackup/virtbackup/systemd/jobunit"
)

// Domains is libvirt, as far as it is asked here.
type Domains interface {
	ByUUID(ctx context.Context, uuid string) (hypervisor.Domain, error)
}

// Live shows the disks of the job's domain as they are now. What is read there
// is taken only if its digest is the one that is wanted: so it does no harm that
// a domain may run, and write while it is read.
type Live struct {
	Domains  Domains
	Exporter *export.Exporter
	Limits   func() jobunit.Limits
}

const stopLimit = 30 * time.Second

// start shows the disks that a backup has too, if they can be. That they cannot
// is no reason to repair nothing with what other backups hold.
func (l Live) start(ctx context.Context, h *job.Handle, b catalog.Backup) []transfer.BackupDisk {
	disks, err := l.disks(ctx, b)
	if err == nil && len(disks) > 0 {
		// One may be left from before a restart.
		if err = l.stop(ctx, h.Job().ID); err == nil {
			err = l.Exporter.Prepare(h.Job().ID)
		}
		if err == nil {
			err = l.Exporter.Start(ctx, h.Job().ID, disks, l.Limits())
		}
	}
	if err != nil {
		if ctx.Err() == nil {
			h.Log(ctx, slog.LevelWarn, fmt.Sprintf("what the domain's disks hold is not used, as they cannot be read: %v", err))
		}
		return nil
	}
	var live []transfer.BackupDisk
	for _, d := range disks {
		live = append(live, transfer.BackupDisk{Target: d.Name, Socket: l.Exporter.Socket(h.Job().ID), Export: d.Name})
	}
	return live
}

func (l Live) disks(ctx context.Context, b catalog.Backup) (all []export.Disk, err error) {
	d, err := l.Domains.ByUUID(ctx, b.Domain)
	if errors.Is(err, hypervisor.ErrNoDomain) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	for _, i := range b.Images {
		k, there := d.Disk(i.Target)
		if !there || k.Source == "" {
			continue
		}
		layers, err := hypervisor.Layers(ctx, k)
		if errors.Is(err, hypervisor.ErrLayer) {
			continue
		}
		if err != nil {
			return nil, err
		}
		all = append(all, export.Disk{Name: i.Target, Layers: layers})
	}
	return all, nil
}

// stop ends what start began, also when the job was just cancelled.
func (l Live) stop(ctx context.Context, jobID string) error {
	limited, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopLimit)
	defer cancel()
	if err := l.Exporter.Stop(limited, jobID); err != nil {
		return err
	}
	return l.Exporter.Remove(jobID)
}
