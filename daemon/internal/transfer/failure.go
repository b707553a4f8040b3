package transfer

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/virtbackup/virtbackup/daemon/internal/repository"
)

// ErrCancelled is the cause of a context that ends because of SIGTERM.
var ErrCancelled = errors.New("cancelled")

// classed is an error at the place that knows whose fault it is.
type classed struct {
	class Class
	err   error
}

func (c *classed) Error() string { return c.err.Error() }
func (c *classed) Unwrap() error { return c.err }

// classify gives an error a class unless it has one; nil stays nil.
func classify(class Class, err error) error {
	var already *classed
	if err == nil || errors.As(err, &already) {
		return err
	}
	return &classed{class, err}
}

func fail(class Class, format string, args ...any) error {
	return &classed{class, fmt.Errorf(format, args...)}
}

// inRepository classes what the repository package said.
func inRepository(err error) error {
	if class := sentinelOf(err); class != "" {
		return classify(class, err)
	}
	return classify(ClassRepository, err)
}

// failure makes an error what stands in the result. Everything fails in some
// way once the job is cancelled: that is then the reason.
func failure(ctx context.Context, err error) *Failure {
	if err == nil {
		return nil
	}
	var place *classed
	class := ClassInternal
	switch {
	case errors.Is(context.Cause(ctx), ErrCancelled):
		return &Failure{ClassCancelled, "the job was cancelled"}
	case errors.As(err, &place):
		class = place.class
	}
	// Storage that does not answer says nothing of what is stored.
	if slices.Contains([]Class{ClassVerification, ClassManifest, ClassParent, ClassMissing}, class) && unreachable(err) {
		class = ClassRepository
	}
	if class == ClassRepository && (errors.Is(err, repository.ErrNoSpace) || errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT)) {
		class = ClassFull
	}
	return &Failure{class, err.Error()}
}

// unreachable tells whether an error is that of a way to storage, or of a lack of
// something here. EIO is not: that is what a bad disk says.
func unreachable(err error) bool {
	return slices.ContainsFunc([]error{
		unix.ESTALE, unix.ETIMEDOUT, unix.ENOTCONN, unix.EHOSTDOWN, unix.EHOSTUNREACH, unix.ENETUNREACH, unix.ENETDOWN,
		unix.ECONNREFUSED, unix.ECONNRESET, unix.ECONNABORTED, unix.EACCES, unix.EPERM, unix.ENOMEM, unix.EMFILE, unix.ENFILE,
	}, func(errno error) bool { return errors.Is(err, errno) })
}

func sentinelOf(err error) Class {
	table := []struct {
		sentinel error
		class    Class
	}{
		{repository.ErrForeign, ClassForeign},
		{repository.ErrManifest, ClassManifest},
		{repository.ErrForeignManifest, ClassManifest},
		{repository.ErrNoSpace, ClassFull},
		{repository.ErrDamaged, ClassVerification},
		{repository.ErrNotRepository, ClassRepository},
		{repository.ErrNewerFormat, ClassRepository},
		{repository.ErrReadOnly, ClassRepository},
		{repository.ErrMissing, ClassGone},
		{repository.ErrNotMounted, ClassGone},
		{repository.ErrNoBackup, ClassMissing},
		{repository.ErrExists, ClassRepository},
		{repository.ErrNotEmpty, ClassRepository},
		{repository.ErrHasChildren, ClassRepository},
	}
	for _, t := range table {
		if errors.Is(err, t.sentinel) {
			return t.class
		}
	}
	return ""
}
