package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/virtbackup/virtbackup/dbus"
)

func (a *app) scheduleCommand() *cobra.Command {
	list := &cobra.Command{Use: "list", Short: "List schedules, and what became of their last runs", Args: cobra.NoArgs}
	list.RunE = a.verb(func(ctx context.Context, c *dbus.Client, _ []string) error {
		schedules, err := c.Schedules(ctx)
		if err != nil {
			return err
		}
		return a.show(schedules, func(p *page) { scheduleTable(p, schedules) })
	})
	enable := a.scheduleVerb("enable", "Start a schedule's timer", func(ctx context.Context, c *dbus.Client, s dbus.ScheduleProperties) error {
		if err := c.EnableSchedule(ctx, s.ID); err != nil {
			return err
		}
		a.say("Schedule %s is enabled.", s.Name)
		return a.jsonRecord(dbus.Get[dbus.ScheduleProperties](ctx, c, s.ID))
	})
	disable := a.scheduleVerb("disable", "Stop a schedule's timer; what runs goes on", func(ctx context.Context, c *dbus.Client, s dbus.ScheduleProperties) error {
		if err := c.DisableSchedule(ctx, s.ID); err != nil {
			return err
		}
		a.say("Schedule %s is disabled.", s.Name)
		return a.jsonRecord(dbus.Get[dbus.ScheduleProperties](ctx, c, s.ID))
	})
	remove := a.scheduleVerb("remove", "Remove a schedule; its backups stay", func(ctx context.Context, c *dbus.Client, s dbus.ScheduleProperties) error {
		if err := c.RemoveSchedule(ctx, s.ID); err != nil {
			return err
		}
		a.say("Schedule %s is removed.", s.Name)
		return a.jsonRecord(s, nil)
	})
	return group("schedule", "Have backups made by themselves", a.scheduleCreateCommand(), a.scheduleUpdateCommand(), list,
		a.scheduleVerb("show", "Show a schedule and its runs", a.showSchedule), enable, disable, a.scheduleTriggerCommand(),
		a.schedulePreviewCommand(), remove)
}

// scheduleVerb makes a verb that takes a schedule.
func (a *app) scheduleVerb(name, short string, f func(context.Context, *dbus.Client, dbus.ScheduleProperties) error) *cobra.Command {
	cmd := &cobra.Command{Use: name + " SCHEDULE", Short: short, Args: cobra.ExactArgs(1), ValidArgsFunction: a.names(1, scheduleNames)}
	cmd.RunE = a.verb(func(ctx context.Context, c *dbus.Client, args []string) error {
		s, err := getSchedule(ctx, c, args[0])
		if err != nil {
			return err
		}
		return f(ctx, c, s)
	})
	return cmd
}

func getSchedule(ctx context.Context, c *dbus.Client, name string) (dbus.ScheduleProperties, error) {
	id, err := findSchedule(ctx, c, name)
	if err != nil {
		return dbus.ScheduleProperties{}, err
	}
	return dbus.Get[dbus.ScheduleProperties](ctx, c, id)
}

// scheduleFlags are what can be changed of a schedule.
type scheduleFlags struct {
	calendars  []string
	repository string
	delay      time.Duration
	persistent bool
	isolated   bool
	quiesce    *dbus.ScheduleQuiesce
	overlap    *dbus.Overlap
}

func (a *app) addSchedule(cmd *cobra.Command) *scheduleFlags {
	s := &scheduleFlags{}
	f := cmd.Flags()
	f.StringArrayVar(&s.calendars, "calendar", nil, "when it is due, a `CALENDAR` as in systemd.time(7): daily, \"Mon..Fri 22:00\", \"*-*-* 00/12:00\"; can be repeated")
	f.StringVar(&s.repository, "repository", "", "back up to this `REPOSITORY`, not the offering's")
	f.DurationVar(&s.delay, "randomized-delay", 0, "put each run off by a random `TIME` up to this: 90s, 30m, 2h")
	f.BoolVar(&s.persistent, "persistent", true, "make up for a run that was missed while the host was down")
	f.BoolVar(&s.isolated, "isolated", false, "make full backups that belong to no chain")
	addChoice(cmd, &s.quiesce, "quiesce", "how guests are quieted")
	addChoice(cmd, &s.overlap, "overlap", "what of a run that is due while the last one goes on, or the repository is away")
	complete(cmd, "calendar", fixed("hourly", "daily", "weekly", "monthly", "*-*-* 00/12:00:00"))
	complete(cmd, "repository", a.names(0, repositoryNames))
	complete(cmd, "randomized-delay", cobra.NoFileCompletions)
	cmd.PreRunE = func(*cobra.Command, []string) error {
		if s.delay < 0 {
			return errors.New("a run cannot be put off by less than nothing")
		}
		return nil
	}
	return s
}

