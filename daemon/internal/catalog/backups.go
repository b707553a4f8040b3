package catalog

import (
	"context"
	"database/sql"
	"encoding/json"
	"strings"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/chain"
)

// Backup is one restore point of one domain, or the attempt to make one.
type Backup struct {
	ID          string
	Domain      string // UUID
	DomainName  string // at the time
	Chain       string // the id of the full backup that it starts from: its own for a full one; "" for a failed increment
	Parent      string // "" for a full backup, and a failed one
	Repository  string // id
	Job         string
	Kind        chain.Kind
	State       chain.BackupState
	Cause       chain.Cause // why it is full; "" for an increment
	Isolated    bool
	Mark        int64         // number of the newest Mark before its point in time
	Held        time.Duration // that the guest was held still
	Shortfall   string        // why it is less consistent than asked for; "" if it is not
	Consistency string        // "application", "filesystem", "crash"; "" until known
	Created     time.Time
	Finished    time.Time
	// CompressionState is how far it is compressed by a job after it, and
	// CompressionError why that failed.
	CompressionState CompressionState
	CompressionError string
	Validation       ValidationSummary
	Verified         time.Time // when it was last read back by a job of its own; zero for never
	Size             uint64    // bytes of all disks, as the guest sees them
	StoredBytes      uint64
	DataBytes        uint64
	Error            string // why it failed or is damaged
	Pin              string // of the manifest, if another host made it: see repository.Trust
	Hold             string // why it must stay, by somebody's word; "" if it may go
	Sequence         int64  // the order in which backups were committed; 0 until then
	Offering         string // its name at the time; "" if there was none
	UID              uint32 // who asked for it
	Settings
	Manifest json.RawMessage // nil until complete; only Catalog.Backup reads it
	Images   []Image         // only Catalog.Backup and LatestChain read them
}

// Image is one disk in one backup.
type Image struct {
	Target      string // "vda"
	Kind        chain.Kind
	Tracking    chain.Tracking // how its changes are known from this backup on
	Changes     chain.Tracking // how an increment's were found; "" for a full one
	Cause       chain.Cause    // why it is not an increment by CBT; "" if it is
	Source      string         // path, informative
	Format      string         // of the source
	Size        uint64         // bytes
	StoredBytes uint64
	DataBytes   uint64
	ReadBytes   uint64   // from the source
	Backing     []string // paths of the source's layers below the top, top first
	Run         string   // of QEMU; "" when the domain was off
	Node        int      // libvirt's index of the top layer in that run
}

// Link returns what the rules of chains need to know of the backup.
func (b Backup) Link() chain.Backup {
	link := chain.Backup{ID: b.ID, Chain: b.Chain, Parent: b.Parent, Kind: b.Kind, State: b.State}
	for _, i := range b.Images {
		link.Images = append(link.Images, chain.Image{Target: i.Target, Kind: i.Kind, Size: i.Size})
	}
	return link
}

const backupColumns = `id, domain, domain_name, coalesce(chain, iif(kind = 'full', id, '')), coalesce(parent, ''), repository, job, kind, state, cause,
	isolated, consistency, created, finished, size, stored_bytes, data_bytes, error,
	offering, mode, compression, compression_time, level, threads, chain_size, quiesce, quiesce_policy, tracking, fallback, verified, mark, held, shortfall, uid, pin, hold, sequence,
	compression_state, compression_error, validation, validation_step, validation_cause, validated`

