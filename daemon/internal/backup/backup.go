// Package backup is the job that makes a backup of a domain: it plans,
// lets a worker open the repository, fixes the point in time, lets the worker
// copy, and commits. Before each side effect a step is recorded, so that a
// daemon that was restarted carries on with the same backup; whatever fails is
// undone, and Reconcile clears up what could not be undone then.
//
//	step       recorded        then                          after a restart
//	           -               -                             plan
//	planned    with the plan   prepare, worker               the same again, if the disks are still the same
//	begin      before          fix the point in time         carry on when that was done; else the same again
//	copying    with the point  the worker copies, commits    follow the worker
package backup

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/errand"
	"github.com/virtbackup/virtbackup/daemon/internal/export"
	"github.com/virtbackup/virtbackup/daemon/internal/failure"
	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/daemon/internal/job"
	"github.com/virtbackup/virtbackup/daemon/internal/quiesce"
	"github.com/virtbackup/virtbackup/daemon/internal/transfer"
	"github.com/virtbackup/virtbackup/hooks/fingerprint"
)

// KindName is the name under which the Kind is to be registered with the engine.
const KindName = "backup"

// Hypervisor is what a backup needs of libvirt.
type Hypervisor interface {
	ByUUID(ctx context.Context, uuid string) (hypervisor.Domain, error)
	Domains(ctx context.Context) ([]hypervisor.Domain, error)
	State(ctx context.Context, uuid string) (name, reason string, err error)
	Subscribe(ctx context.Context) <-chan hypervisor.Event
	BackupDefinition(ctx context.Context, uuid string) (string, error)
	BeginBackup(ctx context.Context, uuid string, b hypervisor.Begin) error
	PutOverlays(ctx context.Context, uuid string, paths map[string]string) error
	BackupJob(ctx context.Context, uuid string) (hypervisor.BackupJob, error)
	EndBackup(ctx context.Context, uuid string) error
	ListOurs(ctx context.Context, uuid string) ([]string, error)
	CheckpointDefinition(ctx context.Context, uuid, name string) (string, error)
	CheckpointUsable(ctx context.Context, uuid, name string) (map[string]bool, error)
	Redefine(ctx context.Context, uuid, definition string) error
	Forget(ctx context.Context, uuid, name string) error
	Delete(ctx context.Context, uuid, name, definition string) error
}

// Quiescer holds guests still.
type Quiescer interface {
	Hold(ctx context.Context, uuid string, w quiesce.Wish, point func(context.Context) error) (quiesce.Result, error)
	ThawLeftover(ctx context.Context) error
}

// Catalog is what a backup remembers and is remembered by.
type Catalog interface {
	Repository(ctx context.Context, id string) (catalog.Repository, error)
	LatestChain(ctx context.Context, domain, repository string) (catalog.Head, error)
	CreateBackup(ctx context.Context, b catalog.Backup, checkpoint string, step catalog.Step) error
	CommitBackup(ctx context.Context, id string, done catalog.Commit) error
	FailBackup(ctx context.Context, id, message string, finished time.Time) error
	Backup(ctx context.Context, id string) (catalog.Backup, error)
	ListBackups(ctx context.Context, f catalog.BackupFilter, p catalog.Page) ([]catalog.Backup, error)
	Checkpoints(ctx context.Context, domain string, states ...catalog.CheckpointState) ([]catalog.Checkpoint, error)
	SetCheckpointXML(ctx context.Context, name, xml string) error
	RemovedCheckpoint(ctx context.Context, name string) error
	DropCheckpoint(ctx context.Context, name string) error
	AddOverlays(ctx context.Context, all []catalog.Overlay) error
	Overlays(ctx context.Context, domain string) ([]catalog.Overlay, error)
	KeptOverlays(ctx context.Context, domain string) ([]catalog.Overlay, error)
	Domains(ctx context.Context, offering string) ([]catalog.Domain, error)
	Job(ctx context.Context, id string) (catalog.Job, error)
	UnfinishedJobs(ctx context.Context) ([]catalog.Job, error)
}

// Keeper knows whether disks were watched between two backups, see lifecycle.Keeper.
type Keeper interface {
	Observe(ctx context.Context, d hypervisor.Domain) (number int64, newest []catalog.Mark, err error)
	OwnWork(ctx context.Context, d hypervisor.Domain, targets []string, fn func() error) error
}

// Settings are read anew for each backup.
type Settings struct {
	ScratchDirectory   string // for scratch images, on a local disk
	MinimumFreeScratch uint64 // bytes free there, or no backup is started
}

// Deps is what a Kind works with.
type Deps struct {
	Catalog    Catalog
	Hypervisor Hypervisor
	Quiescer   Quiescer
	Keeper     Keeper
	Exporter   *export.Exporter
	Overlays   Overlays
	Errands    errand.Sender
	Settings   func() Settings
	Version    string // of this program, for manifests
	Log        *slog.Logger
}

