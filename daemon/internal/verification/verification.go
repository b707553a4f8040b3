// Package verification is the jobs that look and change nothing: at a
// repository (is it there, is it ours, how much room has it), and at backups
// (is every block what was written).
package verification

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/errand"
	"github.com/virtbackup/virtbackup/daemon/internal/failure"
	"github.com/virtbackup/virtbackup/daemon/internal/job"
	"github.com/virtbackup/virtbackup/daemon/internal/journal"
	"github.com/virtbackup/virtbackup/daemon/internal/transfer"
	"github.com/virtbackup/virtbackup/dbus"
)

// Request asks to verify backups of the job's domain, and all they build on.
type Request struct {
	Backups []string `json:"backups"`
}

// Verify is the kind of job that reads backups back.
type Verify struct {
	Catalog *catalog.Catalog
	Errand  errand.Sender
}

// Again makes it a job.Retrier: another try is about the same.
func (Verify) Again(j catalog.Job) string { return j.Backup }

// Run has a worker compare every block with its digest. What it finds damaged
// is recorded, with all that builds on it.
func (k Verify) Run(ctx context.Context, h *job.Handle) error {
	var r Request
	if err := json.Unmarshal(h.Job().Spec, &r); err != nil {
		return fmt.Errorf("cannot read the job's request: %w", err)
	}
	repo, err := k.Catalog.Repository(ctx, h.Job().Repository)
	if err != nil {
		return failure.Named(err)
	}
	result, err := k.Errand.Run(ctx, h, repo, transfer.Spec{
		Operation: transfer.OperationVerify, Domain: h.Job().Domain, Backups: r.Backups,
	})
	if result == nil {
		return err
	}
	if recorded := k.record(context.WithoutCancel(ctx), h, result.Backups); recorded != nil {
		return errors.Join(err, recorded)
	}
	if err != nil {
		return err
	}
	return verdict(repo.Name, result.Backups)
}

// verdict fails a job that found a backup bad: a person who asks whether a
// backup is good gets the answer from how the job ended.
func verdict(repository string, found []transfer.BackupState) error {
	var bad []transfer.BackupState
	for _, b := range found {
		if b.Error != nil {
			bad = append(bad, b)
		}
	}
	if len(bad) == 0 {
		return nil
	}
	name, first := dbus.ErrRepositoryUnavailable, bad[0]
	for _, b := range bad {
		if Damage(b.Error.Class) {
			name, first = dbus.ErrDamaged, b
		}
	}
	return failure.Errorf(name, "%d of %d backups in repository %q cannot be trusted, as %s: %s: make a new full backup",
		len(bad), len(found), repository, first.Backup, first.Error.Message)
}

func (k Verify) record(ctx context.Context, h *job.Handle, found []transfer.BackupState) error {
	now := time.Now()
	for _, b := range found {
		var err error
		switch {
		case b.Error == nil:
			err = k.Catalog.VerifiedBackup(ctx, b.Backup, now)
		case Damage(b.Error.Class):
			h.Log(ctx, slog.LevelError, fmt.Sprintf("backup %s is %s: %s", b.Backup, word(b.Error.Class), b.Error.Message),
				journal.MessageID, journal.BackupDamaged, "damaged", b.Backup, "detail", b.Error.Message)
			err = k.Catalog.DamagedBackup(ctx, b.Backup, b.Error.Message)
		}
		// One whose deletion was cut short may well be missing.
		if err != nil && !errors.Is(err, catalog.ErrNotFound) && !errors.Is(err, catalog.ErrState) {
			return failure.Errorf(dbus.ErrFailed, "cannot record what was found of backup %s: %w", b.Backup, err)
		}
	}
	return nil
}

// word says to people what is wrong with a backup.
func word(c transfer.Class) string {
	if c == transfer.ClassMissing {
		return "missing"
	}
	return "damaged"
}

// Damage tells whether a failure is about what is stored; a share that does not
// answer says nothing about the backups in it.
func Damage(c transfer.Class) bool {
	return c == transfer.ClassVerification || c == transfer.ClassManifest || c == transfer.ClassParent || c == transfer.ClassMissing
}

// Undo has nothing to undo.
func (Verify) Undo(context.Context, *job.Handle) error { return nil }
