package catalog

import (
	"cmp"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/chain"
)

// Step is a durable note of how far a job has come: all that it needs to carry
// on after a restart.
type Step struct {
	Job  string
	Name string
	Data json.RawMessage
}

// CreateBackup records the intent to make a backup before anything is done for
// it: the backup (state running), its checkpoint (pending; "" for none) and the
// job's step, at once. ErrExists: the id or the checkpoint's name was used
// before. ErrState: the parent cannot be built upon. ErrQuota: a quota forbids it.
func (c *Catalog) CreateBackup(ctx context.Context, b Backup, checkpoint string, step Step) error {
	return c.write(ctx, "create backup "+b.ID, func(tx *sql.Tx) error {
		if err := mustExist(ctx, tx, "repository", "repositories", "id", b.Repository); err != nil {
			return err
		}
		if err := seenDomain(ctx, tx, b.Domain, b.DomainName); err != nil {
			return err
		}
		if err := checkQuota(ctx, tx, b); err != nil {
			return err
		}
		if b.Kind == chain.Incremental {
			if err := mustBeTip(ctx, tx, b); err != nil {
				return err
			}
		} else {
			b.Chain = b.ID
		}
		if err := insertBackup(ctx, tx, b); err != nil {
			return err
		}
		if err := insertImages(ctx, tx, b.ID, b.Images); err != nil {
			return err
		}
		if checkpoint != "" {
			_, err := tx.ExecContext(ctx, "INSERT INTO checkpoints (name, domain, backup, chain, state, xml) VALUES (?, ?, ?, ?, 'pending', '')",
				checkpoint, b.Domain, b.ID, b.Chain)
			if err != nil {
				return err
			}
		}
		return recordStep(ctx, tx, step)
	})
}

// mustBeTip refuses an increment on anything but the newest backup of an open
// chain, and a second one while the first runs: a chain has no branches.
func mustBeTip(ctx context.Context, tx *sql.Tx, b Backup) error {
	var open bool
	err := tx.QueryRowContext(ctx, "SELECT state = 'open' FROM chains WHERE id = ? AND domain = ? AND repository = ?",
		b.Chain, b.Domain, b.Repository).Scan(&open)
	if errors.Is(err, sql.ErrNoRows) {
		return fmt.Errorf("chain %q of this domain and repository: %w", b.Chain, ErrNotFound)
	}
	if err != nil {
		return err
	}
	tip, err := chainTip(ctx, tx, b.Chain)
	if err != nil {
		return err
	}
	if !open || tip == nil || tip.ID != b.Parent || tip.State != chain.Complete {
		return fmt.Errorf("parent %q is not the newest backup of an open chain: %w", b.Parent, ErrState)
	}
	running, err := collect(ctx, tx, scanString, "SELECT id FROM backups WHERE chain = ? AND state = 'running'", b.Chain)
	if err != nil {
		return err
	}
	if len(running) > 0 {
		return fmt.Errorf("backups %v of the chain are running: %w", running, ErrState)
	}
	return nil
}

func insertBackup(ctx context.Context, tx *sql.Tx, b Backup) error {
	null := func(s string) sql.NullString { return sql.NullString{String: s, Valid: s != ""} }
	if b.Kind == chain.Full {
		b.Chain = "" // made when the backup is committed
	}
	_, err := tx.ExecContext(ctx, `INSERT INTO backups (id, domain, domain_name, chain, parent, repository, job, kind, state, cause,
		isolated, consistency, created, finished, size, stored_bytes, data_bytes, error,
		offering, mode, compression, compression_time, level, threads, chain_size, quiesce, quiesce_policy, tracking, fallback, mark, uid, manifest)
		VALUES (?, ?, ?, ?, ?, ?, ?, ?, 'running', ?, ?, ?, ?, 0, ?, 0, 0, '', ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, '')`,
		b.ID, b.Domain, b.DomainName, null(b.Chain), null(b.Parent), b.Repository, b.Job, b.Kind, b.Cause,
		b.Isolated, b.Consistency, toMicro(b.Created), b.Size,
		b.Offering, b.Mode, b.Compression, cmp.Or(b.CompressionTime, "inline"), b.Level, b.Threads, b.ChainSize, b.Quiesce, b.QuiescePolicy, b.Tracking, b.Fallback, b.Mark, b.UID)
	return err
}

func insertImages(ctx context.Context, tx *sql.Tx, backup string, images []Image) error {
	for position, i := range images {
		backing, err := json.Marshal(i.Backing)
		if err != nil {
			return err
		}
		_, err = tx.ExecContext(ctx, "INSERT INTO images (backup, position, "+imageColumns+") VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
			backup, position, i.Target, i.Kind, i.Tracking, i.Changes, i.Cause, i.Source, i.Format, i.Size, i.StoredBytes, i.DataBytes,
			i.ReadBytes, string(backing), i.Run, i.Node)
		if err != nil {
			return err
		}
	}
	return nil
}

// Commit is what is known of a backup once it is in the repository.
type Commit struct {
	Finished    time.Time
	Consistency string
	Held        time.Duration
	Shortfall   string
	Manifest    json.RawMessage
	Images      []Image // replace those of CreateBackup
}

