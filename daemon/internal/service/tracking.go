package service

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/backup"
	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/chain"
	"github.com/virtbackup/virtbackup/daemon/internal/failure"
	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/daemon/internal/lifecycle"
	"github.com/virtbackup/virtbackup/dbus"
)

// target is where a domain's backups go: by its offering, or by that of a
// chain, or ad hoc.
type target struct {
	repository string // id
	offering   string // name; "" for none
	settings   catalog.Settings
}

// DomainTracking returns, for each place that a domain's backups go to, how
// the next one would find what changed.
func (s *Service) DomainTracking(ctx context.Context, uuid string) ([]dbus.DomainTracking, error) {
	d, _, _ := s.domain(uuid)
	targets, err := s.targets(ctx, uuid)
	if err != nil {
		return nil, failure.Named(err)
	}
	var all []dbus.DomainTracking
	for _, t := range targets {
		_, next, err := s.next(ctx, uuid, d, t)
		if err != nil {
			return nil, failure.Named(err)
		}
		all = append(all, next...)
	}
	return all, nil
}

// targets returns where the domain's offering sends its backups, and where it
// has other chains that go on.
func (s *Service) targets(ctx context.Context, uuid string) ([]target, error) {
	var all []target
	known, err := s.Catalog.Domain(ctx, uuid)
	if err != nil && !errors.Is(err, catalog.ErrNotFound) {
		return nil, err
	}
	if known.Offering != "" {
		o, err := s.Catalog.Offering(ctx, known.Offering)
		if err != nil {
			return nil, err
		}
		e, err := effectiveOf(&o, known)
		if err != nil {
			return nil, err
		}
		all = append(all, target{o.Repository, o.Name, e.Settings})
	}
	chains, err := s.Catalog.Chains(ctx, uuid)
	if err != nil {
		return nil, err
	}
	for _, c := range chains {
		if c.State != chain.Open || slices.ContainsFunc(all, func(t target) bool { return t.repository == c.Repository }) {
			continue
		}
		t, of := target{repository: c.Repository}, (*catalog.Offering)(nil)
		if o, err := s.Catalog.Offering(ctx, c.Offering); err == nil {
			t.offering, of = o.Name, &o
		} else if !errors.Is(err, catalog.ErrNotFound) {
			return nil, err
		}
		e, err := effectiveOf(of, known)
		if err != nil {
			return nil, err
		}
		t.settings = e.Settings
		all = append(all, t)
	}
	return all, nil
}

// next says how the next backup of a domain would find what changed on each
// disk, and which chain it would have before it.
func (s *Service) next(ctx context.Context, uuid string, d hypervisor.Domain, t target) (head catalog.Head, all []dbus.DomainTracking, err error) {
	r, err := s.Catalog.Repository(ctx, t.repository)
	if err != nil {
		return head, nil, err
	}
	var last *catalog.Head
	head, err = s.Catalog.LatestChain(ctx, uuid, t.repository)
	if err == nil {
		last = &head
	} else if !errors.Is(err, catalog.ErrNotFound) {
		return head, nil, err
	}
	marks, err := s.Catalog.Marks(ctx, uuid, 0)
	if err != nil {
		return head, nil, err
	}
	v, err := backup.Foresee(backup.Request{Domain: uuid, Repository: t.repository, Offering: t.offering, Settings: t.settings}, d, last, marks)
	for _, disk := range v.Disks {
		one := dbus.DomainTracking{
			Repository: r.Name, Offering: t.offering, Chain: v.Chain, Target: disk.Target,
			Tracking: cmp.Or(dbus.Tracking(disk.Changes), dbus.TrackingNone), Cause: string(disk.Cause),
		}
		one.Since = since(disk, head.Tip, marks)
		all = append(all, one)
	}
	return head, all, err
}

// since returns from when on a disk is tracked as it is: from the newest
// backup, or from what was seen of the disk after it.
func since(disk chain.DiskVerdict, tip *catalog.Backup, marks []catalog.Mark) time.Time {
	if tip == nil {
		return time.Time{}
	}
	if mark, ok := lifecycle.Unseen(marks, disk.Target, tip.Mark); ok && mark.Cause == disk.Cause {
		return mark.Time
	}
	return tip.Created
}

// DomainMarks returns what was seen of a domain's disks, newest first.
func (s *Service) DomainMarks(ctx context.Context, uuid string, limit int) ([]dbus.Mark, error) {
	list, err := s.Catalog.Marks(ctx, uuid, 0)
	if err != nil {
		return nil, failure.Named(err)
	}
	var all []dbus.Mark
	for _, m := range slices.Backward(list) {
		if len(all) == limit {
			break
		}
		all = append(all, dbus.Mark{Time: m.Time, Target: m.Target, Cause: string(m.Cause), Detail: m.Detail})
	}
	return all, nil
}
