package bus

import (
	"context"
	"fmt"
	"maps"

	godbus "github.com/godbus/dbus/v5"
	"github.com/virtbackup/virtbackup/dbus"
)

// method is one method of the API.
type method struct {
	// in is its signature, from the XML.
	in string
	// parse reads its arguments, which have that signature.
	parse parser
}

type parser func(about dbus.Ref, a arguments) (request, error)

// arguments are those of a call; their types were checked.
type arguments []any

func (a arguments) text(i int) string { return a[i].(string) }

func (a arguments) texts(i int) []string { return a[i].([]string) }

func (a arguments) number(i int) int { return int(a[i].(uint32)) }

// options reads the last argument.
func (a arguments) options(into any) error {
	return dbus.DecodeOptions(a[len(a)-1].(map[string]godbus.Variant), into)
}

// apiMethods joins the XML and the parsers; both must have the same methods.
func apiMethods(interfaces []dbus.Interface) (map[string]method, error) {
	parsers := parsers()
	methods := make(map[string]method)
	for _, i := range interfaces {
		for _, m := range i.Methods {
			name := i.Name + "." + m.Name
			parse, ok := parsers[name]
			if !ok {
				return nil, fmt.Errorf("the interfaces have a method %s that nothing answers", name)
			}
			methods[name] = method{in: m.Signature("in"), parse: parse}
		}
	}
	if len(methods) != len(parsers) {
		return nil, fmt.Errorf("%d methods are answered, and the interfaces have %d", len(parsers), len(methods))
	}
	return methods, nil
}

func parsers() map[string]parser {
	all := managerParsers()
	maps.Copy(all, objectParsers())
	return all
}

func managerParsers() map[string]parser {
	return map[string]parser{
		"org.virtbackup1.Manager.CreateRepository":       createRepository,
		"org.virtbackup1.Manager.CreateOffering":         createOffering,
		"org.virtbackup1.Manager.CreateSchedule":         createSchedule,
		"org.virtbackup1.Manager.PreviewSchedule":        previewCalendars,
		"org.virtbackup1.Manager.GetSchedule":            getObject(dbus.KindSchedule),
		"org.virtbackup1.Manager.GetRepository":          getObject(dbus.KindRepository),
		"org.virtbackup1.Manager.GetOffering":            getObject(dbus.KindOffering),
		"org.virtbackup1.Manager.GetDomain":              getObject(dbus.KindDomain),
		"org.virtbackup1.Manager.GetBackup":              getObject(dbus.KindBackup),
		"org.virtbackup1.Manager.ListRepositories":       listAll(Backend.ListRepositories),
		"org.virtbackup1.Manager.ListOfferings":          listAll(Backend.ListOfferings),
		"org.virtbackup1.Manager.ListSchedules":          listAll(Backend.ListSchedules),
		"org.virtbackup1.Manager.ListDomains":            listDomains,
		"org.virtbackup1.Manager.ListChains":             listChains,
		"org.virtbackup1.Manager.ListBackups":            listBackups,
		"org.virtbackup1.Manager.ListJobs":               listJobs,
		"org.virtbackup1.Manager.EffectiveConfiguration": effectiveConfiguration,
		"org.virtbackup1.Manager.Metrics":                metrics,
		"org.virtbackup1.Manager.ListUsage":              listUsage,
		"org.virtbackup1.Manager.ListQuotas":             listQuotas,
		"org.virtbackup1.Manager.SetQuota":               setQuota,
		"org.virtbackup1.Manager.RemoveQuota":            removeQuota,
		"org.virtbackup1.Manager.Reload":                 change("reload", reload),
		"org.virtbackup1.Manager.NotifyHook":             notifyHook,
	}
}

