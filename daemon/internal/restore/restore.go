// Package restore is the jobs that bring a backup back: as a new domain, or in
// place of the disks of the domain that it was made of.
//
// Both have a worker write new files into a directory of the job's own, beside
// where they are to be, compare every block with its digest, and flush. Only
// what is whole is put into place: by a rename that replaces nothing, or by an
// exchange with the disk that was there, which is given up when all are done.
//
//	step       recorded before           then                    after a restart
//	planned    directories are made      a worker brings the     the same again
//	                                     new domain's definition
//	copying    that definition is good   the worker copies       the same again
//	placing    the first file is moved   move, define            carry on: what is in place is seen by its inode
//	placed     the old disks go, or      clear up, start         the same again; nothing is taken back any more
//	           the new domain starts
package restore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/errand"
	"github.com/virtbackup/virtbackup/daemon/internal/failure"
	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/daemon/internal/job"
	"github.com/virtbackup/virtbackup/daemon/internal/transfer"
)

// Hypervisor is what a restore needs of libvirt.
type Hypervisor interface {
	Lookup(ctx context.Context, nameOrUUID string) (hypervisor.Domain, error)
	ByUUID(ctx context.Context, uuid string) (hypervisor.Domain, error)
	State(ctx context.Context, uuid string) (name, reason string, err error)
	Define(ctx context.Context, definition string) (uuid string, err error)
	Undefine(ctx context.Context, uuid string, removeNVRAM bool) error
	Start(ctx context.Context, uuid string, paused bool) error
	HasSecret(ctx context.Context, which hypervisor.Secret) (bool, error)
}

// Deps is what a Kind works with.
type Deps struct {
	Catalog      *catalog.Catalog
	Hypervisor   Hypervisor
	Errand       errand.Sender
	Overlays     Overlays
	Destinations func() []string // directories below which new domains' disks may be; the first is the default
	Log          *slog.Logger
}

// Overlays are the images that tracking by snapshot puts on disks, see overlay.Keeper.
type Overlays interface {
	Drop(ctx context.Context, uuid string) error
}

// Kind restores backups; Request.InPlace says which way.
type Kind struct{ Deps }

// New makes a Kind.
func New(d Deps) *Kind { return &Kind{d} }

// Request asks for a restore.
type Request struct {
	Backup         string   `json:"backup"`
	InPlace        bool     `json:"in_place"`
	Name           string   `json:"name"`        // of the new domain
	Destination    string   `json:"destination"` // directory; "" for the default
	Disks          []string `json:"disks"`       // targets; none for all
	KeepMACs       bool     `json:"keep_macs"`
	DropInterfaces bool     `json:"drop_interfaces"`
	Start          bool     `json:"start"`
}

const (
	stepPlanned = "planned"
	stepCopying = "copying"
	stepPlacing = "placing"
	stepPlaced  = "placed"
)

// state is recorded with each step.
type state struct {
	Plan  Plan   `json:"plan"`
	Files []file `json:"files"` // of stepPlacing: with the inodes of what the worker wrote
}

// Run carries a restore out, from wherever it was.
func (k *Kind) Run(ctx context.Context, h *job.Handle) error {
	var r Request
	if err := h.Request(&r); err != nil {
		return err
	}
	s, err := k.begin(ctx, h, r)
	if err != nil {
		return failure.Named(err)
	}
	switch h.Job().Step {
	case stepPlaced:
		return k.settled(ctx, h, r, s)
	case stepPlacing:
	default:
		if err := k.tryDefinition(ctx, h, r, s); err != nil {
			return failure.Named(err)
		}
		if err := k.copy(ctx, h, s.Plan); err != nil {
			return err
		}
		if s.Files, err = written(s.Plan); err != nil {
			return err
		}
		if err := h.Step(ctx, stepPlacing, s); err != nil {
			return err
		}
	}
	if r.InPlace {
		return failure.Named(k.exchange(ctx, h, r, s))
	}
	return failure.Named(k.define(ctx, h, r, s))
}

// begin plans, unless that was done, and records the plan.
func (k *Kind) begin(ctx context.Context, h *job.Handle, r Request) (state, error) {
	var s state
	if h.Job().Step != "" {
		if err := json.Unmarshal(h.Job().StepData, &s); err != nil {
			return s, fmt.Errorf("cannot read step %q: %w", h.Job().Step, err)
		}
		return s, nil
	}
	if r.InPlace {
		if err := k.dropOverlays(ctx, r); err != nil {
			return s, err
		}
	}
	plan, err := k.Plan(ctx, r)
	if err != nil {
		return s, err
	}
	s.Plan = plan
	s.Plan.settle(h.Job().ID)
	for _, text := range plan.Secrets {
		h.Log(ctx, slog.LevelWarn, text)
	}
	return s, h.Step(ctx, stepPlanned, s)
}