func (a *app) scheduleCreateCommand() *cobra.Command {
	var o dbus.CreateScheduleOptions
	cmd := &cobra.Command{
		Use:   "create NAME {--offering OFFERING|--domain DOMAIN} --calendar CALENDAR...",
		Short: "Have a domain, or all of an offering, backed up by itself",
		Example: `  virtbackupctl schedule create gold --offering gold --calendar '*-*-* 00/12:00' --randomized-delay 30m
  virtbackupctl schedule create web1-off-site --domain web1 --calendar 'Sun 03:00' --repository off-site --overlap queue`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	f := cmd.Flags()
	f.StringVar(&o.Offering, "offering", "", "back up every domain of this `OFFERING`")
	f.StringVar(&o.Domain, "domain", "", "back up this `DOMAIN`, with its own offering")
	f.BoolVar(&o.Disabled, "disabled", false, "do not start its timer yet")
	complete(cmd, "offering", a.names(0, offeringNames))
	complete(cmd, "domain", a.names(0, domainNames))
	s := a.addSchedule(cmd)
	cmd.MarkFlagsMutuallyExclusive("offering", "domain")
	cmd.MarkFlagsOneRequired("offering", "domain")
	cmd.MarkFlagsOneRequired("calendar")
	cmd.RunE = a.verb(func(ctx context.Context, c *dbus.Client, args []string) error {
		o.Repository, o.RandomizedDelay, o.Persistent, o.Isolated = s.repository, uint64(s.delay.Microseconds()), &s.persistent, s.isolated
		o.Quiesce, o.Overlap = s.quiesce, s.overlap
		id, err := c.CreateSchedule(ctx, args[0], s.calendars, o)
		if err != nil {
			return err
		}
		made, err := dbus.Get[dbus.ScheduleProperties](ctx, c, id)
		switch {
		case err != nil:
			return err
		case !made.Enabled:
			a.say("Schedule %s is made. \"virtbackupctl schedule enable %s\" starts it.", made.Name, made.Name)
		default:
			a.say("Schedule %s is made. It is due at %s.", made.Name, moment(made.NextElapse))
		}
		return a.jsonRecord(made, nil)
	})
	return cmd
}

func (a *app) scheduleUpdateCommand() *cobra.Command {
	var flags *scheduleFlags
	var cmd *cobra.Command
	cmd = a.scheduleVerb("update", "Change a schedule", func(ctx context.Context, c *dbus.Client, s dbus.ScheduleProperties) error {
		change := flags.given(cmd)
		if change == (dbus.UpdateScheduleOptions{}) {
			return &usageError{errors.New("say what to change")}
		}
		if err := c.UpdateSchedule(ctx, s.ID, change); err != nil {
			return err
		}
		a.say("Schedule %s is changed.", s.Name)
		return a.jsonRecord(dbus.Get[dbus.ScheduleProperties](ctx, c, s.ID))
	})
	flags = a.addSchedule(cmd)
	return cmd
}

// given returns what the command line has.
func (s *scheduleFlags) given(cmd *cobra.Command) dbus.UpdateScheduleOptions {
	o := dbus.UpdateScheduleOptions{Quiesce: s.quiesce, Overlap: s.overlap}
	changed := cmd.Flags().Changed
	if changed("calendar") {
		o.Calendars = &s.calendars
	}
	if changed("repository") {
		o.Repository = &s.repository
	}
	if changed("randomized-delay") {
		o.RandomizedDelay = new(uint64(s.delay.Microseconds()))
	}
	if changed("persistent") {
		o.Persistent = &s.persistent
	}
	if changed("isolated") {
		o.Isolated = &s.isolated
	}
	return o
}

func (a *app) scheduleTriggerCommand() *cobra.Command {
	var o dbus.TriggerOptions
	cmd := a.scheduleVerb("trigger", "Run a schedule now", func(ctx context.Context, c *dbus.Client, s dbus.ScheduleProperties) error {
		return a.trigger(ctx, c, s, o)
	})
	cmd.Long = `Run a schedule now, also one that is disabled, and follow its jobs.

A run that does not start, because of the schedule's rule, says why; the exit status is 0 then.`
	cmd.Flags().BoolVar(&o.Timer, "timer", false, "its timer is due: for the timer's unit")
	return cmd
}

// trigger runs a schedule. For a timer, all is said in lines for the journal, no
// job is followed, and what was recorded is no failure: its unit is started
// again only when the daemon could not be told.
func (a *app) trigger(ctx context.Context, c *dbus.Client, s dbus.ScheduleProperties, o dbus.TriggerOptions) error {
	state, reason, jobs, err := c.TriggerSchedule(ctx, s.ID, o)
	if err != nil {
		return err
	}
	if reason != "" && len(jobs) > 0 {
		a.say("Schedule %s: %s.", s.Name, reason)
	}
	switch {
	case state == dbus.RunFailed && !o.Timer:
		return fmt.Errorf("schedule %s: nothing could be started: %s", s.Name, reason)
	case len(jobs) == 0:
		a.say("Schedule %s: the run is %s: %s.", s.Name, state, reason)
		return a.jsonRecord(dbus.Get[dbus.ScheduleProperties](ctx, c, s.ID))
	case o.Timer:
		a.say("Schedule %s: started %s.", s.Name, strings.Join(jobs, " "))
		return nil
	}
	ended, err := a.finish(ctx, c, jobs...)
	return errors.Join(a.jsonJobs(ended, true), err)
}

func (a *app) schedulePreviewCommand() *cobra.Command {
	var calendars []string
	var count uint32
	cmd := &cobra.Command{
		Use:               "preview {SCHEDULE|--calendar CALENDAR...}",
		Short:             "Show when a schedule, or calendars, are due next",
		Example:           "  virtbackupctl schedule preview --calendar 'Mon..Fri 22:00' -n 3",
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: a.names(1, scheduleNames),
	}
	f := cmd.Flags()
	f.StringArrayVar(&calendars, "calendar", nil, "a `CALENDAR` as in systemd.time(7); can be repeated")
	f.Uint32VarP(&count, "count", "n", 10, "show this many")
	complete(cmd, "calendar", fixed("hourly", "daily", "weekly", "monthly"))
	complete(cmd, "count", cobra.NoFileCompletions)
	cmd.PreRunE = func(_ *cobra.Command, args []string) error {
		if (len(args) == 0) == (len(calendars) == 0) {
			return errors.New("say a schedule or calendars, and not both")
		}
		return nil
	}
	cmd.RunE = a.verb(func(ctx context.Context, c *dbus.Client, args []string) error {
		var times []time.Time
		var err error
		if len(args) == 0 {
			times, err = c.PreviewSchedule(ctx, calendars, count)
		} else {
			var s dbus.ScheduleProperties
			if s, err = getSchedule(ctx, c, args[0]); err == nil {
				times, err = c.PreviewOf(ctx, s.ID, count)
			}
		}
		if err != nil {
			return err
		}
		return a.show(times, func(p *page) {
			for _, t := range times {
				p.line("%s", t.Local().Format("Mon 2006-01-02 15:04:05 MST"))
			}
		})
	})
	return cmd
}

func scheduleTable(p *page, schedules []dbus.ScheduleProperties) {
	if len(schedules) == 0 && p.legend {
		p.line("No schedules. \"virtbackupctl schedule create\" makes one.")
		return
	}
	var rows [][]string
	for _, s := range schedules {
		rows = append(rows, []string{s.Name, scheduleFor(s), strings.Join(s.Calendars, ", "), cmp.Or(s.Repository, "of the offering"),
			nextElapse(s), moment(s.LastRun), string(s.LastState), cmp.Or(s.Problem, s.LastReason)})
	}
	p.table([]string{"SCHEDULE", "FOR", "CALENDARS", "REPOSITORY", "NEXT", "LAST", "STATE", "REASON"}, rows)
}

func scheduleFor(s dbus.ScheduleProperties) string {
	if s.Offering != "" {
		return "offering " + s.Offering
	}
	return s.DomainName
}

func nextElapse(s dbus.ScheduleProperties) string {
	switch {
	case !s.Enabled:
		return "disabled"
	case s.NextElapse.IsZero():
		return "never"
	}
	return moment(s.NextElapse)
}

// shownRuns is how many runs are shown to people; JSON has all.
const shownRuns = 10

func (a *app) showSchedule(ctx context.Context, c *dbus.Client, s dbus.ScheduleProperties) error {
	limit := uint32(shownRuns)
	if a.json != jsonOff {
		limit = 1000
	}
	runs, err := c.ScheduleRuns(ctx, s.ID, limit)
	if err != nil {
		return err
	}
	return a.show(append(members(s), member{"runs", runs}), func(p *page) { schedulePage(p, s, runs) })
}

func schedulePage(p *page, s dbus.ScheduleProperties, runs []dbus.ScheduleRun) {
	persistent := "no"
	if s.Persistent {
		persistent = "yes: a run that was missed is made up for"
	}
	isolated := "no"
	if s.Isolated {
		isolated = "yes: full backups that belong to no chain"
	}
	delay := ""
	if s.RandomizedDelay > 0 {
		delay = "up to " + span(time.Duration(s.RandomizedDelay)*time.Microsecond)
	}
	p.fields(
		"Schedule", s.Name,
		"Id", s.ID,
		"Domain", s.DomainName,
		"Offering", s.Offering,
		"Repository", cmp.Or(s.Repository, "of the offering"),
		"Calendars", strings.Join(s.Calendars, ", "),
		"Delay", delay,
		"Persistent", persistent,
		"Isolated", isolated,
		"Quiesce", string(s.Quiesce),
		"Overlap", string(s.Overlap),
		"Next", nextElapse(s),
		"Problem", s.Problem,
		"Last success", moment(s.LastSuccess),
		"Timer", s.Unit,
		"Jobs", strings.Join(s.Jobs, " "),
		"Created", fmt.Sprintf("%s by uid %d", moment(s.Created), s.UID),
	)
	if len(runs) == 0 {
		return
	}
	p.line("")
	var rows [][]string
	for _, r := range runs {
		by := "timer"
		if !r.Timer {
			by = "uid " + strconv.FormatUint(uint64(r.UID), 10)
		}
		rows = append(rows, []string{moment(r.Created), by, string(r.State), moment(r.Finished), strconv.Itoa(len(r.Jobs)), r.Reason})
	}
	p.table([]string{"RUN", "BY", "STATE", "FINISHED", ">JOBS", "REASON"}, rows)
}
