package main

import (
	"context"
	"errors"
	"strings"

	"github.com/spf13/cobra"

	"github.com/virtbackup/virtbackup/dbus"
)

func (a *app) restoreCommand() *cobra.Command {
	var o dbus.PlanRestoreOptions
	var dryRun bool
	cmd := &cobra.Command{
		Use:   "restore BACKUP {--name NAME | --in-place}",
		Short: "Restore a backup as a new domain, or over its own",
		Long: `Restore a backup as a new domain, or over the disks of its own domain, which must be shut off.

Every block is compared with its digest on the way; what is there already is given up at the end only.`,
		Example: `  virtbackupctl restore 01KQ --name web1-copy
  virtbackupctl restore 01KQ --in-place --dry-run`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.names(1, backupNames),
	}
	f := cmd.Flags()
	f.StringVar(&o.Name, "name", "", "make a new domain with this `NAME`")
	f.BoolVar(&o.InPlace, "in-place", false, "write over the disks of its own domain")
	f.StringVar(&o.Destination, "destination", "", "put the new domain's disks into this `DIRECTORY`")
	f.StringSliceVar(&o.Disks, "disk", nil, "restore only this `DISK`, as vda; may be given several times")
	f.BoolVar(&o.KeepMACs, "keep-macs", false, "keep the MAC addresses, in place of new ones")
	f.BoolVar(&o.DropInterfaces, "no-nics", false, "leave the network interfaces out")
	f.BoolVar(&o.Start, "start", false, "start the domain at the end")
	f.BoolVar(&dryRun, "dry-run", false, "only tell what would be done, or why it would be refused")
	cmd.MarkFlagsOneRequired("name", "in-place")
	for _, flag := range []string{"name", "destination", "keep-macs", "no-nics"} {
		cmd.MarkFlagsMutuallyExclusive("in-place", flag)
	}
	cmd.MarkFlagsMutuallyExclusive("keep-macs", "no-nics")
	complete(cmd, "name", cobra.NoFileCompletions)
	complete(cmd, "disk", cobra.NoFileCompletions)
	complete(cmd, "destination", func(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
		return nil, cobra.ShellCompDirectiveFilterDirs
	})
	cmd.RunE = a.verb(func(ctx context.Context, c *dbus.Client, args []string) error {
		id, err := findBackup(ctx, c, args[0])
		if err != nil {
			return err
		}
		if dryRun {
			return a.planRestore(ctx, c, id, o)
		}
		var job string
		if o.InPlace {
			job, err = c.RestoreInPlace(ctx, id, dbus.RestoreInPlaceOptions{Disks: o.Disks, Start: o.Start})
		} else {
			job, err = c.RestoreBackup(ctx, id, o.Name, o.RestoreOptions)
		}
		if err != nil {
			return err
		}
		return a.finishOne(ctx, c, job)
	})
	return cmd
}

// planRestore tells what a restore would do. One that would be refused fails.
func (a *app) planRestore(ctx context.Context, c *dbus.Client, id string, o dbus.PlanRestoreOptions) error {
	plan, err := c.PlanRestore(ctx, id, o)
	if err != nil {
		return err
	}
	if err := a.show(plan, func(p *page) { planPage(p, plan) }); err != nil {
		return err
	}
	if len(plan.Refusals) > 0 {
		return errors.New("it would be refused: " + strings.Join(plan.Refusals, "; "))
	}
	return nil
}

func planPage(p *page, plan dbus.RestorePlan) {
	uuid := plan.DomainUUID
	if uuid == "" {
		uuid = "a new one"
	}
	what := "as a new domain"
	if plan.InPlace {
		what = "in place"
	}
	p.fields("Restore", what, "Domain", plan.DomainName, "UUID", uuid)
	for _, text := range plan.Interfaces {
		p.fields("Interface", text)
	}
	for _, text := range plan.Warnings {
		p.fields("Warning", text)
	}
	var rows [][]string
	for _, d := range plan.Disks {
		rows = append(rows, []string{d.Target, d.Destination, d.Format, size(d.Size), size(d.StoredBytes), strings.Join(d.Images, " ")})
	}
	p.line("")
	p.table([]string{"DISK", "DESTINATION", "FORMAT", ">SIZE", ">READ", "BACKUPS"}, rows)
}
