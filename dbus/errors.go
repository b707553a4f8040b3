package dbus

import (
	"context"
	"errors"
	"fmt"
	"strings"

	godbus "github.com/godbus/dbus/v5"
)

// ErrorName is the name of a D-Bus error. It is an error itself, so that
// errors.Is(err, ErrNotFound) asks for one on both sides of the bus.
type ErrorName string

// The errors of org.virtbackup1. Each comes with one sentence for people.
const (
	// ErrNotFound: no such object.
	ErrNotFound ErrorName = "org.virtbackup1.Error.NotFound"
	// ErrExists: the name or the destination is taken.
	ErrExists ErrorName = "org.virtbackup1.Error.Exists"
	// ErrInvalidArgument: an argument or option is not known or not valid.
	ErrInvalidArgument ErrorName = "org.virtbackup1.Error.InvalidArgument"
	// ErrNotAuthorized: polkit or the bus did not allow it.
	ErrNotAuthorized ErrorName = "org.virtbackup1.Error.NotAuthorized"
	// ErrBusy: something else is being done with the object, or uses it.
	ErrBusy ErrorName = "org.virtbackup1.Error.Busy"
	// ErrLimitsExceeded: too many calls at once from one caller, or in all.
	ErrLimitsExceeded ErrorName = "org.virtbackup1.Error.LimitsExceeded"
	// ErrQuotaExceeded: no more may be stored for the domain, the offering or the user.
	ErrQuotaExceeded ErrorName = "org.virtbackup1.Error.QuotaExceeded"
	// ErrUnsupported: this domain, disk, libvirt or QEMU cannot do it.
	ErrUnsupported ErrorName = "org.virtbackup1.Error.Unsupported"
	// ErrUnavailable: libvirt or another service does not answer.
	ErrUnavailable ErrorName = "org.virtbackup1.Error.Unavailable"
	// ErrRepositoryUnavailable: the repository is missing, read-only or not ours.
	ErrRepositoryUnavailable ErrorName = "org.virtbackup1.Error.RepositoryUnavailable"
	// ErrRepositoryFull: no space is left for it.
	ErrRepositoryFull ErrorName = "org.virtbackup1.Error.RepositoryFull"
	// ErrDamaged: stored data is not what was written.
	ErrDamaged ErrorName = "org.virtbackup1.Error.Damaged"
	// ErrNotValid: a backup that was tried does not do what it should.
	ErrNotValid ErrorName = "org.virtbackup1.Error.NotValid"
	// ErrUnable: the host could not try a backup, of which nothing follows about it.
	ErrUnable ErrorName = "org.virtbackup1.Error.Unable"
	// ErrStalled: it made no progress.
	ErrStalled ErrorName = "org.virtbackup1.Error.Stalled"
	// ErrTimedOut: it was not done in time.
	ErrTimedOut ErrorName = "org.virtbackup1.Error.TimedOut"
	// ErrCancelled: somebody asked for it to stop.
	ErrCancelled ErrorName = "org.virtbackup1.Error.Cancelled"
	// ErrFailed: anything else.
	ErrFailed ErrorName = "org.virtbackup1.Error.Failed"
)

// ErrorNames returns all of them.
func ErrorNames() []ErrorName {
	return []ErrorName{
		ErrNotFound, ErrExists, ErrInvalidArgument, ErrNotAuthorized, ErrBusy, ErrLimitsExceeded, ErrQuotaExceeded, ErrUnsupported,
		ErrUnavailable, ErrRepositoryUnavailable, ErrRepositoryFull, ErrDamaged, ErrNotValid, ErrUnable, ErrStalled, ErrTimedOut, ErrCancelled, ErrFailed,
	}
}

// Error returns the name.
func (n ErrorName) Error() string { return string(n) }

// Error is an error as it goes over the bus: a name for programs and a
// sentence for people.
type Error struct {
	Name    ErrorName
	Message string
}

// Errorf makes an error of the given name.
func Errorf(name ErrorName, format string, args ...any) error {
	return &Error{Name: name, Message: fmt.Sprintf(format, args...)}
}

// Error returns the message.
func (e *Error) Error() string { return e.Message }

// Is makes errors.Is compare names.
func (e *Error) Is(target error) bool {
	name, ok := target.(ErrorName)
	return ok && name == e.Name
}

// DBusError is how godbus asks for the name and body of an error reply. One
// that it cannot send would leave the caller waiting for ever.
func (e *Error) DBusError() (string, []any) { return string(e.Name), []any{text(e.Message)} }

// ToError returns the error to send for err: the name is that of the first
// Error or ErrorName in its tree, the message is err's own. What has no name
// is ErrFailed.
func ToError(err error) *Error {
	var known *Error
	var name ErrorName
	switch {
	case errors.As(err, &known):
		name = known.Name
	case errors.As(err, &name):
	case errors.Is(err, context.Canceled):
		name = ErrCancelled
	default:
		name = ErrFailed
	}
	return &Error{Name: name, Message: err.Error()}
}

// fromCall turns the error of a call into one of ours. Those of the bus itself
// that a person may meet are translated: the daemon cannot be reached, or the
// bus policy refused the message.
func fromCall(err error) error {
	var remote godbus.Error
	if !errors.As(err, &remote) {
		return err
	}
	switch remote.Name {
	case "org.freedesktop.DBus.Error.AccessDenied":
		return Errorf(ErrNotAuthorized, "the system bus refused the message: %s", remote.Error())
	case "org.freedesktop.DBus.Error.ServiceUnknown", "org.freedesktop.DBus.Error.NameHasNoOwner",
		"org.freedesktop.DBus.Error.NoReply", "org.freedesktop.DBus.Error.Disconnected", "org.freedesktop.DBus.Error.TimedOut":
		return Errorf(ErrNoDaemon, "virtbackupd does not answer: %s", remote.Error())
	}
	// The bus, or systemd for it, could not start the daemon.
	if strings.HasPrefix(remote.Name, "org.freedesktop.systemd1.") || strings.HasPrefix(remote.Name, "org.freedesktop.DBus.Error.Spawn.") {
		return Errorf(ErrNoDaemon, "virtbackupd cannot be started: %s", remote.Error())
	}
	return &Error{Name: ErrorName(remote.Name), Message: remote.Error()}
}