func scanBackup(from row) (b Backup, err error) {
	var held int64
	err = from.Scan(&b.ID, &b.Domain, &b.DomainName, &b.Chain, &b.Parent, &b.Repository, &b.Job, &b.Kind, &b.State, &b.Cause,
		&b.Isolated, &b.Consistency, timestamp{&b.Created}, timestamp{&b.Finished}, &b.Size, &b.StoredBytes, &b.DataBytes, &b.Error,
		&b.Offering, &b.Mode, &b.Compression, &b.CompressionTime, &b.Level, &b.Threads, &b.ChainSize, &b.Quiesce, &b.QuiescePolicy, &b.Tracking, &b.Fallback,
		timestamp{&b.Verified}, &b.Mark, &held, &b.Shortfall, &b.UID, &b.Pin, &b.Hold, &b.Sequence,
		&b.CompressionState, &b.CompressionError,
		&b.Validation.Result, &b.Validation.Step, &b.Validation.Cause, timestamp{&b.Validation.Finished})
	b.Held = time.Duration(held) * time.Microsecond
	return b, err
}

const imageColumns = "target, kind, tracking, changes, cause, source, format, size, stored_bytes, data_bytes, read_bytes, backing, run, node"

func scanImage(from row) (i Image, err error) {
	var backing string
	err = from.Scan(&i.Target, &i.Kind, &i.Tracking, &i.Changes, &i.Cause, &i.Source, &i.Format, &i.Size, &i.StoredBytes, &i.DataBytes,
		&i.ReadBytes, &backing, &i.Run, &i.Node)
	if err == nil {
		err = json.Unmarshal([]byte(backing), &i.Backing)
	}
	return i, err
}

func oneBackup(ctx context.Context, tx *sql.Tx, id string) (Backup, error) {
	b, err := scanBackup(tx.QueryRowContext(ctx, "SELECT "+backupColumns+" FROM backups WHERE id = ?", id))
	if err != nil {
		return b, err
	}
	b.Images, err = collect(ctx, tx, scanImage, "SELECT "+imageColumns+` FROM images WHERE backup = ? ORDER BY position`, id)
	return b, err
}

// Backup returns one backup with its images and manifest.
func (c *Catalog) Backup(ctx context.Context, id string) (b Backup, err error) {
	err = c.read(ctx, "read backup "+id, func(tx *sql.Tx) (err error) {
		if b, err = oneBackup(ctx, tx, id); err != nil {
			return err
		}
		var manifest string
		if err := tx.QueryRowContext(ctx, "SELECT manifest FROM backups WHERE id = ?", id).Scan(&manifest); err != nil {
			return err
		}
		if manifest != "" {
			b.Manifest = json.RawMessage(manifest)
		}
		return nil
	})
	return b, err
}

// BackupFilter selects backups; a zero field selects all.
type BackupFilter struct {
	Domain     string // UUID
	Repository string // id
	Chain      string
	Offering   string
	Kind       chain.Kind
	States     []chain.BackupState
	Since      time.Time // created at or after
	Until      time.Time // created before
}

// Page asks for a part of a list, newest first.
type Page struct {
	Limit int    // at most so many; 0 for maximumPage, which is also the most
	After string // the id of the last one of the page before; "" for the first page
}

const maximumPage = 1000

func (p Page) limit() int {
	if p.Limit <= 0 || p.Limit > maximumPage {
		return maximumPage
	}
	return p.Limit
}

// ListBackups returns a page of backups, newest first, without images and
// manifest. The next page starts after the last one's id; it is the last page
// when it has fewer than asked for.
func (c *Catalog) ListBackups(ctx context.Context, f BackupFilter, p Page) (list []Backup, err error) {
	query, args := f.query(p)
	err = c.read(ctx, "list backups", func(tx *sql.Tx) (err error) {
		list, err = collect(ctx, tx, scanBackup, query, args...)
		return err
	})
	return list, err
}

func (f BackupFilter) query(p Page) (string, []any) {
	var q conditions
	q.equal("domain", f.Domain)
	q.equal("repository", f.Repository)
	q.equal("chain", f.Chain)
	q.equal("offering", f.Offering)
	q.equal("kind", string(f.Kind))
	q.states(f.States)
	q.window(f.Since, f.Until)
	if !f.Until.IsZero() {
		// What is newer need not be looked at, one by one, to find that it is.
		q.add("id <= (SELECT max(id) FROM backups INDEXED BY backups_created WHERE created < ?)", toMicro(f.Until))
	}
	q.after(p)
	return "SELECT " + backupColumns + " FROM backups" + q.where() + " ORDER BY id DESC LIMIT ?", append(q.args, p.limit())
}

