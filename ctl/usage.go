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

func (a *app) usageCommand() *cobra.Command {
	var by *dbus.UsageBy
	cmd := &cobra.Command{Use: "usage", Short: "Show what backups take", Args: cobra.NoArgs}
	addChoice(cmd, &by, "by", "of what it is told, domain unless said")
	cmd.RunE = a.verb(func(ctx context.Context, c *dbus.Client, _ []string) error {
		of := dbus.UsageByDomain
		if by != nil {
			of = *by
		}
		usage, err := c.Usage(ctx, of)
		if err != nil {
			return err
		}
		return a.show(usage, func(p *page) { usageTable(p, of, usage) })
	})
	return cmd
}

func usageTable(p *page, by dbus.UsageBy, usage []dbus.Usage) {
	var rows [][]string
	for _, u := range usage {
		rows = append(rows, []string{
			nameOr(u.Name, u.Of), strconv.FormatUint(uint64(u.Backups), 10), strconv.FormatUint(uint64(u.Chains), 10),
			size(u.StoredBytes), size(u.ProtectedBytes), moment(u.Newest),
		})
	}
	p.table([]string{strings.ToUpper(string(by)), ">BACKUPS", ">CHAINS", ">STORED", ">PROTECTED", "NEWEST"}, rows)
}

// nameOr is a name, or what else something is known by.
func nameOr(name, id string) string {
	switch {
	case name != "":
		return name
	case id != "":
		return id
	}
	return "(none)"
}

func (a *app) metricsCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "metrics", Short: "Print metrics for Prometheus", Args: cobra.NoArgs}
	cmd.RunE = a.verb(func(ctx context.Context, c *dbus.Client, _ []string) error {
		text, err := c.Metrics(ctx)
		if err != nil {
			return err
		}
		if a.json != jsonOff {
			return writeJSON(a.out, a.json, object{{"text", text}})
		}
		return a.print([]byte(text))
	})
	return cmd
}

func (a *app) quotaCommand() *cobra.Command {
	list := &cobra.Command{Use: "list", Short: "List quotas, and what is used of them", Args: cobra.NoArgs}
	list.RunE = a.verb(func(ctx context.Context, c *dbus.Client, _ []string) error {
		quotas, err := c.Quotas(ctx)
		if err != nil {
			return err
		}
		return a.show(quotas, func(p *page) { quotaTable(p, quotas) })
	})
	remove := a.quotaVerb("remove", "Take a quota away", func(ctx context.Context, c *dbus.Client, kind dbus.QuotaKind, name string) error {
		if err := c.RemoveQuota(ctx, kind, name); err != nil {
			return err
		}
		a.say("The quota of %s %s is removed.", kind, name)
		return a.jsonRecord(object{{"kind", string(kind)}, {"name", name}}, nil)
	})
	return group("quota", "Bound how much may be backed up", a.quotaSetCommand(), list, remove)
}

// quotaVerb makes a verb that takes what a quota is of.
func (a *app) quotaVerb(name, short string, f func(context.Context, *dbus.Client, dbus.QuotaKind, string) error) *cobra.Command {
	kinds := dbus.QuotaKind("").Values()
	cmd := &cobra.Command{
		Use: name + " {" + strings.Join(kinds, "|") + "} NAME", Short: short,
		Args: cobra.MatchAll(cobra.ExactArgs(2), func(_ *cobra.Command, args []string) error {
			var kind *dbus.QuotaKind
			return choice[dbus.QuotaKind]{&kind}.Set(args[0])
		}),
		ValidArgsFunction: func(cmd *cobra.Command, args []string, word string) ([]cobra.Completion, cobra.ShellCompDirective) {
			if len(args) == 0 {
				return kinds, cobra.ShellCompDirectiveNoFileComp
			}
			switch dbus.QuotaKind(args[0]) {
			case dbus.QuotaDomain:
				return a.names(2, domainNames)(cmd, args, word)
			case dbus.QuotaOffering:
				return a.names(2, offeringNames)(cmd, args, word)
			}
			return nil, cobra.ShellCompDirectiveNoFileComp
		},
	}
	cmd.RunE = a.verb(func(ctx context.Context, c *dbus.Client, args []string) error {
		return f(ctx, c, dbus.QuotaKind(args[0]), args[1])
	})
	return cmd
}

func (a *app) quotaSetCommand() *cobra.Command {
	var o dbus.QuotaOptions
	var bytes string
	var backups, chains uint32
	cmd := a.quotaVerb("set", "Set or change a quota", func(ctx context.Context, c *dbus.Client, kind dbus.QuotaKind, name string) error {
		if err := c.SetQuota(ctx, kind, name, o); err != nil {
			return err
		}
		a.say("The quota of %s %s is set. \"virtbackupctl quota list\" shows what is used.", kind, name)
		return a.jsonRecord(object{{"kind", string(kind)}, {"name", name}}, nil)
	})
	cmd.Example = "  virtbackupctl quota set offering gold --bytes 2T --backups 500"
	f := cmd.Flags()
	f.StringVar(&bytes, "bytes", "", "no more backups once `SIZE` is stored, as 500G; 0 for no bound")
	f.Uint32Var(&backups, "backups", 0, "so many backups at most, 0 for no bound")
	f.Uint32Var(&chains, "chains", 0, "so many chains at most, 0 for no bound")
	for _, name := range []string{"bytes", "backups", "chains"} {
		complete(cmd, name, cobra.NoFileCompletions)
	}
	cmd.PreRunE = func(cmd *cobra.Command, _ []string) error {
		if cmd.Flags().Changed("bytes") {
			n, err := parseSize(bytes)
			if err != nil {
				return err
			}
			o.Bytes = &n
		}
		if cmd.Flags().Changed("backups") {
			o.Backups = &backups
		}
		if cmd.Flags().Changed("chains") {
			o.Chains = &chains
		}
		if o == (dbus.QuotaOptions{}) {
			return errors.New("say a bound: --bytes, --backups or --chains")
		}
		return nil
	}
	return cmd
}

func quotaTable(p *page, quotas []dbus.Quota) {
	if len(quotas) == 0 && p.legend {
		p.line("No quotas. \"virtbackupctl quota set\" sets one.")
		return
	}
	bound := func(used, most string, is bool) string {
		if !is {
			return used
		}
		return used + " of " + most
	}
	number := func(used, most uint32) string { return bound(fmt.Sprint(used), fmt.Sprint(most), most > 0) }
	var rows [][]string
	for _, q := range quotas {
		rows = append(rows, []string{
			string(q.Kind), nameOr(q.Name, q.Of), bound(size(q.UsedBytes), size(q.Bytes), q.Bytes > 0),
			number(q.UsedBackups, q.Backups), number(q.UsedChains, q.Chains),
		})
	}
	p.table([]string{"KIND", "NAME", ">BYTES", ">BACKUPS", ">CHAINS"}, rows)
}
