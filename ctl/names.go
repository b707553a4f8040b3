package main

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/virtbackup/virtbackup/dbus"
)

// unknownObject is what the bus objects answer with where the id itself is
// malformed.
const unknownObject dbus.ErrorName = "org.freedesktop.DBus.Error.UnknownObject"

func isNotFound(err error) bool {
	return errors.Is(err, dbus.ErrNotFound) || errors.Is(err, unknownObject)
}

// found adds to the error of a search what shows the names that there are.
func found(id string, err error, what, name, list string) (string, error) {
	if isNotFound(err) {
		return "", dbus.Errorf(dbus.ErrNotFound, "there is no %s %q: %q shows them", what, name, "virtbackupctl "+list)
	}
	return id, err
}

func findDomain(ctx context.Context, c *dbus.Client, name string) (string, error) {
	id, err := c.FindDomain(ctx, name)
	return found(id, err, "domain", name, "domain list")
}

func findBackup(ctx context.Context, c *dbus.Client, name string) (string, error) {
	id, err := c.FindBackup(ctx, strings.ToUpper(name))
	return found(id, err, "backup", name, "list")
}

func findRepository(ctx context.Context, c *dbus.Client, name string) (string, error) {
	id, err := c.FindRepository(ctx, name)
	return found(id, err, "repository", name, "repository list")
}

func findOffering(ctx context.Context, c *dbus.Client, name string) (string, error) {
	id, err := c.FindOffering(ctx, name)
	return found(id, err, "offering", name, "offering list")
}

func findSchedule(ctx context.Context, c *dbus.Client, name string) (string, error) {
	id, err := c.FindSchedule(ctx, name)
	return found(id, err, "schedule", name, "schedule list")
}

func findJob(ctx context.Context, c *dbus.Client, name string) (dbus.JobProperties, error) {
	job, err := dbus.Get[dbus.JobProperties](ctx, c, strings.ToUpper(name))
	_, err = found(name, err, "job", name, "jobs --all")
	return job, err
}

// completionTime is how long a person waits for a completion at most.
const completionTime = 2 * time.Second

// names completes with what the daemon knows. It asks for no password, and an
// argument that is given already is not offered again.
func (a *app) names(most int, list func(ctx context.Context, c *dbus.Client) ([]cobra.Completion, error)) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if most > 0 && len(args) >= most || a.host != "" && checkHost(a.host) != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		ctx := cmd.Context()
		if ctx == nil {
			ctx = context.Background()
		}
		ctx, stop := context.WithTimeout(ctx, completionTime)
		defer stop()
		c, err := a.connect(ctx, false)
		if err != nil {
			return nil, cobra.ShellCompDirectiveError
		}
		all, err := list(ctx, c)
		if err != nil {
			return nil, cobra.ShellCompDirectiveError
		}
		var left []cobra.Completion
		for _, one := range all {
			name, _, _ := strings.Cut(one, "\t")
			if !slices.Contains(args, name) {
				left = append(left, one)
			}
		}
		return left, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveKeepOrder
	}
}

func domainNames(ctx context.Context, c *dbus.Client) ([]cobra.Completion, error) {
	domains, err := collect(c.Domains(ctx, dbus.DomainFilter{}))
	var all []cobra.Completion
	for _, d := range domains {
		all = append(all, described(d.Name, string(d.Protection)))
	}
	return all, err
}

func repositoryNames(ctx context.Context, c *dbus.Client) ([]cobra.Completion, error) {
	repositories, err := c.Repositories(ctx)
	var all []cobra.Completion
	for _, r := range repositories {
		all = append(all, described(r.Name, r.Path))
	}
	return all, err
}

func offeringNames(ctx context.Context, c *dbus.Client) ([]cobra.Completion, error) {
	offerings, err := c.Offerings(ctx)
	var all []cobra.Completion
	for _, o := range offerings {
		all = append(all, described(o.Name, string(o.Mode)+" to "+o.Repository))
	}
	return all, err
}

func scheduleNames(ctx context.Context, c *dbus.Client) ([]cobra.Completion, error) {
	schedules, err := c.Schedules(ctx)
	var all []cobra.Completion
	for _, s := range schedules {
		all = append(all, described(s.Name, scheduleFor(s)+", "+strings.Join(s.Calendars, ", ")))
	}
	return all, err
}

// mostBackups is how many of the newest backups are offered.
const mostBackups = 100

func backupNames(ctx context.Context, c *dbus.Client) ([]cobra.Completion, error) {
	var all []cobra.Completion
	for b, err := range c.Backups(ctx, dbus.BackupFilter{}) {
		if err != nil {
			return all, err
		}
		if all = append(all, described(b.ID, b.DomainName+", "+string(b.Kind)+", "+moment(b.Created))); len(all) == mostBackups {
			break
		}
	}
	return all, nil
}

func jobNames(ctx context.Context, c *dbus.Client) ([]cobra.Completion, error) {
	jobs, err := liveJobs(ctx, c, dbus.JobFilter{})
	var all []cobra.Completion
	for _, j := range jobs {
		all = append(all, described(j.ID, title(j)))
	}
	return all, err
}

// anyNames completes with domains, backups and jobs.
func anyNames(ctx context.Context, c *dbus.Client) ([]cobra.Completion, error) {
	var all []cobra.Completion
	var errs []error
	for _, list := range []func(context.Context, *dbus.Client) ([]cobra.Completion, error){domainNames, backupNames, jobNames} {
		some, err := list(ctx, c)
		all = append(all, some...)
		errs = append(errs, err)
	}
	return all, errors.Join(errs...)
}

func described(name, description string) cobra.Completion {
	return cobra.CompletionWithDesc(clean(name), clean(description))
}
