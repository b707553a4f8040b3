package catalog

import (
	"cmp"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"time"
)

// JobState is the state of a job.
type JobState string

const (
	JobQueued     JobState = "queued"
	JobRunning    JobState = "running"
	JobCancelling JobState = "cancelling" // somebody asked for it; it has not ended yet
	JobSucceeded  JobState = "succeeded"
	JobFailed     JobState = "failed"
	JobCancelled  JobState = "cancelled"
)

// Ended says whether the state is final.
func (s JobState) Ended() bool { return s == JobSucceeded || s == JobFailed || s == JobCancelled }

// JobOrigin is who started a job.
type JobOrigin string

const (
	OriginUser     JobOrigin = "user"
	OriginSchedule JobOrigin = "schedule"
	OriginSystem   JobOrigin = "system" // the daemon, on its own
)

// Job is a long operation.
type Job struct {
	ID           string
	Kind         string
	Domain       string // UUID; "" if it is about none
	Repository   string // id; "" if it uses none
	Backup       string // id; "" if it is about none
	Spec         json.RawMessage
	State        JobState
	Step         string // the last that was recorded
	StepData     json.RawMessage
	Undoing      bool            // it is to fail or be cancelled: only clearing up is left
	Result       json.RawMessage // what it has to tell besides; nil for nothing
	ErrorName    string          // as in D-Bus, after "org.virtbackup1.Error."
	ErrorMessage string
	UID          uint32 // who asked for it
	Priority     int    // 0 to 99: the higher goes first
	Origin       JobOrigin
	Schedule     string    // id of the one that started it; "" for none
	Parent       string    // id of the group that it is of; "" for none
	Attempts     int       // how often it may be tried
	Attempt      int       // how often it was begun
	Yielded      int       // how often it gave way to another one of its domain
	Again        bool      // while it is undone: it is to be tried again then
	NextTry      time.Time // not before
	Created      time.Time
	Started      time.Time
	Finished     time.Time
	Phase        string // at the end, as are:
	Done, Total  uint64 // bytes
}

// Message is a line of a job's log.
type Message struct {
	Time  time.Time
	Level slog.Level
	Text  string
}

// maximumMessages bounds the lines kept of one job; the oldest go first.
const maximumMessages = 200

const jobColumns = `id, kind, domain, repository, backup, spec, state, step, step_data, undoing, result, error_name, error_message, uid,
	priority, origin, schedule, parent, attempts, attempt, yielded, again, next_try, created, started, finished, phase, done, total`

func scanJob(from row) (j Job, err error) {
	var spec, data, result string
	err = from.Scan(&j.ID, &j.Kind, &j.Domain, &j.Repository, &j.Backup, &spec, &j.State, &j.Step, &data, &j.Undoing, &result,
		&j.ErrorName, &j.ErrorMessage, &j.UID, &j.Priority, &j.Origin, &j.Schedule, &j.Parent, &j.Attempts, &j.Attempt, &j.Yielded, &j.Again, timestamp{&j.NextTry},
		timestamp{&j.Created}, timestamp{&j.Started}, timestamp{&j.Finished},
		&j.Phase, &j.Done, &j.Total)
	j.Spec, j.StepData, j.Result = raw(spec), raw(data), raw(result)
	return j, err
}

func raw(s string) json.RawMessage {
	if s == "" {
		return nil
	}
	return json.RawMessage(s)
}

// CreateJob records a job as queued, before anything is done for it.
func (c *Catalog) CreateJob(ctx context.Context, j Job) error {
	return c.write(ctx, "create job "+j.ID, func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, `INSERT INTO jobs (id, kind, domain, repository, backup, spec, state, step, step_data, undoing, result,
			error_name, error_message, uid, priority, origin, schedule, parent, attempts, created, started, finished, phase, done, total)
			VALUES (?, ?, ?, ?, ?, ?, 'queued', '', '', 0, '', '', '', ?, ?, ?, ?, ?, ?, ?, 0, 0, '', 0, 0)`,
			j.ID, j.Kind, j.Domain, j.Repository, j.Backup, string(j.Spec), j.UID,
			j.Priority, cmp.Or(j.Origin, OriginUser), j.Schedule, j.Parent, max(j.Attempts, 1), toMicro(j.Created))
		return err
	})
}

// StartJob records that a queued job runs. ErrState: it is not queued.
func (c *Catalog) StartJob(ctx context.Context, id string, started time.Time) error {
	return c.write(ctx, "start job "+id, func(tx *sql.Tx) error {
		return changeJob(ctx, tx, id, "state = 'queued'", "state = 'running', attempt = attempt + 1, next_try = 0, started = ?", toMicro(started))
	})
}

