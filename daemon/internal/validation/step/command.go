package step

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
)

// command runs the program that an offering or a domain says.
type command struct {
	Command
	expected []byte // nil: the exit code must be 0
	timeout  time.Duration
}

func (command) Name() string { return NameCommand }

func (c command) Run(ctx context.Context, g Guest, _ []Finding) Finding {
	if c.Path == "" {
		return Finding{Verdict: Skipped, Cause: "no validation command is set"}
	}
	within, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	o, err := g.Execute(within, c.Command)
	switch {
	case err != nil && within.Err() != nil:
		return Finding{Verdict: NotValid, Cause: fmt.Sprintf("%q did not end within %s", c.Path, c.timeout)}
	case errors.Is(err, ErrRefused) && notStarted(err):
		return Finding{Verdict: NotValid, Cause: fmt.Sprintf("%q cannot be run in the guest: %v", c.Path, err)}
	case err != nil:
		return failed(err)
	}
	f := c.judge(o)
	f.Output = said(o)
	return f
}

// notStarted tells the agent's word for a program that there is not from its
// word for what it must not do, of which nothing follows.
func notStarted(err error) bool {
	return strings.Contains(err.Error(), "Failed to execute child process")
}

func (c command) judge(o Output) Finding {
	switch {
	case c.expected != nil && same(o.Stdout, c.expected):
		return Finding{Verdict: Valid}
	case c.expected != nil && o.Truncated:
		return Finding{Verdict: NotValid, Cause: fmt.Sprintf("%q wrote more than the %d bytes that are compared", c.Path, MaxOutput)}
	case c.expected != nil:
		return Finding{Verdict: NotValid, Cause: fmt.Sprintf("%q wrote something else than is expected", c.Path)}
	case o.Signalled:
		return Finding{Verdict: NotValid, Cause: fmt.Sprintf("%q was ended by signal %d", c.Path, o.ExitCode)}
	case o.ExitCode != 0:
		return Finding{Verdict: NotValid, Cause: fmt.Sprintf("%q ended with exit code %d", c.Path, o.ExitCode)}
	}
	return Finding{Verdict: Valid}
}
