package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/virtbackup/virtbackup/dbus"
)

func (a *app) domainCommand() *cobra.Command {
	list := &cobra.Command{Use: "list", Short: "List domains", Args: cobra.NoArgs}
	list.RunE = a.verb(func(ctx context.Context, c *dbus.Client, _ []string) error {
		all, err := collect(c.Domains(ctx, dbus.DomainFilter{}))
		if err != nil {
			return err
		}
		slices.SortFunc(all, func(x, y dbus.DomainProperties) int {
			return cmp.Or(cmp.Compare(x.Name, y.Name), cmp.Compare(x.UUID, y.UUID))
		})
		return a.show(all, func(p *page) { domainTable(p, all) })
	})
	assign := &cobra.Command{
		Use: "assign DOMAIN OFFERING", Short: "Assign an offering to a domain", Args: cobra.ExactArgs(2),
		ValidArgsFunction: func(cmd *cobra.Command, args []string, word string) ([]cobra.Completion, cobra.ShellCompDirective) {
			if len(args) == 1 {
				return a.names(2, offeringNames)(cmd, args, word)
			}
			return a.names(1, domainNames)(cmd, args, word)
		},
	}
	assign.RunE = a.verb(func(ctx context.Context, c *dbus.Client, args []string) error {
		uuid, err := findDomain(ctx, c, args[0])
		if err != nil {
			return err
		}
		offering, err := findOffering(ctx, c, args[1])
		if err != nil {
			return err
		}
		if err := c.AssignDomain(ctx, uuid, offering); err != nil {
			return err
		}
		a.say("Domain %s is assigned to offering %s.", args[0], args[1])
		return a.jsonRecord(dbus.Get[dbus.DomainProperties](ctx, c, uuid))
	})
	show := a.domainVerb("show", "Show a domain, and what its next backup would do", a.showDomain)
	return group("domain", "Manage domains", list, assign, a.unassignCommand(), a.domainSetCommand(), show)
}

func (a *app) unassignCommand() *cobra.Command {
	var forced, dryRun, sure bool
	cmd := a.domainVerb("unassign", "Take a domain's offering away; its backups stay, unless forced", func(ctx context.Context, c *dbus.Client, d dbus.DomainProperties) error {
		if forced || dryRun {
			return a.unassignForced(ctx, c, d, dryRun, sure)
		}
		if err := c.UnassignDomain(ctx, d.UUID); err != nil {
			return err
		}
		a.say("Domain %s is assigned to no offering; its backups stay.", d.Name)
		return a.jsonRecord(dbus.Get[dbus.DomainProperties](ctx, c, d.UUID))
	})
	f := cmd.Flags()
	f.BoolVar(&forced, "forced", false, "delete all its backups, too; asks first")
	f.BoolVar(&dryRun, "dry-run", false, "only tell which backups --forced would delete")
	f.BoolVarP(&sure, "yes", "y", false, "do not ask")
	return cmd
}

// unassignForced takes a domain's offering away, and then its backups, in that
// order: the first can be taken back.
func (a *app) unassignForced(ctx context.Context, c *dbus.Client, d dbus.DomainProperties, dryRun, sure bool) error {
	backups, bytes, _, err := c.DeleteDomainBackups(ctx, d.UUID, dbus.DeleteDomainBackupsOptions{DryRun: true})
	if err != nil {
		return err
	}
	if dryRun {
		return a.show(object{{"domain", d.Name}, {"offering", d.Offering}, {"backups", backups}, {"stored_bytes", bytes}}, func(p *page) {
			p.line("Domain %s would be assigned to no offering, and %d backups, %s, would be deleted.", d.Name, len(backups), size(bytes))
			for _, id := range backups {
				p.line("%s", id)
			}
		})
	}
	if a.asks(sure) {
		if err := a.confirm(ctx, fmt.Sprintf("Delete all %d backups of domain %s, %s?", len(backups), d.Name, size(bytes))); err != nil {
			return err
		}
	}
	if err := c.UnassignDomain(ctx, d.UUID); err != nil && (!isNotFound(err) || d.Offering != "") {
		return err
	}
	_, _, jobs, err := c.DeleteDomainBackups(ctx, d.UUID, dbus.DeleteDomainBackupsOptions{})
	if err != nil {
		return err
	}
	a.say("Domain %s is assigned to no offering.", d.Name)
	if len(jobs) == 0 {
		return a.jsonRecord(dbus.Get[dbus.DomainProperties](ctx, c, d.UUID))
	}
	done, err := a.finish(ctx, c, jobs...)
	return errors.Join(a.jsonJobs(done, true), err)
}

// domainVerb makes a verb that takes a domain.
func (a *app) domainVerb(name, short string, f func(context.Context, *dbus.Client, dbus.DomainProperties) error) *cobra.Command {
	cmd := &cobra.Command{Use: name + " DOMAIN", Short: short, Args: cobra.ExactArgs(1), ValidArgsFunction: a.names(1, domainNames)}
	cmd.RunE = a.verb(func(ctx context.Context, c *dbus.Client, args []string) error {
		uuid, err := findDomain(ctx, c, args[0])
		if err != nil {
			return err
		}
		d, err := dbus.Get[dbus.DomainProperties](ctx, c, uuid)
		if err != nil {
			return err
		}
		return f(ctx, c, d)
	})
	return cmd
}

