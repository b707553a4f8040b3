package transfer

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/repository"
)

const (
	// disksAtOnce bounds the memory of a domain with many disks; the point in
	// time is that of the exports and the same for those that wait.
	disksAtOnce = 4

	spaceInterval = 2 * time.Second
)

// backup is one that is being made.
type backup struct {
	*worker
	*BackupSpec
	repo    *repository.Repository
	stage   *repository.Stage
	claim   *repository.Claim
	parents lineage // of an increment, newest first
	disks   []*diskCopy
}

func (w *worker) backup(ctx context.Context) (err error) {
	if w.spec.Backup == nil {
		return fail(ClassInternal, "the specification says nothing about the backup")
	}
	b := &backup{worker: w, BackupSpec: w.spec.Backup}
	if b.repo, err = w.open(); err != nil {
		return err
	}
	defer b.repo.Close()
	if err := b.room(); err != nil {
		return err
	}
	if b.claim, err = b.repo.Claim(b.Manifest.Domain.UUID, b.Manifest.Backup); err != nil {
		return inRepository(err)
	}
	defer w.release(b.claim)
	if b.stage, err = b.repo.Stage(b.Manifest.Backup); err != nil {
		return inRepository(err)
	}
	defer func() {
		b.closeDisks()
		if err != nil {
			b.discard()
		}
	}()
	return b.guard(ctx, b.make)
}

func (b *backup) discard() {
	if err := b.stage.Discard(); err != nil {
		b.log.Error("cannot remove what was staged; it is collected later", "error", err)
	}
}

// guard runs make while it watches that the claim and the space stay.
func (b *backup) guard(ctx context.Context, make func(context.Context) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	var wait sync.WaitGroup
	defer wait.Wait()
	defer cancel(nil)
	wait.Go(func() {
		if err := b.claim.Keep(ctx); err != nil {
			cancel(inRepository(err))
		}
	})
	wait.Go(func() {
		tick := time.NewTicker(spaceInterval)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				if err := b.space(); err != nil {
					cancel(err)
					return
				}
			}
		}
	})
	return make(ctx)
}

// room fails if what the backup is expected to take is not there, beside what
// must stay free and what others take that are being made.
func (b *backup) room() error {
	free, _, err := b.repo.Space()
	if err != nil {
		return inRepository(err)
	}
	r := b.spec.Repository
	if least := r.MinimumFree + r.Promised + b.Expected; free < least {
		return fail(ClassFull, "the repository %q has %d MiB free: the backup is expected to take %d MiB, those being made take %d MiB more, and %d MiB must stay free",
			r.Name, free>>20, b.Expected>>20, r.Promised>>20, r.MinimumFree>>20)
	}
	return nil
}

// space fails if less is free in the repository than must stay free.
func (b *backup) space() error {
	free, _, err := b.repo.Space()
	if err != nil {
		return inRepository(err)
	}
	if least := b.spec.Repository.MinimumFree; free < least {
		return fail(ClassFull, "the repository %q has %d bytes free, and %d must stay free", b.spec.Repository.Name, free, least)
	}
	return nil
}

// make takes the backup through its phases.
func (b *backup) make(ctx context.Context) error {
	if err := b.prepare(); err != nil {
		return err
	}
	if err := b.status.enter(PhaseReady); err != nil {
		return err
	}
	start, err := waitGo(ctx, b.directory)
	if err != nil {
		return classify(ClassInternal, err)
	}
	b.Manifest.Created, b.Manifest.Consistency = start.Created, start.Consistency
	b.Manifest.Held, b.Manifest.Shortfall = start.Held, start.Shortfall
	phases := []struct {
		name string
		each func(*diskCopy, context.Context) error
	}{
		{PhaseCopying, (*diskCopy).copy},
		{PhaseFlushing, (*diskCopy).flush},
		{PhaseVerifying, (*diskCopy).verify},
	}
	for _, p := range phases {
		if err := b.status.enter(p.name); err != nil {
			return err
		}
		if p.name == PhaseCopying {
			if err := b.copyFiles(); err != nil {
				return err
			}
		}
		if err := b.eachDisk(ctx, p.each); err != nil {
			return err
		}
		if p.name == PhaseFlushing && b.Confirm {
			if err := b.confirm(ctx); err != nil {
				return err
			}
		}
	}
	return b.commit(ctx)
}

