package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/virtbackup/virtbackup/dbus"
)

func (a *app) backupCommand() *cobra.Command {
	var o dbus.BackupOptions
	var as groupFlags
	cmd := &cobra.Command{
		Use:   "backup DOMAIN...",
		Short: "Back up domains",
		Long: `Back up domains, each with the offering that it is assigned to, or ad hoc.

All are started, and all are followed; the exit status is 1 if one failed.
With --parallel or --sequential they are one job, a group, that can be
cancelled and retried as a whole.`,
		Example: `  virtbackupctl backup web1
  virtbackupctl backup web1 web2 --no-block
  virtbackupctl backup web1 web2 web3 --sequential --priority 80
  virtbackupctl backup web1 --repository nas --isolated --compression zstd`,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: a.names(0, domainNames),
	}
	f := cmd.Flags()
	f.StringVar(&o.Offering, "offering", "", "use this `OFFERING`, not the one assigned")
	f.StringVar(&o.Repository, "repository", "", "back up to this `REPOSITORY`, without an offering")
	f.BoolVar(&o.Isolated, "isolated", false, "make a full backup that belongs to no chain")
	f.BoolVar(&o.Full, "full", false, "make a full backup, and begin a new chain with it")
	as.add(cmd)
	addSettings(cmd, &o.Settings)
	cmd.MarkFlagsMutuallyExclusive("offering", "repository")
	complete(cmd, "offering", a.names(0, offeringNames))
	complete(cmd, "repository", a.names(0, repositoryNames))
	cmd.RunE = a.verb(func(ctx context.Context, c *dbus.Client, args []string) error {
		as.set(cmd, &o)
		if as.parallel || as.sequential {
			return a.backupGroup(ctx, c, args, dbus.GroupOptions{Sequential: as.sequential, BackupOptions: o})
		}
		return a.backup(ctx, c, args, o)
	})
	return cmd
}

// backup starts all before it follows any. A name that is not known starts none.
func (a *app) backup(ctx context.Context, c *dbus.Client, names []string, o dbus.BackupOptions) error {
	var uuids []string
	for _, name := range names {
		uuid, err := findDomain(ctx, c, name)
		if err != nil {
			return err
		}
		if !slices.Contains(uuids, uuid) {
			uuids = append(uuids, uuid)
		}
	}
	var ids []string
	var refusals []error
	for _, uuid := range uuids {
		id, err := c.BackupDomain(ctx, uuid, o)
		if err != nil {
			refusals = append(refusals, err)
			continue
		}
		ids = append(ids, id)
	}
	if len(ids) == 0 {
		return errors.Join(refusals...)
	}
	jobs, err := a.finish(ctx, c, ids...)
	return errors.Join(append(refusals, a.jsonJobs(jobs, true), err)...)
}

func (a *app) verifyCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:               "verify BACKUP",
		Short:             "Check a backup, and all it builds on",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.names(1, backupNames),
	}
	cmd.RunE = a.verb(func(ctx context.Context, c *dbus.Client, args []string) error {
		id, err := findBackup(ctx, c, args[0])
		if err != nil {
			return err
		}
		job, err := c.VerifyBackup(ctx, id)
		if err != nil {
			return err
		}
		return a.finishOne(ctx, c, job)
	})
	return cmd
}

func (a *app) repairCommand() *cobra.Command {
	var o dbus.RepairOptions
	cmd := &cobra.Command{
		Use:   "repair BACKUP",
		Short: "Repair a damaged backup with what others hold of the same",
		Long: `Repair what of a backup's disks is damaged, with what other backups of the
domain in the same repository, or its disks as they are now, hold of the same,
as digests tell.

It is written beside what is there, read back, and exchanged at once. A disk of
which not all is held elsewhere stays as it is; the exit status is 1 then.`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.names(1, backupNames),
	}
	cmd.Flags().BoolVar(&o.DryRun, "dry-run", false, "only tell what could be repaired")
	cmd.RunE = a.verb(func(ctx context.Context, c *dbus.Client, args []string) error {
		id, err := findBackup(ctx, c, args[0])
		if err != nil {
			return err
		}
		job, err := c.RepairBackup(ctx, id, o)
		if err != nil {
			return err
		}
		return a.finishAndTell(ctx, c, job)
	})
	return cmd
}

