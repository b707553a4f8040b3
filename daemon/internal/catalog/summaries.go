package catalog

import (
	"context"
	"database/sql"
	"time"
)

// Summary is how a domain is protected, as far as its backups and jobs say.
type Summary struct {
	Domain
	LastBackup     string // id of its newest complete backup; "" for none
	LastBackupTime time.Time
	LastJob        JobState // of its newest backup that was made or failed; "" for none
	LastError      string   // of that job
	Chain          string   // the open one in the repository of its offering; "" for none
	ChainLength    int      // committed backups in it
}

// Each part is one look into an index: there may be a thousand domains, and a
// hundred backups of each. Which one is said, as SQLite would take others that
// have the ids in their order.
const summaryQuery = "SELECT d.uuid, d.name, coalesce(d.offering, ''), d.overrides," + `
	coalesce(b.id, ''), coalesce(b.created, 0), coalesce(j.state, ''), coalesce(j.error_message, ''), coalesce(c.id, ''),
	(SELECT count(*) FROM backups WHERE chain = c.id AND state <> 'running')
	FROM domains AS d LEFT JOIN offerings AS o ON o.name = d.offering
	LEFT JOIN backups AS b ON b.id = (SELECT max(id) FROM backups INDEXED BY backups_complete WHERE domain = d.uuid AND state = 'complete')
	LEFT JOIN jobs AS j ON j.id = (SELECT max(id) FROM jobs INDEXED BY jobs_backed_up WHERE domain = d.uuid AND kind = 'backup' AND state IN ('succeeded', 'failed'))
	LEFT JOIN chains AS c ON c.domain = d.uuid AND c.repository = o.repository AND c.state = 'open'`

func scanSummary(from row) (s Summary, err error) {
	var overrides string
	err = from.Scan(&s.UUID, &s.Name, &s.Offering, &overrides, &s.LastBackup, timestamp{&s.LastBackupTime}, &s.LastJob, &s.LastError,
		&s.Chain, &s.ChainLength)
	s.Overrides = raw(overrides)
	return s, err
}

// Summaries returns how a domain is protected, or how all are for "". One that
// is not known is not in it.
func (c *Catalog) Summaries(ctx context.Context, domain string) (all []Summary, err error) {
	var q conditions
	q.equal("d.uuid", domain)
	err = c.read(ctx, "read how domains are protected", func(tx *sql.Tx) (err error) {
		all, err = collect(ctx, tx, scanSummary, summaryQuery+q.where(), q.args...)
		return err
	})
	return all, err
}
