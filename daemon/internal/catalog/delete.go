package catalog

import (
	"context"
	"database/sql"
	"fmt"

	"github.com/virtbackup/virtbackup/daemon/internal/chain"
)

// BeginDelete records that these backups are going to be deleted, together
// with the job's step: from now on nothing is built on them or restored from
// them. A chain that loses its newest backup ends. ErrInUse: a backup that is
// not among them builds on one of them; ErrState: one is running.
func (c *Catalog) BeginDelete(ctx context.Context, ids []string, step Step) error {
	return c.write(ctx, "begin deletion", func(tx *sql.Tx) error {
		ended := map[string]bool{}
		for _, id := range ids {
			b, err := oneBackup(ctx, tx, id)
			if err != nil {
				return fmt.Errorf("backup %s: %w", id, err)
			}
			if b.Hold != "" {
				return fmt.Errorf("backup %s is held (%s): %w", id, b.Hold, ErrInUse)
			}
			if b.State == chain.Running {
				return fmt.Errorf("backup %s is %s: %w", id, b.State, ErrState)
			}
			tip, err := chainTip(ctx, tx, b.Chain)
			if err != nil {
				return err
			}
			if tip != nil && tip.ID == id {
				ended[b.Chain] = true
			}
			if _, err := tx.ExecContext(ctx, "UPDATE backups SET state = 'deleting' WHERE id = ?", id); err != nil {
				return err
			}
		}
		if err := noneBuildsOn(ctx, tx, ids); err != nil {
			return err
		}
		for id := range ended {
			if err := endChain(ctx, tx, id, chain.Finished, chain.BackupDeleted); err != nil {
				return err
			}
		}
		return recordStep(ctx, tx, step)
	})
}

func noneBuildsOn(ctx context.Context, tx *sql.Tx, ids []string) error {
	var q conditions
	oneOf(&q, "parent.id", ids)
	children, err := collect(ctx, tx, scanString, `SELECT child.id FROM backups AS child JOIN backups AS parent ON child.parent = parent.id
		AND parent.state = 'deleting' AND child.state <> 'deleting'`+q.where()+" ORDER BY child.id", q.args...)
	if err != nil {
		return err
	}
	if len(children) > 0 {
		return fmt.Errorf("backups %v build on it: %w", children, ErrInUse)
	}
	return nil
}

// KeepBackups takes back BeginDelete for backups that are still whole: each is
// what it was before, complete or damaged. Their chains stay ended. Others than
// those being deleted are passed over.
func (c *Catalog) KeepBackups(ctx context.Context, ids []string) error {
	return c.write(ctx, "keep backups", func(tx *sql.Tx) error {
		for _, id := range ids {
			_, err := tx.ExecContext(ctx, `UPDATE backups SET (state, error) =
				(SELECT 'damaged', iif(backups.error = '', ?2, backups.error) FROM damage WHERE backup = ?1 UNION ALL SELECT 'complete', '' LIMIT 1)
				WHERE id = ?1 AND state = 'deleting'`, id, parentDamaged)
			if err != nil {
				return err
			}
		}
		return nil
	})
}

// ForgetBackups forgets all backups of a repository, which stay where they are,
// and their chains: what was made on domains for the next increments is to be
// removed. ErrState: one is being made.
func (c *Catalog) ForgetBackups(ctx context.Context, repository string) (forgotten int, err error) {
	err = c.write(ctx, "forget the backups of repository "+repository, func(tx *sql.Tx) error {
		var running bool
		if err := tx.QueryRowContext(ctx, "SELECT EXISTS (SELECT 1 FROM backups WHERE repository = ? AND state = 'running')", repository).Scan(&running); err != nil {
			return err
		}
		if running {
			return fmt.Errorf("a backup is being made: %w", ErrState)
		}
		chains, err := collect(ctx, tx, scanString, "SELECT id FROM chains WHERE repository = ?", repository)
		if err != nil {
			return err
		}
		for _, id := range chains {
			if err := endChain(ctx, tx, id, chain.Finished, chain.BackupDeleted); err != nil {
				return err
			}
		}
		gone, err := tx.ExecContext(ctx, "DELETE FROM backups WHERE repository = ?", repository)
		if err != nil {
			return err
		}
		n, err := gone.RowsAffected()
		if err != nil {
			return err
		}
		forgotten = int(n)
		_, err = tx.ExecContext(ctx, "DELETE FROM chains WHERE repository = ?", repository)
		return err
	})
	return forgotten, err
}

// DeleteBackups forgets backups that are gone from the repository, and the
// chains that have none left. ErrState: BeginDelete was not called for one.
// Ids that are not known (any more) are passed over.
func (c *Catalog) DeleteBackups(ctx context.Context, ids []string) error {
	return c.write(ctx, "forget deleted backups", func(tx *sql.Tx) error {
		for _, id := range ids {
			state, err := collect(ctx, tx, scanString, "SELECT state FROM backups WHERE id = ?", id)
			if err != nil {
				return err
			}
			if len(state) == 1 && state[0] != string(chain.Deleting) {
				return fmt.Errorf("backup %s is %s: %w", id, state[0], ErrState)
			}
			if _, err := tx.ExecContext(ctx, "DELETE FROM backups WHERE id = ?", id); err != nil {
				return err
			}
		}
		_, err := tx.ExecContext(ctx, "DELETE FROM chains WHERE NOT EXISTS (SELECT 1 FROM backups WHERE chain = chains.id)")
		return err
	})
}
