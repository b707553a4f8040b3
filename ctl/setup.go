package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/virtbackup/virtbackup/dbus"
)

// jsonRecord prints a record as the result of a verb that has no other; the
// error is of reading it.
func (a *app) jsonRecord(record any, err error) error {
	if err != nil || a.json == jsonOff {
		return err
	}
	return writeJSON(a.out, a.json, record)
}

func (a *app) offeringCommand() *cobra.Command {
	list := &cobra.Command{Use: "list", Short: "List offerings", Args: cobra.NoArgs}
	list.RunE = a.verb(func(ctx context.Context, c *dbus.Client, _ []string) error {
		all, err := c.Offerings(ctx)
		if err != nil {
			return err
		}
		return a.show(all, func(p *page) { offeringTable(p, all) })
	})
	show := a.offeringVerb("show", "Show an offering", func(ctx context.Context, c *dbus.Client, o dbus.OfferingProperties) error {
		return a.show(o, func(p *page) { offeringPage(p, o) })
	})
	return group("offering", "Manage offerings", a.offeringCreateCommand(), a.offeringUpdateCommand(), list, show, a.offeringRemoveCommand())
}

// offeringVerb makes a verb that takes an offering.
func (a *app) offeringVerb(name, short string, f func(context.Context, *dbus.Client, dbus.OfferingProperties) error) *cobra.Command {
	cmd := &cobra.Command{Use: name + " OFFERING", Short: short, Args: cobra.ExactArgs(1), ValidArgsFunction: a.names(1, offeringNames)}
	cmd.RunE = a.verb(func(ctx context.Context, c *dbus.Client, args []string) error {
		id, err := findOffering(ctx, c, args[0])
		if err != nil {
			return err
		}
		o, err := dbus.Get[dbus.OfferingProperties](ctx, c, id)
		if err != nil {
			return err
		}
		return f(ctx, c, o)
	})
	return cmd
}

