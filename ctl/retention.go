package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/virtbackup/virtbackup/dbus"
)

func (a *app) pruneCommand() *cobra.Command {
	var o dbus.PruneOptions
	var yes bool
	cmd := &cobra.Command{
		Use:   "prune [DOMAIN...]",
		Short: "Remove backups that need not stay",
		Long: `Remove the backups of domains that need not stay by what is in force for each:
keep_last, keep_daily and so on, of its offering or its own. It is done after each
backup by itself; with this verb it is done now, and all of it at once.

What others build on is merged into the next backup that stays, which holds the
same as before. On a terminal, it tells what goes and asks first.`,
		Example: `  virtbackupctl prune --dry-run
  virtbackupctl prune web1 --repository nas`,
		ValidArgsFunction: a.names(0, domainNames),
	}
	f := cmd.Flags()
	f.StringVar(&o.Repository, "repository", "", "only in this `REPOSITORY`")
	f.BoolVar(&o.DryRun, "dry-run", false, "only tell what stays, what goes, and why")
	f.BoolVarP(&yes, "yes", "y", false, "do not ask")
	complete(cmd, "repository", a.names(0, repositoryNames))
	cmd.RunE = a.verb(func(ctx context.Context, c *dbus.Client, args []string) error {
		uuids, err := domainsOrAll(ctx, c, args)
		if err != nil {
			return err
		}
		if o.DryRun || !yes && a.json == jsonOff && isTerminal(a.in) && isTerminal(a.err) {
			more, err := a.showPrune(ctx, c, uuids, o)
			if err != nil || o.DryRun || !more {
				return err
			}
			if err := a.confirm(ctx, "Remove these?"); err != nil {
				return err
			}
		}
		var jobs []string
		for _, uuid := range uuids {
			_, ids, err := c.PruneDomain(ctx, uuid, o)
			if err != nil {
				return err
			}
			jobs = append(jobs, ids...)
		}
		if len(jobs) == 0 {
			a.say("All backups stay.")
			return a.jsonJobs(nil, true)
		}
		done, err := a.finish(ctx, c, jobs...)
		return errors.Join(err, a.jsonJobs(done, true))
	})
	return cmd
}

// domainsOrAll finds domains; all of them when none is named.
func domainsOrAll(ctx context.Context, c *dbus.Client, names []string) (uuids []string, err error) {
	for _, name := range names {
		uuid, err := findDomain(ctx, c, name)
		if err != nil {
			return nil, err
		}
		uuids = append(uuids, uuid)
	}
	if len(names) > 0 {
		return uuids, nil
	}
	objects, err := c.Objects(ctx)
	return objects.Domains, err
}

// showPrune tells what would become of each backup, and whether any would go.
func (a *app) showPrune(ctx context.Context, c *dbus.Client, uuids []string, o dbus.PruneOptions) (more bool, err error) {
	o.DryRun = true
	var all []dbus.PruneEntry
	var rows [][]string
	for _, uuid := range uuids {
		d, err := dbus.Get[dbus.DomainProperties](ctx, c, uuid)
		if err != nil {
			return false, err
		}
		plan, _, err := c.PruneDomain(ctx, uuid, o)
		if err != nil {
			return false, err
		}
		all = append(all, plan...)
		for _, e := range plan {
			more = more || e.Action != dbus.PruneKeep
			action := string(e.Action)
			if e.Into != "" {
				action += " into " + e.Into
			}
			rows = append(rows, []string{d.Name, e.Repository, e.Backup, moment(e.Created), size(e.StoredBytes), action, strings.Join(e.Reasons, ", ")})
		}
	}
	return more, a.show(all, func(p *page) {
		if len(rows) == 0 {
			p.line("No backups.")
			return
		}
		p.table([]string{"DOMAIN", "REPOSITORY", "BACKUP", "CREATED", ">STORED", "ACTION", "WHY IT STAYS"}, rows)
	})
}

func (a *app) holdCommand() *cobra.Command {
	var reason string
	cmd := &cobra.Command{
		Use: "hold BACKUP...", Short: "Have backups stay, whatever retention says",
		Args: cobra.MinimumNArgs(1), ValidArgsFunction: a.names(0, backupNames),
	}
	cmd.Flags().StringVar(&reason, "reason", "held by hand", "why, for people")
	complete(cmd, "reason", cobra.NoFileCompletions)
	cmd.RunE = a.eachBackup("Backup %s stays until it is released.", func(ctx context.Context, c *dbus.Client, id string) error {
		return c.HoldBackup(ctx, id, reason)
	})
	return cmd
}

func (a *app) releaseCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "release BACKUP...", Short: "Let backups go again that are held",
		Args: cobra.MinimumNArgs(1), ValidArgsFunction: a.names(0, backupNames),
	}
	cmd.RunE = a.eachBackup("Backup %s may go again.", func(ctx context.Context, c *dbus.Client, id string) error { return c.ReleaseBackup(ctx, id) })
	return cmd
}

// eachBackup makes what cobra runs of something that is done to each backup, and said.
func (a *app) eachBackup(said string, f func(ctx context.Context, c *dbus.Client, id string) error) func(*cobra.Command, []string) error {
	return a.verb(func(ctx context.Context, c *dbus.Client, args []string) error {
		var all []dbus.BackupProperties
		for _, name := range args {
			id, err := findBackup(ctx, c, name)
			if err != nil {
				return err
			}
			if err := f(ctx, c, id); err != nil {
				return fmt.Errorf("backup %s: %w", id, err)
			}
			b, err := dbus.Get[dbus.BackupProperties](ctx, c, id)
			if err != nil {
				return err
			}
			a.say(said, id)
			all = append(all, b)
		}
		return a.jsonRecord(all, nil)
	})
}
