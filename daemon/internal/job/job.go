// Package job runs long operations: each is recorded in the catalog before
// anything is done for it, survives restarts of the daemon, can be cancelled,
// and reaches exactly one end.
package job

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
)

var (
	// ErrDetach is the cause of a Kind's context when the daemon goes down:
	// return and leave workers alone; Run is called again after the restart.
	ErrDetach = errors.New("the daemon goes down")
	// ErrCancelled is the cause of a Kind's context when somebody cancelled the job.
	ErrCancelled = errors.New("the job was cancelled")
	// ErrTooMany says that the caller, or the queue, has too many unfinished jobs.
	ErrTooMany = errors.New("too many unfinished jobs")
	// ErrUnknownKind says that no such kind of job is registered.
	ErrUnknownKind = errors.New("unknown kind of job")
)

// Kind is what a kind of job does.
type Kind interface {
	// Run does the work. After a restart of the daemon it is called again with
	// the recorded step, and carries on from there; it may then find its context
	// cancelled already, by ErrCancelled. A nil error is success, even when the
	// job was to be cancelled: the work had been done.
	Run(ctx context.Context, h *Handle) error
	// Undo clears up after Run failed or was cancelled, and tells why by
	// Handle.Failure. It is called again after a restart, so it has to bear that.
	// Its context ends when the daemon goes down, or when it takes too long.
	Undo(ctx context.Context, h *Handle) error
}

// Retrier is a Kind whose jobs can be tried again after they failed and were
// undone. Others are tried once.
type Retrier interface {
	// Again returns which backup the job is about in its next try.
	Again(j catalog.Job) (backup string)
}

// Withdrawer is a Kind that wants to know of jobs that were cancelled while they
// waited, to begin or to begin anew: neither Run nor Undo is called for those.
type Withdrawer interface {
	// Withdrawn is called before the job ends.
	Withdrawn(ctx context.Context, j catalog.Job) error
}

// NamedError is an error with a name for the bus, which is the job's error name then.
type NamedError interface {
	error
	ErrorName() string // without the prefix "org.virtbackup1.Error."
}

// Names of errors that have none.
const (
	nameFailed    = "Failed"
	nameCancelled = "Cancelled"
	nameInternal  = "Internal"
)

// Request asks for a job.
type Request struct {
	Kind       string
	Domain     string            // UUID: jobs of one domain run one after another; "" for none
	Repository string            // id, for the bound of jobs per repository; "" for none
	Backup     string            // id, if it is about one
	Spec       any               // kept as JSON
	UID        uint32            // who asks
	Priority   *int              // 0 to 99: the higher goes first, but not before older jobs of its domain; nil for NormalPriority
	Origin     catalog.JobOrigin // "" for a user
	Schedule   string            // id of the one that starts it
	Parent     string            // id of the group that it is of
	Attempts   int               // how often it may be tried when what it fails of may pass; 0 for once
}

// NormalPriority is that of a job that is neither urgent nor can wait.
const NormalPriority = 50

// Options are what an Engine is made with.
type Options struct {
	// Limits are those at the start, see Engine.SetLimits.
	Limits Limits
	// Classes says the class of each kind.
	Classes map[string]Class
	// Passing says of a failure that it may not come again. nil: of none.
	Passing func(error) bool
	Logger  *slog.Logger
	// Ended jobs are forgotten when they are older, or more.
	KeepFor  time.Duration
	KeepMost int
}

// Status is a job as it is at this moment.
type Status struct {
	catalog.Job
	Rate float64       // bytes per second, smoothed; 0 when not known
	ETA  time.Duration // until the phase's end; 0 when not known
	// Waiting is why it does not go on; "" when it does.
	Waiting string
}

// Handle is a running job's side of the engine.
type Handle struct {
	engine  *Engine
	entry   *entry
	job     catalog.Job
	logger  *slog.Logger
	failure error
}

// Job returns the job as it was recorded when Run or Undo was called, with the last step.
func (h *Handle) Job() catalog.Job { return h.job }

// Request decodes what the job was submitted with into r, a pointer.
func (h *Handle) Request(r any) error {
	if err := json.Unmarshal(h.job.Spec, r); err != nil {
		return fmt.Errorf("cannot read the job's request: %w", err)
	}
	return nil
}

// Failure returns, in Undo, why the work is undone.
func (h *Handle) Failure() error { return h.failure }

// Logger returns a logger that names the job.
func (h *Handle) Logger() *slog.Logger { return h.logger }

// Step records durably how far the job has come, also when ctx has ended: what
// was done must not be forgotten because somebody cancelled the job.
func (h *Handle) Step(ctx context.Context, name string, data any) error {
	step, err := h.NewStep(name, data)
	if err != nil {
		return err
	}
	return h.engine.catalog.RecordStep(context.WithoutCancel(ctx), step)
}

// NewStep makes a step that is to be recorded together with something else,
// by a method of the catalog that takes one.
func (h *Handle) NewStep(name string, data any) (catalog.Step, error) {
	raw, err := json.Marshal(data)
	if err != nil {
		return catalog.Step{}, err
	}
	return catalog.Step{Job: h.job.ID, Name: name, Data: raw}, nil
}

// Progress says how far the phase is, in bytes. It is kept in memory only. From
// then on the job is to make progress, until it is in a phase where it waits.
func (h *Handle) Progress(phase string, done, total uint64) {
	h.engine.progress(h.entry, func(m *meter, now time.Time) { m.update(now, phase, done, total) })
}

// Waits says that the job is in a phase in which it makes no progress of its
// own, and which is bounded otherwise, as by the limits of what it waits for.
func (h *Handle) Waits(phase string) {
	h.engine.progress(h.entry, func(m *meter, _ time.Time) { m.wait(phase) })
}

// Submit submits a job for a group, which this one is, with the group's user,
// priority and origin.
func (h *Handle) Submit(ctx context.Context, r Request) (Status, error) {
	j := h.job
	r.UID, r.Priority, r.Origin, r.Schedule, r.Parent = j.UID, &j.Priority, j.Origin, j.Schedule, j.ID
	return h.engine.Submit(ctx, r)
}

// Cancel is Engine.Cancel, and Wait Engine.Wait.
func (h *Handle) Cancel(ctx context.Context, id string) error { return h.engine.Cancel(ctx, id) }

// Wait returns a job once it has ended.
func (h *Handle) Wait(ctx context.Context, id string) (Status, error) { return h.engine.Wait(ctx, id) }

// SetResult sets what the job has to tell at its end; it must marshal to JSON.
func (h *Handle) SetResult(v any) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return err
	}
	h.engine.setResult(h.entry, raw)
	return nil
}

// Log writes to the journal and to the job's own log, which people read with the
// job. Only the journal gets the attributes.
func (h *Handle) Log(ctx context.Context, level slog.Level, message string, attributes ...any) {
	h.logger.Log(ctx, level, message, attributes...)
	// Also when the job has just been cancelled: its log says what it did about that.
	err := h.engine.catalog.AddJobMessage(context.WithoutCancel(ctx), h.job.ID,
		catalog.Message{Time: time.Now(), Level: level, Text: message})
	if err != nil {
		h.logger.WarnContext(ctx, "cannot write to the job's log", "error", err)
	}
}
