package config

import (
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/window"
)

// setting ties a key to its place in a Config.
type setting struct {
	key     string
	to      any // *bool, *int, *float64, *string, *Level, *Size, *time.Duration, *Spans, or *[]string of directories
	check   func() error
	allowed string
	help    string
}

// settings lists all keys. It is the only such list: the file is read, shown
// and documented from it.
func (c *Config) settings() []setting {
	d, v, l, j, b, r, s := &c.Daemon, &c.Libvirt, &c.Limits, &c.Jobs, &c.Backup, &c.Restore, &c.Repositories
	return slices.Concat([]setting{
		directory("daemon.state_directory", &d.StateDirectory, "Where the catalog and the key of the manifests are. Has to be on a local disk."),
		directory("daemon.runtime_directory", &d.RuntimeDirectory, "Where sockets and the state of running jobs are. Has to be on a tmpfs."),
		{"daemon.log_level", &d.LogLevel, func() error { return d.LogLevel.check() }, "debug, info, warning, error", "How much is logged."},

		{"libvirt.uri", &v.URI, func() error { return checkURI(v.URI) }, "a local QEMU connection, such as qemu:///system", "The libvirt connection whose domains are backed up."},
		duration("libvirt.agent_timeout", &v.AgentTimeout, time.Second, 10*time.Minute, "How long a guest agent may take to answer one command."),
		duration("libvirt.hold_limit", &v.HoldLimit, time.Second, 10*time.Minute, "How long a guest may be frozen or suspended for a backup. After this it goes on, and the backup fails or is less consistent."),

		number("limits.concurrent_backups", &l.ConcurrentBackups, 1, 1000, "How many backups run at once."),
		number("limits.concurrent_restores", &l.ConcurrentRestores, 1, 1000, "How many restores run at once."),
		number("limits.concurrent_compressions", &l.ConcurrentCompressions, 1, 1000, "How many backups are compressed at once after they were made."),
		number("limits.concurrent_validations", &l.ConcurrentValidations, 1, 1000, "How many backups are verified at once."),
		number("limits.concurrent_maintenance", &l.ConcurrentMaintenance, 1, 1000, "How many jobs look after repositories at once: check them, delete, merge and prune."),
		number("limits.concurrent_jobs_per_repository", &l.ConcurrentJobsPerRepository, 1, 1000, "How many jobs of whatever kind may use the same repository at once."),
		timeout("limits.backup_timeout", &l.BackupTimeout, "How long a backup may take from its beginning. After this it fails."),
		timeout("limits.restore_timeout", &l.RestoreTimeout, "The same of a restore."),
		timeout("limits.compression_timeout", &l.CompressionTimeout, "The same of a compression."),
		timeout("limits.validation_timeout", &l.ValidationTimeout, "The same of a verification."),
		timeout("limits.maintenance_timeout", &l.MaintenanceTimeout, "The same of what looks after repositories."),
		number("limits.jobs_per_user", &l.JobsPerUser, 1, 100000, "How many unfinished jobs a user may have. Root has no such limit."),
		number("limits.queue", &l.Queue, 1, 100000, "How many jobs may wait."),
		number("limits.cpu_weight", &l.CPUWeight, 1, 10000, "The CPUWeight= of each job's service; systemd's default for others is 100."),
		number("limits.cpu_quota", &l.CPUQuota, 0, 100000, "The CPUQuota= of each job's service in percent of one CPU; 0 for no limit."),
		size("limits.memory_max", &l.MemoryMax, 128*mebibyte, "The MemoryMax= of each job's service, page cache included."),
		number("limits.io_weight", &l.IOWeight, 1, 10000, "The IOWeight= of each job's service; systemd's default for others is 100."),
		number("limits.rate_per_job", &l.RatePerJob, 0, mostRate, "How many MB (1,000,000 bytes) a backup may read from the guest's disks per second, and as many that it may write to the repository; 0 for no limit. A backup that runs takes a new value up within a second."),
		number("limits.rate_per_repository", &l.RatePerRepository, 0, mostRate, "The same for all backups that write to the same repository, which share it."),
		number("limits.rate_per_host", &l.RatePerHost, 0, mostRate, "The same for all backups of the host. What one of them may not use because of the other limits is for the others."),
		size("limits.minimum_free_repository", &l.MinimumFreeRepository, 0, "A backup fails before it leaves less than this free in its repository. It is not begun if what it is expected to take, and what those being made still take, would not leave this free."),
		size("limits.minimum_free_scratch", &l.MinimumFreeScratch, 0, "How much of the space below backup.scratch_directory is set aside for each backup of a running domain. One is not started when that, and what the others have set aside and not used yet, is not free."),

		number("jobs.attempts", &j.Attempts, 1, 100, "How often a job that a schedule or the daemon itself started is tried when what it fails of may pass, as a repository that is away."),
		duration("jobs.retry_delay", &j.RetryDelay, time.Second, time.Hour, "How long after a failure the second try begins. It doubles with each, up to an hour."),
		duration("jobs.stall_limit", &j.StallLimit, time.Second, 24*time.Hour, "How long a job may make no progress before it is ended. After half of this it is told."),
		{"jobs.window", &j.Window, func() error { _, err := window.ParseAll(j.Window); return err }, "a list of spans, as \"Mon..Fri 22:00-06:00\"", "When jobs may begin that a schedule or the daemon itself started; always when the list is empty. What runs when a span is over goes on."},

		directory("backup.scratch_directory", &b.ScratchDirectory, "Where QEMU puts the old contents of blocks that a guest overwrites during a backup. Has to be on a local disk."),

		{"restore.destinations", &r.Destinations, func() error { return checkDirectories(r.Destinations) }, "a list of absolute paths without \"..\", none of them \"/\"", "Directories below which a restore may write disks."},

		duration("repositories.mount_timeout", &s.MountTimeout, time.Second, 10*time.Minute, "How long mounting the storage of a repository may take, and unmounting it."),
		duration("repositories.unmount_after", &s.UnmountAfter, time.Second, 24*time.Hour, "After how long without use the storage of a repository is unmounted."),
		duration("repositories.look_every", &s.LookEvery, time.Second, 24*time.Hour, "How often a repository that a job uses, or that was not online, is looked at."),
		duration("repositories.look_idle", &s.LookIdle, time.Second, 7*24*time.Hour, "How often any other is looked at. Storage that is not mounted is mounted for it."),
		duration("repositories.hung_after", &s.HungAfter, time.Second, 10*time.Minute, "After how long without an answer the storage of a repository is hung. No job is begun with it then."),
		duration("repositories.slow_after", &s.SlowAfter, 10*time.Millisecond, 10*time.Minute, "From when on it is slow, when a little is written to it."),

		{"metrics.textfile", &c.Metrics.Textfile, func() error { return checkTextfile(c.Metrics.Textfile) }, "an absolute path that ends in .prom, or \"\" for none", "Where the metrics of \"virtbackupctl metrics\" are written from time to time, for the textfile collector of Prometheus' node_exporter. The daemon cannot write below /usr and /etc."},
		duration("metrics.interval", &c.Metrics.Interval, time.Second, 24*time.Hour, "How often they are."),

		number("retention.most_at_once", &c.Retention.MostAtOnce, 1, 100000, "How many backups of a domain in a repository retention removes after one backup at most. \"virtbackupctl prune\" has no such limit."),
	}, c.compressionSettings(), c.validationSettings(), c.verificationSettings())
}

