package catalog

import (
	"context"
	"database/sql"
	"encoding/json"
	"log/slog"

	"github.com/virtbackup/virtbackup/daemon/internal/chain"
)

// Lists read what belongs to all of a page at once: a query for each entry
// would cost a hundred times as much.

// WholeBackups returns a page as ListBackups does, with images and manifests,
// and by its id what builds on each directly.
func (c *Catalog) WholeBackups(ctx context.Context, f BackupFilter, p Page) (list []Backup, children map[string][]string, err error) {
	err = c.read(ctx, "list backups", func(tx *sql.Tx) error {
		query, args := f.query(p)
		if list, err = collect(ctx, tx, scanBackup, query, args...); err != nil {
			return err
		}
		at := make(map[string]*Backup, len(list))
		var ids conditions
		for i := range list {
			at[list[i].ID] = &list[i]
			ids.args = append(ids.args, list[i].ID)
		}
		if len(list) == 0 {
			return nil
		}
		images := func(from row) (struct{}, error) {
			var backup string
			i, err := scanImage(prefixed{from, &backup})
			if err == nil {
				at[backup].Images = append(at[backup].Images, i)
			}
			return struct{}{}, err
		}
		if _, err := collect(ctx, tx, images, "SELECT backup, "+imageColumns+" FROM images WHERE backup IN "+ids.list()+" ORDER BY backup, position", ids.args...); err != nil {
			return err
		}
		manifest := func(from row) (struct{}, error) {
			var id, text string
			err := from.Scan(&id, &text)
			if err == nil && text != "" {
				at[id].Manifest = json.RawMessage(text)
			}
			return struct{}{}, err
		}
		if _, err := collect(ctx, tx, manifest, "SELECT id, manifest FROM backups WHERE id IN "+ids.list(), ids.args...); err != nil {
			return err
		}
		children, err = grouped(ctx, tx, "SELECT parent, id FROM backups WHERE parent IN "+ids.list()+" AND state NOT IN ('running', 'failed') ORDER BY id", ids.args...)
		return err
	})
	return list, children, err
}

// ChainFilter selects chains; a zero field selects all.
type ChainFilter struct {
	Domain     string // UUID
	Repository string // id
	States     []chain.State
}

// ListChains returns a page of chains, newest first.
func (c *Catalog) ListChains(ctx context.Context, f ChainFilter, p Page) (list []Chain, err error) {
	var q conditions
	q.equal("domain", f.Domain)
	q.equal("repository", f.Repository)
	oneOf(&q, "state", f.States)
	q.after(p)
	err = c.read(ctx, "list chains", func(tx *sql.Tx) (err error) {
		list, err = collect(ctx, tx, scanChain, "SELECT "+chainColumns+" FROM chains"+q.where()+" ORDER BY id DESC LIMIT ?",
			append(q.args, p.limit())...)
		return err
	})
	return list, err
}

// Link is a backup as its chain shows it.
type Link struct {
	ID          string
	State       chain.BackupState
	StoredBytes uint64
}

// Links returns the backups of chains, by the chain's id, the full one first.
// Failed ones are not among them.
func (c *Catalog) Links(ctx context.Context, chains []string) (all map[string][]Link, err error) {
	all = make(map[string][]Link, len(chains))
	if len(chains) == 0 {
		return all, nil
	}
	var ids conditions
	for _, id := range chains {
		ids.args = append(ids.args, id)
	}
	link := func(from row) (struct{}, error) {
		var in string
		var l Link
		err := from.Scan(&in, &l.ID, &l.State, &l.StoredBytes)
		all[in] = append(all[in], l)
		return struct{}{}, err
	}
	err = c.read(ctx, "read backups of chains", func(tx *sql.Tx) error {
		_, err := collect(ctx, tx, link, `WITH RECURSIVE line (chain, id, state, stored_bytes, depth) AS (
			SELECT chain, id, state, stored_bytes, 0 FROM backups WHERE chain IN `+ids.list()+` AND parent IS NULL
			UNION ALL SELECT b.chain, b.id, b.state, b.stored_bytes, depth + 1 FROM line CROSS JOIN backups AS b ON b.parent = line.id)
			SELECT chain, id, state, stored_bytes FROM line ORDER BY depth`, ids.args...)
		return err
	})
	return all, err
}

// JobWarnings returns what jobs have warned of, by the job's id, oldest first.
func (c *Catalog) JobWarnings(ctx context.Context, jobs []string) (all map[string][]string, err error) {
	if len(jobs) == 0 {
		return nil, nil
	}
	var ids conditions
	for _, id := range jobs {
		ids.args = append(ids.args, id)
	}
	err = c.read(ctx, "read warnings of jobs", func(tx *sql.Tx) (err error) {
		all, err = grouped(ctx, tx, "SELECT job, message FROM job_messages WHERE job IN "+ids.list()+" AND level >= ? ORDER BY job, number",
			append(ids.args, int(slog.LevelWarn))...)
		return err
	})
	return all, err
}

// grouped reads pairs of texts, and gathers the second ones of the same first.
func grouped(ctx context.Context, tx *sql.Tx, query string, args ...any) (map[string][]string, error) {
	all := map[string][]string{}
	_, err := collect(ctx, tx, func(from row) (struct{}, error) {
		var first, second string
		err := from.Scan(&first, &second)
		all[first] = append(all[first], second)
		return struct{}{}, err
	}, query, args...)
	return all, err
}

// prefixed scans one column more, before those that are asked for.
type prefixed struct {
	row
	first any
}

func (p prefixed) Scan(dest ...any) error { return p.row.Scan(append([]any{p.first}, dest...)...) }
