package main

import (
	"github.com/virtbackup/virtbackup/daemon/internal/backup"
	"github.com/virtbackup/virtbackup/daemon/internal/compression"
	"github.com/virtbackup/virtbackup/daemon/internal/share"
	"github.com/virtbackup/virtbackup/daemon/internal/validation"
	"github.com/virtbackup/virtbackup/daemon/internal/verification"
	"github.com/virtbackup/virtbackup/daemon/internal/window"
	"github.com/virtbackup/virtbackup/systemd/jobunit"
)

func (a *app) limits() jobunit.Limits {
	l := a.settings.Load().Limits
	return jobunit.Limits{
		CPUWeight: uint64(l.CPUWeight), CPUQuota: uint64(l.CPUQuota), IOWeight: uint64(l.IOWeight), MemoryMax: uint64(l.MemoryMax),
	}
}

const megabyte = 1_000_000

// rates are what all workers share.
func (a *app) rates() share.Rates {
	l := a.settings.Load().Limits
	return share.Rates{
		Job: uint64(l.RatePerJob) * megabyte, Repository: uint64(l.RatePerRepository) * megabyte, Host: uint64(l.RatePerHost) * megabyte,
	}
}

func (a *app) compressionSettings() compression.Settings {
	c := a.settings.Load().Compression
	return compression.Settings{Enabled: c.Enabled, Attempts: 1 + c.Retries, Threads: c.Threads, Factor: c.MinimumFree, Rate: uint64(c.Rate) * megabyte}
}

func (a *app) validationSettings() validation.Settings {
	c := a.settings.Load()
	v := c.Validation
	return validation.Settings{
		Enabled: v.Enabled, Interval: v.Interval, Attempts: 1 + v.Retries, Memory: uint64(v.MemoryMax), CPUs: v.CPUs, EndChain: v.EndChain,
		MinimumFree: uint64(c.Limits.MinimumFreeScratch), BootTimeout: v.BootTimeout, CommandTimeout: v.CommandTimeout, ScreenshotWait: v.ScreenshotWait,
	}
}

func (a *app) verificationSettings() verification.Settings {
	c := a.settings.Load()
	w, _ := window.ParseAll(c.Verification.Window) // the configuration has been checked: it can be read
	return verification.Settings{
		Enabled: c.Verification.Enabled, Every: c.Verification.Every, Share: uint64(c.Verification.BytesPerNight), Window: w,
		Attempts: c.Jobs.Attempts, Rate: uint64(c.Verification.Rate) * megabyte,
	}
}

func (a *app) backupSettings() backup.Settings {
	c := a.settings.Load()
	return backup.Settings{
		ScratchDirectory: c.Backup.ScratchDirectory, MinimumFreeScratch: uint64(c.Limits.MinimumFreeScratch),
	}
}