func (a *app) offeringCreateCommand() *cobra.Command {
	var repository string
	cmd := &cobra.Command{
		Use:               "create NAME --repository REPOSITORY",
		Short:             "Make an offering",
		Example:           "  virtbackupctl offering create daily --repository nas --compression zstd --chain-size 14 --quiesce agent",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	cmd.Flags().StringVar(&repository, "repository", "", "back up to this `REPOSITORY`")
	complete(cmd, "repository", a.names(0, repositoryNames))
	var o dbus.OfferingOptions
	addOffering(cmd, &o)
	cmd.MarkFlagsOneRequired("repository")
	cmd.RunE = a.verb(func(ctx context.Context, c *dbus.Client, args []string) error {
		r, err := findRepository(ctx, c, repository)
		if err != nil {
			return err
		}
		id, err := c.CreateOffering(ctx, args[0], r, o)
		if err != nil {
			return err
		}
		a.say("Offering %s is made. \"virtbackupctl domain assign DOMAIN %s\" assigns it.", args[0], args[0])
		return a.jsonRecord(dbus.Get[dbus.OfferingProperties](ctx, c, id))
	})
	return cmd
}

func (a *app) offeringUpdateCommand() *cobra.Command {
	var repository string
	var change dbus.UpdateOfferingOptions
	cmd := a.offeringVerb("update", "Change an offering", func(ctx context.Context, c *dbus.Client, o dbus.OfferingProperties) error {
		if repository != "" {
			r, err := findRepository(ctx, c, repository)
			if err != nil {
				return err
			}
			change.Repository = &r
		}
		if change == (dbus.UpdateOfferingOptions{}) {
			return &usageError{errors.New("say what to change")}
		}
		if err := c.UpdateOffering(ctx, o.ID, change); err != nil {
			return err
		}
		a.say("Offering %s is changed.", o.Name)
		return a.jsonRecord(dbus.Get[dbus.OfferingProperties](ctx, c, o.ID))
	})
	cmd.Flags().StringVar(&repository, "repository", "", "back up to this `REPOSITORY`; ends the chains of its domains")
	complete(cmd, "repository", a.names(0, repositoryNames))
	addOffering(cmd, &change.OfferingOptions)
	return cmd
}

func (a *app) offeringRemoveCommand() *cobra.Command {
	var o dbus.RemoveOfferingOptions
	var sure bool
	cmd := a.offeringVerb("remove", "Remove an offering that no domain has, or take it from those that have it", func(ctx context.Context, c *dbus.Client, offering dbus.OfferingProperties) error {
		domains, schedules, err := usersOf(ctx, c, offering)
		if err != nil {
			return err
		}
		if o.DryRun {
			return a.show(object{{"offering", offering.Name}, {"domains", domains}, {"schedules", schedules}}, func(p *page) {
				p.line("Offering %s would be removed; domains that have it: %s; its schedules: %s.", offering.Name, listOr(domains, "none"), listOr(schedules, "none"))
			})
		}
		if o.Forced && len(domains)+len(schedules) > 0 && a.asks(sure) {
			if err := a.confirm(ctx, fmt.Sprintf("Remove offering %s, which has domains (%s) and schedules (%s)?", offering.Name, listOr(domains, "none"), listOr(schedules, "none"))); err != nil {
				return err
			}
		}
		if _, err := c.RemoveOffering(ctx, offering.ID, o); err != nil {
			return err
		}
		a.say("Offering %s is removed.", offering.Name)
		return a.jsonRecord(offering, nil)
	})
	f := cmd.Flags()
	f.BoolVar(&o.Forced, "forced", false, "take it from the domains that have it; their backups stay, their chains end")
	f.BoolVar(&o.DryRun, "dry-run", false, "only tell whom it would hit")
	f.BoolVarP(&sure, "yes", "y", false, "do not ask")
	return cmd
}

// usersOf returns the names of the domains and schedules that have an offering.
func usersOf(ctx context.Context, c *dbus.Client, o dbus.OfferingProperties) (domains, schedules []string, err error) {
	uuids, err := c.RemoveOffering(ctx, o.ID, dbus.RemoveOfferingOptions{DryRun: true})
	if err != nil {
		return nil, nil, err
	}
	domains, schedules = []string{}, []string{}
	for _, uuid := range uuids {
		d, err := dbus.Get[dbus.DomainProperties](ctx, c, uuid)
		if err != nil {
			return nil, nil, err
		}
		domains = append(domains, d.Name)
	}
	all, err := c.Schedules(ctx)
	for _, s := range all {
		if s.Offering == o.Name {
			schedules = append(schedules, s.Name)
		}
	}
	return domains, schedules, err
}

// listOr names some things, or says what is said of none.
func listOr(names []string, none string) string {
	if len(names) == 0 {
		return none
	}
	return strings.Join(names, ", ")
}

func offeringTable(p *page, offerings []dbus.OfferingProperties) {
	if len(offerings) == 0 && p.legend {
		p.line("No offerings. \"virtbackupctl offering create\" makes one.")
		return
	}
	var rows [][]string
	for _, o := range offerings {
		rows = append(rows, []string{
			o.Name, o.Repository, string(o.Mode), compression(o), chainSize(o.ChainSize), string(o.Quiesce), retention(o), offeringState(o), strconv.Itoa(len(o.Domains)),
		})
	}
	p.table([]string{"OFFERING", "REPOSITORY", "MODE", "COMPRESSION", ">CHAIN SIZE", "QUIESCE", "KEEPS", "STATE", ">DOMAINS"}, rows)
}

// offeringState says whether an offering can be used, and by whom.
func offeringState(o dbus.OfferingProperties) string {
	switch {
	case o.Disabled:
		return "disabled"
	case len(o.Users) > 0:
		return "dedicated"
	}
	return "public"
}

func offeringPage(p *page, o dbus.OfferingProperties) {
	threads := "one per CPU"
	if o.Threads > 0 {
		threads = strconv.FormatUint(uint64(o.Threads), 10)
	}
	p.fields(
		"Offering", o.Name,
		"Id", o.ID,
		"Description", o.Description,
		"State", offeringState(o),
		"Users", strings.Join(o.Users, ", "),
		"File", o.Origin,
		"Repository", o.Repository,
		"Mode", string(o.Mode),
		"Compression", compression(o),
		"Threads", threads,
		"Chain size", chainSize(o.ChainSize),
		"Quiesce", quiesce(o),
		"Tracking", string(o.Tracking),
		"Fallback", string(o.Fallback),
		"Included disks", strings.Join(o.IncludeDisks, ", "),
		"Excluded disks", strings.Join(o.ExcludeDisks, ", "),
		"Volatile disks", yes(o.VolatileDisks),
		"Keeps", retention(o),
		"Validation", validation(o),
		"Command", validationCommand(o),
		"Ports", strings.Join(o.ValidationPorts, ", "),
		"Not allowed", denied(o),
		"Created", moment(o.Created),
	)
	for _, uuid := range o.Domains {
		p.fields("Domain", uuid)
	}
}
