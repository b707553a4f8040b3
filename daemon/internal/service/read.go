package service

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/chain"
	"github.com/virtbackup/virtbackup/daemon/internal/failure"
	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/daemon/internal/job"
	"github.com/virtbackup/virtbackup/dbus"
)

// managedJobs is how many ended jobs stay managed objects.
const managedJobs = 100

// Objects returns all managed objects.
func (s *Service) Objects(ctx context.Context) ([]dbus.Record, error) {
	var all []dbus.Record
	for _, list := range []func(context.Context) ([]dbus.Record, error){
		s.repositories, s.offerings, s.schedules, s.allDomains, s.jobs,
	} {
		records, err := list(ctx)
		if err != nil {
			return nil, failure.Named(err)
		}
		all = append(all, records...)
	}
	return all, nil
}

// Object returns one object of any kind.
func (s *Service) Object(ctx context.Context, ref dbus.Ref) (dbus.Record, error) {
	record, err := s.object(ctx, ref)
	if errors.Is(err, catalog.ErrNotFound) || errors.Is(err, dbus.ErrNotFound) {
		return nil, notFound(ref)
	}
	return record, err
}

func (s *Service) object(ctx context.Context, ref dbus.Ref) (dbus.Record, error) {
	switch ref.Kind {
	case dbus.KindManager:
		return asRecord(s.Manager(ctx))
	case dbus.KindRepository:
		r, err := s.Catalog.Repository(ctx, ref.ID)
		return s.repositoryRecord(r), err
	case dbus.KindOffering:
		o, err := s.offeringByID(ctx, ref.ID)
		if err != nil {
			return nil, err
		}
		return asRecord(s.offeringRecord(ctx, o))
	case dbus.KindSchedule:
		sch, err := s.Catalog.Schedule(ctx, ref.ID)
		if err != nil {
			return nil, err
		}
		return asRecord(s.scheduleRecord(ctx, sch))
	case dbus.KindDomain:
		return asRecord(s.domainRecord(ctx, ref.ID))
	case dbus.KindChain:
		c, err := s.Catalog.Chain(ctx, ref.ID)
		if err != nil {
			return nil, err
		}
		links, err := s.Catalog.Links(ctx, []string{c.ID})
		if err != nil {
			return nil, err
		}
		return asRecord(s.newNames().chain(ctx, c, links[c.ID]))
	case dbus.KindBackup:
		b, err := s.Catalog.Backup(ctx, ref.ID)
		if err != nil {
			return nil, err
		}
		if !listed(b.State) {
			return nil, dbus.ErrNotFound
		}
		children, err := s.Catalog.Children(ctx, b.ID)
		if err != nil {
			return nil, err
		}
		return asRecord(s.newNames().backup(ctx, b, children))
	case dbus.KindJob:
		st, err := s.Jobs.Job(ctx, ref.ID)
		if err != nil {
			return nil, err
		}
		warnings, err := s.Catalog.JobWarnings(ctx, []string{st.ID})
		if err != nil {
			return nil, err
		}
		return asRecord(s.newNames().job(ctx, st, warnings[st.ID]))
	}
	return nil, dbus.ErrNotFound
}

// asRecord keeps a nil error from making a typed record of a failure.
func asRecord[R dbus.Record](r R, err error) (dbus.Record, error) {
	if err != nil {
		return nil, err
	}
	return r, nil
}

// Find resolves a name or id.
func (s *Service) Find(ctx context.Context, kind dbus.Kind, name string) (dbus.Ref, error) {
	id, err := s.find(ctx, kind, name)
	switch {
	case errors.Is(err, catalog.ErrNotFound), errors.Is(err, hypervisor.ErrNoDomain):
		return dbus.Ref{}, dbus.Errorf(dbus.ErrNotFound, "there is no %s %q", kind, name)
	case err != nil:
		return dbus.Ref{}, failure.Named(err)
	}
	return dbus.Ref{Kind: kind, ID: id}, nil
}

func (s *Service) find(ctx context.Context, kind dbus.Kind, name string) (string, error) {
	switch kind {
	case dbus.KindRepository:
		r, err := s.Catalog.RepositoryByName(ctx, name)
		if errors.Is(err, catalog.ErrNotFound) {
			r, err = s.Catalog.Repository(ctx, name)
		}
		return r.ID, err
	case dbus.KindOffering:
		o, err := s.Catalog.Offering(ctx, name)
		if errors.Is(err, catalog.ErrNotFound) {
			o, err = s.offeringByID(ctx, name)
		}
		return o.ID, err
	case dbus.KindSchedule:
		sch, err := s.Catalog.ScheduleByName(ctx, name)
		if errors.Is(err, catalog.ErrNotFound) {
			sch, err = s.Catalog.Schedule(ctx, name)
		}
		return sch.ID, err
	case dbus.KindDomain:
		return s.findDomain(ctx, name)
	case dbus.KindBackup:
		return s.findBackup(ctx, name)
	}
	return "", fmt.Errorf("a %s has no name: %w", kind, catalog.ErrNotFound)
}

