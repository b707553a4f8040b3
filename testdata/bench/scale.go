package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/virtbackup/virtbackup/dbus"
)

const (
	scaleDomains = 1000 // as TestFill of package catalog makes them
	scaleCatalog = "/var/lib/virtbackup/catalog.sqlite"
	scaleBus     = "/run/dbus/system_bus_socket"
	scaleImages  = "/srv/scale-images"
	scaleCalls   = 200 // of each kind
	scaleRuns    = 30  // of each verb
	scaleLimit   = 10 * time.Minute
)

// countedConn counts what is read from a connection.
type countedConn struct {
	io.ReadWriteCloser
	read *atomic.Int64
}

func (c countedConn) Read(p []byte) (int, error) {
	n, err := c.ReadWriteCloser.Read(p)
	c.read.Add(int64(n))
	return n, err
}

// scaled is the daemon with a thousand domains and a hundred thousand backups.
type scaled struct {
	client *dbus.Client
	read   atomic.Int64
	text   *strings.Builder
}

// scale measures what people and programs ask of a daemon that has much to tell.
func scale(ctx context.Context, text *strings.Builder) error {
	ctx, cancel := context.WithTimeout(ctx, scaleLimit)
	defer cancel()
	if err := fillCatalog(ctx); err != nil {
		return err
	}
	s := &scaled{text: text}
	conn, err := net.Dial("unix", scaleBus)
	if err != nil {
		return err
	}
	if s.client, err = dbus.ConnectPipe(ctx, countedConn{conn, &s.read}); err != nil {
		return err
	}
	defer func() { _ = s.client.Close() }()
	if err := s.settled(ctx); err != nil {
		return err
	}
	fmt.Fprintf(text, "\n| %d domains, 100,000 backups: a call over the bus, polkit included | median ms | p99 ms | reply KiB |\n| --- | --- | --- | --- |\n", scaleDomains)
	if err := s.calls(ctx); err != nil {
		return err
	}
	fmt.Fprintf(text, "\n| the same: `virtbackupctl` from start to exit | median ms | p99 ms | output KiB |\n| --- | --- | --- | --- |\n")
	for _, verb := range []string{"status", "list", "list scale-0001", "list --repository scale-1 --kind full", "jobs", "jobs --all", "domain show scale-0001", "show scale-0001", "repository list", "domain list", "usage", "usage --by user", "metrics"} {
		if err := s.verb(ctx, verb); err != nil {
			return err
		}
	}
	return nil
}

// fillCatalog makes repositories and domains, and the catalog of years.
func fillCatalog(ctx context.Context) error {
	for i := range 2 {
		path := fmt.Sprintf("/srv/scale-%d", i+1)
		if err := os.MkdirAll(path, 0o700); err != nil {
			return err
		}
		if err := command(ctx, "virtbackupctl", "repository", "add", fmt.Sprintf("scale-%d", i+1), path); err != nil {
			return err
		}
	}
	if err := command(ctx, "systemctl", "stop", "virtbackupd"); err != nil {
		return err
	}
	fill := exec.CommandContext(ctx, "go", "test", "-count=1", "-run", "^TestFill$", "./daemon/internal/catalog")
	fill.Env = append(os.Environ(), "TEST_CATALOG_FILL="+scaleCatalog)
	if out, err := fill.CombinedOutput(); err != nil {
		return fmt.Errorf("cannot fill the catalog: %w\n%s", err, out)
	}
	if err := defineDomains(ctx); err != nil {
		return err
	}
	return command(ctx, "systemctl", "start", "virtbackupd")
}

// defineDomains defines the catalog's domains in libvirt, with two disks each.
func defineDomains(ctx context.Context) error {
	if err := os.MkdirAll(scaleImages, 0o755); err != nil {
		return err
	}
	var script strings.Builder
	for i := range scaleDomains {
		name := fmt.Sprintf("scale-%04d", i)
		var disks string
		for _, target := range []string{"vda", "vdb"} {
			path := fmt.Sprintf("%s/%s-%s", scaleImages, name, target)
			f, err := os.Create(path)
			if err == nil {
				err = errors.Join(f.Truncate(64<<30), f.Close())
			}
			if err != nil {
				return err
			}
			disks += fmt.Sprintf("<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='%s'/><target dev='%s' bus='virtio'/></disk>", path, target)
		}
		definition := fmt.Sprintf("<domain type='qemu'><name>%s</name><uuid>5ca1e000-0000-4000-8000-%012d</uuid><memory unit='MiB'>64</memory>"+
			"<os><type arch='x86_64' machine='q35'>hvm</type></os><devices>%s</devices></domain>", name, i, disks)
		file := fmt.Sprintf("%s/%s.xml", scaleImages, name)
		if err := os.WriteFile(file, []byte(definition), 0o600); err != nil {
			return err
		}
		fmt.Fprintf(&script, "define %s\n", file)
	}
	c := exec.CommandContext(ctx, "virsh", "-q")
	c.Stdin = strings.NewReader(script.String())
	if out, err := c.CombinedOutput(); err != nil || strings.Contains(string(out), "error") {
		return fmt.Errorf("cannot define domains: %w\n%.2000s", err, out)
	}
	return nil
}

// settled waits until the daemon has looked at all domains and repositories.
func (s *scaled) settled(ctx context.Context) error {
	for {
		page, err := s.client.DomainPage(ctx, dbus.DomainFilter{}, "", 1000)
		if err != nil {
			return err
		}
		live := 0
		for _, d := range page.Domains {
			if d.State == "shutoff" {
				live++
			}
		}
		m, err := dbus.Get[dbus.ManagerProperties](ctx, s.client, "")
		if err != nil {
			return err
		}
		if live >= scaleDomains-1 && m.JobsQueued+m.JobsRunning == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the daemon has seen %d of %d domains: %w", live, len(page.Domains), ctx.Err())
		case <-time.After(time.Second):
		}
	}
}

