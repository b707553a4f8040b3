// Package retention is the job that removes the backups of a domain in one
// repository that need not stay: ends of chains are deleted, and what others
// build on is merged into the next backup that stays. package chain has the
// rules, the worker does the work.
package retention

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/chain"
	"github.com/virtbackup/virtbackup/daemon/internal/errand"
	"github.com/virtbackup/virtbackup/daemon/internal/failure"
	"github.com/virtbackup/virtbackup/daemon/internal/job"
	"github.com/virtbackup/virtbackup/daemon/internal/journal"
	"github.com/virtbackup/virtbackup/daemon/internal/repository"
	"github.com/virtbackup/virtbackup/daemon/internal/transfer"
	"github.com/virtbackup/virtbackup/dbus"
)

// Request asks to prune the job's domain in the job's repository.
type Request struct {
	Most int `json:"most,omitempty"` // backups that may go at most; 0 for no bound: a person has seen the plan
}

// Policy returns what a domain's backups are kept by.
type Policy func(ctx context.Context, domain string) (chain.Retention, error)

// Plan says what becomes of the backups of a domain in a repository, and which
// there are, in the order in which they were committed.
func Plan(ctx context.Context, c *catalog.Catalog, domain, repository string, r chain.Retention) (chain.RetentionPlan, []catalog.Backup, error) {
	backups, err := c.PlaceBackups(ctx, domain, repository)
	if err != nil {
		return chain.RetentionPlan{}, nil, err
	}
	base := ""
	head, err := c.LatestChain(ctx, domain, repository)
	switch {
	case errors.Is(err, catalog.ErrNotFound):
	case err != nil:
		return chain.RetentionPlan{}, nil, err
	case head.State == chain.Open && head.Tip != nil:
		base = head.Tip.ID
	}
	points := make([]chain.Point, 0, len(backups))
	for _, b := range backups {
		points = append(points, chain.Point{Backup: b.Link(), Sequence: b.Sequence, Created: b.Created, Hold: b.Hold != "" || b.Pin != "", Base: b.ID == base})
	}
	return chain.PlanRetention(points, r, time.Local), backups, nil
}

// Prune is the kind of job that does it.
type Prune struct {
	Catalog *catalog.Catalog
	Errand  errand.Sender
	Policy  Policy
}

// Steps of the job. Each is recorded before its worker is started, with all
// that a daemon after this one needs to go on with it.
const (
	stepMerging  = "merging"
	stepDeleting = "deleting"
)

type stepData struct {
	Merge  *chain.Merge `json:"merge,omitempty"`
	Delete []string     `json:"delete,omitempty"` // the newest first
	Gone   int          `json:"gone,omitempty"`   // backups that this job has removed
}

// run is one prune.
type run struct {
	Prune
	job        *job.Handle
	repository catalog.Repository
	request    Request
	data       stepData
}

// Run goes on with the step that was begun, removes what was marked so before,
// and then what the plan says, one end or merge at a time: it is made anew
// after each, for the world may have changed.
func (k Prune) Run(ctx context.Context, h *job.Handle) error {
	r := &run{Prune: k, job: h}
	if err := h.Request(&r.request); err != nil {
		return err
	}
	var err error
	if r.repository, err = k.Catalog.Repository(ctx, h.Job().Repository); err != nil {
		return failure.Named(err)
	}
	if h.Job().Step != "" {
		if err := json.Unmarshal(h.Job().StepData, &r.data); err != nil {
			return fmt.Errorf("cannot read the job's step: %w", err)
		}
		if err := r.resume(ctx, h.Job().Step); err != nil {
			return err
		}
	}
	if err := r.deleteMarked(ctx); err != nil {
		return err
	}
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		more, err := r.next(ctx)
		if err != nil || !more {
			return err
		}
	}
}

// Undo takes nothing back: what was merged holds what it held, and what is
// marked as being deleted is removed by the next prune. It clears up after a
// worker that died, and records a merge that came through all the same.
func (k Prune) Undo(ctx context.Context, h *job.Handle) error {
	if h.Job().Step == "" {
		return nil
	}
	r := &run{Prune: k, job: h}
	var err error
	if r.repository, err = k.Catalog.Repository(ctx, h.Job().Repository); err != nil {
		return err
	}
	if err := json.Unmarshal(h.Job().StepData, &r.data); err != nil {
		return fmt.Errorf("cannot read the job's step: %w", err)
	}
	// In the names of these there may be half a deletion, files of a merge, and a claim.
	touched := append(slices.Clone(r.data.Delete), h.Job().ID)
	if r.data.Merge != nil {
		touched = append(touched, r.data.Merge.Into)
	}
	_, err = k.Errand.Run(ctx, h, r.repository, transfer.Spec{
		Operation: transfer.OperationDiscard, Domain: h.Job().Domain, Backups: touched,
	})
	if err != nil || r.data.Merge == nil {
		return err
	}
	into := r.data.Merge.Into
	found, err := k.Errand.Run(ctx, h, r.repository, transfer.Spec{Operation: transfer.OperationList, Domain: h.Job().Domain})
	if err != nil {
		return err
	}
	for _, b := range found.Backups {
		if b.Backup == into && b.Error == nil && b.Manifest != nil {
			return r.catchUp(ctx, b.Manifest)
		}
	}
	return nil
}

// catchUp records how a backup stands in the repository, if it has taken over
// others there since the catalog was written.
func (r *run) catchUp(ctx context.Context, manifest *repository.Manifest) error {
	b, err := r.Catalog.Backup(ctx, manifest.Backup)
	if err != nil || b.Parent == manifest.Parent {
		return err
	}
	m := chain.Merge{Into: b.ID, Base: manifest.Parent}
	for at := b.Parent; at != "" && at != m.Base; {
		m.Drop = append(m.Drop, at)
		below, err := r.Catalog.Backup(ctx, at)
		if err != nil {
			return err
		}
		at = below.Parent
	}
	return r.record(ctx, m, manifest)
}

