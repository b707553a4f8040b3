// Package supervise looks after workers: it starts each in a transient unit of its own, follows what it says in its job
// directory, and tells how it ended. A worker outlives the daemon; a new daemon attaches to it again.
//
// All that lasts is in the job directory and in systemd, nothing in memory. So every step may be the last one of a daemon,
// and the next daemon can tell where things stand:
//
//	no directory, or only spec.json        never started: Start starts it
//	status.json, unit runs                 at work: Attach, then Ready or Follow
//	result.json                            ended with this result
//	status.json, unit ended, no result     killed: *KilledError
package supervise

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/virtbackup/virtbackup/daemon/internal/job"
	"github.com/virtbackup/virtbackup/daemon/internal/share"
	"github.com/virtbackup/virtbackup/daemon/internal/transfer"
	"github.com/virtbackup/virtbackup/systemd/jobunit"
)

// ErrNoWorker says that the job has no worker: none was started, or it was forgotten.
var ErrNoWorker = errors.New("no worker was started")

// KilledError is the end of a worker that left no result: by SIGKILL, by the kernel for want of memory, by a crash.
type KilledError struct {
	Job   string
	State jobunit.State // how it ended, as systemd tells
}

func (e *KilledError) Error() string {
	if e.Hung() {
		return fmt.Sprintf("worker of job %s cannot be killed: it hangs in the kernel, as when storage does not answer", e.Job)
	}
	return fmt.Sprintf("worker of job %s ended without a result: %s", e.Job, e.State)
}

// Hung says that a process of the worker is still there, because it hangs in the kernel. It is left to systemd. It will
// not do anything more than the system call that it is in; but that one may still take effect.
func (e *KilledError) Hung() bool { return e.State.Processes || !e.State.Ended() }

// Options of a Supervisor.
type Options struct {
	Directory string        // of the job directories, normally /run/virtbackup/jobs
	Worker    string        // path of virtbackup-worker
	StopAfter time.Duration // that a worker has to end and clean up when it is asked to, before it is killed
	// Rates are those that all workers share, as configured now; nil for no bounds.
	Rates func() share.Rates
	Log   *slog.Logger
	// Prefix begins the names of units; "" for that of jobs.
	Prefix string
}

// Supervisor looks after the workers of this host. It is safe for concurrent use; one caller at a time per job.
type Supervisor struct {
	units *jobunit.Manager
	Options

	sharing sync.Mutex // of what workers have together: rates, and space in repositories
}

// New makes a Supervisor.
func New(units *jobunit.Manager, o Options) *Supervisor {
	o.Prefix = cmp.Or(o.Prefix, unitPrefix)
	return &Supervisor{units: units, Options: o}
}

const (
	unitPrefix = "virtbackup-job-"
	unitSuffix = ".service"
	rootName   = "root" // the worker's /, in its job directory

	answer = 30 * time.Second // within which systemd has to answer a question
)

// Worker is the worker of one job.
type Worker struct {
	s         *Supervisor
	id        string
	unit      string
	directory string
}

func (s *Supervisor) worker(id string) (*Worker, error) {
	// The id becomes part of a path and of the name of a unit.
	if _, err := ulid.ParseStrict(id); err != nil {
		return nil, fmt.Errorf("%q is not the id of a job: %w", id, err)
	}
	return &Worker{s, id, s.Prefix + id + unitSuffix, filepath.Join(s.Directory, id)}, nil
}

