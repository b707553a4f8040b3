package catalog

import (
	"context"
	"database/sql"
	"errors"
	"fmt"

	"github.com/virtbackup/virtbackup/daemon/internal/chain"
)

// Pins returns the pins of the backups in a repository that other hosts made, by
// backup.
func (c *Catalog) Pins(ctx context.Context, repository string) (pins map[string]string, err error) {
	pins = map[string]string{}
	err = c.read(ctx, "read the pins of repository "+repository, func(tx *sql.Tx) error {
		_, err := collect(ctx, tx, func(from row) (string, error) {
			var id, pin string
			err := from.Scan(&id, &pin)
			pins[id] = pin
			return id, err
		}, "SELECT id, pin FROM backups WHERE repository = ? AND pin <> ''", repository)
		return err
	})
	return pins, err
}

// KnownBackups returns the state of each backup of a repository that is known and
// did not fail, by its id.
func (c *Catalog) KnownBackups(ctx context.Context, repository string) (known map[string]chain.BackupState, err error) {
	known = map[string]chain.BackupState{}
	err = c.read(ctx, "read backups of repository "+repository, func(tx *sql.Tx) error {
		_, err := collect(ctx, tx, func(from row) (string, error) {
			var id string
			var state chain.BackupState
			err := from.Scan(&id, &state)
			known[id] = state
			return id, err
		}, "SELECT id, state FROM backups WHERE repository = ? AND state <> 'failed'", repository)
		return err
	})
	return known, err
}

// RepinBackup records that another host has written images of a backup of its own
// anew, which hold the same as when it was imported. ErrState: it is this host's,
// or is being deleted.
func (c *Catalog) RepinBackup(ctx context.Context, done Compressed, pin string) error {
	return c.write(ctx, "record that backup "+done.Backup+" was written anew by its host", func(tx *sql.Tx) error {
		err := exactlyOne(tx.ExecContext(ctx, "UPDATE backups SET pin = ? WHERE id = ? AND pin <> ''", pin, done.Backup))
		if errors.Is(err, ErrNotFound) {
			return fmt.Errorf("it is no backup of another host: %w", ErrState)
		}
		if err != nil {
			return err
		}
		return rewritten(ctx, tx, done)
	})
}

// ImportBackup records a backup that was found in a repository: complete or
// damaged, with its chain if that is not known yet. A chain of this host's goes
// on if there is no other open one of the domain there; what changed since then
// is found by comparing. ErrExists: it is known already.
func (c *Catalog) ImportBackup(ctx context.Context, b Backup) error {
	return c.write(ctx, "import backup "+b.ID, func(tx *sql.Tx) error {
		if err := mustExist(ctx, tx, "repository", "repositories", "id", b.Repository); err != nil {
			return err
		}
		// The name may be an old one: only a domain that is not known gets it.
		if _, err := tx.ExecContext(ctx, "INSERT INTO domains (uuid, name) VALUES (?, ?) ON CONFLICT (uuid) DO NOTHING", b.Domain, b.DomainName); err != nil {
			return err
		}
		if _, err := tx.ExecContext(ctx, "DELETE FROM backups WHERE id = ? AND state = 'failed'", b.ID); err != nil {
			return err
		}
		if b.Parent != "" {
			var state chain.BackupState
			var pin string
			err := tx.QueryRowContext(ctx, "SELECT state, pin FROM backups WHERE id = ?", b.Parent).Scan(&state, &pin)
			switch {
			case errors.Is(err, sql.ErrNoRows):
				return fmt.Errorf("it builds on backup %s, which is not known: %w", b.Parent, ErrState)
			case err != nil:
				return err
			case state == chain.Deleting || state == chain.Running:
				return fmt.Errorf("it builds on backup %s, which is %s: %w", b.Parent, state, ErrState)
			case b.Pin != "" && pin == "":
				return fmt.Errorf("another host's, it builds on backup %s, which is this host's: %w", b.Parent, ErrState)
			case state != chain.Complete && b.State == chain.Complete:
				b.State, b.Error = chain.Damaged, parentDamaged
			}
		}
		if err := importChain(ctx, tx, b); err != nil {
			return err
		}
		id := b.Chain
		if err := insertBackup(ctx, tx, b); err != nil {
			return err
		}
		if err := insertImages(ctx, tx, b.ID, b.Images); err != nil {
			return err
		}
		_, err := tx.ExecContext(ctx, `UPDATE backups SET chain = ?, state = ?, error = ?, finished = ?, manifest = ?, held = ?, shortfall = ?, pin = ?,
			stored_bytes = (SELECT sum(stored_bytes) FROM images WHERE backup = ?9), data_bytes = (SELECT sum(data_bytes) FROM images WHERE backup = ?9),
			sequence = coalesce((SELECT min(sequence) FROM backups WHERE domain = ?10 AND repository = ?11 AND id > ?9 AND sequence > 0),
				(SELECT max(sequence) + 1 FROM backups)) WHERE id = ?9`, // one that is found late is no newer for that
			id, b.State, b.Error, toMicro(b.Finished), string(b.Manifest), b.Held.Microseconds(), b.Shortfall, b.Pin, b.ID, b.Domain, b.Repository)
		if err != nil {
			return err
		}
		if b.State == chain.Damaged && b.Error != parentDamaged {
			if _, err := tx.ExecContext(ctx, "INSERT INTO damage VALUES (?1, '', 0, 0, ?1, '')", b.ID); err != nil {
				return err
			}
		}
		return inheritDamage(ctx, tx, b.ID)
	})
}

// importChain records the chain of an imported backup unless it is known. It is
// open only if it is this host's and the backup complete, and then the one that
// was open before it is finished.
func importChain(ctx context.Context, tx *sql.Tx, b Backup) error {
	var known bool
	if err := tx.QueryRowContext(ctx, "SELECT EXISTS (SELECT 1 FROM chains WHERE id = ?)", b.Chain).Scan(&known); err != nil {
		return err
	}
	open := !b.Isolated && b.Pin == "" && b.State == chain.Complete
	if known {
		var ours bool
		err := tx.QueryRowContext(ctx, "SELECT EXISTS (SELECT 1 FROM backups WHERE chain = ? AND (pin = '') <> (? = ''))", b.Chain, b.Pin).Scan(&ours)
		if err != nil {
			return err
		}
		if ours {
			return fmt.Errorf("its chain %s is of more than one host: %w", b.Chain, ErrState)
		}
		if !open && b.State != chain.Complete {
			return endChain(ctx, tx, b.Chain, chain.Broken, chain.ParentDamaged)
		}
		return nil
	}
	state, cause := chain.Finished, chain.Imported
	if open {
		var other bool
		err := tx.QueryRowContext(ctx, "SELECT EXISTS (SELECT 1 FROM chains WHERE domain = ? AND repository = ? AND state = 'open' AND id > ?)",
			b.Domain, b.Repository, b.Chain).Scan(&other)
		if err != nil {
			return err
		}
		if !other {
			older, err := collect(ctx, tx, scanString, "SELECT id FROM chains WHERE domain = ? AND repository = ? AND state = 'open'", b.Domain, b.Repository)
			if err != nil {
				return err
			}
			for _, id := range older {
				if err := endChain(ctx, tx, id, chain.Finished, chain.Imported); err != nil {
					return err
				}
			}
			state, cause = chain.Open, ""
		}
	}
	_, err := tx.ExecContext(ctx, "INSERT INTO chains (id, domain, repository, offering, isolated, state, cause, created) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
		b.Chain, b.Domain, b.Repository, b.Offering, b.Isolated, state, cause, toMicro(b.Created))
	return err
}
