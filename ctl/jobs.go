package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/virtbackup/virtbackup/dbus"
)

func (a *app) jobsCommand() *cobra.Command {
	var filter dbus.JobFilter
	var all bool
	var since, until string
	cmd := &cobra.Command{
		Use:               "jobs [DOMAIN]",
		Short:             "List the jobs that go on, newest first",
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: a.names(1, domainNames),
	}
	f := cmd.Flags()
	f.BoolVar(&all, "all", false, "also those that ended")
	addType(cmd, &filter.Operation)
	addChoice(cmd, &filter.State, "state", "only those in this state")
	f.StringVar(&since, "since", "", "only those not older than this `TIME`: 2026-01-31, \"2026-01-31 14:00\", 7d, 12h")
	f.StringVar(&until, "until", "", "only those older than this `TIME`")
	complete(cmd, "since", cobra.NoFileCompletions)
	complete(cmd, "until", cobra.NoFileCompletions)
	limit := addLimit(cmd)
	cmd.MarkFlagsMutuallyExclusive("all", "state")
	cmd.PreRunE = func(*cobra.Command, []string) (err error) {
		filter.Since, filter.Until, err = period(since, until)
		return err
	}
	cmd.RunE = a.verb(func(ctx context.Context, c *dbus.Client, args []string) error {
		if len(args) > 0 {
			uuid, err := findDomain(ctx, c, args[0])
			if err != nil {
				return err
			}
			filter.Domain = uuid
		}
		var jobs []dbus.JobProperties
		var err error
		if all || filter.State != nil {
			jobs, err = take(c.Jobs(ctx, filter), limit.in(a.json))
		} else {
			jobs, err = liveJobs(ctx, c, filter)
		}
		if err != nil {
			return err
		}
		table, err := a.jobTable(ctx, c, filter)
		if err != nil {
			return err
		}
		return a.show(jobs, func(p *page) {
			if len(jobs) > 0 {
				table(p, jobs)
				limit.hint(p, len(jobs))
			} else if p.legend && all {
				p.line("No jobs.")
			} else if p.legend {
				p.line("No jobs. --all lists those that ended, too.")
			}
		})
	})
	return cmd
}

// jobTable is the table for what is listed: of one kind, it tells more.
func (a *app) jobTable(ctx context.Context, c *dbus.Client, f dbus.JobFilter) (func(*page, []dbus.JobProperties), error) {
	if f.Operation == nil || a.json != jsonOff {
		return jobTable, nil
	}
	m, err := dbus.Get[dbus.ManagerProperties](ctx, c, "")
	return func(p *page, jobs []dbus.JobProperties) { typeTable(p, jobs, m.Host) }, err
}

// jobType is what kind of job is listed, also by the name of the service that it is of.
type jobType struct{ value **dbus.Operation }

func (t jobType) String() string { return choice[dbus.Operation](t).String() }

// Set takes a word.
func (t jobType) Set(word string) error {
	if of, ok := services()[word]; ok {
		word = string(of)
	}
	return choice[dbus.Operation](t).Set(word)
}

// Type stands for the value in the help.
func (jobType) Type() string { return "WORD" }

// services are the names by which KBOSS and people know what jobs do.
func services() map[string]dbus.Operation {
	return map[string]dbus.Operation{"compression": dbus.OperationCompress, "validation": dbus.OperationValidate, "verification": dbus.OperationVerify}
}

func addType(cmd *cobra.Command, value **dbus.Operation) {
	words := dbus.Operation("").Values()
	cmd.Flags().Var(jobType{value}, "type", "only those that do this, with their tries: "+strings.Join(words, ", "))
	complete(cmd, "type", fixed(slices.Concat(words, slices.Sorted(maps.Keys(services())))...))
}

// typeTable lists jobs of one kind.
func typeTable(p *page, jobs []dbus.JobProperties, host string) {
	var rows [][]string
	for _, j := range jobs {
		rows = append(rows, []string{
			j.ID, j.Backup, j.DomainName, host, string(j.Operation), string(j.State), jobProgress(j), fmt.Sprintf("%d of %d", j.Attempt, j.Attempts), moment(j.NextTry),
			cmp.Or(j.Waiting, j.ErrorMessage),
		})
	}
	p.table([]string{"JOB", "BACKUP", "DOMAIN", "HOST", "TYPE", "STATE", "PROGRESS", "ATTEMPTS", "NEXT TRY", "REASON"}, rows)
}

// collect reads a list to its end.
func collect[R any](list iter.Seq2[R, error]) ([]R, error) { return take(list, 0) }

// take reads the first of a list, or all for 0.
func take[R any](list iter.Seq2[R, error], most uint32) ([]R, error) {
	all := []R{}
	for one, err := range list {
		if err != nil {
			return nil, err
		}
		if all = append(all, one); uint32(len(all)) == most {
			break
		}
	}
	return all, nil
}

// shownEntries is how many entries of a long list are shown to people who do
// not say how many; programs get all.
const shownEntries = 100

// limitFlag is --limit of a list.
type limitFlag struct {
	flag *pflag.Flag
	most uint32
}

func addLimit(cmd *cobra.Command) *limitFlag {
	l := &limitFlag{}
	cmd.Flags().Uint32Var(&l.most, "limit", shownEntries, "the newest `N` only, 0 for all; with --json, all unless it is given")
	l.flag = cmd.Flags().Lookup("limit")
	complete(cmd, "limit", cobra.NoFileCompletions)
	return l
}

