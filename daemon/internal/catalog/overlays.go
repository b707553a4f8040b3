package catalog

import (
	"context"
	"database/sql"
	"time"
)

// Overlay is an image that we put on a disk of a domain, so that the changes
// from a backup on are known by what is in it.
type Overlay struct {
	Path   string
	Domain string // UUID
	Backup string // at whose point in time it was made
	Target string
	// Committing: it is being committed into the layer below, or was.
	Committing bool
	// Committed is its mtime, in ns since the epoch, when all that it held was in
	// the layer below; 0 if it never was.
	Committed int64
}

// AddOverlays records overlays that are about to be made.
func (c *Catalog) AddOverlays(ctx context.Context, all []Overlay) error {
	return c.write(ctx, "record overlays", func(tx *sql.Tx) error {
		for _, o := range all {
			_, err := tx.ExecContext(ctx, "INSERT INTO overlays (path, domain, backup, target) VALUES (?, ?, ?, ?) ON CONFLICT (path) DO NOTHING",
				o.Path, o.Domain, o.Backup, o.Target)
			if err != nil {
				return err
			}
		}
		return nil
	})
}

// CommittingOverlay records that an overlay is about to be committed.
func (c *Catalog) CommittingOverlay(ctx context.Context, path string) error {
	return c.write(ctx, "record the commit of overlay "+path, func(tx *sql.Tx) error {
		return exactlyOne(tx.ExecContext(ctx, "UPDATE overlays SET committing = 1 WHERE path = ?", path))
	})
}

// CommittedOverlay records that all that an overlay holds is in the layer below.
// modified is its mtime: what is written to it later is not.
func (c *Catalog) CommittedOverlay(ctx context.Context, path string, modified time.Time) error {
	return c.write(ctx, "record that overlay "+path+" is committed", func(tx *sql.Tx) error {
		return exactlyOne(tx.ExecContext(ctx, "UPDATE overlays SET committed = ? WHERE path = ?", modified.UnixNano(), path))
	})
}

// RemovedOverlay records that an overlay is gone.
func (c *Catalog) RemovedOverlay(ctx context.Context, path string) error {
	return c.write(ctx, "forget overlay "+path, func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, "DELETE FROM overlays WHERE path = ?", path)
		return err
	})
}

const overlayColumns = "path, domain, backup, target, committing, committed"

func scanOverlay(from row) (o Overlay, err error) {
	err = from.Scan(&o.Path, &o.Domain, &o.Backup, &o.Target, &o.Committing, &o.Committed)
	return o, err
}

// Overlays returns the overlays of a domain, or of all for "", oldest first.
func (c *Catalog) Overlays(ctx context.Context, domain string) (all []Overlay, err error) {
	err = c.read(ctx, "list overlays", func(tx *sql.Tx) (err error) {
		all, err = collect(ctx, tx, scanOverlay, "SELECT "+overlayColumns+` FROM overlays
			WHERE ?1 = '' OR domain = ?1 ORDER BY backup, target`, domain)
		return err
	})
	return all, err
}

// KeptOverlays returns the overlays of a domain that hold the changes since
// the newest backup of an open chain, and are to stay for its next increment.
// Of several chains, in several repositories, the one whose newest backup is
// the latest has them: an overlay is on top of a disk only once.
func (c *Catalog) KeptOverlays(ctx context.Context, domain string) (all []Overlay, err error) {
	err = c.read(ctx, "find the overlays to keep of domain "+domain, func(tx *sql.Tx) (err error) {
		all, err = collect(ctx, tx, scanOverlay, "SELECT "+overlayColumns+` FROM overlays WHERE domain = ?1 AND backup =
			(SELECT max(b.id) FROM overlays AS o JOIN backups AS b ON b.id = o.backup JOIN chains AS c ON c.id = b.chain
				WHERE o.domain = ?1 AND b.state = 'complete' AND c.state = 'open' AND NOT EXISTS
					(SELECT 1 FROM backups WHERE parent = b.id AND state <> 'running'))
			ORDER BY target`, domain)
		return err
	})
	return all, err
}