// first reads one page.
func first[R any](list func(func(R, error) bool)) error {
	var failed error
	n := 0
	list(func(_ R, err error) bool {
		n++
		failed = err
		return err == nil && n < 100
	})
	return failed
}

func (s *scaled) calls(ctx context.Context) error {
	c := s.client
	var backup dbus.BackupProperties
	for b, err := range c.Backups(ctx, dbus.BackupFilter{}) {
		if err != nil {
			return err
		}
		backup = b
		break
	}
	offering, err := c.FindOffering(ctx, backup.Offering)
	if err != nil {
		return err
	}
	repository, err := c.FindRepository(ctx, backup.Repository)
	if err != nil {
		return err
	}
	var job dbus.JobProperties
	for j, err := range c.Jobs(ctx, dbus.JobFilter{}) {
		if err != nil {
			return err
		}
		job = j
		break
	}
	for _, one := range s.asked(ctx, backup, repository, offering, job.ID) {
		if err := s.measure(one.name, scaleCalls, func() (int64, error) {
			before := s.read.Load()
			err := one.call()
			return s.read.Load() - before, err
		}); err != nil {
			return err
		}
	}
	return nil
}

// asked is a call to measure.
type asked struct {
	name string
	call func() error
}

func (s *scaled) asked(ctx context.Context, backup dbus.BackupProperties, repository, offering, job string) []asked {
	c := s.client
	damaged, full := dbus.BackupDamaged, dbus.KindFull
	old := time.Now().AddDate(0, 0, -40)
	return []asked{
		{"properties of the manager", func() error { _, err := dbus.Get[dbus.ManagerProperties](ctx, c, ""); return err }},
		{"properties of a repository", func() error { _, err := dbus.Get[dbus.RepositoryProperties](ctx, c, repository); return err }},
		{"properties of an offering", func() error { _, err := dbus.Get[dbus.OfferingProperties](ctx, c, offering); return err }},
		{"properties of a domain", func() error { _, err := dbus.Get[dbus.DomainProperties](ctx, c, backup.DomainUUID); return err }},
		{"properties of a chain", func() error { _, err := dbus.Get[dbus.ChainProperties](ctx, c, backup.Chain); return err }},
		{"properties of a backup", func() error { _, err := dbus.Get[dbus.BackupProperties](ctx, c, backup.ID); return err }},
		{"properties of a job", func() error { _, err := dbus.Get[dbus.JobProperties](ctx, c, job); return err }},
		{"`GetDomain`", func() error { _, err := c.FindDomain(ctx, backup.DomainName); return err }},
		{"`GetBackup`", func() error { _, err := c.FindBackup(ctx, backup.ID[:20]); return err }},
		{"`ListDomains`, a page of 100", func() error { _, err := c.DomainPage(ctx, dbus.DomainFilter{}, "", 0); return err }},
		{"`ListBackups`, a page of 100", func() error { return first(c.Backups(ctx, dbus.BackupFilter{})) }},
		{"`ListBackups` of a domain, 100", func() error { return first(c.Backups(ctx, dbus.BackupFilter{Domain: backup.DomainUUID})) }},
		{"`ListBackups` full ones of a repository, 100", func() error { return first(c.Backups(ctx, dbus.BackupFilter{Repository: repository, Kind: &full})) }},
		{"`ListBackups` damaged ones, 0", func() error { return first(c.Backups(ctx, dbus.BackupFilter{State: &damaged})) }},
		{"`ListBackups` older than 40 days, 100", func() error { return first(c.Backups(ctx, dbus.BackupFilter{Until: &old})) }},
		{"`ListChains`, a page of 100", func() error { return first(c.Chains(ctx, dbus.ChainFilter{})) }},
		{"`ListJobs`, a page of 100", func() error { return first(c.Jobs(ctx, dbus.JobFilter{})) }},
		{"`ListJobs` unfinished ones, 0", func() error { return first(c.Jobs(ctx, dbus.JobFilter{Unfinished: true})) }},
		{"`ListTracking` of a domain", func() error { _, err := c.DomainTracking(ctx, backup.DomainUUID); return err }},
		{"`GetManagedObjects`", func() error { _, err := c.Objects(ctx); return err }},
	}
}

func (s *scaled) verb(ctx context.Context, verb string) error {
	return s.measure("`"+verb+"`", scaleRuns, func() (int64, error) {
		out, err := exec.CommandContext(ctx, "virtbackupctl", strings.Fields(verb)...).Output()
		return int64(len(out)), err
	})
}

// measure adds a row: the median, the 99th percentile, and bytes.
func (s *scaled) measure(name string, times int, run func() (int64, error)) error {
	var took []time.Duration
	var bytes int64
	for range times {
		began := time.Now()
		n, err := run()
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		took, bytes = append(took, time.Since(began)), n
	}
	slices.Sort(took)
	ms := func(d time.Duration) float64 { return d.Seconds() * 1000 }
	row := fmt.Sprintf("| %s | %.1f | %.1f | %.1f |", name, ms(took[len(took)/2]), ms(took[len(took)*99/100]), float64(bytes)/1024)
	fmt.Fprintln(os.Stderr, "bench:", row)
	fmt.Fprintln(s.text, row)
	return nil
}