// findDomain asks libvirt first, which knows the newest names, and the catalog
// for domains that are known only by their backups.
func (s *Service) findDomain(ctx context.Context, name string) (string, error) {
	d, err := s.lookup(ctx, name)
	if err == nil {
		return d.UUID, nil
	}
	known, inCatalog := s.Catalog.Domains(ctx, "")
	if inCatalog != nil {
		return "", inCatalog
	}
	var ids []string
	for _, k := range known {
		if strings.EqualFold(k.UUID, name) {
			return k.UUID, nil
		}
		if k.Name == name {
			ids = append(ids, k.UUID)
		}
	}
	switch len(ids) {
	case 0:
		return "", err
	case 1:
		return ids[0], nil
	}
	return "", dbus.Errorf(dbus.ErrInvalidArgument, "several domains were called %q: say which by its UUID: %s", name, strings.Join(ids, ", "))
}

// findBackup resolves an id or the beginning of one.
func (s *Service) findBackup(ctx context.Context, prefix string) (string, error) {
	if prefix == "" { // it would mean any, and where there is one only, that one
		return "", catalog.ErrNotFound
	}
	ids, err := s.Catalog.BackupsByPrefix(ctx, strings.ToUpper(prefix), 2)
	if err != nil {
		return "", err
	}
	switch len(ids) {
	case 0:
		return "", catalog.ErrNotFound
	case 1:
		return ids[0], nil
	}
	return "", dbus.Errorf(dbus.ErrInvalidArgument, "several backups begin with %q, as %s and %s: say more of the id", prefix, ids[0], ids[1])
}

// ListRepositories returns all repositories.
func (s *Service) ListRepositories(ctx context.Context) ([]dbus.RepositoryProperties, error) {
	all, err := s.repositories(ctx)
	return only[dbus.RepositoryProperties](all), failure.Named(err)
}

// ListOfferings returns all offerings.
func (s *Service) ListOfferings(ctx context.Context) ([]dbus.OfferingProperties, error) {
	all, err := s.offerings(ctx)
	return only[dbus.OfferingProperties](all), failure.Named(err)
}

// ListSchedules returns all schedules.
func (s *Service) ListSchedules(ctx context.Context) ([]dbus.ScheduleProperties, error) {
	all, err := s.schedules(ctx)
	return only[dbus.ScheduleProperties](all), failure.Named(err)
}

// only returns the records of one kind.
func only[R dbus.Record](all []dbus.Record) (list []R) {
	for _, one := range all {
		if r, ok := one.(R); ok {
			list = append(list, r)
		}
	}
	return list
}

// ListChains returns one page of chains, newest first.
func (s *Service) ListChains(ctx context.Context, f dbus.ChainFilter, cursor string, limit int) ([]dbus.ChainProperties, string, error) {
	var q catalog.ChainFilter
	if err := s.resolve(ctx, map[dbus.Kind]nameInto{
		dbus.KindDomain: {f.Domain, &q.Domain}, dbus.KindRepository: {f.Repository, &q.Repository},
	}); err != nil {
		return nil, "", err
	}
	if f.State != nil {
		q.States = []chain.State{chain.State(*f.State)}
	}
	list, err := s.Catalog.ListChains(ctx, q, catalog.Page{Limit: limit, After: cursor})
	if err != nil {
		return nil, "", failure.Named(err)
	}
	id := func(c catalog.Chain) string { return c.ID }
	links, err := s.Catalog.Links(ctx, each(list, id))
	if err != nil {
		return nil, "", failure.Named(err)
	}
	names := s.newNames()
	return page(list, limit, id, func(c catalog.Chain) (dbus.ChainProperties, error) { return names.chain(ctx, c, links[c.ID]) })
}

