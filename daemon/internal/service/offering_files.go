package service

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/config"
	"github.com/virtbackup/virtbackup/daemon/internal/failure"
	"github.com/virtbackup/virtbackup/dbus"
)

// LoadOfferings brings the offerings in line with their files. A file takes an
// offering of its name over. One that is wrong leaves its offering as it was;
// what is wrong with them all is the error. An offering whose file is gone is
// removed, or, while domains have it, disabled and left to be dealt with by hand.
func (s *Service) LoadOfferings(ctx context.Context) error {
	if s.OfferingFiles == nil {
		return nil
	}
	files, err := s.OfferingFiles()
	if err != nil {
		return err
	}
	all, err := s.Catalog.Offerings(ctx)
	if err != nil {
		return failure.Named(err)
	}
	var wrong []error
	for _, f := range files {
		i := slices.IndexFunc(all, func(o catalog.Offering) bool { return o.Name == f.Name })
		var before *catalog.Offering
		if i >= 0 {
			before = &all[i]
		}
		if f.Err == nil {
			if err := s.loadOffering(ctx, f, before); err != nil {
				f.Err = fmt.Errorf("%s: %w", f.Path, err)
			}
		}
		wrong = append(wrong, f.Err)
	}
	for _, o := range all {
		if o.Origin != "" && !slices.ContainsFunc(files, func(f config.OfferingFile) bool { return f.Name == o.Name }) {
			wrong = append(wrong, s.dropOffering(ctx, o))
		}
	}
	return errors.Join(wrong...)
}

// loadOffering makes an offering what its file says; before is nil if there is none yet.
func (s *Service) loadOffering(ctx context.Context, f config.OfferingFile, before *catalog.Offering) error {
	if err := validName("an offering", f.Name); err != nil {
		return err
	}
	ref, err := s.Find(ctx, dbus.KindRepository, *f.Options.Repository)
	if err != nil {
		return err
	}
	now := defaultOffering(f.Name)
	now.ID, now.Repository, now.Origin, now.Created = newID(), ref.ID, f.Path, time.Now()
	if err := change(&now, f.Options.OfferingOptions); err != nil {
		return err
	}
	if before == nil {
		if err := s.Catalog.CreateOffering(ctx, now); err != nil {
			return err
		}
		s.Log.Info("made an offering of its file", "offering", now.Name, "file", f.Path)
		s.notifier.Added(dbus.Ref{Kind: dbus.KindOffering, ID: now.ID})
		return nil
	}
	if before.Origin == "" {
		s.Log.Warn("an offering is what its file says from now on", "offering", now.Name, "file", f.Path)
	}
	if err := s.Catalog.UpdateOffering(ctx, now); err != nil {
		return err
	}
	s.notifier.Changed(dbus.Ref{Kind: dbus.KindOffering, ID: before.ID})
	return nil
}

// dropOffering does away with an offering whose file is gone.
func (s *Service) dropOffering(ctx context.Context, o catalog.Offering) error {
	ref := dbus.Ref{Kind: dbus.KindOffering, ID: o.ID}
	err := s.Catalog.RemoveOffering(ctx, o.Name)
	if err == nil {
		s.Log.Info("removed an offering whose file is gone", "offering", o.Name, "file", o.Origin)
		s.notifier.Removed(ref)
		return nil
	}
	if !errors.Is(err, catalog.ErrInUse) {
		return err
	}
	s.Log.Warn("the file of an offering that domains have is gone: it is disabled, and can be changed or removed by hand", "offering", o.Name, "file", o.Origin)
	o.Origin, o.Disabled = "", true
	if err := s.Catalog.UpdateOffering(ctx, o); err != nil {
		return err
	}
	s.notifier.Changed(ref)
	return nil
}

// ours refuses to change an offering that a file says.
func ours(o catalog.Offering) error {
	if o.Origin != "" {
		return dbus.Errorf(dbus.ErrInvalidArgument, "offering %q is what %s says: change it there, and reload virtbackupd", o.Name, o.Origin)
	}
	return nil
}
