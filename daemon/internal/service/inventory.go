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
	"github.com/virtbackup/virtbackup/daemon/internal/chain"
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
	if err := s.Catalog.RemoveRepository(ctx, id); errors.Is(err, catalog.ErrInUse) {
		return dbus.Errorf(dbus.ErrBusy, "backups of repository %q are known: delete them first", r.Name)
	} else if err != nil {
		return failure.Named(err)
	}
	s.notifier.Removed(dbus.Ref{Kind: dbus.KindRepository, ID: id})
	return nil
}

// CreateOffering makes a named set of backup options.
func (s *Service) CreateOffering(ctx context.Context, _ bus.Caller, name, repository string, o dbus.Settings) (string, error) {
	if err := validName("an offering", name); err != nil {
		return "", err
	}
	ref, err := s.Find(ctx, dbus.KindRepository, repository)
	if err != nil {
		return "", err
	}
	made := catalog.Offering{ID: newID(), Name: name, Repository: ref.ID, Created: time.Now()}
	if made.Settings, err = override(defaultSettings(), o); err != nil {
		return "", err
	}
	if err := s.Catalog.CreateOffering(ctx, made); err != nil {
		return "", failure.Named(err)
	}
	s.notifier.Added(dbus.Ref{Kind: dbus.KindOffering, ID: made.ID})
	return made.ID, nil
}

// defaultSettings are those of an offering that says nothing.
func defaultSettings() catalog.Settings {
	return catalog.Settings{Mode: chain.ModeIncremental, Compression: string(dbus.CompressionNone), Quiesce: string(dbus.QuiesceNone),
		QuiescePolicy: string(dbus.QuiesceRequire), Tracking: chain.CBT, Fallback: chain.FallbackDigest}
}

// override applies what is given to settings, and checks that they fit.
func override(to catalog.Settings, o dbus.Settings) (catalog.Settings, error) {
	if o.Mode != nil {
		to.Mode = chain.Mode(*o.Mode)
	}
	if o.Compression != nil {
		if to.Compression != string(*o.Compression) {
			to.Level = 0 // a level means something else to each compression
		}
		to.Compression = string(*o.Compression)
	}
	if o.CompressionLevel != nil {
		to.Level = int(*o.CompressionLevel)
	}
	if o.Threads != nil {
		to.Threads = int(*o.Threads)
	}
	if o.ChainSize != nil {
		to.ChainSize = int(*o.ChainSize)
	}
	if o.Quiesce != nil {
		to.Quiesce = string(*o.Quiesce)
	}
	if o.QuiescePolicy != nil {
		to.QuiescePolicy = string(*o.QuiescePolicy)
	}
	if o.Tracking != nil {
		to.Tracking = chain.Tracking(*o.Tracking)
	}
	if o.Fallback != nil {
		to.Fallback = chain.Fallback(*o.Fallback)
	}
	return to, fit(to)
}

func fit(c catalog.Settings) error {
	highest := map[dbus.Compression]int{dbus.CompressionZlib: 9, dbus.CompressionZstd: 22}[dbus.Compression(c.Compression)]
	if c.Level > highest {
		return dbus.Errorf(dbus.ErrInvalidArgument, "compression_level %d is too high for compression %s: at most %d", c.Level, c.Compression, highest)
	}
	if c.Threads > 256 {
		return dbus.Errorf(dbus.ErrInvalidArgument, "threads %d is too high: at most 256", c.Threads)
	}
	if c.ChainSize > 10_000 {
		return dbus.Errorf(dbus.ErrInvalidArgument, "chain_size %d is too high: at most 10000", c.ChainSize)
	}
	return nil
}

// UpdateOffering changes an offering. Its domains' chains end when the next
// backup is made, as far as the change asks for it.
func (s *Service) UpdateOffering(ctx context.Context, _ bus.Caller, id string, o dbus.UpdateOfferingOptions) error {
	changed, err := s.offeringByID(ctx, id)
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
	if changed.Settings, err = override(changed.Settings, o.Settings); err != nil {
		return err
	}
	if err := s.Catalog.UpdateOffering(ctx, changed); err != nil {
		return failure.Named(err)
	}
	s.notifier.Changed(dbus.Ref{Kind: dbus.KindOffering, ID: id})
	return nil
}

// RemoveOffering forgets an offering that no domain is assigned to.
func (s *Service) RemoveOffering(ctx context.Context, _ bus.Caller, id string) error {
	o, err := s.offeringByID(ctx, id)
	if err != nil {
		return failure.Named(err)
	}
	assigned, err := s.Catalog.Domains(ctx, o.Name)
	if err != nil {
		return failure.Named(err)
	}
	if len(assigned) > 0 {
		return dbus.Errorf(dbus.ErrBusy, "domain %q (of %d) is assigned to offering %q: unassign it first", assigned[0].Name, len(assigned), o.Name)
	}
	if err := s.Catalog.RemoveOffering(ctx, o.Name); err != nil {
		return failure.Named(err)
	}
	s.notifier.Removed(dbus.Ref{Kind: dbus.KindOffering, ID: id})
	return nil
}
