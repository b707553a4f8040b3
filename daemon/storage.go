package main

import (
	"path/filepath"
	"slices"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/job"
	"github.com/virtbackup/virtbackup/daemon/internal/mounts"
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

// repositoryBusy tells whether a job that runs may use a repository.
func (a *app) repositoryBusy(id string) bool {
	return slices.ContainsFunc(a.engine.Active(), func(j job.Status) bool {
		return j.Repository == id && j.State != catalog.JobQueued
	})
}
