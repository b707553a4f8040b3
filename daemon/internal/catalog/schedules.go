package catalog

import (
	"context"
	"database/sql"
	"encoding/json"
	"time"
)

// Schedule is when which domains are backed up by themselves.
type Schedule struct {
	ID              string // ULID
	Name            string
	Domain          string // UUID; "" if it is for an offering's domains
	Offering        string // name; "" if it is for a domain
	Repository      string // id, in place of the offering's; "" for that
	Calendars       []string
	RandomizedDelay time.Duration
	Persistent      bool // a run that was missed is made up for
	Isolated        bool
	Quiesce         string // in place of the offering's; "" for that
	Overlap         Overlap
	Enabled         bool
	UID             uint32 // who made it
	Created         time.Time
}

// Overlap is what becomes of a run that cannot start when it is due.
type Overlap string

const (
	OverlapSkip  Overlap = "skip"
	OverlapQueue Overlap = "queue"
)

// RunState is the state of a schedule's run.
type RunState string

const (
	RunWaiting   RunState = "waiting"
	RunRunning   RunState = "running"
	RunSucceeded RunState = "succeeded"
	RunFailed    RunState = "failed"
	RunSkipped   RunState = "skipped"
	RunCancelled RunState = "cancelled"
)

// Ended says whether the state is final.
func (s RunState) Ended() bool { return s != RunWaiting && s != RunRunning }

// ScheduleRun is what became of a time that a schedule was due, or triggered.
type ScheduleRun struct {
	ID       string // ULID
	Schedule string
	State    RunState
	Reason   string // why it waits, was skipped, or failed
	Jobs     []string
	Timer    bool // its timer was due; otherwise somebody triggered it
	UID      uint32
	Created  time.Time
	Finished time.Time
}

// keptRuns is how many runs of each schedule are remembered.
const keptRuns = 100

const scheduleColumns = `id, name, domain, offering, coalesce(repository, ''), calendars, randomized_delay, persistent, isolated, quiesce,
	overlap, enabled, uid, created`

func scanSchedule(from row) (s Schedule, err error) {
	var calendars string
	var delay int64
	err = from.Scan(&s.ID, &s.Name, &s.Domain, &s.Offering, &s.Repository, &calendars, &delay, &s.Persistent, &s.Isolated, &s.Quiesce,
		&s.Overlap, &s.Enabled, &s.UID, timestamp{&s.Created})
	if err != nil {
		return s, err
	}
	s.RandomizedDelay = time.Duration(delay) * time.Microsecond
	return s, json.Unmarshal([]byte(calendars), &s.Calendars)
}

// CreateSchedule adds a schedule. ErrExists: the name is taken; ErrNotFound: no such repository.
func (c *Catalog) CreateSchedule(ctx context.Context, s Schedule) error {
	calendars, err := json.Marshal(s.Calendars)
	if err != nil {
		return err
	}
	return c.write(ctx, "create schedule "+s.Name, func(tx *sql.Tx) error {
		if err := repositoryOf(ctx, tx, s); err != nil {
			return err
		}
		_, err := tx.ExecContext(ctx, `INSERT INTO schedules (id, name, domain, offering, repository, calendars, randomized_delay,
			persistent, isolated, quiesce, overlap, enabled, uid, created) VALUES (?, ?, ?, ?, nullif(?, ''), ?, ?, ?, ?, ?, ?, ?, ?, ?)`,
			s.ID, s.Name, s.Domain, s.Offering, s.Repository, string(calendars), s.RandomizedDelay.Microseconds(),
			s.Persistent, s.Isolated, s.Quiesce, s.Overlap, s.Enabled, s.UID, toMicro(s.Created))
		return err
	})
}

func repositoryOf(ctx context.Context, tx *sql.Tx, s Schedule) error {
	if s.Repository == "" {
		return nil
	}
	return mustExist(ctx, tx, "repository", "repositories", "id", s.Repository)
}

// UpdateSchedule replaces what can change of the schedule with this id: all but whom it is for, its name, and who made it.
func (c *Catalog) UpdateSchedule(ctx context.Context, s Schedule) error {
	calendars, err := json.Marshal(s.Calendars)
	if err != nil {
		return err
	}
	return c.write(ctx, "update schedule "+s.Name, func(tx *sql.Tx) error {
		if err := repositoryOf(ctx, tx, s); err != nil {
			return err
		}
		return exactlyOne(tx.ExecContext(ctx, `UPDATE schedules SET repository = nullif(?, ''), calendars = ?, randomized_delay = ?,
			persistent = ?, isolated = ?, quiesce = ?, overlap = ?, enabled = ? WHERE id = ?`,
			s.Repository, string(calendars), s.RandomizedDelay.Microseconds(), s.Persistent, s.Isolated, s.Quiesce, s.Overlap, s.Enabled, s.ID))
	})
}

// RemoveSchedule forgets a schedule and its runs; their jobs go on.
func (c *Catalog) RemoveSchedule(ctx context.Context, id string) error {
	return c.write(ctx, "remove schedule "+id, func(tx *sql.Tx) error {
		return exactlyOne(tx.ExecContext(ctx, "DELETE FROM schedules WHERE id = ?", id))
	})
}

