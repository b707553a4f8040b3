package service

import (
	"context"
	"crypto/rand"
	"errors"
	"path/filepath"
	"slices"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/virtbackup/virtbackup/daemon/internal/bus"
	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/failure"
	"github.com/virtbackup/virtbackup/daemon/internal/job"
	"github.com/virtbackup/virtbackup/daemon/internal/verification"
	"github.com/virtbackup/virtbackup/dbus"
)

// typeDirectory is the only type of repository so far.
const typeDirectory = "dir"

func newID() string { return ulid.MustNew(ulid.Now(), rand.Reader).String() }

// CreateRepository records a repository, and has a worker look at it or make
// it. The daemon itself does not even ask whether the path is there.
func (s *Service) CreateRepository(ctx context.Context, caller bus.Caller, name, typ, path string, o dbus.CreateRepositoryOptions) (string, string, error) {
	if err := validName("a repository", name); err != nil {
		return "", "", err
	}
	if typ != typeDirectory {
		return "", "", dbus.Errorf(dbus.ErrInvalidArgument, "repositories of type %q are not known: use %q", typ, typeDirectory)
	}
	if !filepath.IsAbs(path) || filepath.Clean(path) != path || path == "/" {
		return "", "", dbus.Errorf(dbus.ErrInvalidArgument, "%q cannot be a repository's path: it has to be absolute, without . or .., and not the root", path)
	}
	r := catalog.Repository{
		ID: newID(), Name: name, Type: typ, Path: path, Created: time.Now(),
		MinimumFree: uint64(s.settings().Limits.MinimumFreeRepository),
	}
	if o.MinimumFree != nil {
		r.MinimumFree = *o.MinimumFree
	}
	if err := s.Catalog.CreateRepository(ctx, r); err != nil {
		return "", "", failure.Named(err)
	}
	id, err := s.submit(ctx, job.Request{
		Kind: string(dbus.OperationCheck), Repository: r.ID, UID: caller.UID,
		Spec: verification.CheckRequest{New: true, Existing: o.Existing},
	})
	if err != nil {
		if undo := s.Catalog.RemoveRepository(ctx, r.ID); undo != nil {
			s.Log.Error("cannot take back a repository", "repository", name, "error", undo)
		}
		return "", "", err
	}
	s.notifier.Added(dbus.Ref{Kind: dbus.KindRepository, ID: r.ID})
	s.jobAdded(id)
	return r.ID, id, nil
}

// jobAdded tells of a new job.
func (s *Service) jobAdded(id string) {
	s.notifier.Added(dbus.Ref{Kind: dbus.KindJob, ID: id})
	s.notifier.JobNew(id)
}

// start submits a job and tells of it.
func (s *Service) start(ctx context.Context, r job.Request) (string, error) {
	id, err := s.submit(ctx, r)
	if err == nil {
		s.jobAdded(id)
	}
	return id, err
}

// CheckRepository has a worker look at a repository again.
func (s *Service) CheckRepository(ctx context.Context, caller bus.Caller, id string) (string, error) {
	return s.start(ctx, job.Request{
		Kind: string(dbus.OperationCheck), Repository: id, UID: caller.UID, Spec: verification.CheckRequest{},
	})
}

// RemoveRepository forgets a repository; its files stay as they are.
func (s *Service) RemoveRepository(ctx context.Context, _ bus.Caller, id string) error {
	r, err := s.Catalog.Repository(ctx, id)
	if err != nil {
		return failure.Named(err)
	}
	if slices.ContainsFunc(s.Jobs.Active(), func(j job.Status) bool { return j.Repository == id }) {
		return dbus.Errorf(dbus.ErrBusy, "a job uses repository %q: wait for it, or cancel it", r.Name)
	}
	all, err := s.Catalog.Offerings(ctx)
	if err != nil {
		return failure.Named(err)
	}
	for _, o := range all {
		if o.Repository == id {
			return dbus.Errorf(dbus.ErrBusy, "offering %q names repository %q: remove or change the offering first", o.Name, r.Name)
		}
	}
	schedules, err := s.Catalog.Schedules(ctx)
	if err != nil {
		return failure.Named(err)
	}
	for _, sch := range schedules {
		if sch.Repository == id {
			return dbus.Errorf(dbus.ErrBusy, "schedule %q backs up to repository %q: remove or change the schedule first", sch.Name, r.Name)
		}
	}
	if err := s.Catalog.RemoveRepository(ctx, id); errors.Is(err, catalog.ErrInUse) {
		return dbus.Errorf(dbus.ErrBusy, "backups of repository %q are known: delete them first", r.Name)
	} else if err != nil {
		return failure.Named(err)
	}
	s.notifier.Removed(dbus.Ref{Kind: dbus.KindRepository, ID: id})
	return nil
}
