package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/virtbackup/virtbackup/dbus"
)

func (a *app) deleteCommand() *cobra.Command {
	var withChildren, dryRun, yes bool
	cmd := &cobra.Command{
		Use:   "delete BACKUP...",
		Short: "Delete backups",
		Long: `Delete backups. One that others build on is refused, unless they go as well.

On a terminal, it tells what goes and asks first.`,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: a.names(0, backupNames),
	}
	f := cmd.Flags()
	f.BoolVar(&withChildren, "with-children", false, "delete also all that build on them")
	f.BoolVar(&dryRun, "dry-run", false, "only tell what would be deleted")
	f.BoolVarP(&yes, "yes", "y", false, "do not ask")
	cmd.RunE = a.verb(func(ctx context.Context, c *dbus.Client, args []string) error {
		roots, all, err := planDelete(ctx, c, args, withChildren)
		if err != nil {
			return err
		}
		if dryRun {
			return a.showDeletion(ctx, c, all)
		}
		if a.asks(yes) {
			if err := a.confirm(ctx, fmt.Sprintf("Delete %s?", strings.Join(all, ", "))); err != nil {
				return err
			}
		}
		return a.deleteAll(ctx, c, roots, withChildren)
	})
	return cmd
}

// planDelete finds out which backups to delete, in the order in which they
// have to be, and all that go with them.
func planDelete(ctx context.Context, c *dbus.Client, names []string, withChildren bool) (roots, all []string, err error) {
	var ids []string
	for _, name := range names {
		id, err := findBackup(ctx, c, name)
		if err != nil {
			return nil, nil, err
		}
		ids = append(ids, id)
	}
	slices.Sort(ids) // ids of backups are in the order of their making
	ids = slices.Compact(ids)
	for _, id := range ids {
		if slices.Contains(all, id) {
			continue // it goes with one that it builds on
		}
		going, _, err := c.DeleteBackup(ctx, id, dbus.DeleteBackupOptions{WithChildren: true, DryRun: true})
		if err != nil {
			return nil, nil, err
		}
		for _, child := range going {
			if !withChildren && !slices.Contains(ids, child) {
				return nil, nil, dbus.Errorf(dbus.ErrBusy, "backup %s builds on backup %s: delete it as well, as --with-children does", child, id)
			}
		}
		roots = append(roots, id)
		all = append(all, going...)
	}
	slices.Sort(all)
	slices.Reverse(all)
	if !withChildren {
		// One by one, so that nothing goes that came to build on them meanwhile.
		roots = all
	}
	return roots, all, nil
}

// deleteAll deletes one backup after the other: the next may be what this one
// builds on.
func (a *app) deleteAll(ctx context.Context, c *dbus.Client, ids []string, withChildren bool) error {
	var jobs []dbus.JobProperties
	var errs []error
	for _, id := range ids {
		_, job, err := c.DeleteBackup(ctx, id, dbus.DeleteBackupOptions{WithChildren: withChildren})
		if err == nil {
			var done []dbus.JobProperties
			done, err = a.finish(ctx, c, job)
			jobs = append(jobs, done...)
		}
		if err != nil {
			errs = append(errs, err)
			break
		}
	}
	return errors.Join(append(errs, a.jsonJobs(jobs, true))...)
}

// showDeletion tells what would be deleted.
func (a *app) showDeletion(ctx context.Context, c *dbus.Client, ids []string) error {
	var backups []dbus.BackupProperties
	for _, id := range ids {
		b, err := dbus.Get[dbus.BackupProperties](ctx, c, id)
		if err != nil {
			return err
		}
		backups = append(backups, b)
	}
	return a.show(backups, func(p *page) {
		if p.legend {
			p.line("Would be deleted:")
		}
		backupTable(p, backups)
	})
}

// asks tells whether there is a person to be asked, who has not said yes before.
func (a *app) asks(sure bool) bool {
	return !sure && a.json == jsonOff && isTerminal(a.in) && isTerminal(a.err)
}

// confirm asks a person on the terminal.
func (a *app) confirm(ctx context.Context, question string) error {
	fmt.Fprintf(a.err, "%s [y/N] ", clean(question))
	answer := make(chan string, 1)
	go func() {
		text, _ := bufio.NewReader(a.in).ReadString('\n')
		answer <- strings.ToLower(strings.TrimSpace(text))
	}()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case text := <-answer:
		if text != "y" && text != "yes" {
			return errors.New("nothing was done, as you did not say yes")
		}
		return nil
	}
}
