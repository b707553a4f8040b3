package catalog

import (
	"context"
	"database/sql"
	"fmt"
	"time"
)

// UsageBy is what usage is told by.
type UsageBy string

const (
	ByDomain     UsageBy = "domain"     // UUID
	ByOffering   UsageBy = "offering"   // name at the time of the backup; "" for none
	ByUser       UsageBy = "uid"        // who asked for the backup, in decimal
	ByRepository UsageBy = "repository" // id
)

// Usage is what the backups of one domain, offering, user or repository take.
type Usage struct {
	Of          string
	Backups     int
	Chains      int
	StoredBytes uint64
	// ProtectedBytes are those of the disks that the newest good backup of each domain would bring back.
	ProtectedBytes uint64
	Newest         time.Time // point of the newest good backup; zero for none
}

// Usage returns what backups take, by one thing, in its order. Backups that run
// or failed take nothing.
func (c *Catalog) Usage(ctx context.Context, by UsageBy) (all []Usage, err error) {
	switch by {
	case ByDomain, ByOffering, ByUser, ByRepository:
	default:
		return nil, fmt.Errorf("cannot tell usage by %q", by)
	}
	// In the inner query, size and so on are of the newest backup (SQLite, "Bare
	// columns in an aggregate query"). The index backups_usage has all that is read.
	query := fmt.Sprintf(`SELECT CAST(of AS TEXT), sum(backups), sum(chains), sum(stored), sum(protected), max(newest) FROM (
		SELECT %[1]s AS of, count(*) AS backups, count(DISTINCT chain) AS chains, sum(stored_bytes) AS stored,
			max(iif(state = 'complete', id, '')), iif(state = 'complete', size, 0) AS protected, iif(state = 'complete', created, 0) AS newest
		FROM backups INDEXED BY backups_usage WHERE state IN ('complete', 'damaged', 'deleting') GROUP BY domain, %[1]s)
		GROUP BY of ORDER BY of`, string(by))
	err = c.read(ctx, "tell usage by "+string(by), func(tx *sql.Tx) (err error) {
		all, err = collect(ctx, tx, scanUsage, query)
		return err
	})
	return all, err
}

func scanUsage(from row) (u Usage, err error) {
	err = from.Scan(&u.Of, &u.Backups, &u.Chains, &u.StoredBytes, &u.ProtectedBytes, timestamp{&u.Newest})
	return u, err
}

// LastBackups returns the newest job of each domain that made a backup or
// failed to, by UUID, without spec and step.
func (c *Catalog) LastBackups(ctx context.Context) (last map[string]Job, err error) {
	last = map[string]Job{}
	err = c.read(ctx, "tell the last backup of each domain", func(tx *sql.Tx) error {
		all, err := collect(ctx, tx, scanLast, `SELECT domain, max(id), state, error_name, error_message, started, finished
			FROM jobs WHERE kind = 'backup' AND state IN ('succeeded', 'failed') GROUP BY domain`)
		for _, j := range all {
			last[j.Domain] = j
		}
		return err
	})
	return last, err
}

func scanLast(from row) (j Job, err error) {
	err = from.Scan(&j.Domain, &j.ID, &j.State, &j.ErrorName, &j.ErrorMessage, timestamp{&j.Started}, timestamp{&j.Finished})
	j.Kind = "backup"
	return j, err
}
