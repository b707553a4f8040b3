package backup

import (
	"context"

	"github.com/virtbackup/virtbackup/daemon/internal/transfer"
)

// Names of the sources, as the Plan has them.
const (
	sourceLive    = "live"    // a running domain: libvirt's backup job, see live
	sourceStopped = "stopped" // a domain that is off, see stopped
	sourceFrozen  = "frozen"  // what is below new overlays, see frozen
)

// source is what the disks are copied from, and knows how their point in time
// is fixed. It keeps nothing: a daemon that was restarted goes on with another
// one, by what the job's step says. What fails is undone by end and remove.
type source interface {
	// prepare makes what must be there before the worker is started: it sees
	// only directories that exist then. It may be done again.
	prepare(ctx context.Context) error
	// server is where the worker finds the disks, once the point in time is fixed.
	server() server
	// begin records stepBegin, fixes the point in time and calls run.fixed. The
	// worker is ready.
	begin(ctx context.Context) error
	// begun tells whether begin had fixed the point in time when the daemon
	// ended in the midst of it; then rejoin goes on, else prepare and begin are
	// done again.
	begun(ctx context.Context) (bool, error)
	rejoin(ctx context.Context) error
	// remember records the checkpoint's definition as soon as it can.
	remember(ctx context.Context)
	// watch aborts the copy, with the reason, when it cannot be right any more
	// or does harm. It returns when ctx ends, which is when all has been copied.
	watch(ctx context.Context, abort context.CancelCauseFunc)
	// confirm says whether what was copied is of the point in time; it is asked
	// only when server wants that.
	confirm(ctx context.Context) error
	// lost says why the worker could not read an export.
	lost(ctx context.Context, cause error) error
	// end ends the export, when all is copied, after a failure, and at the end
	// once more. remove then removes the files that were made for it.
	end(ctx context.Context) error
	remove() error
}

// server is an NBD server with one export for each disk, named by its target.
type server struct {
	socket  string
	bitmap  func(target string) string // name of the exported bitmap of an increment by CBT
	confirm bool                       // the copy has to be confirmed
}

// source is the one of the run's plan.
func (r *run) source() source {
	switch r.Plan.Source {
	case sourceStopped:
		return stopped{r}
	case sourceFrozen:
		return frozen{r}
	}
	return live{r}
}

// copied tells by the worker's status that it will not read any more.
func copied(s transfer.Status) bool {
	switch s.Phase {
	case transfer.PhaseFlushing, transfer.PhaseConfirming, transfer.PhaseVerifying, transfer.PhaseCommitting:
		return true
	}
	return false
}
