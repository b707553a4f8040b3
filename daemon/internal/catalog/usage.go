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
