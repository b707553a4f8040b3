// Package catalog remembers what virtbackup knows: repositories, offerings,
// domains, chains, backups, checkpoints and jobs. It is one SQLite file on a
// local disk. Every exported method that writes is one transaction that is on
// disk when it returns, so that intent can be recorded before a side effect.
//
// The repositories hold all that a restore needs; the catalog can be made anew
// from them.
package catalog

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

var (
	// ErrNotFound says that there is no object with that id or name.
	ErrNotFound = errors.New("not found")
	// ErrExists says that the id, name or path is taken.
	ErrExists = errors.New("exists already")
	// ErrInUse says that other objects refer to this one.
	ErrInUse = errors.New("in use")
	// ErrState says that the object's state does not allow the change.
	ErrState = errors.New("state does not allow it")
)

// Catalog is the open database. It is safe for concurrent use.
type Catalog struct {
	writer  *sql.DB // one connection: writers queue in Go, not in SQLite
	readers *sql.DB
}

// Close closes the database. Calls that are under way end first.
func (c *Catalog) Close() error {
	return errors.Join(c.readers.Close(), c.writer.Close())
}

// write runs fn in one immediate transaction; doing says what for in the error.
func (c *Catalog) write(ctx context.Context, doing string, fn func(tx *sql.Tx) error) error {
	err := inTransaction(ctx, c.writer, fn)
	if err != nil {
		return fmt.Errorf("cannot %s: %w", doing, classify(err))
	}
	return nil
}

// read runs fn in one read transaction, so that what it reads fits together.
func (c *Catalog) read(ctx context.Context, doing string, fn func(tx *sql.Tx) error) error {
	err := inTransaction(ctx, c.readers, fn)
	if err != nil {
		return fmt.Errorf("cannot %s: %w", doing, classify(err))
	}
	return nil
}

func inTransaction(ctx context.Context, db *sql.DB, fn func(tx *sql.Tx) error) error {
	tx, err := db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback() }() // does nothing after Commit
	if err := fn(tx); err != nil {
		return err
	}
	return tx.Commit()
}

// classify turns SQLite's constraint errors into the package's sentinels.
func classify(err error) error {
	if errors.Is(err, sql.ErrNoRows) {
		return ErrNotFound
	}
	var se *sqlite.Error
	if !errors.As(err, &se) {
		return err
	}
	switch se.Code() {
	case sqlite3.SQLITE_CONSTRAINT_UNIQUE, sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY:
		return fmt.Errorf("%w (%w)", ErrExists, err)
	case sqlite3.SQLITE_CONSTRAINT_FOREIGNKEY, sqlite3.SQLITE_CONSTRAINT_TRIGGER:
		return fmt.Errorf("%w (%w)", ErrInUse, err)
	}
	return err
}

// exactlyOne refuses a statement that changed no row.
func exactlyOne(r sql.Result, err error) error {
	if err != nil {
		return err
	}
	n, err := r.RowsAffected()
	if err != nil {
		return err
	}
	if n == 0 {
		return ErrNotFound
	}
	return nil
}

// row is what *sql.Row and *sql.Rows share.
type row interface{ Scan(dest ...any) error }

// collect reads all rows of a query with scan.
func collect[T any](ctx context.Context, tx *sql.Tx, scan func(row) (T, error), query string, args ...any) ([]T, error) {
	rows, err := tx.QueryContext(ctx, query, args...)
	if err != nil {
		return nil, err
	}
	defer func() { _ = rows.Close() }() // after Next is false, it is closed already
	var all []T
	for rows.Next() {
		one, err := scan(rows)
		if err != nil {
			return nil, err
		}
		all = append(all, one)
	}
	return all, rows.Err()
}

// Times are kept in microseconds since the epoch, 0 for the zero time.
func toMicro(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMicro()
}

func fromMicro(us int64) time.Time {
	if us == 0 {
		return time.Time{}
	}
	return time.UnixMicro(us).UTC()
}

// timestamp scans such a time.
type timestamp struct{ to *time.Time }

func (t timestamp) Scan(v any) error {
	us, ok := v.(int64)
	if !ok {
		return fmt.Errorf("not a time: %v", v)
	}
	*t.to = fromMicro(us)
	return nil
}