// compressionSettings are those of compressing backups that were made already.
func (c *Config) compressionSettings() []setting {
	p := &c.Compression
	return []setting{
		toggle("compression.enabled", &p.Enabled, "Whether backups whose offering leaves that for later (compression time \"deferred\") are compressed by themselves. Who asks for it by \"virtbackupctl compress\" gets it anyway."),
		number("compression.retries", &p.Retries, 0, 100, "How often it is tried again when it failed and may go well later."),
		duration("compression.retry_interval", &p.RetryInterval, time.Second, 24*time.Hour, "How long after a failure."),
		number("compression.threads", &p.Threads, 1, 8, "How many threads compress one backup, if its offering does not say."),
		factor("compression.minimum_free", &p.MinimumFree, 0, 100, "How much must be free in the repository before it begins, as a multiple of what the backup takes, beside limits.minimum_free_repository."),
		number("compression.rate", &p.Rate, 0, mostRate, "How many MB (1,000,000 bytes) of a backup are read per second for it, and as many written; 0 for no limit. The rates in [limits] hold as well. What is read back at the end, to be compared, is not counted."),
	}
}

// validationSettings are those of trying backups.
func (c *Config) validationSettings() []setting {
	v := &c.Validation
	return []setting{
		toggle("validation.enabled", &v.Enabled, "Whether backups whose offering says so (--validate) are tried by themselves. Who asks for it by \"virtbackupctl validate\" gets it anyway."),
		duration("validation.interval", &v.Interval, time.Minute, 365*24*time.Hour, "How long after one is tried it is tried again, if it is still the newest of its domain. Older ones were tried when they were the newest; that they stay what they were is verified."),
		number("validation.retries", &v.Retries, 0, 100, "How often it is tried again when the host was not able to."),
		duration("validation.retry_interval", &v.RetryInterval, time.Second, 24*time.Hour, "How long after that."),
		size("validation.memory_max", &v.MemoryMax, 64*mebibyte, "How much memory the temporary domain has at most, whatever the backup's domain has."),
		number("validation.cpus", &v.CPUs, 1, 1024, "How many virtual CPUs it has at most."),
		toggle("validation.end_chain", &v.EndChain, "Whether the chain of a backup that is not valid ends, so that the next one is full."),
		duration("validation.boot_timeout", &v.BootTimeout, time.Second, 24*time.Hour, "How long the guest agent of a backup that is tried may take to answer, if its offering or domain does not say."),
		duration("validation.command_timeout", &v.CommandTimeout, time.Second, 24*time.Hour, "The same of the command that is run in the guest, and of each other question to the agent."),
		duration("validation.screenshot_wait", &v.ScreenshotWait, time.Second, 24*time.Hour, "How long after the start of the guest the screenshot is taken, if its offering or domain does not say."),
	}
}

