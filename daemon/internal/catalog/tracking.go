package catalog

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/chain"
)

// Mark is a note that a disk changed unseen, or may have: a bitmap that was
// begun before it must not be used.
type Mark struct {
	Number int64  // ascends for ever
	Domain string // UUID
	Target string // "" for all disks
	Cause  chain.Cause
	Detail string // for people
	Time   time.Time
}

// marksKept is how many marks of a domain are kept beside the newest one of each disk.
const marksKept = 100

// Tracking returns what lifecycle knows of a domain; nil if that is nothing.
func (c *Catalog) Tracking(ctx context.Context, domain string) (known json.RawMessage, err error) {
	err = c.read(ctx, "read what is known of domain "+domain, func(tx *sql.Tx) error {
		var text string
		err := tx.QueryRowContext(ctx, "SELECT known FROM tracking WHERE domain = ?", domain).Scan(&text)
		if errors.Is(err, sql.ErrNoRows) {
			return nil
		}
		known = json.RawMessage(text)
		return err
	})
	return known, err
}

// TrackedDomains returns the UUIDs of the domains that something is known of.
func (c *Catalog) TrackedDomains(ctx context.Context) (all []string, err error) {
	err = c.read(ctx, "list what is known of domains", func(tx *sql.Tx) (err error) {
		all, err = collect(ctx, tx, scanString, "SELECT domain FROM tracking ORDER BY domain")
		return err
	})
	return all, err
}

// SetTracking records what is known of a domain now, and what that says of its
// disks, at once. The numbers of the marks are given here.
func (c *Catalog) SetTracking(ctx context.Context, domain string, known json.RawMessage, marks []Mark) error {
	return c.write(ctx, "record what is known of domain "+domain, func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, "INSERT INTO tracking (domain, known) VALUES (?, ?) ON CONFLICT (domain) DO UPDATE SET known = excluded.known",
			domain, string(known))
		if err != nil {
			return err
		}
		for _, m := range marks {
			_, err := tx.ExecContext(ctx, "INSERT INTO marks (domain, target, cause, detail, time) VALUES (?, ?, ?, ?, ?)",
				domain, m.Target, m.Cause, m.Detail, toMicro(m.Time))
			if err != nil {
				return err
			}
		}
		_, err = tx.ExecContext(ctx, `DELETE FROM marks WHERE domain = ?1
			AND number NOT IN (SELECT max(number) FROM marks WHERE domain = ?1 GROUP BY target)
			AND number NOT IN (SELECT number FROM marks WHERE domain = ?1 ORDER BY number DESC LIMIT ?2)`, domain, marksKept)
		return err
	})
}

// ForgetTracking forgets a domain that is not in the catalog, and its marks. Of
// one that is, it forgets nothing.
func (c *Catalog) ForgetTracking(ctx context.Context, domain string) error {
	return c.write(ctx, "forget domain "+domain, func(tx *sql.Tx) error {
		for _, table := range []string{"tracking", "marks"} {
			_, err := tx.ExecContext(ctx, "DELETE FROM "+table+" WHERE domain = ? AND domain NOT IN (SELECT uuid FROM domains)", domain)
			if err != nil {
				return err
			}
		}
		return nil
	})
}

// Marks returns the marks of a domain that are newer than a number, oldest first.
func (c *Catalog) Marks(ctx context.Context, domain string, after int64) (all []Mark, err error) {
	err = c.read(ctx, "list the marks of domain "+domain, func(tx *sql.Tx) (err error) {
		all, err = collect(ctx, tx, scanMark, "SELECT number, domain, target, cause, detail, time FROM marks WHERE domain = ? AND number > ? ORDER BY number",
			domain, after)
		return err
	})
	return all, err
}

func scanMark(from row) (m Mark, err error) {
	err = from.Scan(&m.Number, &m.Domain, &m.Target, &m.Cause, &m.Detail, timestamp{&m.Time})
	return m, err
}

// LastMark returns the number of the newest mark of all, 0 if there never was one.
func (c *Catalog) LastMark(ctx context.Context) (number int64, err error) {
	err = c.read(ctx, "read the newest mark", func(tx *sql.Tx) error {
		return tx.QueryRowContext(ctx, "SELECT coalesce(max(number), 0) FROM marks").Scan(&number)
	})
	return number, err
}
