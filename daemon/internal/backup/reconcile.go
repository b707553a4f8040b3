package backup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/chain"
	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/daemon/internal/overlay"
	"github.com/virtbackup/virtbackup/daemon/internal/supervise"
)

// Reconcile clears up what jobs could not clear up themselves: held guests,
// backups in libvirt, checkpoints, scratch images, sockets and workers that
// belong to no job. It leaves alone every domain that a job works on. Call it
// before the engine starts, and every now and then.
func (k *Kind) Reconcile(ctx context.Context) error {
	return errors.Join(
		k.Quiescer.ThawLeftover(ctx),
		k.failAbandoned(ctx),
		k.reconcileDomains(ctx),
		k.removeFiles(ctx),
		k.removeWorkers(ctx),
		k.removeExports(ctx),
	)
}

// failAbandoned ends backups that are running in the catalog alone.
func (k *Kind) failAbandoned(ctx context.Context) error {
	// Backups first: a job that ends after this has ended its backup too.
	running, err := k.Catalog.ListBackups(ctx, catalog.BackupFilter{States: []chain.BackupState{chain.Running}}, catalog.Page{})
	if err != nil {
		return err
	}
	jobs, err := k.Catalog.UnfinishedJobs(ctx)
	if err != nil {
		return err
	}
	alive := map[string]bool{}
	for _, j := range jobs {
		alive[j.ID] = true
	}
	var failed []error
	for _, b := range running {
		if !alive[b.Job] {
			failed = append(failed, k.Catalog.FailBackup(ctx, b.ID, "its job ended without it", time.Now()))
		}
	}
	return errors.Join(failed...)
}

func (k *Kind) reconcileDomains(ctx context.Context) error {
	known, err := k.Catalog.Domains(ctx, "")
	if err != nil {
		return err
	}
	names := map[string]string{} // by UUID
	for _, d := range known {
		names[d.UUID] = d.Name
	}
	// A catalog that was lost does not know where something of ours is.
	limited, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	all, err := k.Hypervisor.Domains(limited)
	failed := []error{err}
	for _, d := range all {
		if d.Job || slices.ContainsFunc(d.Checkpoints, hypervisor.OursCheckpoint) || overlay.Concerned(d) {
			names[d.UUID] = d.Name
		}
	}
	for uuid, name := range names {
		if ctx.Err() != nil {
			return errors.Join(append(failed, context.Cause(ctx))...)
		}
		if err := k.reconcileDomain(ctx, uuid); err != nil {
			failed = append(failed, fmt.Errorf("domain %q: %w", name, err))
		}
	}
	return errors.Join(failed...)
}

func (k *Kind) reconcileDomain(ctx context.Context, uuid string) error {
	release, free := k.tryClaim(uuid)
	if !free {
		return nil
	}
	defer release()
	// After the claim: no job of the domain that is not seen here gets further
	// than asking for the claim.
	jobs, err := k.Catalog.UnfinishedJobs(ctx)
	if err != nil {
		return err
	}
	for _, j := range jobs {
		if j.Domain == uuid && j.State != catalog.JobQueued {
			return nil
		}
	}
	limited, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	d, err := k.Hypervisor.ByUUID(limited, uuid)
	if errors.Is(err, hypervisor.ErrNoDomain) {
		return k.tidy(ctx, uuid)
	}
	if err != nil {
		return err
	}
	if d.Job {
		if job, err := k.Hypervisor.BackupJob(limited, uuid); err != nil || !job.Ours {
			return err // somebody else's: checkpoints cannot be deleted meanwhile
		}
		k.Log.Warn("ending a backup in libvirt that belongs to no job", "domain", d.Name)
		if err := k.Hypervisor.EndBackup(limited, uuid); err != nil {
			return err
		}
	}
	return errors.Join(k.dropSnapshotted(limited, d), k.tidy(ctx, uuid), k.reconcileOverlays(ctx, d))
}

// removeFiles removes scratch images and sockets of backups that are not running.
func (k *Kind) removeFiles(ctx context.Context) error {
	scratch := k.Settings().ScratchDirectory
	found := map[string]bool{}
	for _, directory := range []string{scratch, hypervisor.SocketDirectory} {
		entries, err := os.ReadDir(directory)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("cannot look for leftover files: %w", err)
		}
		for _, e := range entries {
			backup := strings.TrimSuffix(e.Name(), socketSuffix)
			if _, err := ulid.ParseStrict(backup); err == nil {
				found[backup] = true
			}
		}
	}
	var failed []error
	for backup := range found {
		b, err := k.Catalog.Backup(ctx, backup)
		switch {
		case err != nil && !errors.Is(err, catalog.ErrNotFound):
			failed = append(failed, err)
		case err != nil || b.State != chain.Running:
			failed = append(failed, removeScratch(scratch, backup))
		}
	}
	return errors.Join(failed...)
}

// removeWorkers ends and forgets the workers of jobs that have ended, or that
// the catalog does not know: it was lost.
func (k *Kind) removeWorkers(ctx context.Context) error {
	left, err := k.Errands.Supervisor.Leftovers(ctx)
	if err != nil {
		return err
	}
	var failed []error
	for _, l := range left {
		j, err := k.Catalog.Job(ctx, l.Job)
		if err == nil && !j.State.Ended() {
			continue
		}
		if err == nil || errors.Is(err, catalog.ErrNotFound) {
			err = k.removeWorker(ctx, l.Job)
		}
		failed = append(failed, err)
	}
	return errors.Join(failed...)
}

// removeExports ends and removes the exports of jobs that have ended, or that
// the catalog does not know.
func (k *Kind) removeExports(ctx context.Context) error {
	left, err := k.Exporter.Jobs(ctx)
	if err != nil {
		return err
	}
	var failed []error
	for _, id := range left {
		j, err := k.Catalog.Job(ctx, id)
		if err == nil && !j.State.Ended() {
			continue
		}
		if err == nil || errors.Is(err, catalog.ErrNotFound) {
			if err = k.Exporter.Stop(ctx, id); err == nil {
				err = k.Exporter.Remove(id)
			}
		}
		failed = append(failed, err)
	}
	return errors.Join(failed...)
}

func (k *Kind) removeWorker(ctx context.Context, job string) error {
	worker, err := k.Errands.Supervisor.Attach(ctx, job)
	if err == nil {
		// Its result, or that it has none, interests nobody any more.
		if _, err := worker.Cancel(ctx); err != nil {
			k.Log.Debug("a leftover worker ended", "job", job, "error", err)
		}
	} else if !errors.Is(err, supervise.ErrNoWorker) { // then only its directory is there
		return err
	}
	return k.Errands.Supervisor.Forget(ctx, job)
}

// claim waits until nobody works on a domain, and keeps others from it until
// release is called.
func (k *Kind) claim(ctx context.Context, uuid string) (release func(), err error) {
	for {
		k.mu.Lock()
		holder, held := k.claims[uuid]
		k.mu.Unlock()
		if !held {
			if release, free := k.tryClaim(uuid); free {
				return release, nil
			}
			continue
		}
		select {
		case <-holder:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// tryClaim is claim that does not wait.
func (k *Kind) tryClaim(uuid string) (release func(), free bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if _, held := k.claims[uuid]; held {
		return nil, false
	}
	done := make(chan struct{})
	k.claims[uuid] = done
	return func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		delete(k.claims, uuid)
		close(done)
	}, true
}
