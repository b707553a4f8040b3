package main

import (
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/backup"
	"github.com/virtbackup/virtbackup/daemon/internal/config"
	"github.com/virtbackup/virtbackup/daemon/internal/group"
	"github.com/virtbackup/virtbackup/daemon/internal/job"
	"github.com/virtbackup/virtbackup/daemon/internal/window"
	"github.com/virtbackup/virtbackup/dbus"
)

// jobClasses says which bound each kind of job comes under.
func jobClasses() map[string]job.Class {
	return map[string]job.Class{
		backup.KindName:                      job.ClassBackup,
		group.KindName:                       job.ClassGroup,
		string(dbus.OperationRestore):        job.ClassRestore,
		string(dbus.OperationRestoreInPlace): job.ClassRestore,
		string(dbus.OperationVerify):         job.ClassValidation,
		string(dbus.OperationCheck):          job.ClassMaintenance,
		string(dbus.OperationDelete):         job.ClassMaintenance,
		string(dbus.OperationPrune):          job.ClassMaintenance,
		string(dbus.OperationScan):           job.ClassMaintenance,
		string(dbus.OperationInspect):        job.ClassMaintenance,
		string(dbus.OperationRepair):         job.ClassMaintenance,
		string(dbus.OperationCompress):       job.ClassCompression,
		string(dbus.OperationValidate):       job.ClassValidation,
	}
}

// jobLimits are the bounds of jobs as they are configured.
func jobLimits(c *config.Config) job.Limits {
	l := job.Limits{
		Concurrent: map[job.Class]int{
			job.ClassBackup: c.Limits.ConcurrentBackups, job.ClassRestore: c.Limits.ConcurrentRestores,
			job.ClassCompression: c.Limits.ConcurrentCompressions, job.ClassValidation: c.Limits.ConcurrentValidations,
			job.ClassMaintenance: c.Limits.ConcurrentMaintenance,
		},
		ConcurrentPerRepository: c.Limits.ConcurrentJobsPerRepository, PerUser: c.Limits.JobsPerUser, Queue: c.Limits.Queue,
		Timeout: map[job.Class]time.Duration{
			job.ClassBackup: c.Limits.BackupTimeout, job.ClassRestore: c.Limits.RestoreTimeout,
			job.ClassCompression: c.Limits.CompressionTimeout, job.ClassValidation: c.Limits.ValidationTimeout,
			job.ClassMaintenance: c.Limits.MaintenanceTimeout,
		},
		Stall: c.Jobs.StallLimit, RetryDelay: c.Jobs.RetryDelay,
		RetryEvery: map[job.Class]time.Duration{job.ClassCompression: c.Compression.RetryInterval, job.ClassValidation: c.Validation.RetryInterval},
	}
	// The configuration has been checked: it can be read.
	if w, err := window.ParseAll(c.Jobs.Window); err == nil && len(w) > 0 {
		l.Window = w
	}
	return l
}
