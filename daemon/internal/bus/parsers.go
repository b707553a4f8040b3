package bus

import (
	"context"
	"errors"

	godbus "github.com/godbus/dbus/v5"
	"github.com/virtbackup/virtbackup/dbus"
)

func createRepository(about dbus.Ref, a arguments) (request, error) {
	name, typ, path := a.text(0), a.text(1), a.text(2)
	var o dbus.CreateRepositoryOptions
	run := func(ctx context.Context, s *Server, c Caller) ([]any, error) {
		repository, job, err := s.backend.CreateRepository(ctx, c, name, typ, path, o)
		return []any{dbus.Ref{Kind: dbus.KindRepository, ID: repository}.Path(), jobPath(job)[0]},
			s.done(c, "create repository "+name, about, err)
	}
	return request{names: map[string]string{dbus.DetailRepository: name}, run: run}, a.options(&o)
}

func updateRepository(about dbus.Ref, a arguments) (request, error) {
	var o dbus.UpdateRepositoryOptions
	run := func(ctx context.Context, s *Server, c Caller) ([]any, error) {
		job, err := s.backend.UpdateRepository(ctx, c, about.ID, o)
		return jobPath(job), s.done(c, "update repository", about, err)
	}
	return request{run: run}, a.options(&o)
}

func removeRepository(about dbus.Ref, a arguments) (request, error) {
	var o dbus.RemoveRepositoryOptions
	run := func(ctx context.Context, s *Server, c Caller) ([]any, error) {
		return nil, s.done(c, "remove repository", about, s.backend.RemoveRepository(ctx, c, about.ID, o))
	}
	return request{run: run}, a.options(&o)
}

func createOffering(about dbus.Ref, a arguments) (request, error) {
	name, repository := a.text(0), a.text(1)
	var o dbus.OfferingOptions
	run := func(ctx context.Context, s *Server, c Caller) ([]any, error) {
		id, err := s.backend.CreateOffering(ctx, c, name, repository, o)
		return []any{dbus.Ref{Kind: dbus.KindOffering, ID: id}.Path()}, s.done(c, "create offering "+name, about, err)
	}
	return request{
		mentions: []mention{{dbus.KindRepository, repository}},
		names:    map[string]string{dbus.DetailOffering: name},
		run:      run,
	}, a.options(&o)
}

// getObject is a method that finds an object by a name.
func getObject(kind dbus.Kind) parser {
	return func(_ dbus.Ref, a arguments) (request, error) {
		name := a.text(0)
		run := func(ctx context.Context, s *Server, _ Caller) ([]any, error) {
			ref, err := s.backend.Find(ctx, kind, name)
			return []any{ref.Path()}, err
		}
		return request{mentions: []mention{{kind, name}}, run: run}, nil
	}
}

// pageLimit is the limit that a caller gets who asks for limit.
func pageLimit(limit int) (int, error) {
	const normal, most = 100, 1000
	switch {
	case limit == 0:
		return normal, nil
	case limit > most:
		return 0, dbus.Errorf(dbus.ErrInvalidArgument, "the limit is %d entries, and at most %d are given", limit, most)
	}
	return limit, nil
}

// listAll is a method that lists what there are few of.
func listAll[R any](read func(Backend, context.Context) ([]R, error)) parser {
	return func(dbus.Ref, arguments) (request, error) {
		return request{run: func(ctx context.Context, s *Server, _ Caller) ([]any, error) {
			all, err := read(s.backend, ctx)
			return []any{dbus.EncodeRecords(all)}, err
		}}, nil
	}
}

// pageAsked reads the arguments of a method that lists page by page: filters,
// a cursor and a limit.
func pageAsked(a arguments, filters any) (cursor string, limit int, err error) {
	if err := dbus.DecodeOptions(a[0].(map[string]godbus.Variant), filters); err != nil {
		return "", 0, err
	}
	limit, err = pageLimit(a.number(2))
	return a.text(1), limit, err
}

func listDomains(_ dbus.Ref, a arguments) (request, error) {
	var f dbus.DomainFilter
	cursor, limit, err := pageAsked(a, &f)
	run := func(ctx context.Context, s *Server, _ Caller) ([]any, error) {
		page, err := s.backend.ListDomains(ctx, f, cursor, limit)
		counts := make(map[string]uint32, len(page.Counts))
		for protection, n := range page.Counts {
			counts[string(protection)] = n
		}
		return []any{dbus.EncodeRecords(page.Domains), counts, page.Next}, err
	}
	return request{mentions: mentions(mention{dbus.KindOffering, f.Offering}), run: run}, err
}

