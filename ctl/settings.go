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

// addSettings adds the flags of settings that a backup can override.
func addSettings(cmd *cobra.Command, s *dbus.Settings) {
	addChoice(cmd, &s.Mode, "mode", "how backups build on each other")
	addChoice(cmd, &s.Compression, "compression", "how data is compressed")
	addChoice(cmd, &s.CompressionTime, "compression-time", "when: while it is written, or left for later")
	addNumber(cmd, &s.CompressionLevel, "level", "level of compression: 1 to 9 for zlib, 1 to 22 for zstd, 0 for the method's own")
	addNumber(cmd, &s.Threads, "threads", "compressing threads, 0 for one per CPU")
	addNumber(cmd, &s.ChainSize, "chain-size", "backups in a chain at most: 1 for full ones only, 0 for no limit")
	addChoice(cmd, &s.Quiesce, "quiesce", "how the guest is quieted")
	addChoice(cmd, &s.QuiescePolicy, "quiesce-policy", "what if it cannot be: fail, or back up less consistent")
	addChoice(cmd, &s.Tracking, "tracking", "how changes are found")
	addChoice(cmd, &s.Fallback, "fallback", "what of a disk whose changes are not known: compare, or store all of it")
	addWords(cmd, &s.IncludeDisks, "include-disks", "back up these disks only, as vda,vdb; \"\" for all")
	addWords(cmd, &s.ExcludeDisks, "exclude-disks", "leave these disks out; \"\" for none")
	addTruth(cmd, &s.VolatileDisks, "volatile-disks", "back up transient disks too, while the domain is off")
}

// addOverrides adds the flags of all that a domain can have of its own.
func addOverrides(cmd *cobra.Command, o *dbus.Overrides) {
	addSettings(cmd, &o.Settings)
	addNumber(cmd, &o.KeepLast, "keep-last", "keep the newest so many backups")
	for _, r := range []struct {
		to         **uint32
		name, each string
	}{
		{&o.KeepHourly, "keep-hourly", "hour"}, {&o.KeepDaily, "keep-daily", "day"}, {&o.KeepWeekly, "keep-weekly", "week"},
		{&o.KeepMonthly, "keep-monthly", "month"}, {&o.KeepYearly, "keep-yearly", "year"},
	} {
		addNumber(cmd, r.to, r.name, "keep the newest of each "+r.each+", for so many that have one")
	}
	addValidation(cmd, &o.Validation)
	addTruth(cmd, &o.AllowUserBackups, "allow-user-backups", "let others than root back up besides its schedules")
	addTruth(cmd, &o.AllowUserSchedules, "allow-user-schedules", "let others than root make schedules")
	addTruth(cmd, &o.AllowQuickRestore, "allow-quick-restore", "let backups be restored quickly, when a later version can")
	addTruth(cmd, &o.AllowFileExtraction, "allow-file-extraction", "let files be taken out of backups, when a later version can")
}

// addOffering adds the flags of all that an offering has but its repository.
func addOffering(cmd *cobra.Command, o *dbus.OfferingOptions) {
	text := func(text string) (string, error) { return text, nil }
	cmd.Flags().Var(optional[string]{&o.Description, text, "TEXT"}, "description", "what it is for")
	complete(cmd, "description", cobra.NoFileCompletions)
	addTruth(cmd, &o.Disabled, "disabled", "let it make no backups")
	addWords(cmd, &o.Users, "users", "let only these users, and @GROUPS, use it; \"\" for everybody")
	addOverrides(cmd, &o.Overrides)
}

func (a *app) domainSetCommand() *cobra.Command {
	var own dbus.Overrides
	var unset []string
	cmd := a.domainVerb("set", "Give a domain settings of its own, in place of its offering's", func(ctx context.Context, c *dbus.Client, d dbus.DomainProperties) error {
		var keys []string
		for _, name := range unset {
			keys = append(keys, settingKey(name))
		}
		if len(keys) == 0 && own == (dbus.Overrides{}) {
			return &usageError{errors.New("say what to set, or to unset")}
		}
		if err := c.SetOverrides(ctx, d.UUID, own, keys); err != nil {
			return err
		}
		settings, err := c.DomainSettings(ctx, d.UUID)
		if err != nil {
			return err
		}
		return a.show(settings, func(p *page) { settingTable(p, settings) })
	})
	cmd.Example = `  virtbackupctl domain set web1 --keep-last 30 --exclude-disks vdb
  virtbackupctl domain set web1 --unset keep-last`
	addOverrides(cmd, &own)
	cmd.Flags().StringSliceVar(&unset, "unset", nil, "take these `SETTINGS` from its offering again")
	complete(cmd, "unset", fixed(dbus.OptionKeys(own)...))
	return cmd
}

// settingKey returns the key of a setting that is named as its flag is.
func settingKey(name string) string {
	switch name {
	case "level":
		return "compression_level"
	case "validation-argument":
		return "validation_arguments"
	}
	return strings.ReplaceAll(name, "-", "_")
}

// settingTable shows what is in force for a domain.
func settingTable(p *page, settings []dbus.EffectiveSetting) {
	var rows [][]string
	for _, s := range settings {
		rows = append(rows, []string{s.Key, s.Value, s.Source})
	}
	p.table([]string{"SETTING", "VALUE", "FROM"}, rows)
}

// retention says which backups stay.
func retention(o dbus.OfferingProperties) string {
	var all []string
	for _, k := range []struct {
		n    uint32
		what string
	}{{o.KeepLast, "last"}, {o.KeepHourly, "hourly"}, {o.KeepDaily, "daily"}, {o.KeepWeekly, "weekly"}, {o.KeepMonthly, "monthly"}, {o.KeepYearly, "yearly"}} {
		if k.n > 0 {
			all = append(all, fmt.Sprintf("%d %s", k.n, k.what))
		}
	}
	if len(all) == 0 {
		return "all"
	}
	return strings.Join(all, ", ")
}

// denied says what others than root may not do with an offering.
func denied(o dbus.OfferingProperties) string {
	var all []string
	for _, r := range []struct {
		allowed bool
		what    string
	}{{o.AllowUserBackups, "backups of users"}, {o.AllowUserSchedules, "schedules of users"}, {o.AllowQuickRestore, "quick restore"}, {o.AllowFileExtraction, "file extraction"}} {
		if !r.allowed {
			all = append(all, r.what)
		}
	}
	return strings.Join(all, ", ")
}

func yes(b bool) string {
	if b {
		return "yes"
	}
	return ""
}

func compression(o dbus.OfferingProperties) string {
	text := string(o.Compression)
	if o.CompressionLevel > 0 {
		text = fmt.Sprintf("%s level %d", text, o.CompressionLevel)
	}
	if o.CompressionTime == dbus.CompressionDeferred && o.Compression != dbus.CompressionNone {
		text += ", deferred"
	}
	return text
}

func chainSize(n uint32) string {
	if n == 0 {
		return "no limit"
	}
	return strconv.FormatUint(uint64(n), 10)
}

func quiesce(o dbus.OfferingProperties) string {
	if o.Quiesce == dbus.QuiesceNone {
		return string(o.Quiesce)
	}
	return fmt.Sprintf("%s (%s)", o.Quiesce, o.QuiescePolicy)
}
