package catalog

import (
	"context"
	"database/sql"
	"encoding/json"
	"fmt"

	"github.com/virtbackup/virtbackup/daemon/internal/chain"
)

// HoldBackup has a backup stay, for a reason, until it is released with none.
// ErrState: it is being deleted, or not made yet; ErrInUse: it is just being
// merged into another one.
func (c *Catalog) HoldBackup(ctx context.Context, id, reason string) error {
	return c.write(ctx, "hold backup "+id, func(tx *sql.Tx) error {
		b, err := oneBackup(ctx, tx, id)
		if err != nil {
			return err
		}
		if reason != "" && b.State != chain.Complete && b.State != chain.Damaged {
			return fmt.Errorf("backup is %s: %w", b.State, ErrState)
		}
		merging, err := collect(ctx, tx, scanString, `SELECT jobs.id FROM jobs, json_each(iif(step = 'merging', step_data, '{}'), '$.merge.drop') AS dropped
			WHERE domain = ? AND finished = 0 AND kind = 'prune' AND dropped.value = ?`, b.Domain, id)
		if err != nil {
			return err
		}
		if reason != "" && len(merging) > 0 {
			return fmt.Errorf("job %s merges it into another backup: %w", merging[0], ErrInUse)
		}
		return exactlyOne(tx.ExecContext(ctx, "UPDATE backups SET hold = ? WHERE id = ?", reason, id))
	})
}

// PlaceBackups returns all backups of a domain in a repository that did not
// fail, in the order in which they were committed, without images and manifests.
func (c *Catalog) PlaceBackups(ctx context.Context, domain, repository string) (list []Backup, err error) {
	err = c.read(ctx, "read backups of domain "+domain, func(tx *sql.Tx) (err error) {
		list, err = collect(ctx, tx, scanBackup, "SELECT "+backupColumns+` FROM backups
			WHERE domain = ? AND repository = ? AND state <> 'failed' ORDER BY sequence, id`, domain, repository)
		return err
	})
	return list, err
}

// Places returns the repositories that have backups of a domain.
func (c *Catalog) Places(ctx context.Context, domain string) (repositories []string, err error) {
	err = c.read(ctx, "find backups of domain "+domain, func(tx *sql.Tx) (err error) {
		repositories, err = collect(ctx, tx, scanString, `SELECT DISTINCT repository FROM backups
			WHERE domain = ? AND state NOT IN ('running', 'failed') ORDER BY repository`, domain)
		return err
	})
	return repositories, err
}

// Merged is what is known of a merge once it is in the repository.
type Merged struct {
	chain.Merge
	Manifest json.RawMessage // of Into
	Images   []MergedImage   // all of Into's
}

// MergedImage is what of an image may change when it is written anew.
type MergedImage struct {
	Target                 string
	Kind                   chain.Kind
	Changes                chain.Tracking
	StoredBytes, DataBytes uint64
}

// BeginMerge records, as the job's step, that backups are going to be merged into
// the one that builds on them. Errors are those of MergeBackups.
func (c *Catalog) BeginMerge(ctx context.Context, m chain.Merge, step Step) error {
	return c.write(ctx, "begin to merge backups into "+m.Into, func(tx *sql.Tx) error {
		if err := mergeable(ctx, tx, m); err != nil {
			return err
		}
		return recordStep(ctx, tx, step)
	})
}

// mergeable holds a merge against how the backups build on each other.
func mergeable(ctx context.Context, tx *sql.Tx, m chain.Merge) error {
	into, err := oneBackup(ctx, tx, m.Into)
	if err != nil {
		return err
	}
	at, above := into.Parent, m.Into
	for _, id := range m.Drop {
		var others string
		err := tx.QueryRowContext(ctx, "SELECT coalesce(group_concat(id, ' '), '') FROM backups WHERE parent = ? AND id <> ?", id, above).Scan(&others)
		if err != nil {
			return err
		}
		if others != "" {
			return fmt.Errorf("on backup %s builds %s as well: %w", id, others, ErrInUse)
		}
		b, err := oneBackup(ctx, tx, id)
		switch {
		case err != nil:
			return err
		case id != at || b.State != chain.Complete || into.State != chain.Complete:
			return fmt.Errorf("backup %s, which is %s, does not build on %s, which is %s: %w", m.Into, into.State, id, b.State, ErrState)
		case b.Hold != "":
			return fmt.Errorf("backup %s is held (%s): %w", id, b.Hold, ErrInUse)
		}
		at, above = b.Parent, id
	}
	if at != m.Base {
		return fmt.Errorf("the backups stand on %q and not on %q: %w", at, m.Base, ErrState)
	}
	return nil
}

// MergeBackups records that a backup has taken over what those below it held:
// it builds on their base, and they are being deleted, together with the job's
// step. ErrState: that is not how they build on each other, or one is not
// complete; ErrInUse: one that goes is held.
func (c *Catalog) MergeBackups(ctx context.Context, m Merged, step Step) error {
	return c.write(ctx, "merge backups into "+m.Into, func(tx *sql.Tx) error {
		if err := mergeable(ctx, tx, m.Merge); err != nil {
			return err
		}
		for _, id := range m.Drop {
			if _, err := tx.ExecContext(ctx, "UPDATE backups SET state = 'deleting' WHERE id = ?", id); err != nil {
				return err
			}
		}
		if err := updateMerged(ctx, tx, m); err != nil {
			return err
		}
		if err := dueAfterMerge(ctx, tx, m.Merge); err != nil {
			return err
		}
		return recordStep(ctx, tx, step)
	})
}

// updateImages records what images became that were written anew.
func updateImages(ctx context.Context, tx *sql.Tx, backup string, images []MergedImage) error {
	for _, i := range images {
		err := exactlyOne(tx.ExecContext(ctx, `UPDATE images SET kind = ?1, changes = ?2, stored_bytes = ?3, data_bytes = ?4,
			cause = iif(kind = 'incremental' AND ?1 = 'full', 'merged', cause) WHERE backup = ?5 AND target = ?6`,
			i.Kind, i.Changes, i.StoredBytes, i.DataBytes, backup, i.Target))
		if err != nil {
			return fmt.Errorf("image %s: %w", i.Target, err)
		}
	}
	return nil
}

func updateMerged(ctx context.Context, tx *sql.Tx, m Merged) error {
	if err := updateImages(ctx, tx, m.Into, m.Images); err != nil {
		return err
	}
	_, err := tx.ExecContext(ctx, `UPDATE backups SET parent = nullif(?1, ''), manifest = ?2,
		kind = iif(?1 = '', 'full', kind), cause = iif(?1 = '', 'merged', cause),
		stored_bytes = (SELECT sum(stored_bytes) FROM images WHERE backup = ?3), data_bytes = (SELECT sum(data_bytes) FROM images WHERE backup = ?3)
		WHERE id = ?3`, m.Base, string(m.Manifest), m.Into)
	return err
}