func listChains(_ dbus.Ref, a arguments) (request, error) {
	var f dbus.ChainFilter
	cursor, limit, err := pageAsked(a, &f)
	run := func(ctx context.Context, s *Server, _ Caller) ([]any, error) {
		chains, next, err := s.backend.ListChains(ctx, f, cursor, limit)
		return []any{dbus.EncodeRecords(chains), next}, err
	}
	return request{mentions: mentions(mention{dbus.KindDomain, f.Domain}, mention{dbus.KindRepository, f.Repository}), run: run}, err
}

func listBackups(_ dbus.Ref, a arguments) (request, error) {
	var f dbus.BackupFilter
	cursor, limit, err := pageAsked(a, &f)
	run := func(ctx context.Context, s *Server, _ Caller) ([]any, error) {
		backups, next, err := s.backend.ListBackups(ctx, f, cursor, limit)
		return []any{dbus.EncodeRecords(backups), next}, err
	}
	return request{
		mentions: mentions(mention{dbus.KindDomain, f.Domain}, mention{dbus.KindOffering, f.Offering}, mention{dbus.KindRepository, f.Repository}),
		run:      run,
	}, err
}

func listJobs(_ dbus.Ref, a arguments) (request, error) {
	var f dbus.JobFilter
	cursor, limit, err := pageAsked(a, &f)
	run := func(ctx context.Context, s *Server, _ Caller) ([]any, error) {
		jobs, next, err := s.backend.ListJobs(ctx, f, cursor, limit)
		return []any{dbus.EncodeRecords(jobs), next}, err
	}
	return request{mentions: mentions(mention{dbus.KindDomain, f.Domain}), run: run}, err
}

func effectiveConfiguration(dbus.Ref, arguments) (request, error) {
	run := func(ctx context.Context, s *Server, _ Caller) ([]any, error) {
		settings, err := s.backend.EffectiveConfiguration(ctx)
		return []any{dbus.EncodeRecords(settings)}, err
	}
	return request{run: run}, nil
}

func updateOffering(about dbus.Ref, a arguments) (request, error) {
	var o dbus.UpdateOfferingOptions
	if err := a.options(&o); err != nil {
		return request{}, err
	}
	r := request{run: func(ctx context.Context, s *Server, c Caller) ([]any, error) {
		return nil, s.done(c, "update offering", about, s.backend.UpdateOffering(ctx, c, about.ID, o))
	}}
	if o.Repository != nil {
		r.mentions = []mention{{dbus.KindRepository, *o.Repository}}
	}
	return r, nil
}

func removeOffering(about dbus.Ref, a arguments) (request, error) {
	var o dbus.RemoveOfferingOptions
	run := func(ctx context.Context, s *Server, c Caller) ([]any, error) {
		domains, err := s.backend.RemoveOffering(ctx, c, about.ID, o)
		return []any{append([]string{}, domains...)}, s.done(c, unless(o.DryRun, "remove offering"), about, err)
	}
	return request{run: run}, a.options(&o)
}

// unless names what is done, or only foreseen.
func unless(dryRun bool, what string) string {
	if dryRun {
		return what + ", as a dry run"
	}
	return what
}

func deleteDomainBackups(about dbus.Ref, a arguments) (request, error) {
	var o dbus.DeleteDomainBackupsOptions
	run := func(ctx context.Context, s *Server, c Caller) ([]any, error) {
		backups, bytes, jobs, err := s.backend.DeleteDomainBackups(ctx, c, about.ID, o)
		paths := []godbus.ObjectPath{}
		for _, id := range jobs {
			paths = append(paths, dbus.Ref{Kind: dbus.KindJob, ID: id}.Path())
		}
		return []any{append([]string{}, backups...), bytes, paths}, s.done(c, unless(o.DryRun, "delete all backups of domain"), about, err)
	}
	return request{run: run}, a.options(&o)
}

func assignDomain(about dbus.Ref, a arguments) (request, error) {
	offering := a.text(0)
	run := func(ctx context.Context, s *Server, c Caller) ([]any, error) {
		return nil, s.done(c, "assign domain to "+offering, about, s.backend.AssignDomain(ctx, c, about.ID, offering))
	}
	return request{mentions: []mention{{dbus.KindOffering, offering}}, run: run}, a.options(&dbus.NoOptions{})
}