// in returns how many entries are to be shown; 0 for all.
func (l *limitFlag) in(mode jsonMode) uint32 {
	if mode != jsonOff && !l.flag.Changed {
		return 0
	}
	return l.most
}

// hint says that there may be more than a table shows.
func (l *limitFlag) hint(p *page, shown int) {
	if p.legend && !l.flag.Changed && shown == shownEntries {
		p.line("These are the newest %d; --limit says how many.", shown)
	}
}

// liveJobs returns the jobs that have not ended, newest first.
func liveJobs(ctx context.Context, c *dbus.Client, filter dbus.JobFilter) ([]dbus.JobProperties, error) {
	filter.Unfinished = true
	return collect(c.Jobs(ctx, filter))
}

func jobTable(p *page, jobs []dbus.JobProperties) {
	var rows [][]string
	for _, j := range jobs {
		rows = append(rows, []string{
			j.ID, string(j.Operation), j.DomainName, j.Repository, string(j.State), jobProgress(j), moment(j.Created), cmp.Or(j.Waiting, j.ErrorMessage),
		})
	}
	p.table([]string{"JOB", "TYPE", "DOMAIN", "REPOSITORY", "STATE", "PROGRESS", "CREATED", "REASON"}, rows)
}

// jobProgress says how far a job is that goes on.
func jobProgress(j dbus.JobProperties) string {
	if j.State.Final() || j.State == dbus.JobQueued {
		return ""
	}
	text := j.Phase
	if j.BytesTotal > 0 {
		text += fmt.Sprintf(" %.0f%%", j.Progress*100)
	}
	return strings.TrimSpace(text)
}

func (a *app) watchCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:               "watch JOB",
		Short:             "Follow a job to its end",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.names(1, jobNames),
	}
	cmd.RunE = a.verb(func(ctx context.Context, c *dbus.Client, args []string) error {
		job, err := findJob(ctx, c, args[0])
		if err != nil {
			return err
		}
		jobs, err := a.follow(ctx, c, []string{job.ID})
		return errors.Join(a.jsonJobs(jobs, false), err)
	})
	return cmd
}

func (a *app) cancelCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "cancel JOB",
		Short: "Stop a job",
		Long: `Stop a job, and wait until it ended; with --no-block, do not wait.

It may still succeed, when it was about to: that is told, and is the exit status 1.`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.names(1, jobNames),
	}
	cmd.RunE = a.verb(func(ctx context.Context, c *dbus.Client, args []string) error {
		job, err := findJob(ctx, c, args[0])
		if err != nil {
			return err
		}
		if err := c.CancelJob(ctx, job.ID); err != nil {
			return err
		}
		if a.noBlock {
			return a.jsonRecord(dbus.Get[dbus.JobProperties](ctx, c, job.ID))
		}
		job, err = watch(ctx, c, job.ID, func(dbus.JobUpdate) {})
		if ctx.Err() != nil {
			return a.detached([]string{job.ID}, []dbus.JobProperties{job})
		}
		if err != nil {
			return err
		}
		if job.State != dbus.JobCancelled {
			err = fmt.Errorf("%s: the job was not stopped, it %s before", title(job), job.State)
		} else {
			a.say("%s: cancelled", title(job))
		}
		return errors.Join(a.jsonRecord(job, nil), err)
	})
	return cmd
}

// jobTry says which try of a job it is, when there may be several.
func jobTry(j dbus.JobProperties) string {
	if j.Attempts <= 1 {
		return ""
	}
	return fmt.Sprintf("%d of %d", max(j.Attempt, 1), j.Attempts)
}

func jobPage(p *page, j dbus.JobProperties, log []dbus.LogMessage) {
	domain := j.DomainName
	if j.DomainUUID != "" {
		domain = strings.TrimSpace(fmt.Sprintf("%s (%s)", j.DomainName, j.DomainUUID))
	}
	done := ""
	if j.BytesTotal > 0 {
		done = fmt.Sprintf("%s of %s", size(j.BytesDone), size(j.BytesTotal))
	}
	p.fields(
		"Job", j.ID,
		"Type", string(j.Operation),
		"State", string(j.State),
		"Waiting", j.Waiting,
		"Error", j.ErrorMessage,
		"Warnings", strings.Join(j.Warnings, "; "),
		"Progress", jobProgress(j),
		"Bytes", done,
		"Domain", domain,
		"Repository", j.Repository,
		"Offering", j.Offering,
		"Backup", j.Backup,
		"Created", moment(j.Created),
		"Started", moment(j.Started),
		"Finished", moment(j.Finished),
		"Priority", fmt.Sprint(j.Priority),
		"Origin", string(j.Origin),
		"Schedule", j.Schedule,
		"Group", j.Parent,
		"Try", jobTry(j),
		"User id", strconv.FormatUint(uint64(j.UID), 10),
		"Unit", j.Unit,
	)
	if len(log) == 0 {
		return
	}
	p.line("")
	var rows [][]string
	for _, m := range log {
		rows = append(rows, []string{moment(m.Time), m.Level, m.Message})
	}
	p.table([]string{"TIME", "LEVEL", "MESSAGE"}, rows)
}
