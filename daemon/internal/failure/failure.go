// Package failure gives the errors of jobs the names that they have on the bus,
// so that a program can tell a full repository from a missing one.
package failure

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/daemon/internal/job"
	"github.com/virtbackup/virtbackup/daemon/internal/transfer"
	"github.com/virtbackup/virtbackup/dbus"
)

// Error is an error with a name.
type Error struct {
	Name dbus.ErrorName
	Err  error
}

func (e *Error) Error() string { return e.Err.Error() }

// Unwrap gives both, so that errors.Is finds the name as well as the cause.
func (e *Error) Unwrap() []error { return []error{e.Name, e.Err} }

// ErrorName makes it a job.NamedError.
func (e *Error) ErrorName() string {
	return strings.TrimPrefix(string(e.Name), dbus.BusName+".Error.")
}

var _ job.NamedError = (*Error)(nil)

// Errorf makes an error of that name.
func Errorf(name dbus.ErrorName, format string, args ...any) error {
	return &Error{name, fmt.Errorf(format, args...)}
}

// Named gives an error the name that its cause has; one that has a name keeps
// it, and one that nobody knows gets none.
func Named(err error) error {
	var has *Error
	if err == nil || errors.As(err, &has) {
		return err
	}
	table := []struct {
		cause error
		name  dbus.ErrorName
	}{
		{hypervisor.ErrNoDomain, dbus.ErrNotFound},
		{hypervisor.ErrDomainExists, dbus.ErrExists},
		{hypervisor.ErrForeignJob, dbus.ErrBusy},
		{hypervisor.ErrNotRunning, dbus.ErrUnsupported},
		{hypervisor.ErrUnavailable, dbus.ErrUnavailable},
		{catalog.ErrNotFound, dbus.ErrNotFound},
		{catalog.ErrExists, dbus.ErrExists},
		{catalog.ErrInUse, dbus.ErrBusy},
		{catalog.ErrState, dbus.ErrBusy},
		{catalog.ErrQuota, dbus.ErrQuotaExceeded},
		{job.ErrTooMany, dbus.ErrLimitsExceeded},
	}
	for _, t := range table {
		if errors.Is(err, t.cause) {
			return &Error{t.name, err}
		}
	}
	return err
}

// Passing says of a job's failure that another try may go well, although nobody
// has done anything about it.
func Passing(err error) bool {
	var killed interface{ Hung() bool } // of a worker
	if errors.As(err, &killed) {
		return !killed.Hung()
	}
	for _, name := range []dbus.ErrorName{dbus.ErrBusy, dbus.ErrUnavailable, dbus.ErrRepositoryUnavailable, dbus.ErrRepositoryFull, dbus.ErrUnable} {
		if errors.Is(err, name) {
			return true
		}
	}
	return false
}

// Worker says for a job what its worker said, or how that died. repository is
// its name.
func Worker(ctx context.Context, repository string, err error) error {
	var f *transfer.Failure
	if !errors.As(err, &f) {
		return Named(err)
	}
	switch f.Class {
	case transfer.ClassCancelled:
		if cause := context.Cause(ctx); cause != nil {
			return cause
		}
		return Errorf(dbus.ErrCancelled, "the job's worker was stopped by somebody")
	case transfer.ClassRepository, transfer.ClassGone, transfer.ClassForeign:
		return Errorf(dbus.ErrRepositoryUnavailable, "repository %q: %w", repository, err)
	case transfer.ClassFull:
		return Errorf(dbus.ErrRepositoryFull, "repository %q: %w", repository, err)
	case transfer.ClassParent, transfer.ClassManifest, transfer.ClassMissing, transfer.ClassVerification:
		return Errorf(dbus.ErrDamaged, "repository %q: %w", repository, err)
	}
	return err
}
