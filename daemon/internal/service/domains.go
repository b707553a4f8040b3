package service

import (
	"context"
	"errors"

	"github.com/virtbackup/virtbackup/daemon/internal/backup"
	"github.com/virtbackup/virtbackup/daemon/internal/bus"
	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/chain"
	"github.com/virtbackup/virtbackup/daemon/internal/failure"
	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/daemon/internal/job"
	"github.com/virtbackup/virtbackup/dbus"
)

// lookup asks libvirt for a domain. It waits for ever for a QEMU that hangs; a
// caller is told.
func (s *Service) lookup(ctx context.Context, nameOrUUID string) (hypervisor.Domain, error) {
	ctx, cancel := context.WithTimeout(ctx, lookLimit)
	defer cancel()
	return s.Domains.Lookup(ctx, nameOrUUID)
}

// AssignDomain assigns an offering to a domain that libvirt knows.
func (s *Service) AssignDomain(ctx context.Context, caller bus.Caller, uuid, offering string) error {
	d, err := s.lookup(ctx, uuid)
	if err != nil {
		return failure.Named(err)
	}
	ref, err := s.Find(ctx, dbus.KindOffering, offering)
	if err != nil {
		return err
	}
	o, err := s.offeringByID(ctx, ref.ID)
	if err != nil {
		return failure.Named(err)
	}
	if err := s.mayUse(caller, o); err != nil {
		return err
	}
	if err := s.Catalog.AssignDomain(ctx, d.UUID, d.Name, o.Name); err != nil {
		return failure.Named(err)
	}
	s.notifier.Changed(dbus.Ref{Kind: dbus.KindDomain, ID: d.UUID})
	s.notifier.Changed(ref)
	return nil
}

// UnassignDomain takes a domain's offering away and finishes its chain.
func (s *Service) UnassignDomain(ctx context.Context, caller bus.Caller, uuid string) error {
	if err := s.Catalog.UnassignDomain(ctx, uuid); errors.Is(err, catalog.ErrNotFound) {
		return dbus.Errorf(dbus.ErrNotFound, "domain %s is assigned to no offering", uuid)
	} else if err != nil {
		return failure.Named(err)
	}
	return s.FinishChain(ctx, caller, uuid)
}

// FinishChain ends the open chains of a domain: its next backup is full.
func (s *Service) FinishChain(ctx context.Context, _ bus.Caller, uuid string) error {
	chains, err := s.Catalog.Chains(ctx, uuid)
	if err != nil {
		return failure.Named(err)
	}
	for _, c := range chains {
		if c.State != chain.Open {
			continue
		}
		if err := s.Catalog.EndChain(ctx, c.ID, chain.Finished, chain.ChainFinished); err != nil {
			return failure.Named(err)
		}
		s.notifier.Changed(dbus.Ref{Kind: dbus.KindChain, ID: c.ID})
	}
	s.notifier.Changed(dbus.Ref{Kind: dbus.KindDomain, ID: uuid})
	return nil
}

// BackupDomain starts a backup with the domain's offering, another, or ad hoc.
func (s *Service) BackupDomain(ctx context.Context, caller bus.Caller, uuid string, o dbus.BackupOptions) (string, error) {
	_, r, err := s.askedBackup(ctx, caller, uuid, o)
	if err != nil {
		return "", err
	}
	return s.start(ctx, r)
}

// askedBackup is the job of a backup that a caller asks for, and may ask for.
func (s *Service) askedBackup(ctx context.Context, caller bus.Caller, uuid string, o dbus.BackupOptions) (name string, j job.Request, err error) {
	d, err := s.lookup(ctx, uuid)
	if err != nil {
		return "", j, failure.Named(err)
	}
	r := backup.Request{Domain: d.UUID, Isolated: o.Isolated, Full: o.Full}
	named, err := s.backupSettings(ctx, d, o, &r)
	if err != nil {
		return "", j, err
	}
	if err := s.mayBackUp(ctx, caller, d.UUID, named); err != nil {
		return "", j, failure.Named(err)
	}
	if err := s.Catalog.SeenDomain(ctx, d.UUID, d.Name); err != nil {
		return "", j, failure.Named(err)
	}
	if err := s.withinQuota(ctx, caller, d.Name, r); err != nil {
		return "", j, err
	}
	j = backup.NewJob(r, caller.UID)
	if o.Priority != nil {
		j.Priority = new(int(*o.Priority))
	}
	if o.Attempts != nil {
		j.Attempts = int(*o.Attempts)
	}
	return d.Name, j, nil
}

// backupSettings finds where a backup goes and with which settings, and returns
// the offering; nil for none.
func (s *Service) backupSettings(ctx context.Context, d hypervisor.Domain, o dbus.BackupOptions, r *backup.Request) (of *catalog.Offering, err error) {
	known, err := s.Catalog.Domain(ctx, d.UUID)
	if err != nil && !errors.Is(err, catalog.ErrNotFound) {
		return nil, failure.Named(err)
	}
	switch {
	case o.Offering != "" && o.Repository != "":
		return nil, dbus.Errorf(dbus.ErrInvalidArgument, "give an offering or a repository, not both")
	case o.Repository != "":
		ref, err := s.Find(ctx, dbus.KindRepository, o.Repository)
		if err != nil {
			return nil, err
		}
		r.Repository = ref.ID
	default:
		offering, err := s.offeringFor(ctx, d, o.Offering)
		if err != nil {
			return nil, err
		}
		r.Offering, r.Repository, of = offering.Name, offering.Repository, &offering
	}
	e, err := effectiveOf(of, known)
	if err != nil {
		return nil, err
	}
	r.Settings = override(e.Settings, o.Settings)
	return of, fit(r.Settings)
}

// offeringFor returns the offering named, or else the one assigned.
func (s *Service) offeringFor(ctx context.Context, d hypervisor.Domain, name string) (catalog.Offering, error) {
	if name == "" {
		known, err := s.Catalog.Domain(ctx, d.UUID)
		if err != nil && !errors.Is(err, catalog.ErrNotFound) {
			return catalog.Offering{}, failure.Named(err)
		}
		if name = known.Offering; name == "" {
			return catalog.Offering{}, dbus.Errorf(dbus.ErrInvalidArgument,
				"domain %q is assigned to no offering: assign one, or say an offering or a repository", d.Name)
		}
	}
	ref, err := s.Find(ctx, dbus.KindOffering, name)
	if err != nil {
		return catalog.Offering{}, err
	}
	o, err := s.offeringByID(ctx, ref.ID)
	return o, failure.Named(err)
}