// dropOverlays has the disks of a stopped domain be what they are without
// overlays of ours, so that these are what changes places. A domain that
// cannot be restored in place is left as it is.
func (k *Kind) dropOverlays(ctx context.Context, r Request) error {
	b, err := k.Catalog.Backup(ctx, r.Backup)
	if err != nil {
		return err
	}
	d, err := k.Hypervisor.ByUUID(ctx, b.Domain)
	if errors.Is(err, hypervisor.ErrNoDomain) || err == nil && occupied(d) != "" {
		return nil // the plan says so
	}
	if err == nil {
		err = k.Overlays.Drop(ctx, b.Domain)
	}
	if err != nil {
		return fmt.Errorf("cannot take overlays of backups from the disks: %w", err)
	}
	return nil
}

// tryDefinition makes sure, before disks are copied for an hour, that a new
// domain can be defined from what the backup has as its definition.
func (k *Kind) tryDefinition(ctx context.Context, h *job.Handle, r Request, s state) error {
	if r.InPlace || h.Job().Step == stepCopying {
		return nil
	}
	only := transfer.RestoreSpec{Backup: s.Plan.Backup}
	for _, f := range s.Plan.Files {
		if f.Name == definitionName {
			only.Files = append(only.Files, f.restored())
		}
	}
	if err := k.work(ctx, h, s.Plan, only); err != nil {
		return err
	}
	if _, _, err := k.newDefinition(r, s.Plan); err != nil {
		return err
	}
	// Before the step: a worker that is found after it is taken for the one that copies.
	if err := k.Errand.Supervisor.Forget(context.WithoutCancel(ctx), h.Job().ID); err != nil {
		return err
	}
	return h.Step(ctx, stepCopying, s)
}

// copy has the worker write all files into the job's directories.
func (k *Kind) copy(ctx context.Context, h *job.Handle, p Plan) error {
	all := transfer.RestoreSpec{Backup: p.Backup}
	for _, d := range p.Disks {
		all.Disks = append(all.Disks, transfer.RestoreDisk{
			Target: d.Target, Directory: d.Staging, Destination: filepath.Base(d.Destination), Format: d.Format, Owner: d.Owner,
		})
	}
	for _, f := range p.Files {
		all.Files = append(all.Files, f.restored())
	}
	return k.work(ctx, h, p, all)
}

// restored is the file as the worker is told of it.
func (f OnlyFile) restored() transfer.RestoreFile {
	return transfer.RestoreFile{Name: f.Name, Directory: f.Staging, Destination: filepath.Base(f.Destination), Owner: f.Owner}
}

// work has a worker restore into the job's directories.
func (k *Kind) work(ctx context.Context, h *job.Handle, p Plan, what transfer.RestoreSpec) error {
	repo, err := k.Catalog.Repository(ctx, h.Job().Repository)
	if err != nil {
		return failure.Named(err)
	}
	if err := k.stage(ctx, h, p); err != nil {
		return err
	}
	_, err = k.Errand.Run(ctx, h, repo, transfer.Spec{Operation: transfer.OperationRestore, Domain: h.Job().Domain, Restore: &what})
	return err
}

// stage makes the job's directories, unless a worker is writing to them. What a
// worker left that was forgotten before its end was recorded is written again.
func (k *Kind) stage(ctx context.Context, h *job.Handle, p Plan) error {
	started, err := k.Errand.Started(ctx, h.Job().ID)
	if err != nil || started {
		return err
	}
	if err := removeStaging(p); err != nil {
		return err
	}
	return makeStaging(p)
}

// Undo takes back what is not finished: what is in place goes back to where it
// was, and the job's directories go.
func (k *Kind) Undo(ctx context.Context, h *job.Handle) error {
	if h.Job().Step == "" {
		return nil
	}
	var s state
	if err := json.Unmarshal(h.Job().StepData, &s); err != nil {
		return fmt.Errorf("cannot read step %q: %w", h.Job().Step, err)
	}
	var problems []error
	if h.Job().Step == stepPlacing {
		if s.Plan.InPlace {
			problems = append(problems, exchangeBack(s.Files))
			removeTPMDirectories(s.Plan)
		} else {
			problems = append(problems, k.undefine(ctx, s))
		}
	}
	if err := errors.Join(problems...); err != nil {
		return err // the directories hold what is still needed
	}
	return removeStaging(s.Plan)
}

// definitionOf reads the definition that the worker restored.
func definitionOf(p Plan) ([]byte, error) {
	for _, f := range p.Files {
		if f.Name == definitionName {
			return readOwn(f.Staging, filepath.Base(f.Destination))
		}
	}
	return nil, fmt.Errorf("backup %s has no definition", p.Backup)
}
