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
	"github.com/virtbackup/virtbackup/daemon/internal/scan"
	"github.com/virtbackup/virtbackup/daemon/internal/storage"
	"github.com/virtbackup/virtbackup/daemon/internal/transfer"
	"github.com/virtbackup/virtbackup/daemon/internal/verification"
	"github.com/virtbackup/virtbackup/dbus"
)

func newID() string { return ulid.MustNew(ulid.Now(), rand.Reader).String() }

// CreateRepository records a repository, and has a worker look at it or make
// it. The daemon itself does not even ask whether the path is there.
func (s *Service) CreateRepository(ctx context.Context, caller bus.Caller, name, typ, path string, o dbus.CreateRepositoryOptions) (string, string, error) {
	if err := validName("a repository", name); err != nil {
		return "", "", err
	}
	r := catalog.Repository{
		ID: newID(), Name: name, Type: typ, Created: time.Now(), FileSystem: o.FileSystem, Options: o.MountOptions,
		MinimumFree: uint64(s.settings().Limits.MinimumFreeRepository),
	}
	if err := s.place(&r, path); err != nil {
		return "", "", err
	}
	if o.MinimumFree != nil {
		r.MinimumFree = *o.MinimumFree
	}
	if err := s.credentials(&r, o.Credentials); err != nil {
		return "", "", err
	}
	if err := s.Catalog.CreateRepository(ctx, r); err != nil {
		return "", "", errors.Join(failure.Named(err), s.Storage.Forget(r.ID))
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

// place says where a repository is, and checks that.
func (s *Service) place(r *catalog.Repository, address string) error {
	if storage.Mounted(r.Type) {
		r.Path, r.Address = s.Storage.Path(r.ID), address
		place := storage.Place{Type: r.Type, Address: address, FileSystem: r.FileSystem, Options: r.Options}
		if err := place.Check(); err != nil {
			return dbus.Errorf(dbus.ErrInvalidArgument, "%v", err)
		}
		return nil
	}
	if len(r.Options) > 0 || r.FileSystem != "" {
		return dbus.Errorf(dbus.ErrInvalidArgument, "a directory is not mounted by virtbackup: it takes no options of a mount, and no file system")
	}
	if !filepath.IsAbs(address) || filepath.Clean(address) != address || address == "/" {
		return dbus.Errorf(dbus.ErrInvalidArgument, "%q cannot be a repository's path: it has to be absolute, without . or .., and not the root", address)
	}
	r.Path = address
	return nil
}

// credentials keeps those that were given.
func (s *Service) credentials(r *catalog.Repository, content string) error {
	r.Credentials = content != ""
	if content == "" {
		return nil
	}
	kept, err := storage.Credentials(r.Type, content)
	if err != nil {
		return dbus.Errorf(dbus.ErrInvalidArgument, "%v", err)
	}
	return s.Storage.Save(r.ID, kept)
}

// UpdateRepository changes a repository, and has a worker look at it again.
func (s *Service) UpdateRepository(ctx context.Context, caller bus.Caller, id string, o dbus.UpdateRepositoryOptions) (string, error) {
	r, err := s.Catalog.Repository(ctx, id)
	if err != nil {
		return "", failure.Named(err)
	}
	if o == (dbus.UpdateRepositoryOptions{}) {
		return "", dbus.Errorf(dbus.ErrInvalidArgument, "say what to change of repository %q", r.Name)
	}
	if o.MinimumFree != nil {
		r.MinimumFree = *o.MinimumFree
	}
	if o.Address != nil || o.MountOptions != nil || o.Credentials != nil {
		if err := s.move(ctx, &r, o); err != nil {
			return "", err
		}
	}
	if err := s.Catalog.UpdateRepository(ctx, r); err != nil {
		return "", failure.Named(err)
	}
	s.notifier.Changed(dbus.Ref{Kind: dbus.KindRepository, ID: id})
	return s.CheckRepository(ctx, caller, id, dbus.CheckRepositoryOptions{})
}

// move changes where a repository is and how it is mounted.
func (s *Service) move(ctx context.Context, r *catalog.Repository, o dbus.UpdateRepositoryOptions) error {
	if s.repositoryInUse(r.ID) {
		return dbus.Errorf(dbus.ErrBusy, "a job uses repository %q: wait for it, or cancel it", r.Name)
	}
	address := r.Path
	if storage.Mounted(r.Type) {
		address = r.Address
	}
	if o.Address != nil {
		address = *o.Address
	}
	if o.MountOptions != nil {
		r.Options = *o.MountOptions
	}
	if err := s.place(r, address); err != nil {
		return err
	}
	if storage.Mounted(r.Type) {
		if err := s.Storage.Unmount(ctx, r.ID); err != nil {
			return dbus.Errorf(dbus.ErrBusy, "the storage of repository %q cannot be unmounted now: %v", r.Name, err)
		}
	}
	switch {
	case o.Credentials == nil:
		return nil
	case *o.Credentials == "":
		r.Credentials = false
		return s.Storage.Forget(r.ID)
	}
	return s.credentials(r, *o.Credentials)
}

func (s *Service) repositoryInUse(id string) bool {
	return slices.ContainsFunc(s.Jobs.Active(), func(j job.Status) bool { return j.Repository == id })
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

// CheckRepository has a worker look at a repository again, or at all backups in it.
func (s *Service) CheckRepository(ctx context.Context, caller bus.Caller, id string, o dbus.CheckRepositoryOptions) (string, error) {
	r := job.Request{Kind: string(dbus.OperationCheck), Repository: id, UID: caller.UID, Spec: verification.CheckRequest{}}
	if o.Depth != nil && *o.Depth != dbus.DepthProbe {
		r.Kind, r.Spec = string(dbus.OperationInspect), scan.Request{Depth: transfer.Depth(*o.Depth)}
	}
	return s.start(ctx, r)
}

// ScanRepository has the catalog know all backups that are in a repository.
func (s *Service) ScanRepository(ctx context.Context, caller bus.Caller, id string, o dbus.ScanRepositoryOptions) (string, error) {
	return s.start(ctx, job.Request{
		Kind: string(dbus.OperationScan), Repository: id, UID: caller.UID,
		Spec: scan.Request{Depth: transfer.DepthManifests, ImportForeign: o.ImportForeign, DryRun: o.DryRun},
	})
}

// RemoveRepository forgets a repository; its files stay as they are.
func (s *Service) RemoveRepository(ctx context.Context, _ bus.Caller, id string, o dbus.RemoveRepositoryOptions) error {
	r, err := s.Catalog.Repository(ctx, id)
	if err != nil {
		return failure.Named(err)
	}
	if s.repositoryInUse(id) {
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
	if o.ForgetBackups {
		n, err := s.Catalog.ForgetBackups(ctx, id)
		if err != nil {
			return failure.Named(err)
		}
		s.Log.Info("forgot the backups of a repository that is removed", "repository", r.Name, "backups", n)
	}
	if err := s.Catalog.RemoveRepository(ctx, id); errors.Is(err, catalog.ErrInUse) {
		return dbus.Errorf(dbus.ErrBusy, "backups of repository %q are known: delete them first, or have them forgotten (forget_backups)", r.Name)
	} else if err != nil {
		return failure.Named(err)
	}
	s.notifier.Removed(dbus.Ref{Kind: dbus.KindRepository, ID: id})
	if err := s.Storage.Forget(id); err != nil {
		s.Log.Error("cannot remove the credentials of a repository that is gone", "repository", r.Name, "error", err)
	}
	return nil
}