func domainTable(p *page, domains []dbus.DomainProperties) {
	if len(domains) == 0 && p.legend {
		p.line("No domains.")
		return
	}
	var rows [][]string
	for _, d := range domains {
		rows = append(rows, []string{
			d.Name, d.State, d.Offering, string(d.Protection), moment(d.LastBackupTime), strconv.FormatUint(uint64(d.ChainLength), 10), d.LastError,
		})
	}
	p.table([]string{"DOMAIN", "STATE", "OFFERING", "PROTECTION", "LAST BACKUP", ">CHAIN", "ERROR"}, rows)
}

// domainView is what is shown of a domain.
type domainView struct {
	domain   dbus.DomainProperties
	tracking []dbus.DomainTracking
	marks    []dbus.Mark
	settings []dbus.EffectiveSetting
}

// shownMarks is how much of what was seen is shown to people; JSON has all.
const shownMarks = 10

func (a *app) showDomain(ctx context.Context, c *dbus.Client, d dbus.DomainProperties) error {
	tracking, err := c.DomainTracking(ctx, d.UUID)
	if err != nil {
		return err
	}
	limit := uint32(shownMarks)
	if a.json != jsonOff {
		limit = 1000
	}
	marks, err := c.DomainMarks(ctx, d.UUID, limit)
	if err != nil {
		return err
	}
	settings, err := c.DomainSettings(ctx, d.UUID)
	if err != nil {
		return err
	}
	all := append(members(d), member{"settings", settings}, member{"tracking", tracking}, member{"marks", marks})
	return a.show(all, func(p *page) { domainPage(p, domainView{d, tracking, marks, settings}) })
}

func domainPage(p *page, s domainView) {
	d := s.domain
	last, open := "", ""
	if d.LastBackup != "" {
		last = fmt.Sprintf("%s, %s", d.LastBackup, moment(d.LastBackupTime))
	}
	if d.Chain != "" {
		open = fmt.Sprintf("%s, backups: %d", d.Chain, d.ChainLength)
	}
	p.fields(
		"Domain", d.Name,
		"UUID", d.UUID,
		"State", d.State,
		"Offering", d.Offering,
		"Protection", string(d.Protection),
		"Last backup", last,
		"Last error", d.LastError,
		"Next run", moment(d.NextRun),
		"Chain", open,
		"Job", d.Job,
	)
	p.line("")
	diskTable(p, d.Disks)
	if len(s.tracking) > 0 {
		p.line("")
		trackingTable(p, s.tracking)
	}
	if len(s.marks) > 0 {
		p.line("")
		markTable(p, s.marks)
	}
	if len(s.settings) > 0 {
		p.line("")
		settingTable(p, s.settings)
	}
}

func diskTable(p *page, disks []dbus.DomainDisk) {
	var rows [][]string
	for _, disk := range disks {
		included := "yes"
		if !disk.Included {
			included = "no: " + disk.Cause
		}
		rows = append(rows, []string{disk.Target, disk.Format, size(disk.Size), disk.Source, included})
	}
	p.table([]string{"DISK", "FORMAT", ">SIZE", "SOURCE", "INCLUDED"}, rows)
}

// trackingTable shows what the next backup would do, as far as that is known.
func trackingTable(p *page, all []dbus.DomainTracking) {
	var rows [][]string
	for _, t := range all {
		rows = append(rows, []string{t.Repository, t.Target, string(t.Tracking), moment(t.Since), dbus.CauseText(t.Cause)})
	}
	p.table([]string{"NEXT BACKUP TO", "DISK", "TRACKING", "SINCE", "CAUSE"}, rows)
}

func markTable(p *page, marks []dbus.Mark) {
	var rows [][]string
	for _, m := range marks {
		cause, detail := dbus.CauseText(m.Cause), m.Detail
		if detail == cause {
			detail = ""
		}
		rows = append(rows, []string{moment(m.Time), cmp.Or(m.Target, "all"), cause, detail})
	}
	p.table([]string{"SEEN", "DISK", "CAUSE", "DETAIL"}, rows)
}

func (a *app) showCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:               "show {BACKUP|DOMAIN|JOB}",
		Short:             "Show a backup, a domain or a job",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.names(1, anyNames),
	}
	var to screenshotFlags
	to.add(cmd)
	cmd.RunE = a.verb(func(ctx context.Context, c *dbus.Client, args []string) error {
		if to.file != "" {
			return a.writeScreenshot(ctx, c, args[0], to)
		}
		return a.showAny(ctx, c, args[0])
	})
	return cmd
}

