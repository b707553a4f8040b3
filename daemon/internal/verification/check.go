package verification

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/errand"
	"github.com/virtbackup/virtbackup/daemon/internal/failure"
	"github.com/virtbackup/virtbackup/daemon/internal/health"
	"github.com/virtbackup/virtbackup/daemon/internal/job"
	"github.com/virtbackup/virtbackup/daemon/internal/mounts"
	"github.com/virtbackup/virtbackup/daemon/internal/transfer"
	"github.com/virtbackup/virtbackup/dbus"
)

// CheckRequest asks to look at the job's repository.
type CheckRequest struct {
	New      bool `json:"new"`      // it was just added: make it, and forget it if that fails
	Existing bool `json:"existing"` // refuse to make one that is not there yet
}

// Check is the kind of job that looks at a repository, and makes a new one.
type Check struct {
	Catalog *catalog.Catalog
	Errand  errand.Sender
	Forget  func(repository string) error // what was kept for one that could not be added
}

// Run has a worker look at the repository and records what it found.
func (k Check) Run(ctx context.Context, h *job.Handle) error {
	var r CheckRequest
	if err := h.Request(&r); err != nil {
		return err
	}
	repo, err := k.Catalog.Repository(ctx, h.Job().Repository)
	if err != nil {
		return failure.Named(err)
	}
	operation := transfer.OperationProbe
	if r.New && !r.Existing {
		operation = transfer.OperationInit
	}
	live, err := k.live(ctx, repo.ID)
	if err != nil {
		return err
	}
	result, err := k.Errand.Run(ctx, h, repo, transfer.Spec{Operation: operation, Collect: true, Live: live, Try: true})
	if errors.Is(err, job.ErrDetach) {
		return err
	}
	return errors.Join(err, k.record(context.WithoutCancel(ctx), repo, result, err))
}

// live returns in whose name there may be something in a repository that is not
// finished, and must not be taken for what a dead job left.
func (k Check) live(ctx context.Context, repository string) ([]string, error) {
	jobs, err := k.Catalog.UnfinishedJobs(ctx)
	var ids []string
	for _, j := range jobs {
		if j.Repository != repository {
			continue
		}
		ids = append(ids, j.ID)
		if j.Backup != "" {
			ids = append(ids, j.Backup)
		}
	}
	return ids, err
}

func (k Check) record(ctx context.Context, repo catalog.Repository, result *transfer.Result, problem error) error {
	if errors.Is(problem, mounts.ErrHung) {
		return nil // which is known
	}
	found := catalog.Finding{Identity: repo.Identity, Total: repo.Total, Free: repo.Free, Checked: time.Now()}
	look := health.Look{MinimumFree: repo.MinimumFree}
	failed := new(transfer.Failure)
	switch {
	case problem != nil:
		look.Problem = problem.Error()
		look.Gone = errors.Is(problem, errand.ErrMount) || errors.As(problem, &failed) && failed.Class == transfer.ClassGone
	case result.Repository == nil:
		return fmt.Errorf("the worker said nothing of repository %q", repo.Name)
	default:
		r := result.Repository
		found.Identity, found.Total, found.Free = string(r.ID), r.Total, r.Free
		look.ReadOnly, look.NoSpace, look.Free = r.ReadOnly, r.NoSpace, r.Free
	}
	state, words := health.Judge(look)
	found.State, found.Problem = string(state), words
	if err := k.Catalog.FoundRepository(ctx, repo.ID, found); err != nil {
		return err
	}
	if problem == nil && state == health.ReadOnly {
		return failure.Errorf(dbus.ErrRepositoryUnavailable, "repository %q: %s: make it writable, then check it again", repo.Name, words)
	}
	return nil
}

// Undo forgets a repository that could not be added.
func (k Check) Undo(ctx context.Context, h *job.Handle) error {
	var r CheckRequest
	if err := h.Request(&r); err != nil || !r.New {
		return err
	}
	err := k.Catalog.RemoveRepository(ctx, h.Job().Repository)
	if err == nil {
		return k.Forget(h.Job().Repository)
	}
	if errors.Is(err, catalog.ErrNotFound) || errors.Is(err, catalog.ErrInUse) {
		return nil // gone already; or somebody has put it to use meanwhile
	}
	return err
}
