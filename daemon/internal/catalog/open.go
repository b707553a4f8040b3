package catalog

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

//go:embed migrations/*.sql
var migrations embed.FS

// readerConnections bounds the readers; SQLite lets them run beside the writer.
const readerConnections = 4

// ErrNewerSchema says that a newer virtbackup wrote the catalog.
var ErrNewerSchema = errors.New("catalog was written by a newer version of virtbackup")

// CorruptError says that a corrupted catalog was moved aside and an empty one
// made in its place: what it knew has to be read from the repositories.
type CorruptError struct {
	MovedTo string
	Err     error
}

func (e *CorruptError) Error() string {
	return fmt.Sprintf("catalog was corrupted and is empty now; the old one is kept as %s: %v", e.MovedTo, e.Err)
}

func (e *CorruptError) Unwrap() error { return e.Err }

// Open opens the catalog at path, and makes it (mode 0600) or brings its
// schema up to date when needed; a copy of the old schema's file is kept as
// path.schema-<version>.
//
// With a *CorruptError the Catalog is not nil and works, but starts empty. With
// any other error it is nil.
func Open(ctx context.Context, path string) (*Catalog, error) {
	schema, err := readMigrations(migrations)
	if err != nil {
		return nil, err
	}
	return open(ctx, path, schema)
}

func open(ctx context.Context, path string, schema []string) (*Catalog, error) {
	c, err := openFile(ctx, path, schema)
	if err == nil || !isCorrupt(err) {
		return c, err
	}
	moved, merr := moveAside(path)
	if merr != nil {
		return nil, errors.Join(err, merr)
	}
	c, oerr := openFile(ctx, path, schema)
	if oerr != nil {
		return nil, errors.Join(err, oerr)
	}
	return c, &CorruptError{MovedTo: moved, Err: err}
}

func openFile(ctx context.Context, path string, schema []string) (*Catalog, error) {
	// SQLite gives its other files the mode of this one. No connection is open
	// yet, so closing the file drops no lock.
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("cannot open catalog: %w", err)
	}
	if err := errors.Join(f.Chmod(0o600), f.Close()); err != nil {
		return nil, fmt.Errorf("cannot open catalog: %w", err)
	}
	writer, err := connect(path, 1, "journal_mode(WAL)", "synchronous(FULL)")
	if err != nil {
		return nil, fmt.Errorf("cannot open catalog %s: %w", path, err)
	}
	if err := prepare(ctx, writer, path, schema); err != nil {
		return nil, errors.Join(fmt.Errorf("cannot open catalog %s: %w", path, err), writer.Close())
	}
	readers, err := connect(path, readerConnections, "query_only(1)")
	if err != nil {
		return nil, errors.Join(fmt.Errorf("cannot open catalog %s: %w", path, err), writer.Close())
	}
	return &Catalog{writer: writer, readers: readers}, nil
}

func connect(path string, connections int, pragmas ...string) (*sql.DB, error) {
	query := url.Values{"_pragma": append([]string{"busy_timeout(10000)", "foreign_keys(1)"}, pragmas...)}
	if connections == 1 {
		query.Set("_txlock", "immediate")
	}
	absolute, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	db, err := sql.Open("sqlite", (&url.URL{Scheme: "file", Path: absolute, RawQuery: query.Encode()}).String())
	if err != nil {
		return nil, err
	}
	db.SetMaxOpenConns(connections)
	db.SetMaxIdleConns(connections)
	return db, nil
}

// prepare checks the file and brings its schema up to date.
func prepare(ctx context.Context, db *sql.DB, path string, schema []string) error {
	var check string
	if err := db.QueryRowContext(ctx, "PRAGMA quick_check(1)").Scan(&check); err != nil {
		return err
	}
	if check != "ok" {
		return &damage{check}
	}
	var version int
	if err := db.QueryRowContext(ctx, "PRAGMA user_version").Scan(&version); err != nil {
		return err
	}
	switch {
	case version > len(schema):
		return fmt.Errorf("%w (schema %d, known up to %d)", ErrNewerSchema, version, len(schema))
	case version == len(schema):
		return nil
	case version > 0:
		if err := keepCopy(ctx, db, fmt.Sprintf("%s.schema-%d", path, version)); err != nil {
			return err
		}
	}
	for ; version < len(schema); version++ {
		if err := migrate(ctx, db, schema[version], version+1); err != nil {
			return fmt.Errorf("cannot migrate to schema %d: %w", version+1, err)
		}
	}
	return nil
}

// keepCopy writes a copy of the database beside it, whole or not at all.
func keepCopy(ctx context.Context, db *sql.DB, to string) error {
	temporary := to + ".new"
	if err := os.Remove(temporary); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cannot keep a copy before migration: %w", err)
	}
	if _, err := db.ExecContext(ctx, "VACUUM INTO ?", temporary); err != nil {
		return fmt.Errorf("cannot keep a copy before migration: %w", err)
	}
	err := os.Chmod(temporary, 0o600)
	if err == nil {
		err = os.Rename(temporary, to)
	}
	if err != nil {
		return fmt.Errorf("cannot keep a copy before migration: %w", err)
	}
	return nil
}

func migrate(ctx context.Context, db *sql.DB, script string, version int) error {
	return inTransaction(ctx, db, func(tx *sql.Tx) error {
		if _, err := tx.ExecContext(ctx, script); err != nil {
			return err
		}
		_, err := tx.ExecContext(ctx, "PRAGMA user_version = "+strconv.Itoa(version))
		return err
	})
}

// readMigrations returns the scripts in order; script n leads to schema n+1.
func readMigrations(from fs.FS) ([]string, error) {
	names, err := fs.Glob(from, "migrations/*.sql") // sorted
	if err != nil {
		return nil, err
	}
	var scripts []string
	for i, name := range names {
		if want := fmt.Sprintf("migrations/%04d.sql", i+1); name != want {
			return nil, fmt.Errorf("migration %s found where %s is due", name, want)
		}
		script, err := fs.ReadFile(from, name)
		if err != nil {
			return nil, err
		}
		scripts = append(scripts, string(script))
	}
	return scripts, nil
}

// damage is what SQLite's own check found.
type damage struct{ found string }

func (d *damage) Error() string { return "database disk image is malformed: " + d.found }

func isCorrupt(err error) bool {
	var d *damage
	if errors.As(err, &d) {
		return true
	}
	var se *sqlite.Error
	if !errors.As(err, &se) {
		return false
	}
	primary := se.Code() & 0xff
	return primary == sqlite3.SQLITE_CORRUPT || primary == sqlite3.SQLITE_NOTADB
}

// moveAside renames the database and its log, so that one can be looked at with the other.
func moveAside(path string) (string, error) {
	to := path + ".corrupt-" + time.Now().UTC().Format("20060102T150405.000000Z")
	for _, suffix := range []string{"-wal", "-shm", ""} { // the file itself last: until then it is found corrupt again
		err := os.Rename(path+suffix, to+suffix)
		if err != nil && (suffix == "" || !errors.Is(err, fs.ErrNotExist)) {
			return "", fmt.Errorf("cannot move corrupted catalog aside: %w", err)
		}
	}
	return to, nil
}