func (a *app) compressCommand() *cobra.Command {
	var o dbus.CompressOptions
	cmd := &cobra.Command{
		Use:   "compress BACKUP",
		Short: "Compress a backup that was made already",
		Long: `Compress what of a backup is not compressed yet. What it holds stays the same,
and so does what builds on it; if it would be no smaller, nothing is changed.`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.names(1, backupNames),
	}
	addChoice(cmd, &o.Compression, "compression", "with this, and not as its offering says")
	addNumber(cmd, &o.Level, "level", "how hard: 1 to 9 for zlib, 1 to 22 for zstd; 0 for its default")
	cmd.RunE = a.verb(func(ctx context.Context, c *dbus.Client, args []string) error {
		id, err := findBackup(ctx, c, args[0])
		if err != nil {
			return err
		}
		job, err := c.CompressBackup(ctx, id, o)
		if err != nil {
			return err
		}
		return a.finishAndTell(ctx, c, job)
	})
	return cmd
}

func (a *app) finishChainCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:               "finish-chain DOMAIN",
		Short:             "End a domain's chain: its next backup is full",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.names(1, domainNames),
	}
	cmd.RunE = a.verb(func(ctx context.Context, c *dbus.Client, args []string) error {
		uuid, err := findDomain(ctx, c, args[0])
		if err != nil {
			return err
		}
		if err := c.FinishChain(ctx, uuid); err != nil {
			return err
		}
		a.say("The next backup of %s is full.", args[0])
		return a.jsonRecord(dbus.Get[dbus.DomainProperties](ctx, c, uuid))
	})
	return cmd
}

func (a *app) listCommand() *cobra.Command {
	var filter dbus.BackupFilter
	var since, until string
	cmd := &cobra.Command{
		Use:               "list [DOMAIN]",
		Short:             "List backups, newest first",
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: a.names(1, domainNames),
	}
	f := cmd.Flags()
	f.StringVar(&filter.Repository, "repository", "", "only those in this `REPOSITORY`")
	f.StringVar(&filter.Offering, "offering", "", "only those made with this `OFFERING`")
	f.StringVar(&filter.Chain, "chain", "", "only those of the chain with this `ID`")
	addChoice(cmd, &filter.State, "state", "only those in this state")
	addChoice(cmd, &filter.Kind, "kind", "only those of this kind")
	f.StringVar(&since, "since", "", "only those not older than this `TIME`: 2026-01-31, \"2026-01-31 14:00\", 7d, 12h")
	f.StringVar(&until, "until", "", "only those older than this `TIME`")
	limit := addLimit(cmd)
	complete(cmd, "repository", a.names(0, repositoryNames))
	complete(cmd, "offering", a.names(0, offeringNames))
	for _, name := range []string{"chain", "since", "until"} {
		complete(cmd, name, cobra.NoFileCompletions)
	}
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
		backups, err := take(c.Backups(ctx, filter), limit.in(a.json))
		if err != nil {
			return err
		}
		return a.show(backups, func(p *page) {
			backupTable(p, backups)
			limit.hint(p, len(backups))
		})
	})
	return cmd
}

// period reads --since and --until.
func period(since, until string) (from, to *time.Time, err error) {
	for _, one := range []struct {
		text string
		time **time.Time
	}{{since, &from}, {until, &to}} {
		if one.text == "" {
			continue
		}
		t, err := parseTime(one.text, time.Now())
		if err != nil {
			return nil, nil, err
		}
		*one.time = &t
	}
	return from, to, nil
}

func backupTable(p *page, backups []dbus.BackupProperties) {
	if len(backups) == 0 && p.legend {
		p.line("No backups.")
		return
	}
	var rows [][]string
	for _, b := range backups {
		rows = append(rows, []string{
			b.ID, b.DomainName, moment(b.Created), backupKind(b), string(b.State), size(b.SizeBytes), size(b.DataBytes), size(b.StoredBytes), saved(b),
			string(b.ValidationResult), string(b.Consistency), b.Repository,
		})
	}
	p.table([]string{"BACKUP", "DOMAIN", "CREATED", "KIND", "STATE", ">SIZE", ">DATA", ">STORED", ">SAVED", "VALIDATION", "CONSISTENCY", "REPOSITORY"}, rows)
}

// saved is how much less a backup takes than the data in it, by compression.
func saved(b dbus.BackupProperties) string {
	switch {
	case b.CompressionState == dbus.CompressionDue:
		return "due"
	case b.Compression == dbus.CompressionNone || b.StoredBytes >= b.DataBytes:
		return ""
	}
	return fmt.Sprintf("%d%%", 100*(b.DataBytes-b.StoredBytes)/b.DataBytes)
}

