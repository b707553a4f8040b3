package supervise

import (
	"context"
	"errors"

	"github.com/virtbackup/virtbackup/daemon/internal/job"
	"github.com/virtbackup/virtbackup/daemon/internal/transfer"
	"github.com/virtbackup/virtbackup/systemd/jobunit"
)

// Run has a worker do the whole of spec, or follows the one that a daemon before this one started, and forgets it. The
// error is the worker's own (*transfer.Failure), with its result, or Follow's. After job.ErrDetach the worker goes on, and
// the next daemon's Run takes it up.
func (s *Supervisor) Run(ctx context.Context, spec transfer.Spec, limits jobunit.Limits, onStatus func(transfer.Status)) (*transfer.Result, error) {
	w, err := s.Start(ctx, spec, limits)
	if err != nil {
		return nil, err
	}
	result, err := w.Follow(ctx, onStatus)
	if errors.Is(err, job.ErrDetach) {
		return nil, err
	}
	if killed := new(KilledError); errors.As(err, &killed) && killed.Hung() {
		return nil, err // it is left to systemd, and to a later look at what is left over
	}
	if forget := s.Forget(context.WithoutCancel(ctx), spec.Job); forget != nil {
		s.Log.Warn("cannot clear up after a worker", "job", spec.Job, "error", forget)
	}
	if err == nil && result.Error != nil {
		return result, result.Error
	}
	return result, err
}

// UnitName is the unit of a job's worker.
func UnitName(job string) string { return unitPrefix + job + unitSuffix }