// showAny shows what has that name or id.
func (a *app) showAny(ctx context.Context, c *dbus.Client, name string) error {
	if uuid, err := c.FindDomain(ctx, name); err == nil {
		d, err := dbus.Get[dbus.DomainProperties](ctx, c, uuid)
		if err != nil {
			return err
		}
		return a.showDomain(ctx, c, d)
	} else if !isNotFound(err) {
		return err
	}
	if id, err := findBackup(ctx, c, name); err == nil {
		b, err := dbus.Get[dbus.BackupProperties](ctx, c, id)
		if err != nil {
			return err
		}
		return a.showBackup(ctx, c, b)
	} else if !isNotFound(err) {
		return err
	}
	job, err := findJob(ctx, c, name)
	if isNotFound(err) {
		return dbus.Errorf(dbus.ErrNotFound, "there is no domain, backup or job %q: \"virtbackupctl domain list\", \"list\" and \"jobs --all\" show them", name)
	} else if err != nil {
		return err
	}
	log, err := c.JobLog(ctx, job.ID, 0)
	if err != nil {
		return err
	}
	if a.json != jsonOff {
		return a.jsonRecord(job, nil)
	}
	return a.show(nil, func(p *page) { jobPage(p, job, log) })
}

func (a *app) statusCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "status", Short: "Show the daemon, its jobs, and how domains are protected", Args: cobra.NoArgs}
	cmd.RunE = a.verb(func(ctx context.Context, c *dbus.Client, _ []string) error {
		manager, err := dbus.Get[dbus.ManagerProperties](ctx, c, "")
		if err != nil {
			return err
		}
		jobs, err := collect(c.Jobs(ctx, dbus.JobFilter{Unfinished: true}))
		if err != nil {
			return err
		}
		repositories, err := c.Repositories(ctx)
		if err != nil {
			return err
		}
		domains, err := c.DomainPage(ctx, dbus.DomainFilter{}, "", statusDomains)
		if err != nil {
			return err
		}
		all := object{{"manager", manager}, {"jobs", jobs}, {"repositories", repositories}, {"protection", counts(domains)}, {"domains", domains.Domains}}
		return a.show(all, func(p *page) {
			statusPage(p, manager, domains)
			if len(jobs) > 0 {
				p.line("")
				jobTable(p, jobs)
			}
			p.line("")
			repositoryTable(p, repositories)
			p.line("")
			domainTable(p, domains.Domains)
			if domains.Next != "" && p.legend {
				p.line("More domains are listed by \"virtbackupctl domain list\".")
			}
		})
	})
	return cmd
}

// statusDomains is how many domains the status shows, those first that need
// somebody to look at them.
const statusDomains = 50

// counts says how many domains are protected how.
func counts(page dbus.DomainPage) object {
	var all object
	for _, word := range dbus.Protection("").Values() {
		all = append(all, member{word, page.Counts[dbus.Protection(word)]})
	}
	return all
}

// countsText is the same for people.
func countsText(page dbus.DomainPage) string {
	var parts []string
	for _, word := range dbus.Protection("").Values() {
		if n := page.Counts[dbus.Protection(word)]; n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", n, word))
		}
	}
	return strings.Join(parts, ", ")
}

func statusPage(p *page, m dbus.ManagerProperties, domains dbus.DomainPage) {
	libvirt := "connected"
	if !m.LibvirtConnected {
		libvirt = strings.TrimSuffix("not connected: "+m.LibvirtError, ": ")
	}
	p.fields(
		"Daemon", fmt.Sprintf("virtbackupd %s on %s, since %s", m.Version, m.Host, moment(m.Started)),
		"Libvirt", libvirt,
		"Hook", hook(m, time.Now()),
		"Jobs", fmt.Sprintf("%d running, %d queued", m.JobsRunning, m.JobsQueued),
		"Domains", countsText(domains),
	)
}

// hook says whether libvirt tells what it does, and what to do if not.
func hook(m dbus.ManagerProperties, now time.Time) string {
	last := ""
	if !m.HookLast.IsZero() {
		last = ", last spoke " + span(max(0, now.Sub(m.HookLast))) + " ago"
	}
	switch m.HookState {
	case dbus.HookMissing:
		return "not installed: \"make install\" puts it to /etc/libvirt/hooks/qemu.d/virtbackup" + last
	case dbus.HookInstalled:
		return "installed, but libvirtd, which is older, has not called it yet: systemctl reload libvirtd, once" + last
	}
	return string(m.HookState) + last
}

func (a *app) configCommand() *cobra.Command {
	show := &cobra.Command{Use: "show", Short: "Show every setting of the daemon, and where it comes from", Args: cobra.NoArgs}
	show.RunE = a.verb(func(ctx context.Context, c *dbus.Client, _ []string) error {
		settings, err := c.EffectiveConfiguration(ctx)
		if err != nil {
			return err
		}
		return a.show(settings, func(p *page) {
			var rows [][]string
			for _, s := range settings {
				rows = append(rows, []string{s.Key, s.Value, s.Source})
			}
			p.table([]string{"SETTING", "VALUE", "SOURCE"}, rows)
		})
	})
	return group("config", "Show the daemon's configuration", show)
}