// Kind makes backups: it is registered with the job engine as KindName.
type Kind struct {
	Deps
	mu     sync.Mutex
	claims map[string]chan struct{} // by UUID: the domains that a job, or Reconcile, works on; closed when done
}

// New makes a Kind.
func New(d Deps) *Kind { return &Kind{Deps: d, claims: map[string]chan struct{}{}} }

// Request is what a backup is asked for.
type Request struct {
	Domain     string // UUID
	Repository string // id
	Offering   string // name; "" for an ad hoc backup
	catalog.Settings
	Isolated bool // outside of the domain's chains
	Full     bool // starts a new chain
}

// NewJob is what to submit to the engine for a request. The backup gets its id here.
func NewJob(r Request, uid uint32) job.Request {
	return job.Request{Kind: KindName, Domain: r.Domain, Repository: r.Repository, Backup: ulid.Make().String(), Spec: r, UID: uid}
}

// Again gives the next try a backup of its own: the one that failed stays known
// as that.
func (k *Kind) Again(catalog.Job) string { return ulid.Make().String() }

var _ job.Retrier = (*Kind)(nil)

// Names of the steps.
const (
	stepPlanned = "planned"
	stepBegin   = "begin"
	stepCopying = "copying"
)

// stepData is recorded with each step.
type stepData struct {
	Plan  Plan
	Point transfer.Go // of stepBegin, not after that moment; of stepCopying
	// Seen are the disks of a stopped domain at the point in time.
	Seen []fingerprint.Disk
}

// run is one backup at work.
type run struct {
	*Kind
	job *job.Handle
	stepData
	remembered bool // the checkpoint's definition is in the catalog
	// heard tells whether something was heard of a stopped domain since before
	// its point in time; nil when the daemon was restarted since.
	heard *atomic.Bool
}

// load reads how far the job has come.
func (k *Kind) load(h *job.Handle) (*run, error) {
	r := &run{Kind: k, job: h}
	if h.Job().Step == "" {
		return r, nil
	}
	if err := json.Unmarshal(h.Job().StepData, &r.stepData); err != nil {
		return nil, fmt.Errorf("cannot read step %q of job %s: %w", h.Job().Step, h.Job().ID, err)
	}
	return r, nil
}

// Run makes the backup, see job.Kind.
func (k *Kind) Run(ctx context.Context, h *job.Handle) error {
	release, err := k.claim(ctx, h.Job().Domain)
	if err != nil {
		return err
	}
	defer release()
	r, err := k.load(h)
	if err != nil {
		return err
	}
	return failure.Named(r.run(ctx))
}

func (r *run) run(ctx context.Context) error {
	if r.job.Job().Step != stepCopying {
		if err := r.start(ctx); err != nil {
			return err
		}
	}
	manifest, err := r.copy(ctx)
	if err != nil {
		return err
	}
	return r.finish(ctx, manifest)
}

// start takes the backup to the point in time.
func (r *run) start(ctx context.Context) error {
	var err error
	begun := false
	switch r.job.Job().Step {
	case "":
		err = r.prepare(ctx)
	case stepBegin:
		if begun, err = r.source().begun(ctx); err == nil && !begun {
			err = r.recheck(ctx)
		}
	default:
		err = r.recheck(ctx)
	}
	if err != nil {
		return err
	}
	if begun {
		return r.source().rejoin(ctx)
	}
	if r.job.Job().Step != "" {
		if err := r.discardLost(ctx); err != nil {
			return err
		}
	}
	if err := r.source().prepare(ctx); err != nil {
		return err
	}
	if err := r.Errands.Prepare(ctx, r.Plan.Repository); err != nil {
		return err
	}
	worker, err := r.Errands.Supervisor.Start(ctx, r.spec(), r.Errands.Limits())
	if err != nil {
		return err
	}
	if err := worker.Ready(ctx, func(s transfer.Status) { errand.Progress(r.job, s) }); err != nil {
		return failure.Worker(ctx, r.Plan.Repository.Name, err)
	}
	return r.source().begin(ctx)
}

// discardLost removes what a worker had staged that was lost with the host: a
// new one would find its place taken.
func (r *run) discardLost(ctx context.Context) error {
	started, err := r.Errands.Started(ctx, r.job.Job().ID)
	if err != nil || started {
		return err
	}
	_, err = r.ask(ctx, transfer.OperationDiscard)
	return err
}

// settled is a context for what must be done also when the job has been
// cancelled meanwhile; only the daemon's going down ends it.
func settled(ctx context.Context) (context.Context, context.CancelFunc) {
	out, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() {
		if cause := context.Cause(ctx); errors.Is(cause, job.ErrDetach) {
			cancel(cause)
		}
	})
	return out, func() { stop(); cancel(nil) }
}
