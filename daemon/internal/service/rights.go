package service

import (
	"context"
	"fmt"
	"os/user"
	"slices"
	"strconv"

	"github.com/virtbackup/virtbackup/daemon/internal/bus"
	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/dbus"
)

// Polkit says who may do what with which domain; an offering says more: for
// whom it is, and whether its domains have backups besides those of its
// schedules. Root, who makes offerings and runs their schedules, may all.

// People returns how offerings name a user: by its name, and by its groups with
// an @ before.
type People func(uid uint32) ([]string, error)

// accounts looks people up on this host.
func accounts(uid uint32) ([]string, error) {
	u, err := user.LookupId(strconv.FormatUint(uint64(uid), 10))
	if err != nil {
		return nil, fmt.Errorf("cannot tell who uid %d is: %w", uid, err)
	}
	names := []string{u.Username}
	groups, err := u.GroupIds()
	if err != nil {
		return nil, fmt.Errorf("cannot tell the groups of user %q: %w", u.Username, err)
	}
	for _, id := range groups {
		if g, err := user.LookupGroupId(id); err == nil { // a group may have no name
			names = append(names, "@"+g.Name)
		}
	}
	return names, nil
}

const root = 0

// mayUse refuses an offering that is disabled, or for others than the caller.
func (s *Service) mayUse(caller bus.Caller, o catalog.Offering) error {
	if o.Disabled {
		return dbus.Errorf(dbus.ErrInvalidArgument, "offering %q is disabled: use another, or enable it", o.Name)
	}
	if caller.UID == root || len(o.Users) == 0 {
		return nil
	}
	names, err := s.People(caller.UID)
	if err != nil {
		return dbus.Errorf(dbus.ErrNotAuthorized, "offering %q is not for everybody: %v", o.Name, err)
	}
	if !slices.ContainsFunc(names, func(name string) bool { return slices.Contains(o.Users, name) }) {
		return dbus.Errorf(dbus.ErrNotAuthorized, "offering %q is not for you: ask for another", o.Name)
	}
	return nil
}

// mayBackUp refuses a caller a backup of a domain besides those of schedules.
// The offering that the domain is assigned to decides, whichever other offering
// or repository, or other settings, the caller names; and so does the other one.
func (s *Service) mayBackUp(ctx context.Context, caller bus.Caller, uuid string, named *catalog.Offering) error {
	return s.may(ctx, caller, uuid, named, "backups", func(r catalog.Rights) bool { return r.Backups })
}

// MaySchedule refuses a caller a schedule of a domain, in the same way.
func (s *Service) MaySchedule(ctx context.Context, caller bus.Caller, uuid string, named *catalog.Offering) error {
	return s.may(ctx, caller, uuid, named, "schedules", func(r catalog.Rights) bool { return r.Schedules })
}

func (s *Service) may(ctx context.Context, caller bus.Caller, uuid string, named *catalog.Offering, what string, allowed func(catalog.Rights) bool) error {
	d, own, err := s.assigned(ctx, uuid)
	if err != nil {
		return err
	}
	for _, o := range []*catalog.Offering{own, named} {
		if o == nil {
			continue
		}
		// Whoever assigned its own to the domain was allowed to.
		as := caller
		if own != nil && o.Name == own.Name {
			as = bus.Caller{}
		}
		if err := s.mayUse(as, *o); err != nil {
			return err
		}
		e, err := effectiveOf(o, d)
		if err != nil {
			return err
		}
		if caller.UID != root && !allowed(e.Rights) {
			return dbus.Errorf(dbus.ErrNotAuthorized, "offering %q has no %s of users: its own schedules back its domains up", o.Name, what)
		}
	}
	return nil
}