// RecordStep records how far a job has come.
func (c *Catalog) RecordStep(ctx context.Context, step Step) error {
	return c.write(ctx, "record step of job "+step.Job, func(tx *sql.Tx) error { return recordStep(ctx, tx, step) })
}

func recordStep(ctx context.Context, tx *sql.Tx, s Step) error {
	return changeJob(ctx, tx, s.Job, "state IN ('running', 'cancelling')", "step = ?, step_data = ?", s.Name, string(s.Data))
}

// CancelJob records that a job is to be cancelled. ErrState: it has ended.
func (c *Catalog) CancelJob(ctx context.Context, id string) error {
	return c.write(ctx, "cancel job "+id, func(tx *sql.Tx) error {
		return changeJob(ctx, tx, id, "finished = 0", "state = 'cancelling'")
	})
}

// FailingJob records why a job is about to fail or be cancelled. From now on
// its work is being undone, also after a restart; then it may be tried again.
func (c *Catalog) FailingJob(ctx context.Context, id, name, message string, again bool) error {
	return c.write(ctx, "record failure of job "+id, func(tx *sql.Tx) error {
		return changeJob(ctx, tx, id, "finished = 0", "undoing = 1, error_name = ?, error_message = ?, again = ?", name, message, again)
	})
}

// RetryJob puts a job that failed, and was undone, back into the queue, for
// another try that is not begun before a time. Its error stays known until it
// ends. backup is what it is about from now on. ErrState: it is not running, as
// when it was cancelled meanwhile.
func (c *Catalog) RetryJob(ctx context.Context, id, backup string, next time.Time) error {
	return c.write(ctx, "try job again "+id, func(tx *sql.Tx) error {
		return changeJob(ctx, tx, id, "state = 'running'",
			"state = 'queued', step = '', step_data = '', undoing = 0, again = 0, started = 0, backup = ?, next_try = ?", backup, toMicro(next))
	})
}

// YieldJob puts a job that gave way to another one, and was undone, back into
// the queue; the try does not count. ErrState: it is not running.
func (c *Catalog) YieldJob(ctx context.Context, id string) error {
	return c.write(ctx, "have job "+id+" give way", func(tx *sql.Tx) error {
		return changeJob(ctx, tx, id, "state = 'running'", `state = 'queued', step = '', step_data = '', undoing = 0, again = 0, started = 0,
			attempt = attempt - 1, yielded = yielded + 1, error_name = '', error_message = ''`)
	})
}

// ChildJobs returns the jobs of a group, oldest first.
func (c *Catalog) ChildJobs(ctx context.Context, parent string) (list []Job, err error) {
	err = c.read(ctx, "list jobs of group "+parent, func(tx *sql.Tx) (err error) {
		list, err = collect(ctx, tx, scanJob, "SELECT "+jobColumns+" FROM jobs WHERE parent = ? ORDER BY id", parent)
		return err
	})
	return list, err
}

// JobEnd is how a job ended.
type JobEnd struct {
	State        JobState // an ended one
	ErrorName    string
	ErrorMessage string
	Result       json.RawMessage
	Finished     time.Time
	Phase        string
	Done, Total  uint64
}

// EndJob records the one end of a job. ErrState: it has ended before.
func (c *Catalog) EndJob(ctx context.Context, id string, end JobEnd) error {
	if !end.State.Ended() || end.Finished.IsZero() {
		return fmt.Errorf("cannot end job %s as %q at %v", id, end.State, end.Finished)
	}
	return c.write(ctx, "end job "+id, func(tx *sql.Tx) error {
		return changeJob(ctx, tx, id, "finished = 0",
			"state = ?, error_name = ?, error_message = ?, result = ?, finished = ?, phase = ?, done = ?, total = ?",
			end.State, end.ErrorName, end.ErrorMessage, string(end.Result), toMicro(end.Finished), end.Phase, end.Done, end.Total)
	})
}

// changeJob sets columns of one job if the condition holds.
func changeJob(ctx context.Context, tx *sql.Tx, id, condition, set string, args ...any) error {
	err := exactlyOne(tx.ExecContext(ctx, "UPDATE jobs SET "+set+" WHERE id = ? AND "+condition, append(args, id)...))
	if !errors.Is(err, ErrNotFound) {
		return err
	}
	var state JobState
	if err := tx.QueryRowContext(ctx, "SELECT state FROM jobs WHERE id = ?", id).Scan(&state); err != nil {
		return err
	}
	return fmt.Errorf("job is %s: %w", state, ErrState)
}

// Job returns one job.
func (c *Catalog) Job(ctx context.Context, id string) (j Job, err error) {
	err = c.read(ctx, "read job "+id, func(tx *sql.Tx) (err error) {
		j, err = scanJob(tx.QueryRowContext(ctx, "SELECT "+jobColumns+" FROM jobs WHERE id = ?", id))
		return err
	})
	return j, err
}