// objectParsers are those of what the Manager makes and finds.
func objectParsers() map[string]parser {
	return map[string]parser{
		"org.virtbackup1.Repository.Check":  jobOf("check repository", Backend.CheckRepository),
		"org.virtbackup1.Repository.Scan":   jobOf("scan repository", Backend.ScanRepository),
		"org.virtbackup1.Repository.Update": updateRepository,
		"org.virtbackup1.Repository.Remove": removeRepository,

		"org.virtbackup1.Offering.Update": updateOffering,
		"org.virtbackup1.Offering.Remove": removeOffering,

		"org.virtbackup1.Schedule.Update":   updateSchedule,
		"org.virtbackup1.Schedule.Enable":   change("enable schedule", Backend.EnableSchedule),
		"org.virtbackup1.Schedule.Disable":  change("disable schedule", Backend.DisableSchedule),
		"org.virtbackup1.Schedule.Trigger":  triggerSchedule,
		"org.virtbackup1.Schedule.Preview":  previewSchedule,
		"org.virtbackup1.Schedule.ListRuns": scheduleRuns,
		"org.virtbackup1.Schedule.Remove":   change("remove schedule", Backend.RemoveSchedule),

		"org.virtbackup1.Domain.Assign":        assignDomain,
		"org.virtbackup1.Domain.Unassign":      change("unassign domain", Backend.UnassignDomain),
		"org.virtbackup1.Domain.Backup":        backupDomain,
		"org.virtbackup1.Domain.FinishChain":   change("finish chain", Backend.FinishChain),
		"org.virtbackup1.Domain.ListTracking":  domainTracking,
		"org.virtbackup1.Domain.SetOverrides":  setOverrides,
		"org.virtbackup1.Domain.ListSettings":  domainSettings,
		"org.virtbackup1.Domain.ListMarks":     domainMarks,
		"org.virtbackup1.Domain.DeleteBackups": deleteDomainBackups,
		"org.virtbackup1.Domain.Prune":         pruneDomain,

		"org.virtbackup1.Chain.Verify": startJob("verify chain", Backend.VerifyChain),
		"org.virtbackup1.Chain.Delete": remove("delete chain", Backend.DeleteChain),

		"org.virtbackup1.Backup.Delete":          remove("delete backup", Backend.DeleteBackup),
		"org.virtbackup1.Backup.Hold":            holdBackup,
		"org.virtbackup1.Backup.Release":         change("release backup", Backend.ReleaseBackup),
		"org.virtbackup1.Backup.Verify":          startJob("verify backup", Backend.VerifyBackup),
		"org.virtbackup1.Backup.Validate":        jobOf("validate backup", Backend.ValidateBackup),
		"org.virtbackup1.Backup.Repair":          jobOf("repair backup", Backend.RepairBackup),
		"org.virtbackup1.Backup.Compress":        jobOf("compress backup", Backend.CompressBackup),
		"org.virtbackup1.Backup.ListValidations": backupValidations,
		"org.virtbackup1.Backup.ReadScreenshot":  readScreenshot,
		"org.virtbackup1.Backup.Restore":         restoreBackup,
		"org.virtbackup1.Backup.RestoreInPlace":  restoreInPlace,
		"org.virtbackup1.Backup.PlanRestore":     planRestore,

		"org.virtbackup1.Manager.BackupGroup":    backupGroup,
		"org.virtbackup1.Manager.Inhibit":        inhibit,
		"org.virtbackup1.Manager.ListInhibitors": listAll(Backend.ListInhibitors),

		"org.virtbackup1.Job.Retry":  retryJob,
		"org.virtbackup1.Job.Cancel": change("cancel job", Backend.CancelJob),
		"org.virtbackup1.Job.Log":    jobLog,
	}
}

// done logs a change that was asked for, and passes on how it went.
func (s *Server) done(c Caller, what string, about dbus.Ref, err error) error {
	log := s.config.Log.With("object", about.String(), "uid", c.UID, "sender", c.Sender)
	if err != nil {
		log.Warn(fmt.Sprintf("uid %d asked to %s (%s), and was told no", c.UID, what, about), "error", err)
		return err
	}
	log.Info(fmt.Sprintf("uid %d asked to %s (%s)", c.UID, what, about))
	return nil
}

func reload(b Backend, ctx context.Context, c Caller, _ string) error { return b.Reload(ctx, c) }

// notifyHook is called with each step of each domain: it is not logged.
func notifyHook(_ dbus.Ref, a arguments) (request, error) {
	run := func(ctx context.Context, s *Server, _ Caller) ([]any, error) { return nil, s.backend.NotifyHook(ctx) }
	return request{run: run}, a.options(&dbus.NoOptions{})
}

// change is a method that takes no options yet and returns nothing.
func change(what string, do func(Backend, context.Context, Caller, string) error) parser {
	return func(about dbus.Ref, a arguments) (request, error) {
		run := func(ctx context.Context, s *Server, c Caller) ([]any, error) {
			return nil, s.done(c, what, about, do(s.backend, ctx, c, about.ID))
		}
		return request{run: run}, a.options(&dbus.NoOptions{})
	}
}

// startJob is a method that takes no options yet and returns a job.
func startJob(what string, start func(Backend, context.Context, Caller, string) (string, error)) parser {
	return func(about dbus.Ref, a arguments) (request, error) {
		run := func(ctx context.Context, s *Server, c Caller) ([]any, error) {
			job, err := start(s.backend, ctx, c, about.ID)
			return jobPath(job), s.done(c, what, about, err)
		}
		return request{run: run}, a.options(&dbus.NoOptions{})
	}
}

// jobOf is a method that takes options and returns a job.
func jobOf[O any](what string, start func(Backend, context.Context, Caller, string, O) (string, error)) parser {
	return func(about dbus.Ref, a arguments) (request, error) {
		var o O
		run := func(ctx context.Context, s *Server, c Caller) ([]any, error) {
			job, err := start(s.backend, ctx, c, about.ID, o)
			return jobPath(job), s.done(c, what, about, err)
		}
		return request{run: run}, a.options(&o)
	}
}

// remove is a method that deletes backups.
func remove[O any](what string, do func(Backend, context.Context, Caller, string, O) ([]string, string, error)) parser {
	return func(about dbus.Ref, a arguments) (request, error) {
		var o O
		run := func(ctx context.Context, s *Server, c Caller) ([]any, error) {
			backups, job, err := do(s.backend, ctx, c, about.ID, o)
			return []any{append([]string{}, backups...), jobPath(job)[0]}, s.done(c, what, about, err)
		}
		return request{run: run}, a.options(&o)
	}
}

// jobPath is the answer of a method that returns a job; an empty id is no job.
func jobPath(id string) []any { return []any{dbus.Ref{Kind: dbus.KindJob, ID: id}.Path()} }

// mentions leaves out what is not mentioned.
func mentions(all ...mention) []mention {
	var out []mention
	for _, m := range all {
		if m.name != "" {
			out = append(out, m)
		}
	}
	return out
}
