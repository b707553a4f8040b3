package transfer

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/virtbackup/virtbackup/daemon/internal/repository"
)

// worker carries out one operation.
type worker struct {
	directory string
	spec      *Spec
	log       *slog.Logger
	status    *reporter
	throttle  *throttle
	result    Result
	broken    map[image]bool // found by verify: nothing that stands on these can be looked at
}

// Run carries out the operation of a job directory and writes its result there,
// whatever happens. A context that ends with ErrCancelled as its cause cancels.
// The error is the one in the result, or that of writing it.
func Run(ctx context.Context, directory string, log *slog.Logger) error {
	w := &worker{directory: directory, log: log, status: newReporter(directory), throttle: newThrottle(), broken: map[image]bool{}}
	var err error
	w.spec, err = ReadSpec(directory)
	if err == nil {
		err = guarded(func() error { return w.run(ctx) })()
	}
	w.result.Version = SpecVersion
	w.result.Disks = w.status.snapshot()
	if w.result.Error = failure(ctx, err); w.result.Error != nil {
		log.Error("operation failed", "class", w.result.Error.Class, "error", err)
		err = w.result.Error
	}
	return errors.Join(err, writeJSON(filepath.Join(directory, ResultFile), w.result))
}

func (w *worker) run(ctx context.Context) error {
	w.log = w.log.With("job", w.spec.Job, "operation", w.spec.Operation)
	if err := w.status.enter(PhaseOpening); err != nil {
		return err
	}
	if err := w.throttle.look(w.directory); err != nil {
		return classify(ClassInternal, err)
	}
	reporting, stop := context.WithCancel(context.WithoutCancel(ctx))
	var wait sync.WaitGroup
	wait.Go(func() { w.status.run(reporting) })
	wait.Go(func() { w.throttle.run(reporting, w.directory) })
	defer wait.Wait()
	defer stop()
	operation, known := map[Operation]func(context.Context) error{
		OperationInit:     w.init,
		OperationProbe:    w.probe,
		OperationList:     w.list,
		OperationBackup:   w.backup,
		OperationRestore:  w.restore,
		OperationVerify:   w.verify,
		OperationDelete:   w.delete,
		OperationDiscard:  w.discard,
		OperationMerge:    w.merge,
		OperationInspect:  w.inspect,
		OperationCompress: w.compress,
		OperationRepair:   w.repair,
		OperationServe:    w.serve,
		OperationAttach:   w.attach,
	}[w.spec.Operation]
	if !known {
		return fail(ClassInternal, "the operation %q is not known", w.spec.Operation)
	}
	return operation(ctx)
}

// key reads the host's manifest key.
func (w *worker) key() ([]byte, error) {
	b, err := os.ReadFile(w.spec.Repository.KeyFile)
	if err != nil {
		return nil, fail(ClassInternal, "cannot read the host's manifest key: %w", err)
	}
	key, err := hex.DecodeString(strings.TrimSpace(string(b)))
	if err != nil || len(key) != 32 {
		return nil, fail(ClassInternal, "the host's manifest key %s is not one of 64 hex digits", w.spec.Repository.KeyFile)
	}
	return key, nil
}

// open opens the repository and makes sure that it is the one that is meant:
// an unmounted share leaves a directory that may hold another.
func (w *worker) open() (*repository.Repository, error) {
	key, err := w.key()
	if err != nil {
		return nil, err
	}
	r, err := repository.Open(w.spec.Repository.Path, key)
	if err != nil {
		return nil, inRepository(err)
	}
	r.Trust(w.spec.Repository.Pins)
	if want := w.spec.Repository.ID; want != "" && want != r.ID() {
		r.Close()
		return nil, fail(ClassRepository, "%s holds the repository %s and not %q (%s)",
			w.spec.Repository.Path, r.ID(), w.spec.Repository.Name, want)
	}
	return r, nil
}

func (w *worker) init(ctx context.Context) error {
	// One that is there already, from before a catalog was lost or of an
	// interrupted job, is as good as a new one.
	if _, err := repository.Init(ctx, w.spec.Repository.Path); err != nil && !errors.Is(err, repository.ErrExists) {
		return inRepository(err)
	}
	return w.probe(ctx)
}

// probe says what repository is there, and clears up after dead jobs if asked.
func (w *worker) probe(ctx context.Context) error {
	err := w.lookAt(ctx)
	// Of one backup these may be the fault of its files alone.
	for _, gone := range []error{unix.ESTALE, unix.ENOTCONN, unix.EHOSTDOWN, unix.ETIMEDOUT} {
		if errors.Is(err, gone) {
			return &classed{ClassGone, err}
		}
	}
	return err
}