func setOverrides(about dbus.Ref, a arguments) (request, error) {
	var o dbus.Overrides
	unset := a.texts(1)
	run := func(ctx context.Context, s *Server, c Caller) ([]any, error) {
		return nil, s.done(c, "override settings of domain", about, s.backend.SetOverrides(ctx, c, about.ID, o, unset))
	}
	return request{run: run}, errors.Join(dbus.DecodeOptions(a[0].(map[string]godbus.Variant), &o), a.options(&dbus.NoOptions{}))
}

func domainSettings(about dbus.Ref, _ arguments) (request, error) {
	run := func(ctx context.Context, s *Server, _ Caller) ([]any, error) {
		settings, err := s.backend.DomainSettings(ctx, about.ID)
		return []any{dbus.EncodeRecords(settings)}, err
	}
	return request{run: run}, nil
}

func pruneDomain(about dbus.Ref, a arguments) (request, error) {
	var o dbus.PruneOptions
	if err := a.options(&o); err != nil {
		return request{}, err
	}
	run := func(ctx context.Context, s *Server, c Caller) ([]any, error) {
		plan, jobs, err := s.backend.PruneDomain(ctx, c, about.ID, o)
		paths := make([]godbus.ObjectPath, len(jobs))
		for i, id := range jobs {
			paths[i] = dbus.Ref{Kind: dbus.KindJob, ID: id}.Path()
		}
		return []any{dbus.EncodeRecords(plan), paths}, s.done(c, "prune backups of domain", about, err)
	}
	return request{mentions: mentions(mention{dbus.KindRepository, o.Repository}), run: run}, nil
}

func holdBackup(about dbus.Ref, a arguments) (request, error) {
	reason := a.text(0)
	run := func(ctx context.Context, s *Server, c Caller) ([]any, error) {
		return nil, s.done(c, "hold backup", about, s.backend.HoldBackup(ctx, c, about.ID, reason))
	}
	return request{run: run}, a.options(&dbus.NoOptions{})
}

func domainTracking(about dbus.Ref, _ arguments) (request, error) {
	run := func(ctx context.Context, s *Server, _ Caller) ([]any, error) {
		tracking, err := s.backend.DomainTracking(ctx, about.ID)
		return []any{dbus.EncodeRecords(tracking)}, err
	}
	return request{run: run}, nil
}

func domainMarks(about dbus.Ref, a arguments) (request, error) {
	limit, err := pageLimit(a.number(0))
	run := func(ctx context.Context, s *Server, _ Caller) ([]any, error) {
		marks, err := s.backend.DomainMarks(ctx, about.ID, limit)
		return []any{dbus.EncodeRecords(marks)}, err
	}
	return request{run: run}, err
}

func backupValidations(about dbus.Ref, a arguments) (request, error) {
	limit, err := pageLimit(a.number(0))
	run := func(ctx context.Context, s *Server, _ Caller) ([]any, error) {
		all, err := s.backend.BackupValidations(ctx, about.ID, limit)
		return []any{dbus.EncodeRecords(all)}, err
	}
	return request{run: run}, err
}

func readScreenshot(about dbus.Ref, a arguments) (request, error) {
	run := func(ctx context.Context, s *Server, _ Caller) ([]any, error) {
		png, err := s.backend.BackupScreenshot(ctx, about.ID)
		return []any{png}, err
	}
	return request{run: run}, a.options(&dbus.NoOptions{})
}

func restoreBackup(about dbus.Ref, a arguments) (request, error) {
	name := a.text(0)
	var o dbus.RestoreOptions
	run := func(ctx context.Context, s *Server, c Caller) ([]any, error) {
		job, err := s.backend.RestoreBackup(ctx, c, about.ID, name, o)
		return jobPath(job), s.done(c, "restore backup as "+name, about, err)
	}
	return request{run: run}, a.options(&o)
}

func restoreInPlace(about dbus.Ref, a arguments) (request, error) {
	var o dbus.RestoreInPlaceOptions
	run := func(ctx context.Context, s *Server, c Caller) ([]any, error) {
		job, err := s.backend.RestoreInPlace(ctx, c, about.ID, o)
		return jobPath(job), s.done(c, "restore backup in place", about, err)
	}
	return request{run: run}, a.options(&o)
}

func planRestore(about dbus.Ref, a arguments) (request, error) {
	var o dbus.PlanRestoreOptions
	run := func(ctx context.Context, s *Server, _ Caller) ([]any, error) {
		plan, err := s.backend.PlanRestore(ctx, about.ID, o)
		return []any{dbus.EncodeRecord(plan)}, err
	}
	return request{run: run}, a.options(&o)
}
