package service

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"time"
	"unicode"

	"github.com/virtbackup/virtbackup/daemon/internal/bus"
	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/failure"
	"github.com/virtbackup/virtbackup/dbus"
)

// CreateOffering makes a named set of backup options.
func (s *Service) CreateOffering(ctx context.Context, _ bus.Caller, name, repository string, o dbus.OfferingOptions) (string, error) {
	if err := validName("an offering", name); err != nil {
		return "", err
	}
	ref, err := s.Find(ctx, dbus.KindRepository, repository)
	if err != nil {
		return "", err
	}
	made := defaultOffering(name)
	made.ID, made.Repository, made.Created = newID(), ref.ID, time.Now()
	if err := change(&made, o); err != nil {
		return "", err
	}
	if err := s.Catalog.CreateOffering(ctx, made); err != nil {
		return "", failure.Named(err)
	}
	s.notifier.Added(dbus.Ref{Kind: dbus.KindOffering, ID: made.ID})
	return made.ID, nil
}

// defaultOffering is one of which nothing is said.
func defaultOffering(name string) catalog.Offering {
	return catalog.Offering{
		Name: name, Settings: defaultSettings(),
		Rights: catalog.Rights{Backups: true, Schedules: true, QuickRestore: true, FileExtraction: true},
	}
}

// change applies what is given to an offering, and checks that it fits.
func change(o *catalog.Offering, given dbus.OfferingOptions) error {
	set(&o.Description, given.Description)
	set(&o.Disabled, given.Disabled)
	set(&o.Users, given.Users)
	e := effectiveIn(*o)
	e.apply(given.Overrides)
	o.Settings, o.Retention, o.Rights, o.Validation = e.Settings, e.Retention, e.Rights, e.Validation
	return cmp.Or(fitOffering(*o), e.fit())
}

// descriptionLimit is the most that a description may have, in bytes.
const descriptionLimit = 1000

func fitOffering(o catalog.Offering) error {
	if len(o.Description) > descriptionLimit || strings.ContainsFunc(o.Description, unicode.IsControl) {
		return dbus.Errorf(dbus.ErrInvalidArgument, "the description has %d bytes or a control character: at most %d, in one line", len(o.Description), descriptionLimit)
	}
	for _, u := range o.Users {
		if !userPattern.MatchString(u) {
			return dbus.Errorf(dbus.ErrInvalidArgument, "%q is not the name of a user, or of a group with an @ before", u)
		}
	}
	return nil
}

// userPattern is what useradd(8) takes, and an @ before a group.
var userPattern = regexp.MustCompile(`^@?[A-Za-z_][A-Za-z0-9_.-]{0,63}\$?$`)

// UpdateOffering changes an offering. Its domains' chains end when the next
// backup is made, as far as the change asks for it.
func (s *Service) UpdateOffering(ctx context.Context, _ bus.Caller, id string, o dbus.UpdateOfferingOptions) error {
	changed, err := s.offeringByID(ctx, id)
	if err == nil {
		err = ours(changed)
	}
	if err != nil {
		return failure.Named(err)
	}
	if o.Repository != nil {
		ref, err := s.Find(ctx, dbus.KindRepository, *o.Repository)
		if err != nil {
			return err
		}
		changed.Repository = ref.ID
	}
	if err := change(&changed, o.OfferingOptions); err != nil {
		return err
	}
	if err := s.Catalog.UpdateOffering(ctx, changed); err != nil {
		return failure.Named(err)
	}
	s.notifier.Changed(dbus.Ref{Kind: dbus.KindOffering, ID: id})
	return nil
}

// RemoveOffering forgets an offering that no domain is assigned to, or, forced,
// takes it from those that are: their backups stay, and their chains end. It
// returns them, also of a dry run.
func (s *Service) RemoveOffering(ctx context.Context, caller bus.Caller, id string, o dbus.RemoveOfferingOptions) ([]string, error) {
	offering, err := s.offeringByID(ctx, id)
	if err == nil {
		err = ours(offering)
	}
	if err != nil {
		return nil, failure.Named(err)
	}
	assigned, err := s.Catalog.Domains(ctx, offering.Name)
	if err != nil {
		return nil, failure.Named(err)
	}
	var uuids []string
	for _, d := range assigned {
		uuids = append(uuids, d.UUID)
	}
	if o.DryRun {
		return uuids, nil
	}
	if err := s.unused(ctx, offering, assigned); err != nil && !o.Forced {
		return nil, err
	}
	for _, uuid := range uuids {
		if err := s.UnassignDomain(ctx, caller, uuid); err != nil && !errors.Is(err, dbus.ErrNotFound) {
			return nil, err
		}
	}
	if err := s.Catalog.RemoveOffering(ctx, offering.Name); err != nil {
		return nil, failure.Named(err)
	}
	s.notifier.Removed(dbus.Ref{Kind: dbus.KindOffering, ID: id})
	return uuids, nil
}

// unused refuses an offering that domains or schedules have.
func (s *Service) unused(ctx context.Context, o catalog.Offering, assigned []catalog.Domain) error {
	if len(assigned) > 0 {
		return dbus.Errorf(dbus.ErrBusy, "offering %q is assigned to %s: unassign it first, or force it, and they have none", o.Name, domainNames(assigned))
	}
	all, err := s.Catalog.Schedules(ctx)
	if err != nil {
		return failure.Named(err)
	}
	for _, one := range all {
		if one.Offering == o.Name {
			return dbus.Errorf(dbus.ErrBusy, "schedule %q is for offering %q: remove it first, or force it, and the schedule has nothing to do", one.Name, o.Name)
		}
	}
	return nil
}

// domainNames names some domains for people.
func domainNames(all []catalog.Domain) string {
	const most = 5
	var names []string
	for _, d := range all[:min(len(all), most)] {
		names = append(names, fmt.Sprintf("%q", d.Name))
	}
	what := "domain " + strings.Join(names, ", ")
	if len(all) > most {
		what += fmt.Sprintf(" and %d more", len(all)-most)
	}
	return what
}
