package backup

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/daemon/internal/quiesce"
	"github.com/virtbackup/virtbackup/daemon/internal/transfer"
	"github.com/virtbackup/virtbackup/dbus"
)

// named is an error that has a name on the bus.
type named struct {
	name dbus.ErrorName
	err  error
}

func (n *named) Error() string   { return n.err.Error() }
func (n *named) Unwrap() []error { return []error{n.name, n.err} }

// ErrorName makes it a job.NamedError.
func (n *named) ErrorName() string {
	return string(n.name[strings.LastIndexByte(string(n.name), '.')+1:])
}

// refuse says why a backup cannot be made.
func refuse(name dbus.ErrorName, format string, args ...any) error {
	return &named{name, fmt.Errorf(format, args...)}
}

// withName gives an error of another package the name that belongs to it.
func withName(err error) error {
	var has *named
	if err == nil || errors.As(err, &has) {
		return err
	}
	table := []struct {
		sentinel error
		name     dbus.ErrorName
	}{
		{hypervisor.ErrNoDomain, dbus.ErrNotFound},
		{catalog.ErrNotFound, dbus.ErrNotFound},
		{catalog.ErrState, dbus.ErrBusy},
		{hypervisor.ErrForeignJob, dbus.ErrBusy},
		{hypervisor.ErrNotRunning, dbus.ErrUnsupported},
		{hypervisor.ErrUnavailable, dbus.ErrUnavailable},
		{quiesce.ErrHold, dbus.ErrUnavailable},
	}
	for _, t := range table {
		if errors.Is(err, t.sentinel) {
			return &named{t.name, err}
		}
	}
	return err
}

// workerError is the job's error for what its worker says, or for how it died.
func workerError(ctx context.Context, repository string, err error) error {
	var f *transfer.Failure
	if !errors.As(err, &f) {
		return err
	}
	switch f.Class {
	case transfer.ClassCancelled:
		if cause := context.Cause(ctx); cause != nil {
			return cause
		}
		return refuse(dbus.ErrCancelled, "the backup's worker was stopped by somebody")
	case transfer.ClassRepository, transfer.ClassForeign:
		return refuse(dbus.ErrRepositoryUnavailable, "repository %q: %w", repository, err)
	case transfer.ClassFull:
		return refuse(dbus.ErrRepositoryFull, "repository %q: %w", repository, err)
	case transfer.ClassParent, transfer.ClassManifest, transfer.ClassVerification:
		return refuse(dbus.ErrDamaged, "repository %q: %w", repository, err)
	}
	return err
}