// verificationSettings are those of reading backups back.
func (c *Config) verificationSettings() []setting {
	v := &c.Verification
	return []setting{
		toggle("verification.enabled", &v.Enabled, "Whether backups are verified by themselves: every block is read back and compared with its digest, whole chains at a time, the ones first that wait the longest. Who asks for it by \"virtbackupctl verify\" gets it anyway."),
		duration("verification.every", &v.Every, 24*time.Hour, 3650*24*time.Hour, "Within how long each chain has its turn, evenly over the nights."),
		size("verification.bytes_per_night", &v.BytesPerNight, 0, "How much is read in 24 hours at most, but for a chain that is larger; 0B for as much as it takes for each to have its turn."),
		{"verification.window", &v.Window, func() error { _, err := window.ParseAll(v.Window); return err }, "a list of spans, as \"Mon..Fri 22:00-06:00\"", "When it may begin; always when the list is empty. jobs.window holds as well."},
		number("verification.rate", &v.Rate, 0, mostRate, "How many MB (1,000,000 bytes) are read per second for it; 0 for no limit. The rates in [limits] hold as well, if this is set."),
	}
}

// mostRate is more than any storage takes, in MB/s.
const mostRate = 1_000_000

const allowedDirectory = "an absolute path without \"..\", not \"/\""

func directory(key string, to *string, help string) setting {
	return setting{key, to, func() error { return checkDirectories([]string{*to}) }, allowedDirectory, help}
}

func number(key string, to *int, low, high int, help string) setting {
	check := func() error {
		if *to < low || *to > high {
			return errors.New("out of range")
		}
		return nil
	}
	return setting{key, to, check, fmt.Sprintf("%d to %d", low, high), help}
}

func toggle(key string, to *bool, help string) setting {
	return setting{key, to, func() error { return nil }, "true or false", help}
}

func factor(key string, to *float64, low, high float64, help string) setting {
	check := func() error {
		if !(*to >= low && *to <= high) { // also when it is not a number
			return errors.New("out of range")
		}
		return nil
	}
	return setting{key, to, check, fmt.Sprintf("%g to %g", low, high), help}
}

func size(key string, to *Size, low Size, help string) setting {
	check := func() error {
		if *to < low {
			return errors.New("too small")
		}
		return nil
	}
	return setting{key, to, check, fmt.Sprintf("a size of at least %q in B, KiB, MiB, GiB or TiB", low), help}
}