// Start starts the worker of spec.Job and returns when it runs. When there is one already, running or ended, it is
// attached to, and its own spec stands.
func (s *Supervisor) Start(ctx context.Context, spec transfer.Spec, limits jobunit.Limits) (*Worker, error) {
	w, err := s.Attach(ctx, spec.Job)
	if !errors.Is(err, ErrNoWorker) {
		return w, err
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if w, err = s.worker(spec.Job); err != nil {
		return nil, err
	}
	if spec, err = w.prepare(spec); err != nil {
		return nil, fmt.Errorf("cannot make the directory of job %s: %w", w.id, err)
	}
	if err := s.units.Start(ctx, w.asUnit(spec, limits)); err != nil {
		if errors.Is(err, job.ErrDetach) {
			return nil, err
		}
		return nil, errors.Join(err, w.undo(ctx))
	}
	return w, nil
}

// prepare makes the job's directory, and gives the worker its share.
func (w *Worker) prepare(spec transfer.Spec) (transfer.Spec, error) {
	w.s.sharing.Lock()
	defer w.s.sharing.Unlock()
	if err := w.makeDirectory(); err != nil {
		return spec, err
	}
	working, err := w.s.working()
	if err != nil {
		return spec, err
	}
	spec.Version = transfer.SpecVersion
	if shares(spec) {
		spec.Repository.Promised = promised(working, spec)
		working = append(working, atWork{w.directory, spec})
	}
	if err := transfer.WriteSpec(w.directory, &spec); err != nil {
		return spec, err
	}
	return spec, w.s.divide(working)
}

func (w *Worker) makeDirectory() error {
	if err := os.MkdirAll(w.s.Directory, 0o700); err != nil {
		return err
	}
	// What is there already is of a daemon that went down before it started the unit.
	if err := os.RemoveAll(w.directory); err != nil {
		return err
	}
	if err := os.Mkdir(w.directory, 0o700); err != nil {
		return err
	}
	return os.Mkdir(filepath.Join(w.directory, rootName), 0o755)
}

// undo takes back a start that failed or was cancelled.
func (w *Worker) undo(ctx context.Context) error {
	state, err := w.stop(ctx)
	if err != nil {
		return err
	}
	if !state.Ended() {
		return &KilledError{w.id, state}
	}
	return w.s.Forget(context.WithoutCancel(ctx), w.id)
}

func (w *Worker) asUnit(spec transfer.Spec, limits jobunit.Limits) jobunit.Unit {
	u := jobunit.Unit{
		Name:        w.unit,
		Description: fmt.Sprintf("virtbackup %s, job %s", spec.Operation, w.id),
		Command:     []string{w.s.Worker, w.directory},
		Root:        filepath.Join(w.directory, rootName),
		StopAfter:   w.s.StopAfter,
		Limits:      limits,
	}
	u.ReadOnly, u.ReadWrite, u.Devices = paths(spec)
	u.ReadWrite = append(u.ReadWrite, w.directory)
	return u
}

// paths are those that a worker needs for what it is asked to do, and all that it gets to see. Directories of sockets,
// because the sockets come when the point in time is fixed, after the worker's start. Directories of files, because
// systemd follows symbolic links: QEMU's user may put one in the place of its NVRAM, and the worker must see that it is one.
func paths(spec transfer.Spec) (readOnly, readWrite, devices []string) {
	switch spec.Operation {
	case transfer.OperationList, transfer.OperationRestore, transfer.OperationVerify, transfer.OperationInspect, transfer.OperationServe:
		readOnly = append(readOnly, spec.Repository.Path)
	default:
		readWrite = append(readWrite, spec.Repository.Path)
	}
	if spec.Repository.KeyFile != "" {
		readOnly = append(readOnly, spec.Repository.KeyFile)
	}
	if b := spec.Backup; b != nil {
		for _, d := range b.Disks {
			readOnly = append(readOnly, filepath.Dir(d.Socket))
		}
		for _, f := range b.Files {
			if f.Path != "" {
				readOnly = append(readOnly, filepath.Dir(f.Path))
			}
		}
	}
	if r := spec.Repair; r != nil {
		for _, d := range r.Live {
			readOnly = append(readOnly, filepath.Dir(d.Socket))
		}
	}
	if r := spec.Restore; r != nil {
		for _, d := range r.Disks {
			if d.Device {
				devices = append(devices, d.Destination)
			} else {
				readWrite = append(readWrite, d.Directory)
			}
		}
		for _, f := range r.Files {
			readWrite = append(readWrite, f.Directory)
		}
	}
	if v := spec.Serve; v != nil {
		for _, d := range v.Disks {
			readWrite = append(readWrite, filepath.Dir(d.Socket))
		}
		for _, f := range v.Files {
			readWrite = append(readWrite, f.Directory)
		}
	}
	return unique(readOnly), unique(readWrite), unique(devices)
}

func unique(paths []string) []string {
	for i, p := range paths {
		paths[i] = filepath.Clean(p)
	}
	slices.Sort(paths)
	return slices.Compact(paths)
}

// Attach finds the worker of a job, running or ended. ErrNoWorker when none was started. It does so also when the context
// is cancelled: the way to cancel a worker is to follow it.
func (s *Supervisor) Attach(ctx context.Context, id string) (*Worker, error) {
	w, err := s.worker(id)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), answer)
	defer cancel()
	state, err := s.units.State(ctx, w.unit)
	if err != nil {
		return nil, err
	}
	if state.Known || w.has(transfer.StatusFile) || w.has(transfer.ResultFile) {
		return w, nil
	}
	return nil, fmt.Errorf("job %s: %w", id, ErrNoWorker)
}

func (w *Worker) has(file string) bool {
	_, err := os.Stat(filepath.Join(w.directory, file))
	return err == nil
}

// Forget removes all that is left of a job's worker. It must have ended.
func (s *Supervisor) Forget(ctx context.Context, id string) error {
	w, err := s.worker(id)
	if err != nil {
		return err
	}
	state, err := s.units.State(ctx, w.unit)
	if err != nil {
		return err
	}
	if !state.Ended() {
		return fmt.Errorf("cannot forget the worker of job %s: it is %s", id, state)
	}
	if err := s.units.Forget(ctx, w.unit); err != nil {
		return err
	}
	if err := os.RemoveAll(w.directory); err != nil {
		return fmt.Errorf("cannot remove the directory of job %s: %w", id, err)
	}
	return s.Share()
}

// Leftover is what there is of the worker of one job.
type Leftover struct {
	Job       string
	State     jobunit.State
	Directory bool
}

// Leftovers lists the workers of which anything is there, running, ended or hung. What belongs to no job of the catalog
// is to be stopped (Attach, Cancel) and forgotten.
func (s *Supervisor) Leftovers(ctx context.Context) ([]Leftover, error) {
	found := map[string]Leftover{}
	entries, err := os.ReadDir(s.Directory)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("cannot list job directories: %w", err)
	}
	for _, e := range entries {
		if _, err := s.worker(e.Name()); err == nil {
			found[e.Name()] = Leftover{Job: e.Name(), Directory: true}
		}
	}
	states, err := s.units.List(ctx, s.Prefix+"*"+unitSuffix)
	if err != nil {
		return nil, err
	}
	for _, state := range states {
		id := strings.TrimSuffix(strings.TrimPrefix(state.Name, s.Prefix), unitSuffix)
		if _, err := s.worker(id); err == nil {
			found[id] = Leftover{Job: id, State: state, Directory: found[id].Directory}
		}
	}
	var list []Leftover
	for _, l := range found {
		list = append(list, l)
	}
	slices.SortFunc(list, func(a, b Leftover) int { return strings.Compare(a.Job, b.Job) })
	return list, nil
}