// compressed says how a backup is compressed, and what is to come of that.
func compressed(b dbus.BackupProperties) string {
	switch text := string(b.Compression); b.CompressionState {
	case dbus.CompressionDue:
		return text + ", to be compressed by a job"
	case dbus.CompressionDone:
		return text + ", by a job after it"
	case dbus.CompressionFailed:
		return text + ", as a job failed to compress it: " + b.CompressionError
	default:
		return text
	}
}

func backupKind(b dbus.BackupProperties) string {
	if b.Isolated {
		return "isolated"
	}
	return string(b.Kind)
}

func backupPage(p *page, b dbus.BackupProperties) {
	verified := moment(b.Verified)
	if verified == "" {
		verified = "when it was made"
	}
	p.fields(
		"Backup", b.ID,
		"Domain", fmt.Sprintf("%s (%s)", b.DomainName, b.DomainUUID),
		"State", string(b.State),
		"Created", moment(b.Created),
		"Finished", moment(b.Finished),
		"Kind", backupKind(b),
		"Cause", backupCause(b),
		"Consistency", consistency(b),
		"Repository", b.Repository,
		"Offering", b.Offering,
		"Chain", b.Chain,
		"Parent", b.Parent,
		"Children", strings.Join(b.Children, " "),
		"Compression", compressed(b),
		"Size", size(b.SizeBytes),
		"Read", size(b.ReadBytes),
		"Stored", size(b.StoredBytes),
		"Saved", saved(b),
		"Verified", verified,
		"Validation", validated(b),
		"Held", b.Hold,
		"Made by", fmt.Sprintf("virtbackup %s on %s", b.Version, b.Host),
	)
	var rows [][]string
	for _, d := range b.Disks {
		rows = append(rows, []string{
			d.Target, string(d.Kind), string(d.Changes), size(d.Size), size(d.ReadBytes), size(d.StoredBytes), d.File, dbus.CauseText(d.Cause),
		})
	}
	p.line("")
	p.table([]string{"DISK", "KIND", "CHANGES", ">SIZE", ">READ", ">STORED", "FILE", "CAUSE"}, rows)
	damagePage(p, b)
}

// damagePage lists what is damaged, and says what can be done.
func damagePage(p *page, b dbus.BackupProperties) {
	if len(b.Damage) == 0 {
		return
	}
	var rows [][]string
	repairable := map[string]bool{} // by the backup whose image is damaged
	for _, d := range b.Damage {
		target, offset, length := d.Target, fmt.Sprint(d.Offset), fmt.Sprint(d.Length)
		if d.Length == 0 {
			target, offset, length = "all", "", ""
		}
		in := d.Image
		if in == b.ID {
			in = "this backup"
		}
		rows = append(rows, []string{target, offset, length, in, d.Donor})
		if known, ok := repairable[d.Image]; d.Image == b.ID {
			repairable[d.Image] = d.Donor != "" && (known || !ok)
		}
	}
	p.line("")
	p.table([]string{"DAMAGED", ">OFFSET", ">LENGTH", "IN THE FILES OF", "HELD BY, TOO"}, rows)
	if repairable[b.ID] {
		p.line("It can be repaired: virtbackupctl repair %s", b.ID)
	}
}

// backupCause says why a backup is full. What else Causes has is of its disks.
func backupCause(b dbus.BackupProperties) string {
	if len(b.Causes) == 0 || strings.Contains(b.Causes[0], ": ") {
		return ""
	}
	return dbus.CauseText(b.Causes[0])
}

// consistency says what the point in time is worth, and what it cost.
func consistency(b dbus.BackupProperties) string {
	text := string(b.Consistency)
	switch {
	case b.Consistency == dbus.ConsistencyOff:
		return "off: the domain was shut off"
	case b.Shortfall != "":
		text = fmt.Sprintf("asked for %s, got %s: %s", b.Quiesce, b.Consistency, b.Shortfall)
	case b.Quiesce != dbus.QuiesceNone:
		text += fmt.Sprintf(" (asked for %s)", b.Quiesce)
	}
	if b.HeldUsec > 0 {
		text += ", held " + brief(time.Duration(b.HeldUsec)*time.Microsecond)
	}
	return text
}
