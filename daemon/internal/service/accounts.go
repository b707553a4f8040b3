package service

import (
	"context"
	"errors"
	"math"
	"os/user"
	"slices"
	"strconv"

	"github.com/virtbackup/virtbackup/daemon/internal/backup"
	"github.com/virtbackup/virtbackup/daemon/internal/bus"
	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/chain"
	"github.com/virtbackup/virtbackup/daemon/internal/failure"
	"github.com/virtbackup/virtbackup/daemon/internal/journal"
	"github.com/virtbackup/virtbackup/daemon/internal/metrics"
	"github.com/virtbackup/virtbackup/dbus"
)

// Metrics returns what is known of backups in Prometheus' text format.
func (s *Service) Metrics(ctx context.Context) (string, error) {
	v, err := s.view(ctx, "")
	if err != nil {
		return "", failure.Named(err)
	}
	snapshot := metrics.Snapshot{
		Version: s.Version, Started: s.started, LibvirtConnected: v.libvirt == nil, Operations: dbus.Operation("").Values(), Live: s.live(),
	}
	if s.Ended != nil {
		snapshot.Ended = s.Ended.Ended()
	}
	used, err := s.usageOf(ctx, catalog.ByDomain)
	if err != nil {
		return "", err
	}
	for _, uuid := range v.uuids() {
		p, err := v.domain(uuid)
		if err != nil {
			return "", failure.Named(err)
		}
		last, u := v.summaries[uuid].LastJob, used[uuid]
		snapshot.Domains = append(snapshot.Domains, metrics.Domain{
			UUID: uuid, Name: p.Name, Offering: p.Offering, Protection: string(p.Protection), LastSuccess: p.LastBackupTime,
			Tried: last != "", Failed: last == catalog.JobFailed, Backups: u.Backups, Stored: u.StoredBytes, Protected: u.ProtectedBytes,
		})
	}
	tried, err := s.Catalog.CountValidations(ctx)
	if err != nil {
		return "", failure.Named(err)
	}
	for _, result := range dbus.ValidationResult("").Values() {
		snapshot.Validations = append(snapshot.Validations, metrics.Validations{Result: result, Backups: tried[catalog.ValidationResult(result)]})
	}
	snapshot.Repositories, err = s.measured(ctx)
	return snapshot.Text(), err
}

// live counts the jobs that have not ended.
func (s *Service) live() (all []metrics.Live) {
	for _, j := range s.Jobs.Active() {
		i := slices.IndexFunc(all, func(l metrics.Live) bool { return l.Operation == j.Kind && l.State == string(j.State) })
		if i < 0 {
			i, all = len(all), append(all, metrics.Live{Operation: j.Kind, State: string(j.State)})
		}
		all[i].Jobs++
	}
	return all
}

// measured is what the metrics tell of repositories.
func (s *Service) measured(ctx context.Context) (all []metrics.Repository, err error) {
	records, err := s.repositories(ctx)
	if err != nil {
		return nil, failure.Named(err)
	}
	used, err := s.usageOf(ctx, catalog.ByRepository)
	for _, r := range records {
		p := r.(dbus.RepositoryProperties)
		all = append(all, metrics.Repository{
			Name: p.Name, Type: p.Type, State: string(p.State), Free: p.FreeBytes, Total: p.TotalBytes,
			Backups: used[p.ID].Backups, Stored: used[p.ID].StoredBytes,
		})
	}
	return all, err
}

func (s *Service) usageOf(ctx context.Context, by catalog.UsageBy) (map[string]catalog.Usage, error) {
	list, err := s.Catalog.Usage(ctx, by)
	of := make(map[string]catalog.Usage, len(list))
	for _, u := range list {
		of[u.Of] = u
	}
	return of, failure.Named(err)
}

// ListUsage returns what backups take.
func (s *Service) ListUsage(ctx context.Context, by dbus.UsageBy) ([]dbus.Usage, error) {
	column := catalog.UsageBy(by)
	if by == dbus.UsageByUser {
		column = catalog.ByUser
	}
	list, err := s.Catalog.Usage(ctx, column)
	if err != nil {
		return nil, failure.Named(err)
	}
	name, err := s.namer(ctx, by)
	var all []dbus.Usage
	for _, u := range list {
		all = append(all, dbus.Usage{
			Of: u.Of, Name: name(u.Of), Backups: uint32(u.Backups), Chains: uint32(u.Chains),
			StoredBytes: u.StoredBytes, ProtectedBytes: u.ProtectedBytes, Newest: u.Newest,
		})
	}
	return all, failure.Named(err)
}

// namer returns what names things of a kind for people.
func (s *Service) namer(ctx context.Context, by dbus.UsageBy) (func(string) string, error) {
	names := map[string]string{}
	name := func(of string) string { return names[of] }
	switch by {
	case dbus.UsageByOffering:
		return func(of string) string { return of }, nil
	case dbus.UsageByUser:
		return userName, nil
	case dbus.UsageByRepository:
		all, err := s.Catalog.Repositories(ctx)
		for _, r := range all {
			names[r.ID] = r.Name
		}
		return name, err
	}
	all, err := s.Catalog.Domains(ctx, "")
	for _, d := range all {
		names[d.UUID] = d.Name
	}
	return name, err
}

