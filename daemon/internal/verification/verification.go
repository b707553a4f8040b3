// Package verification is the jobs that look and change nothing: at a
// repository (is it there, is it ours, how much room has it), and at backups
// (is every block what was written).
package verification

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
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
	Chain   string   `json:"chain,omitempty"` // that is verified by itself; "" if somebody asked
}

// Verify is the kind of job that reads backups back.
type Verify struct {
	Catalog *catalog.Catalog
	Errand  errand.Sender
	// Settings of verifications that nobody asked for.
	Settings func() Settings
}

// Again makes it a job.Retrier: another try is about the same.
func (Verify) Again(j catalog.Job) string { return j.Backup }

// Run has a worker compare every block with its digest. What it finds damaged
// is recorded, with all that builds on it.
func (k Verify) Run(ctx context.Context, h *job.Handle) error {
	var r Request
	if err := h.Request(&r); err != nil {
		return err
	}
	repo, err := k.Catalog.Repository(ctx, h.Job().Repository)
	if err != nil {
		return failure.Named(err)
	}
	spec := transfer.Spec{Operation: transfer.OperationVerify, Domain: h.Job().Domain, Backups: r.Backups}
	if h.Job().Origin == catalog.OriginSystem {
		spec.Most = k.Settings().Rate
	}
	result, err := k.Errand.Run(ctx, h, repo, spec)
	if result == nil {
		return err
	}
	if recorded := Record(context.WithoutCancel(ctx), k.Catalog, h, result); recorded != nil {
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
	help := "make a new full backup"
	if repairable(first) {
		help = "it can be repaired: virtbackupctl repair " + first.Backup
	}
	return failure.Errorf(name, "%d of %d backups in repository %q cannot be trusted, as %s: %s: %s",
		len(bad), len(found), repository, first.Backup, first.Error.Message, help)
}

// repairable tells whether all that is damaged of a backup is held elsewhere.
func repairable(b transfer.BackupState) bool {
	return len(b.Damage) > 0 && !slices.ContainsFunc(b.Damage, func(f transfer.Flaw) bool { return f.Donor == "" })
}

// Record records what a worker found of backups that it read back: what is good,
// what is damaged, and what that does to others.
func Record(ctx context.Context, c *catalog.Catalog, h *job.Handle, found *transfer.Result) error {
	now := time.Now()
	for _, b := range found.Backups {
		var err error
		switch {
		case b.Unseen && b.Error == nil: // it is as what it builds on
		case b.Error == nil:
			err = c.VerifiedBackup(ctx, b.Backup, now)
		case Damage(b.Error.Class):
			var parts []catalog.Damage // none: it may be all, and of all that build on it
			if found.HitKnown {
				parts = damageOf(b, found.Hit)
			}
			h.Log(ctx, slog.LevelError, fmt.Sprintf("backup %s is %s: %s%s", b.Backup, word(b.Error.Class), b.Error.Message, consequences(b, parts)),
				journal.MessageID, journal.BackupDamaged, "damaged", b.Backup, "detail", b.Error.Message)
			err = c.RecordDamage(ctx, b.Backup, b.Error.Message, parts)
		}
		// One whose deletion was cut short may well be missing.
		if err != nil && !errors.Is(err, catalog.ErrNotFound) && !errors.Is(err, catalog.ErrState) {
			return failure.Errorf(dbus.ErrFailed, "cannot record what was found of backup %s: %w", b.Backup, err)
		}
	}
	return nil
}

// damageOf returns what is damaged in a backup, and in others by it.
func damageOf(b transfer.BackupState, hits []transfer.Hit) (parts []catalog.Damage) {
	for _, f := range b.Damage {
		parts = append(parts, catalog.Damage{Backup: b.Backup, Target: f.Target, Offset: f.Offset, Length: f.Length, Image: b.Backup, Donor: f.Donor})
	}
	for _, hit := range hits {
		if hit.Image == b.Backup {
			parts = append(parts, catalog.Damage{Backup: hit.Backup, Target: hit.Target, Offset: hit.Offset, Length: hit.Length, Image: b.Backup})
		}
	}
	return parts
}

// consequences says to people who is hit as well, and what can be done.
func consequences(b transfer.BackupState, parts []catalog.Damage) (text string) {
	var others []string
	for _, p := range parts {
		if name := p.Backup + " (" + p.Target + ")"; p.Backup != b.Backup && !slices.Contains(others, name) {
			others = append(others, name)
		}
	}
	if len(others) > 0 {
		text = "; it is seen in " + strings.Join(others, ", ")
	}
	if repairable(b) {
		text += fmt.Sprintf("; backup %s holds the same: virtbackupctl repair %s", b.Damage[0].Donor, b.Backup)
	}
	return text
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

// Yields makes it a job.Yielder: what nobody has asked for can wait.
func (Verify) Yields(j catalog.Job) bool { return j.Origin == catalog.OriginSystem }

// Undo has nothing to undo.
func (Verify) Undo(context.Context, *job.Handle) error { return nil }
