package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/virtbackup/virtbackup/dbus"
)

// The exit statuses, as virtbackupctl(1) says.
const (
	exitDone        = 0
	exitFailed      = 1
	exitUsage       = 2
	exitNotFound    = 3
	exitRefused     = 4
	exitInterrupted = 130 // 128 + SIGINT, as a shell has it
)

// errNoBus is that the bus cannot be reached, and so the daemon cannot.
var errNoBus = errors.New("virtbackupd cannot be reached")

// usageError is a command line that cannot be understood.
type usageError struct{ err error }

func (e *usageError) Error() string { return e.err.Error() + ": see virtbackupctl --help" }

// jobError is a job that was started and did not succeed. Whatever it failed
// with, it is our own failure: that a domain is gone since is not that it was
// not found.
type jobError struct{ job dbus.JobProperties }

func (e *jobError) Error() string {
	if e.job.State == dbus.JobCancelled {
		return fmt.Sprintf("%s: the job was cancelled", title(e.job))
	}
	return fmt.Sprintf("%s: %s", title(e.job), e.job.ErrorMessage)
}

// detachedError is a person who stopped following jobs; they go on.
type detachedError struct{ message string }

func (e *detachedError) Error() string { return e.message }

// exitStatus returns what to exit with for an error of a verb. What the daemon
// calls an invalid argument is no matter of usage: it may depend on the state
// of things, as whether a name is free.
func exitStatus(err error) int {
	var usage *usageError
	var job *jobError
	var detached *detachedError
	var command *commandError
	switch {
	case err == nil:
		return exitDone
	case errors.As(err, &command):
		return command.status
	case errors.As(err, &detached):
		return exitInterrupted
	case errors.As(err, &job):
		return exitFailed
	case errors.As(err, &usage):
		return exitUsage
	case errors.Is(err, dbus.ErrNotFound):
		return exitNotFound
	case errors.Is(err, dbus.ErrNotAuthorized):
		return exitRefused
	case errors.Is(err, context.Canceled):
		return exitInterrupted
	}
	return exitFailed
}

// errorName returns the name of an error for programs.
func errorName(err error) dbus.ErrorName {
	var usage *usageError
	var job *jobError
	var detached *detachedError
	switch {
	case errors.As(err, &usage):
		return dbus.ErrInvalidArgument
	case errors.As(err, &detached), errors.Is(err, context.Canceled):
		return dbus.ErrCancelled
	case errors.As(err, &job):
		return dbus.ToError(job.job.Err()).Name
	}
	return dbus.ToError(err).Name
}

// message returns what is told to people of an error.
func message(err error, host string) string {
	switch {
	case errors.Is(err, context.Canceled):
		return "interrupted"
	case errors.Is(err, dbus.ErrNoDaemon), errors.Is(err, errNoBus):
		status := "systemctl status virtbackupd"
		if host != "" {
			status = "systemctl -H " + host + " status virtbackupd"
		}
		return fmt.Sprintf("%v: see %q", err, status)
	}
	return err.Error()
}

// report tells of the error that a run ended with, and returns the exit status.
func (a *app) report(err error) int {
	status := exitStatus(err)
	if command := new(commandError); err == nil || errors.As(err, &command) {
		return status // the command has told
	}
	if a.json != jsonOff {
		failure := object{{"error", string(errorName(err))}, {"message", message(err, a.host)}, {"exit_status", status}}
		if writeJSON(a.err, a.json, failure) == nil {
			return status
		}
	}
	// Several jobs may have failed, each with a line.
	for line := range strings.Lines(message(err, a.host)) {
		fmt.Fprintln(a.err, "virtbackupctl: "+clean(strings.TrimSuffix(line, "\n")))
	}
	return status
}