// CommitBackup records that a backup's manifest is in the repository. In one
// transaction the backup becomes complete, its chain is made or extended, its
// checkpoint becomes the current one and the one before obsolete; a full
// backup ends the chain before it. When the increment's chain was ended while
// it ran, the backup is kept, but the chain stays ended. On a committed backup
// it does nothing. ErrState: the backup failed or is being deleted.
func (c *Catalog) CommitBackup(ctx context.Context, id string, done Commit) error {
	return c.write(ctx, "commit backup "+id, func(tx *sql.Tx) error {
		b, err := oneBackup(ctx, tx, id)
		if err != nil {
			return err
		}
		switch b.State {
		case chain.Running:
		case chain.Complete, chain.Damaged:
			return nil
		default:
			return fmt.Errorf("backup is %s: %w", b.State, ErrState)
		}
		open := false
		if b.Kind == chain.Full {
			open, err = startChain(ctx, tx, b)
		} else {
			err = tx.QueryRowContext(ctx, "SELECT state = 'open' FROM chains WHERE id = ?", b.Chain).Scan(&open)
		}
		if err != nil {
			return err
		}
		if err := advanceCheckpoint(ctx, tx, b, open); err != nil {
			return err
		}
		return completeBackup(ctx, tx, b, done)
	})
}

// startChain makes the chain of a full backup; it is open unless the backup is isolated.
func startChain(ctx context.Context, tx *sql.Tx, b Backup) (open bool, err error) {
	state, cause := chain.Open, chain.Cause("")
	if b.Isolated {
		state, cause = chain.Finished, chain.Isolated
	} else {
		before, err := collect(ctx, tx, scanString,
			"SELECT id FROM chains WHERE domain = ? AND repository = ? AND state = 'open'", b.Domain, b.Repository)
		if err != nil {
			return false, err
		}
		for _, id := range before {
			if err := endChain(ctx, tx, id, chain.Finished, b.Cause); err != nil {
				return false, err
			}
		}
	}
	_, err = tx.ExecContext(ctx, "INSERT INTO chains (id, domain, repository, offering, isolated, state, cause, created) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
		b.ID, b.Domain, b.Repository, b.Offering, b.Isolated, state, cause, toMicro(b.Created))
	return state == chain.Open, err
}

// advanceCheckpoint makes the backup's checkpoint the chain's current one. A
// chain that has ended needs none.
func advanceCheckpoint(ctx context.Context, tx *sql.Tx, b Backup, open bool) error {
	_, err := tx.ExecContext(ctx, "UPDATE checkpoints SET state = 'obsolete' WHERE chain = ? AND state = 'current'", b.Chain)
	if err != nil {
		return err
	}
	next := CheckpointObsolete
	if open {
		next = CheckpointCurrent
	}
	_, err = tx.ExecContext(ctx, "UPDATE checkpoints SET state = ? WHERE backup = ? AND state = 'pending'", next, b.ID)
	return err
}

func completeBackup(ctx context.Context, tx *sql.Tx, b Backup, done Commit) error {
	if _, err := tx.ExecContext(ctx, "DELETE FROM images WHERE backup = ?", b.ID); err != nil {
		return err
	}
	if err := insertImages(ctx, tx, b.ID, done.Images); err != nil {
		return err
	}
	var size, stored, data uint64
	for _, i := range done.Images {
		size, stored, data = size+i.Size, stored+i.StoredBytes, data+i.DataBytes
	}
	_, err := tx.ExecContext(ctx, `UPDATE backups SET chain = ?, consistency = ?, finished = ?, manifest = ?, size = ?, stored_bytes = ?, data_bytes = ?,
		held = ?, shortfall = ?, sequence = (SELECT max(sequence) + 1 FROM backups),
		compression_state = iif(compression_time = 'deferred' AND compression <> 'none', 'due', ''),
		state = 'complete', error = '' WHERE id = ?`,
		b.Chain, done.Consistency, toMicro(done.Finished), string(done.Manifest), size, stored, data,
		done.Held.Microseconds(), done.Shortfall, b.ID)
	if err != nil {
		return err
	}
	// Nothing that is listed as complete may fail to restore.
	return inheritDamage(ctx, tx, b.ID)
}

// FailBackup records that a backup came to nothing: its checkpoint becomes
// obsolete, the chain stays as it was. On a failed backup it does nothing.
// ErrState: the backup is committed.
func (c *Catalog) FailBackup(ctx context.Context, id, message string, finished time.Time) error {
	return c.write(ctx, "record failure of backup "+id, func(tx *sql.Tx) error {
		var state chain.BackupState
		if err := tx.QueryRowContext(ctx, "SELECT state FROM backups WHERE id = ?", id).Scan(&state); err != nil {
			return err
		}
		switch state {
		case chain.Failed:
			return nil
		case chain.Running:
		default:
			return fmt.Errorf("backup is %s: %w", state, ErrState)
		}
		_, err := tx.ExecContext(ctx, "UPDATE checkpoints SET state = 'obsolete' WHERE backup = ? AND state = 'pending'", id)
		if err != nil {
			return err
		}
		_, err = tx.ExecContext(ctx, "UPDATE backups SET state = 'failed', chain = NULL, parent = NULL, error = ?, finished = ? WHERE id = ?", message, toMicro(finished), id)
		return err
	})
}
