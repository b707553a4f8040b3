// Package removal is the job that deletes backups from a repository.
package removal

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/errand"
	"github.com/virtbackup/virtbackup/daemon/internal/failure"
	"github.com/virtbackup/virtbackup/daemon/internal/job"
	"github.com/virtbackup/virtbackup/daemon/internal/transfer"
)

// Request asks to delete backups of the job's domain, in this order: what
// builds on a backup goes before it.
type Request struct {
	Backups []string `json:"backups"`
}

// Delete is the kind of job that does it.
type Delete struct {
	Catalog *catalog.Catalog
	Errand  errand.Sender
}

const stepDeleting = "deleting"

// Again makes it a job.Retrier: another try is about the same.
func (Delete) Again(j catalog.Job) string { return j.Backup }

// Run records the intent, has a worker delete, and forgets what is gone.
func (k Delete) Run(ctx context.Context, h *job.Handle) error {
	var r Request
	if err := h.Request(&r); err != nil {
		return err
	}
	repo, err := k.Catalog.Repository(ctx, h.Job().Repository)
	if err != nil {
		return failure.Named(err)
	}
	// A try before this one may have got some away.
	r.Backups = slices.DeleteFunc(r.Backups, func(id string) bool {
		_, err := k.Catalog.Backup(ctx, id)
		return errors.Is(err, catalog.ErrNotFound) && h.Job().Attempt > 1
	})
	if len(r.Backups) == 0 {
		return nil
	}
	if h.Job().Step == "" {
		step, err := h.NewStep(stepDeleting, nil)
		if err != nil {
			return err
		}
		if err := k.Catalog.BeginDelete(ctx, r.Backups, step); err != nil {
			return failure.Named(err)
		}
	}
	return k.delete(ctx, h, repo, r.Backups)
}

func (k Delete) delete(ctx context.Context, h *job.Handle, repo catalog.Repository, backups []string) error {
	result, err := k.Errand.Run(ctx, h, repo, transfer.Spec{
		Operation: transfer.OperationDelete, Domain: h.Job().Domain, Backups: backups,
	})
	if errors.Is(err, job.ErrDetach) || result == nil {
		return err
	}
	return errors.Join(err, failure.Named(k.Catalog.DeleteBackups(context.WithoutCancel(ctx), result.Deleted)))
}

// Undo finds out which backups are gone, and which are still whole: those are
// again what they were. What is neither, or cannot be looked at, stays marked,
// and deleting it again carries on.
func (k Delete) Undo(ctx context.Context, h *job.Handle) error {
	if h.Job().Step == "" {
		return nil
	}
	var r Request
	if err := h.Request(&r); err != nil {
		return err
	}
	repo, err := k.Catalog.Repository(ctx, h.Job().Repository)
	if err != nil {
		return err
	}
	found, err := k.Errand.Run(ctx, h, repo, transfer.Spec{Operation: transfer.OperationList, Domain: h.Job().Domain})
	if found == nil || err != nil {
		return fmt.Errorf("what was to be deleted stays marked so, delete it again: %w", err)
	}
	if len(found.Deleted) > 0 { // it was the worker that deletes, of a daemon before this one
		return k.Catalog.DeleteBackups(ctx, found.Deleted)
	}
	var gone, whole []string
	for _, id := range r.Backups {
		i := slices.IndexFunc(found.Backups, func(b transfer.BackupState) bool { return b.Backup == id })
		switch {
		case i < 0:
			gone = append(gone, id)
		case found.Backups[i].Error == nil:
			whole = append(whole, id)
		}
	}
	return errors.Join(k.Catalog.DeleteBackups(ctx, gone), k.Catalog.KeepBackups(ctx, whole))
}