// userName names a user; who is gone has a number only.
func userName(uid string) string {
	if u, err := user.LookupId(uid); err == nil {
		return u.Username
	}
	return uid
}

// ListQuotas returns all quotas, and what is used of each.
func (s *Service) ListQuotas(ctx context.Context) ([]dbus.Quota, error) {
	list, err := s.Catalog.Quotas(ctx)
	if err != nil {
		return nil, failure.Named(err)
	}
	var all []dbus.Quota
	for _, q := range list {
		u, err := s.Catalog.QuotaUse(ctx, q.Kind, q.Subject)
		if err != nil {
			return nil, failure.Named(err)
		}
		name, err := s.namer(ctx, dbus.UsageBy(q.Kind))
		if err != nil {
			return nil, failure.Named(err)
		}
		all = append(all, dbus.Quota{
			Kind: dbus.QuotaKind(q.Kind), Of: q.Subject, Name: name(q.Subject), Bytes: q.Bytes, Backups: uint32(q.Backups), Chains: uint32(q.Chains),
			UsedBytes: u.Bytes, UsedBackups: uint32(u.Backups + u.Running), UsedChains: uint32(u.Chains + u.RunningChains),
		})
	}
	return all, nil
}

// SetQuota bounds what there may be of something.
func (s *Service) SetQuota(ctx context.Context, _ bus.Caller, kind dbus.QuotaKind, name string, o dbus.QuotaOptions) error {
	subject, err := s.quotaSubject(ctx, kind, name)
	if err != nil {
		return err
	}
	all, err := s.Catalog.Quotas(ctx)
	if err != nil {
		return failure.Named(err)
	}
	q := catalog.Quota{Kind: catalog.QuotaKind(kind), Subject: subject}
	if i := slices.IndexFunc(all, func(one catalog.Quota) bool { return one.Kind == q.Kind && one.Subject == q.Subject }); i >= 0 {
		q = all[i]
	}
	set(&q.Bytes, o.Bytes)
	setNumber(&q.Backups, o.Backups)
	setNumber(&q.Chains, o.Chains)
	switch {
	case q.Bytes > math.MaxInt64:
		return dbus.Errorf(dbus.ErrInvalidArgument, "a quota of %d bytes is too large", q.Bytes)
	case q.Bytes == 0 && q.Backups == 0 && q.Chains == 0:
		return dbus.Errorf(dbus.ErrInvalidArgument, "a quota needs a bound of bytes, backups or chains; to have none, remove it")
	}
	return failure.Named(s.Catalog.SetQuota(ctx, q))
}

// RemoveQuota takes such a bound away, also from what is gone.
func (s *Service) RemoveQuota(ctx context.Context, _ bus.Caller, kind dbus.QuotaKind, name string) error {
	subject, err := s.quotaSubject(ctx, kind, name)
	if err != nil {
		subject = name
	}
	if err := s.Catalog.RemoveQuota(ctx, catalog.QuotaKind(kind), subject); errors.Is(err, catalog.ErrNotFound) {
		return dbus.Errorf(dbus.ErrNotFound, "%s %q has no quota", kind, name)
	} else {
		return failure.Named(err)
	}
}

// quotaSubject is what the catalog knows something by.
func (s *Service) quotaSubject(ctx context.Context, kind dbus.QuotaKind, name string) (string, error) {
	switch kind {
	case dbus.QuotaDomain:
		ref, err := s.Find(ctx, dbus.KindDomain, name)
		return ref.ID, err
	case dbus.QuotaOffering:
		ref, err := s.Find(ctx, dbus.KindOffering, name)
		if err != nil {
			return "", err
		}
		o, err := s.offeringByID(ctx, ref.ID)
		return o.Name, failure.Named(err)
	}
	if u, err := user.Lookup(name); err == nil {
		return u.Uid, nil
	}
	if uid, err := strconv.ParseUint(name, 10, 32); err == nil {
		return strconv.FormatUint(uid, 10), nil
	}
	return "", dbus.Errorf(dbus.ErrNotFound, "there is no user %q", name)
}

// withinQuota refuses a backup that a quota forbids. The one that begins last
// may still find it used up then.
func (s *Service) withinQuota(ctx context.Context, caller bus.Caller, name string, r backup.Request) error {
	b := catalog.Backup{Domain: r.Domain, DomainName: name, Offering: r.Offering, UID: caller.UID, Kind: chain.Incremental}
	if r.Full || r.Isolated || r.Mode == chain.ModeFull {
		b.Kind = chain.Full
	}
	err := s.Catalog.CheckQuota(ctx, b)
	if errors.Is(err, catalog.ErrQuota) {
		s.Log.Warn("a backup is refused", journal.MessageID, journal.QuotaExceeded, journal.Domain, r.Domain, journal.DomainName, name,
			"uid", caller.UID, journal.Error, err)
	}
	return failure.Named(err)
}
