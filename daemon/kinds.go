package main

import (
	"context"
	"path/filepath"

	"github.com/virtbackup/virtbackup/daemon/internal/backup"
	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/chain"
	"github.com/virtbackup/virtbackup/daemon/internal/compression"
	"github.com/virtbackup/virtbackup/daemon/internal/config"
	"github.com/virtbackup/virtbackup/daemon/internal/errand"
	"github.com/virtbackup/virtbackup/daemon/internal/export"
	"github.com/virtbackup/virtbackup/daemon/internal/group"
	"github.com/virtbackup/virtbackup/daemon/internal/job"
	"github.com/virtbackup/virtbackup/daemon/internal/overlay"
	"github.com/virtbackup/virtbackup/daemon/internal/quiesce"
	"github.com/virtbackup/virtbackup/daemon/internal/removal"
	"github.com/virtbackup/virtbackup/daemon/internal/repair"
	"github.com/virtbackup/virtbackup/daemon/internal/restore"
	"github.com/virtbackup/virtbackup/daemon/internal/retention"
	"github.com/virtbackup/virtbackup/daemon/internal/scan"
	"github.com/virtbackup/virtbackup/daemon/internal/upkeep"
	"github.com/virtbackup/virtbackup/daemon/internal/validation"
	"github.com/virtbackup/virtbackup/daemon/internal/verification"
	"github.com/virtbackup/virtbackup/dbus"
)

// kinds are those of jobs.
type kinds struct {
	all      map[string]job.Kind
	chores   []upkeep.Chore // those that find out by themselves what is due
	restores *restore.Kind
}

// kinds makes the kinds of jobs.
func (a *app) kinds(c *config.Config) kinds {
	errands := errand.Sender{Supervisor: a.workers, Limits: a.limits, KeyFile: a.keyPath(), Pins: a.catalog.Pins, Storage: a.mounts}
	overlays := &overlay.Keeper{Hypervisor: a.hypervisor, Catalog: a.catalog, Lifecycle: a.lifecycle, Log: a.log}
	exporter := &export.Exporter{Units: a.units, Directory: filepath.Join(c.Daemon.RuntimeDirectory, "exports")}
	destinations := func() []string { return a.settings.Load().Restore.Destinations }
	a.backup = backup.New(backup.Deps{
		Overlays: overlays,
		Catalog:  a.catalog, Hypervisor: a.hypervisor, Errands: errands, Settings: a.backupSettings, Version: version, Log: a.log,
		Keeper: a.lifecycle, Exporter: exporter,
		Quiescer: quiesce.New(a.hypervisor, quiesce.ThawUnit{URI: c.Libvirt.URI}, quiesce.Options{
			Directory: filepath.Join(c.Daemon.RuntimeDirectory, "frozen"), Limit: c.Libvirt.HoldLimit, Log: a.log,
		}),
	})
	a.validation = validation.New(validation.Deps{
		Catalog: a.catalog, Hypervisor: a.hypervisor, Errand: errands, Settings: a.validationSettings, Log: a.log,
		Wanted: func(ctx context.Context, domain string) (catalog.Validation, error) {
			return a.service.EffectiveValidation(ctx, domain)
		},
		BootDirectories: destinations,
		Directory:       filepath.Join(c.Daemon.StateDirectory, "validation"), RuntimeDirectory: filepath.Join(c.Daemon.RuntimeDirectory, "validation"),
	})
	restores := restore.New(restore.Deps{
		Catalog: a.catalog, Hypervisor: a.hypervisor, Errand: errands, Overlays: overlays, Log: a.log, Destinations: destinations,
	})
	compressions := compression.Kind{Catalog: a.catalog, Errand: errands, Settings: a.compressionSettings}
	verifications := verification.Verify{Catalog: a.catalog, Errand: errands, Settings: a.verificationSettings}
	return kinds{restores: restores, chores: []upkeep.Chore{compressions, a.validation, verifications}, all: map[string]job.Kind{
		backup.KindName:                      a.backup,
		group.KindName:                       group.Kind{Catalog: a.catalog},
		string(dbus.OperationRestore):        restores,
		string(dbus.OperationRestoreInPlace): restores,
		string(dbus.OperationCompress):       compressions,
		string(dbus.OperationValidate):       a.validation,
		string(dbus.OperationVerify):         verifications,
		string(dbus.OperationRepair): repair.Kind{Catalog: a.catalog, Errand: errands,
			Live: repair.Live{Domains: a.hypervisor, Exporter: exporter, Limits: a.limits}},
		string(dbus.OperationCheck):   verification.Check{Catalog: a.catalog, Errand: errands, Forget: a.mounts.Forget},
		string(dbus.OperationDelete):  removal.Delete{Catalog: a.catalog, Errand: errands},
		string(dbus.OperationScan):    scan.Scan{Catalog: a.catalog, Errand: errands},
		string(dbus.OperationInspect): scan.Inspect{Catalog: a.catalog, Errand: errands},
		string(dbus.OperationPrune): retention.Prune{Catalog: a.catalog, Errand: errands,
			Policy: func(ctx context.Context, domain string) (chain.Retention, error) {
				return a.service.EffectiveRetention(ctx, domain)
			}},
	}}
}
