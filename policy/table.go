// Package policy decides who may do what: one table that says which polkit
// action each D-Bus method needs, and the authorizer that asks polkit.
//
// Nothing is assumed. A method that the table does not list is refused, and so
// is a call about which polkit cannot be asked, does not answer in time, or
// answers with anything but "authorized".
package policy

import "maps"

// Action is the id of a polkit action in org.virtbackup1.policy.
type Action string

// The actions. Reading needs one too: what domains there are, where their
// backups lie and what failed is nobody's business by default (libvirt and
// udisks let everybody read; a rule can do the same here, see examples/).
const (
	ActionView               Action = "org.virtbackup1.view"
	ActionBackup             Action = "org.virtbackup1.backup"
	ActionVerify             Action = "org.virtbackup1.verify"
	ActionRestore            Action = "org.virtbackup1.restore"
	ActionRestoreInPlace     Action = "org.virtbackup1.restore-in-place"
	ActionDelete             Action = "org.virtbackup1.delete"
	ActionManageDomains      Action = "org.virtbackup1.manage-domains"
	ActionManageOfferings    Action = "org.virtbackup1.manage-offerings"
	ActionManageSchedules    Action = "org.virtbackup1.manage-schedules"
	ActionManageRepositories Action = "org.virtbackup1.manage-repositories"
	ActionManageJobs         Action = "org.virtbackup1.manage-jobs"
	ActionManageQuotas       Action = "org.virtbackup1.manage-quotas"
	ActionManageDaemon       Action = "org.virtbackup1.manage-daemon"

	// ActionNone is no action of polkit: anybody may, because the answer is
	// the same for all and is in the package anyway.
	ActionNone Action = "none"
	// ActionRoot is no action of polkit: root may, and nobody else.
	ActionRoot Action = "root"
)

// actionOf returns the action that a method needs, by its full name; false
// for a method that is not known.
func actionOf(method string) (Action, bool) {
	action, ok := table()[method]
	return action, ok
}

// table says which action each method needs.
func table() map[string]Action {
	all := ofManager()
	maps.Copy(all, ofObjects())
	maps.Copy(all, ofStandard())
	return all
}

// ofManager is the part of the Manager.
func ofManager() map[string]Action {
	return map[string]Action{
		"org.virtbackup1.Manager.CreateRepository":       ActionManageRepositories,
		"org.virtbackup1.Manager.CreateOffering":         ActionManageOfferings,
		"org.virtbackup1.Manager.CreateSchedule":         ActionManageSchedules,
		"org.virtbackup1.Manager.PreviewSchedule":        ActionView,
		"org.virtbackup1.Manager.GetSchedule":            ActionView,
		"org.virtbackup1.Manager.GetRepository":          ActionView,
		"org.virtbackup1.Manager.GetOffering":            ActionView,
		"org.virtbackup1.Manager.GetDomain":              ActionView,
		"org.virtbackup1.Manager.GetBackup":              ActionView,
		"org.virtbackup1.Manager.ListRepositories":       ActionView,
		"org.virtbackup1.Manager.ListOfferings":          ActionView,
		"org.virtbackup1.Manager.ListSchedules":          ActionView,
		"org.virtbackup1.Manager.ListDomains":            ActionView,
		"org.virtbackup1.Manager.ListChains":             ActionView,
		"org.virtbackup1.Manager.ListBackups":            ActionView,
		"org.virtbackup1.Manager.ListJobs":               ActionView,
		"org.virtbackup1.Manager.EffectiveConfiguration": ActionView,
		"org.virtbackup1.Manager.Metrics":                ActionView,
		"org.virtbackup1.Manager.ListUsage":              ActionView,
		"org.virtbackup1.Manager.ListQuotas":             ActionView,
		"org.virtbackup1.Manager.SetQuota":               ActionManageQuotas,
		"org.virtbackup1.Manager.RemoveQuota":            ActionManageQuotas,
		"org.virtbackup1.Manager.Reload":                 ActionManageDaemon,
		// A domain's start waits for the hook: polkitd must not hold it up.
		"org.virtbackup1.Manager.NotifyHook": ActionRoot,
	}
}