// states selects backups in one of these states. A single one that few are in
// is written out: only so SQLite uses the index of those alone.
func (q *conditions) states(all []chain.BackupState) {
	if len(all) == 1 {
		switch all[0] {
		case chain.Running, chain.Deleting, chain.Damaged:
			q.add("state = '" + string(all[0]) + "'")
			return
		}
	}
	oneOf(q, "state", all)
}

// ChainBackups returns the backups of a chain with their images, the full one
// first. Failed ones are not in it.
func (c *Catalog) ChainBackups(ctx context.Context, id string) (list []Backup, err error) {
	err = c.read(ctx, "read backups of chain "+id, func(tx *sql.Tx) error {
		ids, err := collect(ctx, tx, scanString, `WITH RECURSIVE line (id, depth) AS (
			SELECT id, 0 FROM backups WHERE chain = ? AND parent IS NULL
			UNION ALL SELECT b.id, depth + 1 FROM backups AS b JOIN line ON b.parent = line.id)
			SELECT id FROM line ORDER BY depth`, id)
		if err != nil {
			return err
		}
		for _, id := range ids {
			b, err := oneBackup(ctx, tx, id)
			if err != nil {
				return err
			}
			list = append(list, b)
		}
		return nil
	})
	return list, err
}

func scanString(from row) (s string, err error) {
	err = from.Scan(&s)
	return s, err
}

// conditions collects the WHERE clause of a filter.
type conditions struct {
	terms []string
	args  []any
}

func (q *conditions) add(term string, args ...any) {
	q.terms = append(q.terms, term)
	q.args = append(q.args, args...)
}

func (q *conditions) equal(column, value string) {
	if value != "" {
		q.add(column+" = ?", value)
	}
}

func (q *conditions) window(since, until time.Time) {
	if !since.IsZero() {
		q.add("created >= ?", toMicro(since))
	}
	if !until.IsZero() {
		q.add("created < ?", toMicro(until))
	}
}

func (q *conditions) after(p Page) {
	if p.After != "" {
		q.add("id < ?", p.After)
	}
}

func oneOf[T any](q *conditions, column string, values []T) {
	if len(values) == 0 {
		return
	}
	args := make([]any, len(values))
	for i, v := range values {
		args[i] = v
	}
	q.add(column+" IN "+(&conditions{args: args}).list(), args...)
}

// list is what stands in SQL for all arguments.
func (q *conditions) list() string { return "(?" + strings.Repeat(", ?", len(q.args)-1) + ")" }

func (q *conditions) where() string {
	if len(q.terms) == 0 {
		return ""
	}
	return " WHERE " + strings.Join(q.terms, " AND ")
}

// BackupsByPrefix returns the ids, at most limit, of the backups whose id
// begins with prefix and that did not fail.
func (c *Catalog) BackupsByPrefix(ctx context.Context, prefix string, limit int) (ids []string, err error) {
	err = c.read(ctx, "find backup "+prefix, func(tx *sql.Tx) (err error) {
		ids, err = collect(ctx, tx, scanString, `SELECT id FROM backups
			WHERE id >= ?1 AND id < ?1 || '~' AND state NOT IN ('running', 'failed') ORDER BY id LIMIT ?2`, prefix, limit) // ids have no ~
		return err
	})
	return ids, err
}

// Children returns the ids of the backups that build on one directly, and did not fail.
func (c *Catalog) Children(ctx context.Context, id string) (ids []string, err error) {
	err = c.read(ctx, "find what builds on backup "+id, func(tx *sql.Tx) (err error) {
		ids, err = collect(ctx, tx, scanString, "SELECT id FROM backups WHERE parent = ? AND state NOT IN ('running', 'failed') ORDER BY id", id)
		return err
	})
	return ids, err
}
