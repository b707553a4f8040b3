package supervise

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/virtbackup/virtbackup/daemon/internal/share"
	"github.com/virtbackup/virtbackup/daemon/internal/transfer"
	"github.com/virtbackup/virtbackup/systemd/jobunit"
)

// atWork is a worker that has no result yet, as its directory tells: also one
// that a daemon before this one started.
type atWork struct {
	directory string
	spec      transfer.Spec
}

// working finds the workers that read from guests' disks or write much to a
// repository.
func (s *Supervisor) working() (all []atWork, err error) {
	specs, err := filepath.Glob(filepath.Join(s.Directory, "*", transfer.SpecFile))
	if err != nil {
		return nil, err
	}
	for _, file := range specs {
		directory := filepath.Dir(file)
		if _, err := os.Stat(filepath.Join(directory, transfer.ResultFile)); err == nil {
			continue
		}
		spec, err := transfer.ReadSpec(directory)
		if err != nil { // it is being forgotten, or another version's
			continue
		}
		if shares(*spec) {
			all = append(all, atWork{directory, *spec})
		}
	}
	return all, nil
}

// shares tells whether a worker moves so much that it has to share.
func shares(s transfer.Spec) bool {
	switch s.Operation {
	case transfer.OperationBackup, transfer.OperationMerge, transfer.OperationCompress, transfer.OperationRepair:
		return true
	}
	return s.Most > 0
}

// promised is how much the other backups in a repository are still expected to
// take that are being made, or compressed.
func promised(working []atWork, of transfer.Spec) uint64 {
	var all []share.Promise
	for _, w := range working {
		p := share.Promise{}
		switch {
		case w.spec.Repository.Path != of.Repository.Path:
			continue
		case w.spec.Backup != nil:
			p.Expected = w.spec.Backup.Expected
		case w.spec.Compress != nil:
			p.Expected = w.spec.Compress.Free
		default:
			continue
		}
		status, _ := transfer.ReadStatus(w.directory) // before the first, nothing is written
		for _, d := range status.Disks {
			p.Written += d.Written
		}
		all = append(all, p)
	}
	return share.Promised(all)
}

// Share gives each worker its share of the rates anew: when one has gone, and
// when the configuration was changed.
func (s *Supervisor) Share() error {
	s.sharing.Lock()
	defer s.sharing.Unlock()
	working, err := s.working()
	if err == nil {
		err = s.divide(working)
	}
	if err != nil {
		return fmt.Errorf("cannot divide the rates among workers: %w", err)
	}
	return nil
}

// divide tells each worker its rate, if it is another one than before.
func (s *Supervisor) divide(working []atWork) error {
	if s.Rates == nil {
		return nil
	}
	workers := make(map[string]share.Worker, len(working))
	for _, w := range working {
		workers[w.directory] = share.Worker{Repository: w.spec.Repository.Path, Most: w.spec.Most}
	}
	var errs []error
	for directory, bytes := range share.Divide(s.Rates(), workers) {
		now, err := transfer.ReadRate(directory)
		if err == nil && now.Bytes == bytes {
			continue
		}
		errs = append(errs, transfer.WriteRate(directory, transfer.Rate{Bytes: bytes}))
	}
	return errors.Join(errs...)
}

// Apply has the workers that run go on with other limits and rates.
func (s *Supervisor) Apply(ctx context.Context, limits jobunit.Limits) error {
	states, err := s.units.List(ctx, unitPrefix+"*"+unitSuffix)
	errs := []error{err, s.Share()}
	for _, state := range states {
		if !state.Ended() {
			errs = append(errs, s.units.SetLimits(ctx, state.Name, limits))
		}
	}
	return errors.Join(errs...)
}
