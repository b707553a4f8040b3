package catalog

import (
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"time"
)

// ValidationResult is what came of trying a backup.
type ValidationResult string

// The results. Of a backup that could not be tried nothing is known by that.
const (
	Valid    ValidationResult = "valid"
	NotValid ValidationResult = "not-valid"
	Unable   ValidationResult = "unable"
)

// ValidationSummary is what is known of a backup by trying it; all is empty for
// one that never was.
type ValidationSummary struct {
	Result   ValidationResult
	Step     string // that decided it; "" if none did
	Cause    string
	Finished time.Time
}

// ValidationRecord is what came of trying a backup once.
type ValidationRecord struct {
	ID      string // ULID; later ones are higher
	Backup  string
	Job     string
	Started time.Time
	ValidationSummary
	Findings      json.RawMessage // of each step, as package step has them
	HasScreenshot bool
}

// Bounds of what is kept of validations: so many of each backup, and the newest
// screenshot of each.
const (
	MaximumScreenshot = 2 << 20 // bytes
	validationsKept   = 20
)

// RecordValidation records what came of trying a backup, with a screenshot as
// PNG; nil for none. ErrNotFound: the backup is gone.
func (c *Catalog) RecordValidation(ctx context.Context, v ValidationRecord, screenshot []byte) error {
	if len(screenshot) > MaximumScreenshot {
		return fmt.Errorf("cannot record the validation of backup %s: its screenshot has %d bytes, and at most %d are kept", v.Backup, len(screenshot), MaximumScreenshot)
	}
	return c.write(ctx, "record the validation of backup "+v.Backup, func(tx *sql.Tx) error {
		// That one is not valid is not forgotten because the host cannot try it now.
		err := exactlyOne(tx.ExecContext(ctx, `UPDATE backups SET validated = ?4, (validation, validation_step, validation_cause) =
			(SELECT validation, validation_step, validation_cause WHERE ?1 = 'unable' AND validation = 'not-valid' UNION ALL SELECT ?1, ?2, ?3 LIMIT 1) WHERE id = ?5`,
			v.Result, v.Step, v.Cause, toMicro(v.Finished), v.Backup))
		if err != nil {
			return err
		}
		findings := "[]"
		if v.Findings != nil {
			findings = string(v.Findings)
		}
		var picture any // NULL, and not an empty one
		if len(screenshot) > 0 {
			picture = screenshot
			if _, err := tx.ExecContext(ctx, "UPDATE validations SET screenshot = NULL WHERE backup = ? AND screenshot IS NOT NULL", v.Backup); err != nil {
				return err
			}
		}
		if _, err := tx.ExecContext(ctx, `INSERT INTO validations (id, backup, job, result, step, cause, findings, screenshot, started, finished)
			VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`,
			v.ID, v.Backup, v.Job, v.Result, v.Step, v.Cause, findings, picture, toMicro(v.Started), toMicro(v.Finished)); err != nil {
			return err
		}
		_, err = tx.ExecContext(ctx, `DELETE FROM validations WHERE backup = ?1 AND screenshot IS NULL
			AND id <= (SELECT id FROM validations WHERE backup = ?1 ORDER BY id DESC LIMIT 1 OFFSET ?2)`, v.Backup, validationsKept)
		return err
	})
}

// DueValidations returns, of each domain in each repository whose storage is
// there, the newest complete backup, if it was not tried since a time; or is said
// to have been later than now, when the clock was set back.
func (c *Catalog) DueValidations(ctx context.Context, since, now time.Time) (list []Backup, err error) {
	err = c.read(ctx, "list backups to be tried", func(tx *sql.Tx) (err error) {
		list, err = collect(ctx, tx, scanBackup, "SELECT "+backupColumns+` FROM backups WHERE id IN (
			SELECT (SELECT id FROM backups AS b WHERE b.domain = places.domain AND b.repository = places.repository AND b.state = 'complete' ORDER BY b.sequence DESC LIMIT 1)
			FROM (SELECT DISTINCT domain, repository FROM chains WHERE repository IN
				(SELECT id FROM repositories WHERE state IN ('online', 'slow', 'unknown'))) AS places)
			AND (validated <= ? OR validated > ?) ORDER BY validated, id`, toMicro(since), toMicro(now))
		return err
	})
	return list, err
}

// Validations returns what came of trying a backup, the newest first, at most limit.
func (c *Catalog) Validations(ctx context.Context, backup string, limit int) (all []ValidationRecord, err error) {
	scan := func(from row) (v ValidationRecord, err error) {
		var findings string
		err = from.Scan(&v.ID, &v.Backup, &v.Job, &v.Result, &v.Step, &v.Cause, &findings, &v.HasScreenshot, timestamp{&v.Started}, timestamp{&v.Finished})
		v.Findings = raw(findings)
		return v, err
	}
	err = c.read(ctx, "list validations of backup "+backup, func(tx *sql.Tx) (err error) {
		all, err = collect(ctx, tx, scan, `SELECT id, backup, job, result, step, cause, findings, screenshot IS NOT NULL, started, finished
			FROM validations WHERE backup = ? ORDER BY id DESC LIMIT ?`, backup, limit)
		return err
	})
	return all, err
}

// Screenshot returns the newest screenshot of a backup's guest, as PNG. ErrNotFound: there is none.
func (c *Catalog) Screenshot(ctx context.Context, backup string) (png []byte, err error) {
	err = c.read(ctx, "read the screenshot of backup "+backup, func(tx *sql.Tx) error {
		return tx.QueryRowContext(ctx, "SELECT screenshot FROM validations WHERE backup = ? AND screenshot IS NOT NULL ORDER BY id DESC LIMIT 1", backup).Scan(&png)
	})
	return png, err
}

// CountValidations returns how many backups have which result; those that were
// never tried are left out.
func (c *Catalog) CountValidations(ctx context.Context) (map[ValidationResult]int, error) {
	counts := map[ValidationResult]int{}
	err := c.read(ctx, "count validations", func(tx *sql.Tx) error {
		_, err := collect(ctx, tx, func(from row) (none struct{}, err error) {
			var result ValidationResult
			var n int
			err = from.Scan(&result, &n)
			counts[result] = n
			return none, err
		}, "SELECT validation, count(*) FROM backups WHERE validation <> '' GROUP BY validation")
		return err
	})
	return counts, err
}