// ListBackups returns one page of backups, newest first.
func (s *Service) ListBackups(ctx context.Context, f dbus.BackupFilter, cursor string, limit int) ([]dbus.BackupProperties, string, error) {
	q := catalog.BackupFilter{Chain: f.Chain, States: []chain.BackupState{chain.Complete, chain.Damaged, chain.Deleting}}
	if err := s.resolve(ctx, map[dbus.Kind]nameInto{
		dbus.KindDomain: {f.Domain, &q.Domain}, dbus.KindRepository: {f.Repository, &q.Repository},
	}); err != nil {
		return nil, "", err
	}
	var err error
	if q.Offering, err = s.offeringName(ctx, f.Offering); err != nil { // which is what backups know
		return nil, "", err
	}
	if f.State != nil {
		q.States = []chain.BackupState{chain.BackupState(*f.State)}
	}
	setAs(&q.Kind, f.Kind)
	set(&q.Since, f.Since)
	set(&q.Until, f.Until)
	list, children, err := s.Catalog.WholeBackups(ctx, q, catalog.Page{Limit: limit, After: cursor})
	if err != nil {
		return nil, "", failure.Named(err)
	}
	names := s.newNames()
	return page(list, limit, func(b catalog.Backup) string { return b.ID }, func(b catalog.Backup) (dbus.BackupProperties, error) {
		return names.backup(ctx, b, children[b.ID])
	})
}

// ListJobs returns one page of jobs, newest first.
func (s *Service) ListJobs(ctx context.Context, f dbus.JobFilter, cursor string, limit int) ([]dbus.JobProperties, string, error) {
	q := catalog.JobFilter{Unfinished: f.Unfinished, Parent: f.Parent}
	if err := s.resolve(ctx, map[dbus.Kind]nameInto{dbus.KindDomain: {f.Domain, &q.Domain}}); err != nil {
		return nil, "", err
	}
	setAs(&q.Kind, f.Operation)
	if f.State != nil {
		q.States = []catalog.JobState{catalog.JobState(*f.State)}
	}
	set(&q.Since, f.Since)
	set(&q.Until, f.Until)
	list, err := s.Catalog.ListJobs(ctx, q, catalog.Page{Limit: limit, After: cursor})
	if err != nil {
		return nil, "", failure.Named(err)
	}
	id := func(j catalog.Job) string { return j.ID }
	warnings, err := s.Catalog.JobWarnings(ctx, each(list, id))
	if err != nil {
		return nil, "", failure.Named(err)
	}
	names, active := s.newNames(), s.active()
	return page(list, limit, id, func(j catalog.Job) (dbus.JobProperties, error) {
		st, ok := active[j.ID]
		if !ok {
			st = job.Status{Job: j}
		}
		return names.job(ctx, st, warnings[j.ID])
	})
}

// active returns the jobs that have not ended, as they are at this moment.
func (s *Service) active() map[string]job.Status {
	all := map[string]job.Status{}
	for _, st := range s.Jobs.Active() {
		all[st.ID] = st
	}
	return all
}

func each[T any](list []T, id func(T) string) []string {
	all := make([]string, len(list))
	for i, one := range list {
		all[i] = id(one)
	}
	return all
}

// page makes records of one page of a list, without what is gone meanwhile, and
// returns the cursor of the next page.
func page[T, R any](list []T, limit int, id func(T) string, record func(T) (R, error)) (all []R, next string, err error) {
	for _, one := range list {
		r, err := record(one)
		if errors.Is(err, catalog.ErrNotFound) {
			continue
		} else if err != nil {
			return nil, "", failure.Named(err)
		}
		all = append(all, r)
	}
	if len(list) == limit {
		next = id(list[len(list)-1])
	}
	return all, next, nil
}

// nameInto is a name to resolve, unless it is empty, and where its id goes.
type nameInto struct {
	name string
	id   *string
}

func (s *Service) resolve(ctx context.Context, names map[dbus.Kind]nameInto) error {
	for kind, n := range names {
		if n.name == "" {
			continue
		}
		ref, err := s.Find(ctx, kind, n.name)
		if err != nil {
			return err
		}
		*n.id = ref.ID
	}
	return nil
}

// offeringName returns the name of an offering that is given by name or id; ""
// for "".
func (s *Service) offeringName(ctx context.Context, given string) (string, error) {
	if given == "" {
		return "", nil
	}
	ref, err := s.Find(ctx, dbus.KindOffering, given)
	if err != nil {
		return "", err
	}
	o, err := s.offeringByID(ctx, ref.ID)
	return o.Name, failure.Named(err)
}

func (s *Service) offeringByID(ctx context.Context, id string) (catalog.Offering, error) {
	all, err := s.Catalog.Offerings(ctx)
	if err != nil {
		return catalog.Offering{}, err
	}
	for _, o := range all {
		if o.ID == id {
			return o, nil
		}
	}
	return catalog.Offering{}, fmt.Errorf("offering %s: %w", id, catalog.ErrNotFound)
}