// JobFilter selects jobs; a zero field selects all.
type JobFilter struct {
	Kind   string
	Domain string // UUID
	Parent string // id of a group
	// Schedule is the id of the schedule that started them.
	Schedule string
	States   []JobState
	// Unfinished selects those that have not ended.
	Unfinished bool
	Since      time.Time // created at or after
	Until      time.Time // created before
}

// ListJobs returns a page of jobs, newest first.
func (c *Catalog) ListJobs(ctx context.Context, f JobFilter, p Page) (list []Job, err error) {
	var q conditions
	q.equal("kind", f.Kind)
	q.equal("domain", f.Domain)
	q.equal("parent", f.Parent)
	q.equal("schedule", f.Schedule)
	oneOf(&q, "state", f.States)
	if f.Unfinished {
		q.add("finished = 0")
	}
	q.window(f.Since, f.Until)
	q.after(p)
	err = c.read(ctx, "list jobs", func(tx *sql.Tx) (err error) {
		list, err = collect(ctx, tx, scanJob, "SELECT "+jobColumns+" FROM jobs"+q.where()+" ORDER BY id DESC LIMIT ?",
			append(q.args, p.limit())...)
		return err
	})
	return list, err
}

// UntoldJobs returns the jobs whose end was not told outside yet, oldest first.
func (c *Catalog) UntoldJobs(ctx context.Context) (list []Job, err error) {
	err = c.read(ctx, "list jobs that are to be told of", func(tx *sql.Tx) (err error) {
		list, err = collect(ctx, tx, scanJob, "SELECT "+jobColumns+" FROM jobs WHERE told = 0 AND finished <> 0 ORDER BY id")
		return err
	})
	return list, err
}

// ToldJob records that a job's end was told outside.
func (c *Catalog) ToldJob(ctx context.Context, id string) error {
	return c.write(ctx, "record that job "+id+" was told of", func(tx *sql.Tx) error {
		return exactlyOne(tx.ExecContext(ctx, "UPDATE jobs SET told = 1 WHERE id = ?", id))
	})
}

// UnfinishedJobs returns the jobs that have not ended, oldest first.
func (c *Catalog) UnfinishedJobs(ctx context.Context) (list []Job, err error) {
	err = c.read(ctx, "list unfinished jobs", func(tx *sql.Tx) (err error) {
		list, err = collect(ctx, tx, scanJob, "SELECT "+jobColumns+" FROM jobs WHERE finished = 0 ORDER BY id")
		return err
	})
	return list, err
}

// PruneJobs forgets jobs that ended before a time, and of the others all but the
// newest so many. Jobs that have not ended stay, and so do those of their groups.
func (c *Catalog) PruneJobs(ctx context.Context, before time.Time, keep int) error {
	return c.write(ctx, "forget old jobs", func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, `DELETE FROM jobs WHERE finished <> 0 AND (finished < ? OR (finished, id) <=
			(SELECT finished, id FROM jobs WHERE finished <> 0 ORDER BY finished DESC, id DESC LIMIT 1 OFFSET ?))
			AND NOT EXISTS (SELECT 1 FROM jobs AS groups WHERE groups.id = jobs.parent AND groups.finished = 0)`, toMicro(before), keep)
		return err
	})
}

// AddJobMessage appends a line to a job's log.
func (c *Catalog) AddJobMessage(ctx context.Context, id string, m Message) error {
	return c.write(ctx, "log for job "+id, func(tx *sql.Tx) error {
		var number int
		if err := tx.QueryRowContext(ctx, "SELECT coalesce(max(number), 0) + 1 FROM job_messages WHERE job = ?", id).Scan(&number); err != nil {
			return err
		}
		if _, err := tx.ExecContext(ctx, "INSERT INTO job_messages (job, number, time, level, message) VALUES (?, ?, ?, ?, ?)",
			id, number, toMicro(m.Time), int(m.Level), m.Text); err != nil {
			return err
		}
		_, err := tx.ExecContext(ctx, "DELETE FROM job_messages WHERE job = ? AND number <= ?", id, number-maximumMessages)
		return err
	})
}

// JobMessages returns a job's log, oldest line first.
func (c *Catalog) JobMessages(ctx context.Context, id string) (list []Message, err error) {
	err = c.read(ctx, "read log of job "+id, func(tx *sql.Tx) (err error) {
		list, err = collect(ctx, tx, scanMessage, "SELECT time, level, message FROM job_messages WHERE job = ? ORDER BY number", id)
		return err
	})
	return list, err
}

func scanMessage(from row) (m Message, err error) {
	err = from.Scan(timestamp{&m.Time}, &m.Level, &m.Text)
	return m, err
}