// Schedule returns the schedule with this id.
func (c *Catalog) Schedule(ctx context.Context, id string) (s Schedule, err error) {
	err = c.read(ctx, "read schedule "+id, func(tx *sql.Tx) (err error) {
		s, err = scanSchedule(tx.QueryRowContext(ctx, "SELECT "+scheduleColumns+" FROM schedules WHERE id = ?", id))
		return err
	})
	return s, err
}

// ScheduleByName returns the schedule with this name.
func (c *Catalog) ScheduleByName(ctx context.Context, name string) (s Schedule, err error) {
	err = c.read(ctx, "find schedule "+name, func(tx *sql.Tx) (err error) {
		s, err = scanSchedule(tx.QueryRowContext(ctx, "SELECT "+scheduleColumns+" FROM schedules WHERE name = ?", name))
		return err
	})
	return s, err
}

// Schedules returns all schedules by name.
func (c *Catalog) Schedules(ctx context.Context) (all []Schedule, err error) {
	err = c.read(ctx, "list schedules", func(tx *sql.Tx) (err error) {
		all, err = collect(ctx, tx, scanSchedule, "SELECT "+scheduleColumns+" FROM schedules ORDER BY name")
		return err
	})
	return all, err
}

const runColumns = "id, schedule, state, reason, jobs, timer, uid, created, finished"

func scanRun(from row) (r ScheduleRun, err error) {
	var jobs string
	err = from.Scan(&r.ID, &r.Schedule, &r.State, &r.Reason, &jobs, &r.Timer, &r.UID, timestamp{&r.Created}, timestamp{&r.Finished})
	if err != nil {
		return r, err
	}
	return r, json.Unmarshal([]byte(jobs), &r.Jobs)
}

// AddRun records a run, and forgets the oldest beyond what is kept. ErrExists:
// one waits, or one runs, and so would this one.
func (c *Catalog) AddRun(ctx context.Context, r ScheduleRun) error {
	jobs, err := jobList(r.Jobs)
	if err != nil {
		return err
	}
	return c.write(ctx, "record a run of schedule "+r.Schedule, func(tx *sql.Tx) error {
		if _, err := tx.ExecContext(ctx, "INSERT INTO schedule_runs ("+runColumns+") VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
			r.ID, r.Schedule, r.State, r.Reason, jobs, r.Timer, r.UID, toMicro(r.Created), toMicro(r.Finished)); err != nil {
			return err
		}
		_, err := tx.ExecContext(ctx, `DELETE FROM schedule_runs WHERE schedule = ?1 AND state NOT IN ('waiting', 'running')
			AND id NOT IN (SELECT id FROM schedule_runs WHERE schedule = ?1 ORDER BY id DESC LIMIT ?2)`, r.Schedule, keptRuns)
		return err
	})
}

// UpdateRun replaces state, reason, jobs and end of the run with this id.
// ErrNotFound: it has ended, or its schedule is gone.
func (c *Catalog) UpdateRun(ctx context.Context, r ScheduleRun) error {
	jobs, err := jobList(r.Jobs)
	if err != nil {
		return err
	}
	return c.write(ctx, "record what became of a run of schedule "+r.Schedule, func(tx *sql.Tx) error {
		return exactlyOne(tx.ExecContext(ctx, `UPDATE schedule_runs SET state = ?, reason = ?, jobs = ?, finished = ?
			WHERE id = ? AND state IN ('waiting', 'running')`, r.State, r.Reason, jobs, toMicro(r.Finished), r.ID))
	})
}

func jobList(ids []string) (string, error) {
	text, err := json.Marshal(append([]string{}, ids...))
	return string(text), err
}

// Runs returns the newest runs of a schedule, newest first.
func (c *Catalog) Runs(ctx context.Context, schedule string, limit int) (all []ScheduleRun, err error) {
	err = c.read(ctx, "list the runs of schedule "+schedule, func(tx *sql.Tx) (err error) {
		all, err = collect(ctx, tx, scanRun, "SELECT "+runColumns+" FROM schedule_runs WHERE schedule = ? ORDER BY id DESC LIMIT ?", schedule, limit)
		return err
	})
	return all, err
}

// LastRuns returns of each schedule, or of one, the newest run, the newest that
// succeeded, and the one that goes on, newest first.
func (c *Catalog) LastRuns(ctx context.Context, schedule string) (all []ScheduleRun, err error) {
	const of = "FROM schedule_runs WHERE (?1 = '' OR schedule = ?1) "
	err = c.read(ctx, "list the last runs of schedules", func(tx *sql.Tx) (err error) {
		all, err = collect(ctx, tx, scanRun, "SELECT "+runColumns+" FROM schedule_runs WHERE id IN (SELECT max(id) "+of+"GROUP BY schedule"+
			" UNION SELECT max(id) "+of+"AND state = 'succeeded' GROUP BY schedule UNION SELECT id "+of+"AND state = 'running') ORDER BY id DESC", schedule)
		return err
	})
	return all, err
}

// UnfinishedRuns returns the runs that wait or go on, oldest first; with a schedule, only its.
func (c *Catalog) UnfinishedRuns(ctx context.Context, schedule string) (all []ScheduleRun, err error) {
	err = c.read(ctx, "list the runs that go on", func(tx *sql.Tx) (err error) {
		all, err = collect(ctx, tx, scanRun, "SELECT "+runColumns+` FROM schedule_runs
			WHERE state IN ('waiting', 'running') AND (?1 = '' OR schedule = ?1) ORDER BY id`, schedule)
		return err
	})
	return all, err
}