func (w *worker) lookAt(ctx context.Context) error {
	began := time.Now()
	r, err := w.open()
	if err != nil {
		return err
	}
	defer r.Close()
	state := &RepositoryState{ID: r.ID(), Host: r.Host()}
	if state.ReadOnly, err = r.ReadOnly(); err != nil {
		return inRepository(err)
	}
	if w.spec.Try && !state.ReadOnly {
		if err := try(r, state); err != nil {
			return err
		}
	}
	state.Took = time.Since(began).Microseconds()
	if w.spec.Collect && !state.ReadOnly {
		if err := w.collect(ctx, r); err != nil {
			return err
		}
	}
	if state.Free, state.Total, err = r.Space(); err != nil {
		return inRepository(err)
	}
	w.result.Repository = state
	return nil
}

// try finds out whether the repository can be written. That it cannot is what it
// is like, and no failure.
func try(r *repository.Repository, state *RepositoryState) error {
	err := r.Try()
	switch {
	case errors.Is(err, repository.ErrReadOnly):
		state.ReadOnly = true
	case errors.Is(err, repository.ErrNoSpace):
		state.NoSpace = true
	default:
		return inRepository(err)
	}
	return nil
}

// collect clears up after dead jobs. Jobs that were submitted after this one
// are in no list that it was given: what they make has a greater id. What cannot
// be removed makes the repository no worse, so that is no failure.
func (w *worker) collect(ctx context.Context, r *repository.Repository) error {
	err := r.Collect(ctx, func(id string) bool { return id > w.spec.Job || slices.Contains(w.spec.Live, id) })
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		w.log.Warn("cannot remove what dead jobs left; the next check tries again", "error", err)
	}
	return nil
}

// list reads all manifests, and gives a verdict on each.
func (w *worker) list(ctx context.Context) error {
	r, err := w.open()
	if err != nil {
		return err
	}
	defer r.Close()
	domains := []string{w.spec.Domain}
	if w.spec.Domain == "" {
		if domains, err = r.Domains(); err != nil {
			return inRepository(err)
		}
	}
	for _, domain := range domains {
		backups, err := r.Backups(domain)
		if err != nil {
			return inRepository(err)
		}
		for _, backup := range backups {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			w.result.Backups = append(w.result.Backups, w.look(ctx, r, domain, backup))
		}
	}
	return nil
}

func (w *worker) look(ctx context.Context, r *repository.Repository, domain, backup string) BackupState {
	state := BackupState{Domain: domain, Backup: backup}
	var err error
	state.Manifest, err = r.Whole(domain, backup)
	state.Error = failure(ctx, inRepository(err))
	return state
}

// delete removes backups, an increment before what it stands on. Ids ascend
// with time, so the newest goes first.
func (w *worker) delete(ctx context.Context) error {
	r, err := w.open()
	if err != nil {
		return err
	}
	defer r.Close()
	if len(w.spec.Backups) == 0 {
		return fail(ClassInternal, "no backup to delete is named")
	}
	if err := w.status.enter(PhaseDeleting); err != nil {
		return err
	}
	newestFirst := slices.Sorted(slices.Values(w.spec.Backups))
	slices.Reverse(newestFirst)
	// In this job's name: the backups' are as old as they are, and collect goes by age.
	claim, err := r.Claim(w.spec.Domain, w.spec.Job)
	if err != nil {
		return inRepository(err)
	}
	defer w.release(claim)
	for _, backup := range newestFirst {
		err := r.Delete(ctx, claim, w.spec.Domain, backup)
		// One that is not there may have gone in a run of this job that died.
		if err != nil && !errors.Is(err, repository.ErrNoBackup) {
			return inRepository(err)
		}
		w.result.Deleted = append(w.result.Deleted, backup)
	}
	return nil
}

func (w *worker) release(claim *repository.Claim) {
	if err := claim.Release(); err != nil {
		w.log.Warn("cannot give back the claim on the domain's backups; it goes stale by itself", "error", err)
	}
}

// discard removes what a job left that died before it committed.
func (w *worker) discard(context.Context) error {
	r, err := w.open()
	if err != nil {
		return err
	}
	defer r.Close()
	for _, backup := range w.spec.Backups {
		if err := r.Discard(w.spec.Domain, backup); err != nil {
			return inRepository(fmt.Errorf("cannot discard what is left of backup %s: %w", backup, err))
		}
	}
	return nil
}