// ofObjects is the part of the other objects.
func ofObjects() map[string]Action {
	return map[string]Action{
		"org.virtbackup1.Repository.Check":  ActionManageRepositories,
		"org.virtbackup1.Repository.Scan":   ActionManageRepositories,
		"org.virtbackup1.Repository.Update": ActionManageRepositories,
		"org.virtbackup1.Repository.Remove": ActionManageRepositories,

		"org.virtbackup1.Offering.Update": ActionManageOfferings,
		"org.virtbackup1.Offering.Remove": ActionManageOfferings,

		"org.virtbackup1.Schedule.Update":   ActionManageSchedules,
		"org.virtbackup1.Schedule.Enable":   ActionManageSchedules,
		"org.virtbackup1.Schedule.Disable":  ActionManageSchedules,
		"org.virtbackup1.Schedule.Trigger":  ActionBackup,
		"org.virtbackup1.Schedule.Preview":  ActionView,
		"org.virtbackup1.Schedule.ListRuns": ActionView,
		"org.virtbackup1.Schedule.Remove":   ActionManageSchedules,

		"org.virtbackup1.Domain.Assign":        ActionManageDomains,
		"org.virtbackup1.Domain.Unassign":      ActionManageDomains,
		"org.virtbackup1.Domain.Backup":        ActionBackup,
		"org.virtbackup1.Domain.FinishChain":   ActionManageDomains,
		"org.virtbackup1.Domain.ListTracking":  ActionView,
		"org.virtbackup1.Domain.DeleteBackups": ActionDelete,
		"org.virtbackup1.Domain.Prune":         ActionDelete,
		// What a domain has in place of its offering's settings is part of what is sold.
		"org.virtbackup1.Domain.SetOverrides": ActionManageOfferings,
		"org.virtbackup1.Domain.ListSettings": ActionView,
		"org.virtbackup1.Domain.ListMarks":    ActionView,

		"org.virtbackup1.Chain.Verify": ActionVerify,
		"org.virtbackup1.Chain.Delete": ActionDelete,

		"org.virtbackup1.Backup.Delete":          ActionDelete,
		"org.virtbackup1.Backup.Hold":            ActionDelete,
		"org.virtbackup1.Backup.Release":         ActionDelete,
		"org.virtbackup1.Backup.Verify":          ActionVerify,
		"org.virtbackup1.Backup.Validate":        ActionVerify,
		"org.virtbackup1.Backup.Repair":          ActionBackup,
		"org.virtbackup1.Backup.Compress":        ActionBackup,
		"org.virtbackup1.Backup.ListValidations": ActionView,
		// What is on a guest's screen is the guest's, as what is in its disks.
		"org.virtbackup1.Backup.ReadScreenshot": ActionRestore,
		"org.virtbackup1.Backup.Restore":        ActionRestore,
		"org.virtbackup1.Backup.RestoreInPlace": ActionRestoreInPlace,
		"org.virtbackup1.Backup.PlanRestore":    ActionView,

		// For each of the domains, see bus.
		"org.virtbackup1.Manager.BackupGroup":    ActionBackup,
		"org.virtbackup1.Manager.Inhibit":        ActionManageJobs,
		"org.virtbackup1.Manager.ListInhibitors": ActionView,

		// It makes backups only, and is asked about each of them.
		"org.virtbackup1.Job.Retry":  ActionBackup,
		"org.virtbackup1.Job.Cancel": ActionManageJobs,
		"org.virtbackup1.Job.Log":    ActionView,
	}
}

// ofStandard is the part of D-Bus' own interfaces.
func ofStandard() map[string]Action {
	return map[string]Action{
		"org.freedesktop.DBus.ObjectManager.GetManagedObjects": ActionView,
		"org.freedesktop.DBus.Properties.Get":                  ActionView,
		"org.freedesktop.DBus.Properties.GetAll":               ActionView,
		// Of all properties only LogControl1's LogLevel can be written.
		"org.freedesktop.DBus.Properties.Set":            ActionRoot,
		"org.freedesktop.DBus.Introspectable.Introspect": ActionNone,
	}
}
