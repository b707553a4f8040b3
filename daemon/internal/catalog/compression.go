package catalog

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/chain"
)

// CompressionState is how far a backup is compressed by a job after it; "" if it
// is not to be.
type CompressionState string

// The states.
const (
	CompressionDue    CompressionState = "due"
	CompressionDone   CompressionState = "done"
	CompressionFailed CompressionState = "failed"
)

// DueCompressions returns the complete backups that are to be compressed now, the
// oldest first, so many at most. Those in storage that is known not to be there
// are not due.
func (c *Catalog) DueCompressions(ctx context.Context, now time.Time, most int) (list []Backup, err error) {
	err = c.read(ctx, "list backups to be compressed", func(tx *sql.Tx) (err error) {
		list, err = collect(ctx, tx, scanBackup, "SELECT "+backupColumns+` FROM backups
			WHERE compression_state = 'due' AND state = 'complete' AND compression_next <= ?
			AND repository IN (SELECT id FROM repositories WHERE state IN ('online', 'slow', 'unknown')) ORDER BY id LIMIT ?`, toMicro(now), most)
		return err
	})
	return list, err
}

// Compressed is what is known of a backup once it is compressed in the repository.
type Compressed struct {
	Backup   string
	Manifest json.RawMessage
	Images   []MergedImage // all of its
}

// CompressedBackup records that a backup was compressed, or that this made it no
// smaller. ErrState: it is not complete.
func (c *Catalog) CompressedBackup(ctx context.Context, done Compressed) error {
	return c.write(ctx, "record that backup "+done.Backup+" is compressed", func(tx *sql.Tx) error {
		if err := rewritten(ctx, tx, done); err != nil {
			return err
		}
		return setCompression(ctx, tx, done.Backup, "compression_state = ?2, compression_error = ''", CompressionDone)
	})
}

// RewrittenBackup records that images of a backup were written anew, and hold the
// same. ErrState: it is not committed, or being deleted.
func (c *Catalog) RewrittenBackup(ctx context.Context, done Compressed) error {
	return c.write(ctx, "record that backup "+done.Backup+" was written anew", func(tx *sql.Tx) error { return rewritten(ctx, tx, done) })
}

func rewritten(ctx context.Context, tx *sql.Tx, done Compressed) error {
	if err := updateImages(ctx, tx, done.Backup, done.Images); err != nil {
		return err
	}
	return setCompression(ctx, tx, done.Backup, `manifest = ?2, stored_bytes = (SELECT sum(stored_bytes) FROM images WHERE backup = ?1),
		data_bytes = (SELECT sum(data_bytes) FROM images WHERE backup = ?1)`, string(done.Manifest))
}

// CompressionFailed records why a backup is not compressed that was to be, for
// good. ErrState: it is not complete, or was not to be.
func (c *Catalog) CompressionFailed(ctx context.Context, id, why string) error {
	return c.notCompressed(ctx, id, CompressionFailed, why, time.Time{})
}

// PutOffCompression records why a backup is not compressed yet that is to be, and
// when it is due again. ErrState: as of CompressionFailed.
func (c *Catalog) PutOffCompression(ctx context.Context, id, why string, until time.Time) error {
	return c.notCompressed(ctx, id, CompressionDue, why, until)
}

func (c *Catalog) notCompressed(ctx context.Context, id string, state CompressionState, why string, until time.Time) error {
	return c.write(ctx, "record that backup "+id+" is not compressed", func(tx *sql.Tx) error {
		if err := mustExist(ctx, tx, "backup", "backups", "id", id); err != nil {
			return err
		}
		err := exactlyOne(tx.ExecContext(ctx, `UPDATE backups SET compression_state = ?, compression_error = ?, compression_next = ?
			WHERE id = ? AND compression_state = 'due' AND state = 'complete'`, state, why, toMicro(until), id))
		if errors.Is(err, ErrNotFound) {
			return fmt.Errorf("it is not to be compressed: %w", ErrState)
		}
		return err
	})
}

func setCompression(ctx context.Context, tx *sql.Tx, id, set string, arg any) error {
	var state chain.BackupState
	if err := tx.QueryRowContext(ctx, "SELECT state FROM backups WHERE id = ?", id).Scan(&state); err != nil {
		return err
	}
	if state != chain.Complete && state != chain.Damaged {
		return fmt.Errorf("backup is %s: %w", state, ErrState)
	}
	_, err := tx.ExecContext(ctx, "UPDATE backups SET "+set+" WHERE id = ?1", id, arg)
	return err
}

// dueAfterMerge has a backup compressed again that has taken over what was not.
func dueAfterMerge(ctx context.Context, tx *sql.Tx, m chain.Merge) error {
	for _, id := range m.Drop {
		_, err := tx.ExecContext(ctx, `UPDATE backups SET compression_state = 'due', compression_next = 0 WHERE id = ?1 AND compression_state = 'done'
			AND EXISTS (SELECT 1 FROM backups AS d WHERE d.id = ?2 AND d.compression_state <> 'done'
				AND NOT (d.compression_time = 'inline' AND d.compression <> 'none'))`, m.Into, id)
		if err != nil {
			return err
		}
	}
	return nil
}
