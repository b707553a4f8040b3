package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/virtbackup/virtbackup/dbus"
)

// groupFlags say how the backups of a verb are queued.
type groupFlags struct {
	parallel, sequential bool
	priority, attempts   uint32
}

func (g *groupFlags) add(cmd *cobra.Command) {
	f := cmd.Flags()
	f.BoolVar(&g.parallel, "parallel", false, "make them one job, which has as many made at once as may be")
	f.BoolVar(&g.sequential, "sequential", false, "make them one job, which has one made after the other")
	f.Uint32Var(&g.priority, "priority", 50, "`N` from 0 to 99: what is higher goes first")
	f.Uint32Var(&g.attempts, "attempts", 1, "try `N` times, later and later, when what it fails of may pass")
	cmd.MarkFlagsMutuallyExclusive("parallel", "sequential")
	complete(cmd, "priority", cobra.NoFileCompletions)
	complete(cmd, "attempts", cobra.NoFileCompletions)
}

// set sets what was given.
func (g *groupFlags) set(cmd *cobra.Command, o *dbus.BackupOptions) {
	if cmd.Flags().Changed("priority") {
		o.Priority = &g.priority
	}
	if cmd.Flags().Changed("attempts") {
		o.Attempts = &g.attempts
	}
}

func (a *app) backupGroup(ctx context.Context, c *dbus.Client, names []string, o dbus.GroupOptions) error {
	id, err := c.BackupGroup(ctx, names, o)
	if err != nil {
		return err
	}
	return a.finishGroup(ctx, c, id)
}

// finishGroup is finishOne, and tells how the jobs of a group went.
func (a *app) finishGroup(ctx context.Context, c *dbus.Client, id string) error {
	jobs, err := a.finish(ctx, c, id)
	if len(jobs) > 0 && jobs[0].Operation == dbus.OperationGroup && jobs[0].State.Final() {
		children, listed := collect(c.Jobs(ctx, dbus.JobFilter{Parent: id}))
		err = errors.Join(err, listed)
		for _, child := range slices.Backward(children) { // oldest first
			if child.State == dbus.JobSucceeded { // the group tells of others
				err = errors.Join(err, a.outcome(ctx, c, child))
			}
		}
	}
	return errors.Join(a.jsonJobs(jobs, false), err)
}

func (a *app) retryCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "retry JOB",
		Short: "Make a backup again that failed, or those of a group that did",
		Long: `Make a backup again that failed or was cancelled, as it was asked for. Of a
group, those are made again that were not made, as a new group.`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.names(1, jobNames),
	}
	cmd.RunE = a.verb(func(ctx context.Context, c *dbus.Client, args []string) error {
		job, err := findJob(ctx, c, args[0])
		if err != nil {
			return err
		}
		id, err := c.RetryJob(ctx, job.ID)
		if err != nil {
			return err
		}
		return a.finishGroup(ctx, c, id)
	})
	return cmd
}

// commandError is a command that was run, and ended with a status.
type commandError struct{ status int }

func (e *commandError) Error() string { return fmt.Sprintf("the command ended with %d", e.status) }

func (a *app) inhibitCommand() *cobra.Command {
	var what []string
	var who, why string
	var list bool
	cmd := &cobra.Command{
		Use:   "inhibit --why TEXT [--] COMMAND [ARGUMENT]...",
		Short: "Hold jobs back while a command runs",
		Long: `Hold jobs back from being begun while a command runs, and exit with its status.
What runs already goes on. With --list, list what holds jobs back.`,
		Example: `  virtbackupctl inhibit --why "storage is moved" -- ./move.sh
  virtbackupctl inhibit --what backup,restore --why "an upgrade" -- apt upgrade`,
	}
	cmd.ValidArgsFunction = func(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
		return nil, cobra.ShellCompDirectiveDefault // files
	}
	f := cmd.Flags()
	f.SetInterspersed(false) // what follows the command is its own
	f.StringSliceVar(&what, "what", nil, "jobs of these `CLASSES` only: backup, restore, compression, validation, maintenance")
	f.StringVar(&who, "who", "", "`NAME` of who holds them back; the command if it is not given")
	f.StringVar(&why, "why", "", "why, for `PEOPLE`")
	f.BoolVar(&list, "list", false, "list what holds jobs back")
	complete(cmd, "what", fixed("backup", "restore", "compression", "validation", "maintenance"))
	complete(cmd, "who", cobra.NoFileCompletions)
	complete(cmd, "why", cobra.NoFileCompletions)
	cmd.Args = func(_ *cobra.Command, args []string) error {
		switch {
		case list && len(args) > 0:
			return errors.New("--list takes no command")
		case !list && (len(args) == 0 || why == ""):
			return errors.New("say why, with --why, and a command")
		}
		return nil
	}
	cmd.RunE = a.verb(func(ctx context.Context, c *dbus.Client, args []string) error {
		if list {
			return a.listInhibitors(ctx, c)
		}
		if who == "" {
			who = args[0]
		}
		return a.inhibit(ctx, c, what, who, why, args)
	})
	return cmd
}

func (a *app) inhibit(ctx context.Context, c *dbus.Client, what []string, who, why string, args []string) error {
	held, release := context.WithCancel(ctx)
	defer release()
	lost := func(err error) {
		fmt.Fprintln(a.err, clean(fmt.Sprintf("virtbackupctl: virtbackupd was restarted, and holds no jobs back any more: %v", err)))
	}
	if err := c.Inhibit(held, what, who, why, lost); err != nil {
		return err
	}
	command := exec.Command(args[0], args[1:]...) // a terminal interrupts it, too, and we wait for it
	command.Stdin, command.Stdout, command.Stderr = a.in, a.out, a.err
	if command.Env = os.Environ(); a.host != "" {
		fmt.Fprintln(a.err, clean("jobs are held back on "+a.host))
	}
	err := command.Run()
	var ended *exec.ExitError
	if errors.As(err, &ended) {
		return &commandError{max(ended.ExitCode(), 1)}
	}
	return err
}

func (a *app) listInhibitors(ctx context.Context, c *dbus.Client) error {
	all, err := c.Inhibitors(ctx)
	if err != nil {
		return err
	}
	return a.show(all, func(p *page) {
		if len(all) == 0 && p.legend {
			p.line("Nothing holds jobs back.")
			return
		}
		var rows [][]string
		for _, i := range all {
			what := strings.Join(i.What, " ")
			if what == "" {
				what = "all"
			}
			rows = append(rows, []string{i.Who, what, i.Why, fmt.Sprint(i.UID), moment(i.Since)})
		}
		p.table([]string{"WHO", "WHAT", "WHY", "USER ID", "SINCE"}, rows)
	})
}
