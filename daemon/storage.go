package main

import (
	"path/filepath"
	"slices"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/health"
	"github.com/virtbackup/virtbackup/daemon/internal/job"
	"github.com/virtbackup/virtbackup/daemon/internal/mounts"
	"github.com/virtbackup/virtbackup/daemon/internal/supervise"
	"github.com/virtbackup/virtbackup/dbus"
	"github.com/virtbackup/virtbackup/systemd/mountunit"
)

// newMounts makes the keeper of what is mounted for repositories.
func (a *app) newMounts() *mounts.Keeper {
	c := a.settings.Load()
	return mounts.New(mounts.Options{
		Systemd: mountunit.Systemd{}, Catalog: a.catalog, Log: a.log,
		Directory:   filepath.Join(c.Daemon.RuntimeDirectory, "mounts"),
		Credentials: filepath.Join(c.Daemon.StateDirectory, "credentials"),
		Limit:       func() time.Duration { return a.settings.Load().Repositories.MountTimeout },
		Idle:        func() time.Duration { return a.settings.Load().Repositories.UnmountAfter },
		Busy:        a.repositoryBusy,
		Changed:     func(id string) { a.server.Changed(dbus.Ref{Kind: dbus.KindRepository, ID: id}) },
	})
}

// newHealth makes the watcher of repositories.
func (a *app) newHealth() *health.Watcher {
	const stopProbe = 2 * time.Second // a probe has nothing to clean up
	c := a.settings.Load()
	return health.New(health.Options{
		Catalog: a.catalog, Storage: a.mounts, Limits: a.limits, KeyFile: a.keyPath(), Busy: a.repositoryBusy, Log: a.log,
		Probes: supervise.New(a.units, supervise.Options{
			Directory: filepath.Join(c.Daemon.RuntimeDirectory, "probes"), Worker: workerProgram, StopAfter: stopProbe, Log: a.log,
			Prefix: health.UnitPrefix,
		}),
		Settings: func() health.Settings {
			r := a.settings.Load().Repositories
			return health.Settings{Every: r.LookEvery, Idle: r.LookIdle, Limit: r.HungAfter, Slow: r.SlowAfter}
		},
		Changed: func(id string) { a.server.Changed(dbus.Ref{Kind: dbus.KindRepository, ID: id}) },
	})
}

// repositoryBusy tells whether a job that runs may use a repository.
func (a *app) repositoryBusy(id string) bool {
	return slices.ContainsFunc(a.engine.Active(), func(j job.Status) bool {
		return j.Repository == id && j.State != catalog.JobQueued
	})
}