func timeout(key string, to *time.Duration, help string) setting {
	return duration(key, to, time.Second, 30*24*time.Hour, help)
}

func duration(key string, to *time.Duration, low, high time.Duration, help string) setting {
	check := func() error {
		if *to < low || *to > high {
			return errors.New("out of range")
		}
		return nil
	}
	return setting{key, to, check, fmt.Sprintf("a time from %q to %q", low, high), help}
}

func checkDirectories(paths []string) error {
	for _, p := range paths {
		if !filepath.IsAbs(p) || p == "/" || slices.Contains(strings.Split(p, "/"), "..") || strings.ContainsFunc(p, isControl) {
			return fmt.Errorf("%q is not a usable directory", p)
		}
	}
	return nil
}

func checkTextfile(path string) error {
	if path == "" {
		return nil
	}
	if filepath.Ext(path) != ".prom" {
		return fmt.Errorf("%q does not end in .prom", path)
	}
	return checkDirectories([]string{path})
}

func isControl(r rune) bool { return r < ' ' || r == 0x7f }

func checkURI(uri string) error {
	u, err := url.Parse(uri)
	if err != nil || u.Scheme != "qemu" || u.Host != "" || u.Opaque != "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" ||
		u.Path != "/system" && u.Path != "/session" {
		return fmt.Errorf("%q is not a usable connection", uri)
	}
	return nil
}

// set takes over a value as the TOML library decoded it.
func (s setting) set(v any) error {
	switch to := s.to.(type) {
	case *bool:
		b, ok := v.(bool)
		if !ok {
			return errors.New("not true or false")
		}
		*to = b
	case *float64:
		switch n := v.(type) {
		case int64:
			*to = float64(n)
		case float64:
			*to = n
		default:
			return errors.New("not a number")
		}
	case *int:
		n, ok := v.(int64)
		if !ok || int64(int(n)) != n {
			return errors.New("not a whole number")
		}
		*to = int(n)
	case *[]string:
		list, err := texts(v)
		if err != nil {
			return err
		}
		*to = make([]string, 0, len(list))
		for _, text := range list {
			*to = append(*to, filepath.Clean(text))
		}
		if err := checkDirectories(list); err != nil { // before Clean took a ".." away
			return err
		}
	case *Spans:
		list, err := texts(v)
		if err != nil {
			return err
		}
		*to = list
	default:
		text, ok := v.(string)
		if !ok {
			return errors.New("not a string")
		}
		if err := s.setText(text); err != nil {
			return err
		}
	}
	return s.check()
}

func texts(v any) ([]string, error) {
	list, ok := v.([]any)
	if !ok {
		return nil, errors.New("not a list")
	}
	all := make([]string, 0, len(list))
	for _, one := range list {
		text, ok := one.(string)
		if !ok {
			return nil, errors.New("not a list of strings")
		}
		all = append(all, text)
	}
	return all, nil
}

func (s setting) setText(text string) (err error) {
	switch to := s.to.(type) {
	case *string:
		*to = text
	case *Level:
		*to = Level(text)
	case *Size:
		*to, err = parseSize(text)
	case *time.Duration:
		if *to, err = time.ParseDuration(text); err != nil {
			err = fmt.Errorf("%q is not a time", text)
		}
	}
	return err
}

func quoted(list []string) string {
	all := make([]string, len(list))
	for i, one := range list {
		all[i] = strconv.Quote(one)
	}
	return "[" + strings.Join(all, ", ") + "]"
}

// get returns the value as it would stand in the file.
func (s setting) get() string {
	switch from := s.to.(type) {
	case *bool:
		return strconv.FormatBool(*from)
	case *float64:
		return strconv.FormatFloat(*from, 'f', -1, 64)
	case *int:
		return strconv.Itoa(*from)
	case *[]string:
		return quoted(*from)
	case *Spans:
		return quoted(*from)
	case *string:
		return strconv.Quote(*from)
	case *Level:
		return strconv.Quote(string(*from))
	case *Size:
		return strconv.Quote(from.String())
	case *time.Duration:
		return strconv.Quote(from.String())
	}
	return ""
}
