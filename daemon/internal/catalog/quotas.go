package catalog

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strconv"

	"github.com/virtbackup/virtbackup/daemon/internal/chain"
	"github.com/virtbackup/virtbackup/daemon/internal/quota"
)

// ErrQuota says that a quota forbids a backup.
var ErrQuota = errors.New("quota is used up")

// QuotaKind is what a quota bounds.
type QuotaKind string

const (
	QuotaDomain   QuotaKind = "domain"   // one domain, by UUID
	QuotaOffering QuotaKind = "offering" // all that was made by one, by name
	QuotaUser     QuotaKind = "user"     // all that somebody asked for, by uid in decimal
)

// column is what a backup has of the subject.
func (k QuotaKind) column() string {
	if k == QuotaUser {
		return "uid"
	}
	return string(k)
}

// Quota bounds what there may be of a domain, an offering or a user.
type Quota struct {
	Kind    QuotaKind
	Subject string
	quota.Limits
}

// SetQuota records a quota, in place of the one that the subject has.
func (c *Catalog) SetQuota(ctx context.Context, q Quota) error {
	return c.write(ctx, fmt.Sprintf("set the quota of %s %q", q.Kind, q.Subject), func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, "INSERT OR REPLACE INTO quotas (kind, subject, bytes, backups, chains) VALUES (?, ?, ?, ?, ?)",
			q.Kind, q.Subject, q.Bytes, q.Backups, q.Chains)
		return err
	})
}

// RemoveQuota forgets a quota. ErrNotFound: there is none.
func (c *Catalog) RemoveQuota(ctx context.Context, kind QuotaKind, subject string) error {
	return c.write(ctx, fmt.Sprintf("remove the quota of %s %q", kind, subject), func(tx *sql.Tx) error {
		return exactlyOne(tx.ExecContext(ctx, "DELETE FROM quotas WHERE kind = ? AND subject = ?", kind, subject))
	})
}

// Quotas returns all quotas.
func (c *Catalog) Quotas(ctx context.Context) (all []Quota, err error) {
	err = c.read(ctx, "list quotas", func(tx *sql.Tx) (err error) {
		all, err = collect(ctx, tx, scanQuota, "SELECT kind, subject, bytes, backups, chains FROM quotas ORDER BY kind, subject")
		return err
	})
	return all, err
}

func scanQuota(from row) (q Quota, err error) {
	err = from.Scan(&q.Kind, &q.Subject, &q.Bytes, &q.Backups, &q.Chains)
	return q, err
}

// QuotaUse returns what there is of a quota's subject.
func (c *Catalog) QuotaUse(ctx context.Context, kind QuotaKind, subject string) (u quota.Use, err error) {
	err = c.read(ctx, fmt.Sprintf("tell what is used of the quota of %s %q", kind, subject), func(tx *sql.Tx) (err error) {
		u, err = quotaUse(ctx, tx, kind, subject)
		return err
	})
	return u, err
}

func quotaUse(ctx context.Context, tx *sql.Tx, kind QuotaKind, subject string) (u quota.Use, err error) {
	// A full backup has no chain while it runs.
	err = tx.QueryRowContext(ctx, `SELECT coalesce(sum(stored_bytes), 0), count(*) FILTER (WHERE state <> 'running'), count(DISTINCT chain),
		count(*) FILTER (WHERE state = 'running'), count(*) FILTER (WHERE state = 'running' AND chain IS NULL)
		FROM backups INDEXED BY backups_usage WHERE state <> 'failed' AND `+kind.column()+` = ?`, subject).
		Scan(&u.Bytes, &u.Backups, &u.Chains, &u.Running, &u.RunningChains)
	return u, err
}

// CheckQuota says with ErrQuota when a quota forbids a backup that is asked for.
// CreateBackup says the same when it begins.
func (c *Catalog) CheckQuota(ctx context.Context, b Backup) error {
	return c.read(ctx, "back up domain "+b.DomainName, func(tx *sql.Tx) error { return checkQuota(ctx, tx, b) })
}

func checkQuota(ctx context.Context, tx *sql.Tx, b Backup) error {
	quotas, err := collect(ctx, tx, scanQuota, `SELECT kind, subject, bytes, backups, chains FROM quotas
		WHERE kind = 'domain' AND subject = ? OR kind = 'offering' AND subject = ? OR kind = 'user' AND subject = ?`,
		b.Domain, b.Offering, strconv.FormatUint(uint64(b.UID), 10))
	if err != nil {
		return err
	}
	for _, q := range quotas {
		u, err := quotaUse(ctx, tx, q.Kind, q.Subject)
		if err != nil {
			return err
		}
		if why := q.Forbids(u, b.Kind == chain.Full); why != "" {
			return fmt.Errorf("the %w for %s: %s: delete backups, or have the quota raised", ErrQuota, q.whose(b), why)
		}
	}
	return nil
}

// whose names the subject for people.
func (q Quota) whose(b Backup) string {
	switch q.Kind {
	case QuotaDomain:
		return fmt.Sprintf("domain %q", b.DomainName)
	case QuotaUser:
		return "user id " + q.Subject
	}
	return fmt.Sprintf("offering %q", q.Subject)
}