// confirm waits until the daemon says that what was copied is of one point in time.
func (b *backup) confirm(ctx context.Context) error {
	if err := b.status.enter(PhaseConfirming); err != nil {
		return err
	}
	return classify(ClassInternal, waitConfirm(ctx, b.directory))
}

// prepare checks all that can fail before the guest is touched.
func (b *backup) prepare() error {
	m := &b.Manifest
	if m.Parent != "" {
		var err error
		if b.parents, err = trace(b.repo, m.Domain.UUID, m.Parent); err != nil {
			return classify(ClassParent, err)
		}
		if b.parents[0].Chain != m.Chain {
			return fail(ClassParent, "the parent %s belongs to chain %s and not to %s", m.Parent, b.parents[0].Chain, m.Chain)
		}
	}
	if len(b.Disks) != len(m.Disks) {
		return fail(ClassInternal, "the specification has %d exports for %d disks", len(b.Disks), len(m.Disks))
	}
	for i, spec := range b.Disks {
		entry := &m.Disks[i]
		changes, ok := spec.changes(entry.Kind)
		if !ok || entry.Target != spec.Target || entry.Size != spec.Size {
			return fail(ClassInternal, "the specification contradicts itself about disk %q", spec.Target)
		}
		entry.Changes = changes
		entry.File = repository.ImageName(entry.Target)
		d := &diskCopy{backup: b, spec: spec, entry: entry, count: b.status.disk(entry.Target)}
		b.disks = append(b.disks, d)
		if err := inDisk(spec.Target, d.prepare()); err != nil {
			return err
		}
	}
	return nil
}

func (b *backup) eachDisk(ctx context.Context, f func(*diskCopy, context.Context) error) error {
	free := make(chan struct{}, disksAtOnce)
	return sideBySide(ctx, len(b.disks), func(ctx context.Context, i int) error {
		select {
		case free <- struct{}{}:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		defer func() { <-free }()
		return inDisk(b.disks[i].spec.Target, f(b.disks[i], ctx))
	})
}

func (b *backup) closeDisks() {
	for _, d := range b.disks {
		d.close()
	}
}

// commit fills in the manifest and publishes the backup.
func (b *backup) commit(ctx context.Context) error {
	if err := b.status.enter(PhaseCommitting); err != nil {
		return err
	}
	m := &b.Manifest
	for _, d := range b.disks {
		m.Files = append(m.Files, d.digestFile)
		// A server of SMB renames no directory in which a file is open.
		if err := closeAll(&d.image, &d.digests); err != nil {
			return inDisk(d.spec.Target, classify(ClassRepository, err))
		}
	}
	m.Finished = time.Now().UnixMicro()
	name, err := os.Hostname()
	if err != nil {
		return classify(ClassInternal, err)
	}
	m.HostName = name
	if err := b.stage.Commit(ctx, b.claim, m); err != nil {
		return inRepository(err)
	}
	b.result.Manifest = m
	return nil
}

// copyFiles stores the other files of the backup and reads them back.
func (b *backup) copyFiles() error {
	b.Manifest.Files = nil
	for _, f := range b.Files {
		stored, err := b.copyFile(f)
		if err != nil {
			return fmt.Errorf("file %s: %w", f.Name, err)
		}
		b.Manifest.Files = append(b.Manifest.Files, stored)
	}
	return nil
}

func (b *backup) copyFile(spec FileSpec) (stored repository.File, err error) {
	from, err := openHostFile(spec)
	if err != nil {
		return stored, classify(ClassSource, err)
	}
	defer from.Close()
	to, err := b.stage.Create(spec.Name)
	if err != nil {
		return stored, inRepository(err)
	}
	defer func() { err = errors.Join(err, classify(ClassRepository, to.Close())) }()
	stored, err = writeSummed(to, spec.Name, from)
	if err != nil {
		return stored, err
	}
	return stored, readBack(to, stored)
}
