// Package errand sends workers to repositories on behalf of jobs: what every
// kind of job needs besides its own plan.
package errand

import (
	"context"
	"errors"
	"fmt"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/failure"
	"github.com/virtbackup/virtbackup/daemon/internal/job"
	"github.com/virtbackup/virtbackup/daemon/internal/mounts"
	"github.com/virtbackup/virtbackup/daemon/internal/repository"
	"github.com/virtbackup/virtbackup/daemon/internal/supervise"
	"github.com/virtbackup/virtbackup/daemon/internal/transfer"
	"github.com/virtbackup/virtbackup/dbus"
	"github.com/virtbackup/virtbackup/systemd/jobunit"
)

// Sender sends workers.
type Sender struct {
	Supervisor *supervise.Supervisor
	Limits     func() jobunit.Limits // of one worker, as configured now
	KeyFile    string                // of the host's manifest key
	// Pins returns the pins of the backups in a repository that other hosts made.
	Pins    func(ctx context.Context, repository string) (map[string]string, error)
	Storage Storage // nil where all repositories are directories
}

// ErrMount says that a repository's storage cannot be mounted.
var ErrMount = errors.New("its storage is not there")

// Storage has the storage of repositories mounted.
type Storage interface {
	// Ensure returns when the storage is there, and mounts.ErrHung when it is known
	// not to answer. It stays as long as the job that it is for is known to run.
	Ensure(ctx context.Context, r catalog.Repository) error
}

// Prepare has a repository's storage mounted, for a worker that a job starts itself.
func (s Sender) Prepare(ctx context.Context, r catalog.Repository) error {
	// A job that was cancelled, or a daemon that goes down, starts none.
	if s.Storage == nil || ctx.Err() != nil {
		return nil
	}
	if err := s.Storage.Ensure(ctx, r); err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if !errors.Is(err, mounts.ErrHung) {
			err = fmt.Errorf("%w: %w", ErrMount, err)
		}
		return failure.Errorf(dbus.ErrRepositoryUnavailable, "repository %q: %w", r.Name, err)
	}
	return nil
}

// Repository says to a worker where a repository is.
func (s Sender) Repository(r catalog.Repository) transfer.RepositorySpec {
	return transfer.RepositorySpec{
		Path: r.Path, ID: repository.ID(r.Identity), Name: r.Name, KeyFile: s.KeyFile, MinimumFree: r.MinimumFree,
	}
}

// Started tells whether the job has a worker that runs, or that has ended and
// was not forgotten yet.
func (s Sender) Started(ctx context.Context, jobID string) (bool, error) {
	_, err := s.Supervisor.Attach(ctx, jobID)
	if errors.Is(err, supervise.ErrNoWorker) {
		return false, nil
	}
	return err == nil, err
}

// Run has a worker do the whole of spec for a job, tells its progress and names
// its errors. A worker that a daemon before this one started is taken up.
func (s Sender) Run(ctx context.Context, h *job.Handle, r catalog.Repository, spec transfer.Spec) (*transfer.Result, error) {
	spec, err := s.complete(ctx, h, r, spec)
	if err != nil {
		return nil, err
	}
	result, err := s.Supervisor.Run(ctx, spec, s.Limits(), func(st transfer.Status) { Progress(h, st) })
	h.Waits(PhaseFinishing)
	return result, failure.Worker(ctx, r.Name, err)
}

// complete has the repository there, if a worker is to be started, and says in the spec where it is.
func (s Sender) complete(ctx context.Context, h *job.Handle, r catalog.Repository, spec transfer.Spec) (transfer.Spec, error) {
	started, err := s.Started(ctx, h.Job().ID)
	if err == nil && !started {
		err = s.Prepare(ctx, r)
	}
	if err != nil {
		return spec, err
	}
	spec.Job = h.Job().ID
	spec.Repository = s.Repository(r)
	// Also for a job that was just cancelled: its worker is to be followed to its end.
	spec.Repository.Pins, err = s.Pins(context.WithoutCancel(ctx), r.ID)
	return spec, err
}

// PhaseFinishing is what the daemon does after the worker, with limits of its own.
const PhaseFinishing = "finishing"

// Progress tells for a job what its worker does. When it is ready or serves, it waits for us.
func Progress(h *job.Handle, st transfer.Status) {
	if st.Phase == transfer.PhaseReady || st.Phase == transfer.PhaseServing {
		h.Waits(st.Phase)
		return
	}
	h.Progress(st.Phase, st.Done, st.Total)
}
