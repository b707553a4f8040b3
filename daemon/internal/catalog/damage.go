package catalog

import (
	"context"
	"database/sql"
	"fmt"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/chain"
)

// Damage is a part of a disk of a backup that is not what was written.
type Damage struct {
	Backup         string
	Target         string // "" if it is not known to be of a disk
	Offset, Length uint64 // bytes, as the guest sees the disk
	Image          string // the backup whose file is damaged: this one, or one that it builds on
	Donor          string // where the same is held, so that it can be repaired; "" if that is not known
}

const parentDamaged = "its parent is damaged"

// DamagedBackup records that nothing of a backup can be trusted any more, nor of
// those that build on it; its chain is broken.
func (c *Catalog) DamagedBackup(ctx context.Context, id, message string) error {
	return c.RecordDamage(ctx, id, message, nil)
}

// RecordDamage records what is damaged by what was found of a backup's files, in
// place of what was known: parts of its disks, and of those of others that build
// on it; none for all of all. Those that are hit cannot be trusted any more, and
// the chain is broken. ErrState: the backup is not committed, or being deleted.
func (c *Catalog) RecordDamage(ctx context.Context, id, message string, parts []Damage) error {
	return c.write(ctx, "record damage of backup "+id, func(tx *sql.Tx) error {
		b, err := oneBackup(ctx, tx, id)
		if err != nil {
			return err
		}
		if b.State != chain.Complete && b.State != chain.Damaged {
			return fmt.Errorf("backup is %s: %w", b.State, ErrState)
		}
		if _, err := tx.ExecContext(ctx, "DELETE FROM damage WHERE image = ?", id); err != nil {
			return err
		}
		if len(parts) == 0 {
			_, err = tx.ExecContext(ctx, `WITH RECURSIVE above (id) AS (VALUES (?1) UNION SELECT b.id FROM backups AS b, above WHERE b.parent = above.id)
				INSERT INTO damage SELECT backups.id, '', 0, 0, ?1, '' FROM above JOIN backups USING (id) WHERE state <> 'running'`, id)
			if err != nil {
				return err
			}
		}
		for _, p := range parts {
			// One that was hit may just have been deleted.
			_, err := tx.ExecContext(ctx, "INSERT OR REPLACE INTO damage SELECT id, ?2, ?3, ?4, ?5, ?6 FROM backups WHERE id = ?1 AND chain = ?7 AND state <> 'running'",
				p.Backup, p.Target, p.Offset, p.Length, id, p.Donor, b.Chain)
			if err != nil {
				return err
			}
		}
		_, err = tx.ExecContext(ctx, `UPDATE backups SET state = 'damaged', error = CASE id WHEN ?1 THEN ?2 ELSE ?3 END
			WHERE id IN (SELECT backup FROM damage WHERE image = ?1) AND (state = 'complete' OR state = 'damaged' AND id = ?1)`, id, message, parentDamaged)
		if err != nil {
			return err
		}
		if err := completeUndamaged(ctx, tx, b.Chain); err != nil {
			return err
		}
		return endChain(ctx, tx, b.Chain, chain.Broken, chain.ParentDamaged)
	})
}

// completeUndamaged has those backups of a chain be complete again of which
// nothing is damaged any more.
func completeUndamaged(ctx context.Context, tx *sql.Tx, chainID string) error {
	_, err := tx.ExecContext(ctx, `UPDATE backups SET state = 'complete', error = '' WHERE chain = ? AND state = 'damaged'
		AND NOT EXISTS (SELECT 1 FROM damage WHERE backup = backups.id)`, chainID)
	return err
}

// VerifiedBackup records that the files of a backup were read back and are what
// was written. What was damaged because of them is complete again, unless it is
// for others.
func (c *Catalog) VerifiedBackup(ctx context.Context, id string, at time.Time) error {
	return c.write(ctx, "record that backup "+id+" is good", func(tx *sql.Tx) error {
		b, err := oneBackup(ctx, tx, id)
		if err != nil {
			return err
		}
		if _, err := tx.ExecContext(ctx, "UPDATE backups SET verified = ? WHERE id = ?", toMicro(at), id); err != nil {
			return err
		}
		if _, err := tx.ExecContext(ctx, "DELETE FROM damage WHERE image = ?", id); err != nil {
			return err
		}
		return completeUndamaged(ctx, tx, b.Chain)
	})
}

// inheritDamage has a backup that is being recorded be hit by what its parent is,
// but for disks that it holds whole.
func inheritDamage(ctx context.Context, tx *sql.Tx, id string) error {
	_, err := tx.ExecContext(ctx, `INSERT INTO damage SELECT ?1, target, start, length, image, '' FROM damage AS d
		WHERE backup = (SELECT parent FROM backups WHERE id = ?1)
		AND (target = '' OR EXISTS (SELECT 1 FROM images WHERE backup = ?1 AND target = d.target AND kind = 'incremental'))`, id)
	if err != nil {
		return err
	}
	_, err = tx.ExecContext(ctx, `UPDATE backups SET state = 'damaged', error = ?2
		WHERE id = ?1 AND state = 'complete' AND EXISTS (SELECT 1 FROM damage WHERE backup = ?1)`, id, parentDamaged)
	return err
}

// Damage returns what of a backup is damaged, disk by disk.
func (c *Catalog) Damage(ctx context.Context, backup string) (list []Damage, err error) {
	err = c.read(ctx, "read the damage of backup "+backup, func(tx *sql.Tx) (err error) {
		list, err = collect(ctx, tx, func(from row) (d Damage, err error) {
			err = from.Scan(&d.Backup, &d.Target, &d.Offset, &d.Length, &d.Image, &d.Donor)
			return d, err
		}, "SELECT backup, target, start, length, image, donor FROM damage WHERE backup = ? ORDER BY target, start, image", backup)
		return err
	})
	return list, err
}

// VerifiableChain is a chain of which something can be read back.
type VerifiableChain struct {
	ID         string
	Domain     string // UUID
	Repository string // id
	Newest     string // its newest complete backup
	Bytes      uint64 // of all
	Last       time.Time
}

// VerifiableChains returns the chains that have complete backups, and when the one
// of those was read back that waits the longest. Those in storage that is known
// not to be there are not among them.
func (c *Catalog) VerifiableChains(ctx context.Context) (all []VerifiableChain, err error) {
	err = c.read(ctx, "read when chains were verified", func(tx *sql.Tx) (err error) {
		all, err = collect(ctx, tx, func(from row) (v VerifiableChain, err error) {
			err = from.Scan(&v.ID, &v.Domain, &v.Repository, &v.Newest, &v.Bytes, timestamp{&v.Last})
			return v, err
		}, `SELECT c.id, c.domain, c.repository,
			(SELECT id FROM backups WHERE chain = c.id AND state = 'complete' ORDER BY sequence DESC LIMIT 1),
			sum(b.stored_bytes), min(max(b.verified, b.finished))
			FROM chains AS c JOIN backups AS b INDEXED BY backups_verified ON b.chain = c.id AND b.state = 'complete'
			WHERE c.repository IN (SELECT id FROM repositories WHERE state IN ('online', 'slow', 'unknown')) GROUP BY c.id`)
		return err
	})
	return all, err
}
