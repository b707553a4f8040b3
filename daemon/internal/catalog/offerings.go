package catalog

import (
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/chain"
)

// Settings are the options of an offering that say how a backup is made; a
// backup records those it ran with.
type Settings struct {
	Mode        chain.Mode
	Compression string // "none", "zlib", "zstd"
	// CompressionTime is "inline", while a backup is written, or "deferred", by a job after it.
	CompressionTime string
	Level           int    // 0: the compression's default
	Threads         int    // 0: as many as the host allows
	ChainSize       int    // backups in a chain, the full one included; 0: no bound
	Quiesce         string // "none", "agent", "suspend"
	// QuiescePolicy is "require", which fails when the guest cannot be quiesced, or "prefer".
	QuiescePolicy string
	Tracking      chain.Tracking // CBT, Digest or Snapshot
	Fallback      chain.Fallback
	Include       []string // targets of the disks that are backed up; empty: all. An offering and a job know it, a backup does not
	Exclude       []string // targets of disks that are not; the same
	Volatile      bool     // transient disks are backed up too; the same
}

// Rights are what those who are not root may do with an offering.
type Rights struct {
	Users          []string // who may use it: names of users, and of groups with an @ before; empty: everybody
	Backups        bool     // backups besides those of its schedules
	Schedules      bool
	QuickRestore   bool
	FileExtraction bool
}

// Validation says whether and how backups are tried.
type Validation struct {
	Validate       bool
	Steps          []string
	BootTimeout    time.Duration // 0: as the configuration says, as of the other times
	Command        string        // of the step execute_command; "" for none
	Arguments      []string
	Expected       string // what it must write, in base64; "": its exit code must be 0
	CommandTimeout time.Duration
	ScreenshotWait time.Duration
	Ports          []string // that somebody must listen at
}

// Offering is a named set of backup options.
type Offering struct {
	ID          string // ULID; the name is what other records know it by
	Name        string
	Description string
	Repository  string // id
	Origin      string // the file that it is read from; "" if it was made by a call
	Disabled    bool   // it makes no backups
	Settings
	chain.Retention
	Rights
	Validation
	Created time.Time
}

const offeringColumns = `id, name, repository, description, origin, disabled, users, user_backups, user_schedules, quick_restore, file_extraction,
	validate, validation_steps, validation_boot_timeout, validation_command, validation_arguments, validation_expected, validation_command_timeout,
	validation_screenshot_wait, validation_ports, mode, compression, compression_time, level, threads, chain_size, quiesce, quiesce_policy, tracking, fallback,
	include_disks, exclude_disks, volatile_disks, keep_last, keep_hourly, keep_daily, keep_weekly, keep_monthly, keep_yearly, created`

// texts is a list of strings in a column, as JSON.
type texts struct{ to *[]string }

func (t texts) Scan(v any) error {
	s, ok := v.(string)
	if !ok {
		return fmt.Errorf("not a list: %v", v)
	}
	if err := json.Unmarshal([]byte(s), t.to); err != nil {
		return err
	}
	if len(*t.to) == 0 {
		*t.to = nil
	}
	return nil
}

// span is a time in a column, in microseconds.
type span struct{ to *time.Duration }

func (s span) Scan(v any) error {
	n, ok := v.(int64)
	if !ok {
		return fmt.Errorf("not a time: %v", v)
	}
	*s.to = time.Duration(n) * time.Microsecond
	return nil
}

func fromTexts(list []string) string {
	b, err := json.Marshal(append([]string{}, list...))
	if err != nil {
		panic(err) // strings can always be encoded
	}
	return string(b)
}

func scanOffering(from row) (o Offering, err error) {
	err = from.Scan(&o.ID, &o.Name, &o.Repository, &o.Description, &o.Origin, &o.Disabled,
		texts{&o.Users}, &o.Backups, &o.Schedules, &o.QuickRestore, &o.FileExtraction, &o.Validate, texts{&o.Steps},
		span{&o.BootTimeout}, &o.Command, texts{&o.Arguments}, &o.Expected, span{&o.CommandTimeout}, span{&o.ScreenshotWait}, texts{&o.Ports},
		&o.Mode, &o.Compression, &o.CompressionTime, &o.Level, &o.Threads, &o.ChainSize, &o.Quiesce, &o.QuiescePolicy, &o.Tracking, &o.Fallback,
		texts{&o.Include}, texts{&o.Exclude}, &o.Volatile,
		&o.Last, &o.Hourly, &o.Daily, &o.Weekly, &o.Monthly, &o.Yearly, timestamp{&o.Created})
	return o, err
}