func (r *run) resume(ctx context.Context, step string) error {
	if step == stepMerging {
		return r.merge(ctx)
	}
	return r.delete(ctx)
}

// deleteMarked removes what a job before this one has marked, and did not get to.
func (r *run) deleteMarked(ctx context.Context) error {
	backups, err := r.Catalog.PlaceBackups(ctx, r.job.Job().Domain, r.repository.ID)
	if err != nil {
		return err
	}
	var ids []string
	for _, b := range backups {
		if b.State == chain.Deleting {
			ids = append([]string{b.ID}, ids...)
		}
	}
	if len(ids) == 0 {
		return nil
	}
	return r.beginDelete(ctx, ids)
}

// next does the next thing of the plan; false: there is none.
func (r *run) next(ctx context.Context) (more bool, err error) {
	policy, err := r.Policy(ctx, r.job.Job().Domain)
	if err != nil {
		return false, err
	}
	plan, _, err := Plan(ctx, r.Catalog, r.job.Job().Domain, r.repository.ID, policy)
	if err != nil {
		return false, err
	}
	if most := r.request.Most; most > 0 {
		if r.data.Gone >= most {
			if n := plan.Removed(); n > 0 {
				r.job.Log(ctx, slog.LevelWarn, fmt.Sprintf("%d more backups need not stay, but no more than %d go without somebody asking: they go with the next ones, or with virtbackupctl prune", n, most))
			}
			return false, nil
		}
		plan = plan.AtMost(most - r.data.Gone)
	}
	switch {
	case len(plan.Delete) > 0:
		return true, r.beginDelete(ctx, plan.Delete[0])
	case len(plan.Merge) > 0:
		return true, r.beginMerge(ctx, plan.Merge[0])
	}
	return false, nil
}

func (r *run) beginMerge(ctx context.Context, m chain.Merge) error {
	r.data.Merge, r.data.Delete = &m, nil
	step, err := r.job.NewStep(stepMerging, r.data)
	if err != nil {
		return err
	}
	if err := r.Catalog.BeginMerge(ctx, m, step); err != nil {
		return failure.Named(err)
	}
	return r.merge(ctx)
}

func (r *run) beginDelete(ctx context.Context, ids []string) error {
	r.data.Merge, r.data.Delete = nil, ids
	step, err := r.job.NewStep(stepDeleting, r.data)
	if err != nil {
		return err
	}
	if err := r.Catalog.BeginDelete(ctx, ids, step); err != nil {
		return failure.Named(err)
	}
	return r.delete(ctx)
}

// delete has a worker delete what is marked, and forgets it.
func (r *run) delete(ctx context.Context) error {
	result, err := r.Errand.Run(ctx, r.job, r.repository, transfer.Spec{
		Operation: transfer.OperationDelete, Domain: r.job.Job().Domain, Backups: r.data.Delete,
	})
	if errors.Is(err, job.ErrDetach) || result == nil {
		return err
	}
	err = errors.Join(err, failure.Named(r.Catalog.DeleteBackups(context.WithoutCancel(ctx), result.Deleted)))
	if n := len(result.Deleted); n > 0 {
		r.data.Gone += n
		r.job.Logger().InfoContext(ctx, fmt.Sprintf("removed %d backups that need not stay: %s", n, strings.Join(result.Deleted, ", ")),
			journal.MessageID, journal.BackupsRemoved)
		r.job.Log(ctx, slog.LevelInfo, "removed "+strings.Join(result.Deleted, ", "))
	}
	return err
}

// merge has a worker merge, and records what came of it. What went into the
// other backup is then deleted.
func (r *run) merge(ctx context.Context) error {
	m := *r.data.Merge
	result, err := r.Errand.Run(ctx, r.job, r.repository, transfer.Spec{
		Operation: transfer.OperationMerge, Domain: r.job.Job().Domain, Merge: &transfer.MergeSpec{Into: m.Into, Drop: m.Drop, Base: m.Base},
	})
	if err != nil {
		return err
	}
	if result == nil || result.Manifest == nil {
		return fmt.Errorf("the worker merged into backup %s, and does not say what it is now", m.Into)
	}
	if err := r.record(ctx, m, result.Manifest); err != nil {
		return err
	}
	return r.delete(ctx)
}

// record records what came of a merge: what went into the other backup is to be
// deleted now.
func (r *run) record(ctx context.Context, m chain.Merge, manifest *repository.Manifest) error {
	merged, err := mergedBackup(m, manifest)
	if err != nil {
		return err
	}
	r.data.Merge, r.data.Delete = nil, m.Drop
	step, err := r.job.NewStep(stepDeleting, r.data)
	if err != nil {
		return err
	}
	// Also when it was just cancelled: the repository knows already.
	if err := r.Catalog.MergeBackups(context.WithoutCancel(ctx), merged, step); err != nil {
		return failure.Named(err)
	}
	r.job.Log(ctx, slog.LevelInfo, fmt.Sprintf("merged %s into %s", strings.Join(m.Drop, ", "), m.Into))
	return nil
}

func mergedBackup(m chain.Merge, manifest *repository.Manifest) (catalog.Merged, error) {
	if manifest.Backup != m.Into || manifest.Parent != m.Base {
		return catalog.Merged{}, failure.Errorf(dbus.ErrFailed, "backup %s was merged, and stands on %q instead of %q", manifest.Backup, manifest.Parent, m.Base)
	}
	done, err := errand.Rewritten(manifest)
	return catalog.Merged{Merge: m, Manifest: done.Manifest, Images: done.Images}, err
}
