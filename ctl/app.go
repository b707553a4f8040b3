package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/virtbackup/virtbackup/dbus"
)

// app is one run of virtbackupctl: its streams, what is said for every verb,
// and the connection.
type app struct {
	in       io.Reader
	out, err io.Writer
	getenv   func(string) string

	host          string
	json          jsonMode
	noLegend      bool
	noPager       bool
	noAskPassword bool
	noBlock       bool

	// started says that the command line was understood: what fails before is
	// the usage.
	started bool
	client  *dbus.Client
	closers []func()
}

// run runs a command line and returns the exit status.
func (a *app) run(ctx context.Context, args []string) int {
	root := newRoot(a)
	root.SetArgs(args)
	root.SetIn(a.in)
	root.SetOut(a.out)
	root.SetErr(a.err)
	err := root.ExecuteContext(ctx)
	a.close()
	if err != nil && !a.started {
		err = &usageError{err}
	}
	return a.report(err)
}

func (a *app) close() {
	for i := len(a.closers) - 1; i >= 0; i-- {
		a.closers[i]()
	}
	a.closers = nil
}

// verb makes what cobra runs of a function that needs the daemon.
func (a *app) verb(f func(ctx context.Context, c *dbus.Client, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		a.started = true
		c, err := a.connect(cmd.Context(), !a.noAskPassword)
		if err != nil {
			return err
		}
		return f(cmd.Context(), c, args)
	}
}

// connect connects to the bus, here or on another host. When a person may be
// asked for a password, polkit gets an agent on our terminal.
func (a *app) connect(ctx context.Context, ask bool) (*dbus.Client, error) {
	if a.client != nil {
		return a.client, nil
	}
	var c *dbus.Client
	var err error
	if a.host == "" {
		c, err = dbus.ConnectSystem(ctx)
	} else {
		c, err = connectRemote(ctx, a.host, ask, a.err)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errNoBus, err)
	}
	c.Interactive = ask
	a.client = c
	a.closers = append(a.closers, func() { _ = c.Close() })
	if ask && a.host == "" && os.Geteuid() != 0 && isTerminal(a.in) {
		a.closers = append(a.closers, startAgent())
	}
	return c, nil
}

// isTerminal tells whether a stream is a terminal.
func isTerminal(stream any) bool {
	f, ok := stream.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// colored tells whether a stream gets colors.
func (a *app) colored(w io.Writer) bool {
	return isTerminal(w) && a.getenv("NO_COLOR") == "" && a.getenv("TERM") != "dumb"
}

// say prints a line for people; programs that asked for JSON do not get it.
func (a *app) say(format string, args ...any) {
	if a.json == jsonOff {
		fmt.Fprintln(a.out, clean(fmt.Sprintf(format, args...)))
	}
}

// show prints a result: value as JSON, or else what text writes, through a
// pager when it is long.
func (a *app) show(value any, text func(p *page)) error {
	if a.json != jsonOff {
		return writeJSON(a.out, a.json, value)
	}
	p := &page{color: a.colored(a.out), legend: !a.noLegend}
	text(p)
	return a.print(p.buf.Bytes())
}

func (a *app) print(text []byte) error {
	if f, ok := a.out.(*os.File); ok && isTerminal(f) && !a.noPager {
		_, height, err := term.GetSize(int(f.Fd()))
		if err == nil && bytes.Count(text, []byte("\n")) >= height && runPager(a.getenv("PAGER"), f, text) {
			return nil
		}
	}
	_, err := a.out.Write(text)
	return err
}