// values are those of offeringColumns.
func (o Offering) values() []any {
	if o.CompressionTime == "" {
		o.CompressionTime = "inline"
	}
	return []any{o.ID, o.Name, o.Repository, o.Description, o.Origin, o.Disabled,
		fromTexts(o.Users), o.Backups, o.Schedules, o.QuickRestore, o.FileExtraction, o.Validate, fromTexts(o.Steps),
		o.BootTimeout.Microseconds(), o.Command, fromTexts(o.Arguments), o.Expected, o.CommandTimeout.Microseconds(), o.ScreenshotWait.Microseconds(), fromTexts(o.Ports),
		o.Mode, o.Compression, o.CompressionTime, o.Level, o.Threads, o.ChainSize, o.Quiesce, o.QuiescePolicy, o.Tracking, o.Fallback,
		fromTexts(o.Include), fromTexts(o.Exclude), o.Volatile,
		o.Last, o.Hourly, o.Daily, o.Weekly, o.Monthly, o.Yearly, toMicro(o.Created)}
}

// placeholders are so many for a statement's VALUES.
func placeholders(n int) string { return "?" + strings.Repeat(", ?", n-1) }

// CreateOffering adds an offering. ErrExists: the name is taken; ErrNotFound: no such repository.
func (c *Catalog) CreateOffering(ctx context.Context, o Offering) error {
	return c.write(ctx, "create offering "+o.Name, func(tx *sql.Tx) error {
		if err := mustExist(ctx, tx, "repository", "repositories", "id", o.Repository); err != nil {
			return err
		}
		values := o.values()
		_, err := tx.ExecContext(ctx, "INSERT INTO offerings ("+offeringColumns+") VALUES ("+placeholders(len(values))+")", values...)
		return err
	})
}

// UpdateOffering replaces all of the offering with this name but its id and when it was made.
func (c *Catalog) UpdateOffering(ctx context.Context, o Offering) error {
	return c.write(ctx, "update offering "+o.Name, func(tx *sql.Tx) error {
		if err := mustExist(ctx, tx, "repository", "repositories", "id", o.Repository); err != nil {
			return err
		}
		var before Offering
		before, err := scanOffering(tx.QueryRowContext(ctx, "SELECT "+offeringColumns+" FROM offerings WHERE name = ?", o.Name))
		if err != nil {
			return err
		}
		o.ID, o.Created = before.ID, before.Created
		values := o.values()
		return exactlyOne(tx.ExecContext(ctx, "UPDATE offerings SET ("+offeringColumns+") = ("+placeholders(len(values))+") WHERE name = ?", append(values, o.Name)...))
	})
}

// RemoveOffering forgets an offering. ErrInUse: a domain is assigned to it.
func (c *Catalog) RemoveOffering(ctx context.Context, name string) error {
	return c.write(ctx, "remove offering "+name, func(tx *sql.Tx) error {
		return exactlyOne(tx.ExecContext(ctx, "DELETE FROM offerings WHERE name = ?", name))
	})
}

// Offering returns the offering with this name.
func (c *Catalog) Offering(ctx context.Context, name string) (o Offering, err error) {
	err = c.read(ctx, "read offering "+name, func(tx *sql.Tx) (err error) {
		o, err = scanOffering(tx.QueryRowContext(ctx, "SELECT "+offeringColumns+" FROM offerings WHERE name = ?", name))
		return err
	})
	return o, err
}

// Offerings returns all offerings by name.
func (c *Catalog) Offerings(ctx context.Context) (all []Offering, err error) {
	err = c.read(ctx, "list offerings", func(tx *sql.Tx) (err error) {
		all, err = collect(ctx, tx, scanOffering, "SELECT "+offeringColumns+" FROM offerings ORDER BY name")
		return err
	})
	return all, err
}
