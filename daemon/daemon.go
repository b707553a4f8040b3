package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"github.com/virtbackup/virtbackup/daemon/internal/announce"
	"github.com/virtbackup/virtbackup/daemon/internal/backup"
	"github.com/virtbackup/virtbackup/daemon/internal/bus"
	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/config"
	"github.com/virtbackup/virtbackup/daemon/internal/failure"
	"github.com/virtbackup/virtbackup/daemon/internal/health"
	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/daemon/internal/job"
	"github.com/virtbackup/virtbackup/daemon/internal/journal"
	"github.com/virtbackup/virtbackup/daemon/internal/lifecycle"
	"github.com/virtbackup/virtbackup/daemon/internal/metrics"
	"github.com/virtbackup/virtbackup/daemon/internal/mounts"
	"github.com/virtbackup/virtbackup/daemon/internal/schedule"
	"github.com/virtbackup/virtbackup/daemon/internal/service"
	"github.com/virtbackup/virtbackup/daemon/internal/supervise"
	"github.com/virtbackup/virtbackup/daemon/internal/upkeep"
	"github.com/virtbackup/virtbackup/daemon/internal/validation"
	"github.com/virtbackup/virtbackup/dbus"
	"github.com/virtbackup/virtbackup/hooks/spool"
	"github.com/virtbackup/virtbackup/policy"
	"github.com/virtbackup/virtbackup/systemd/failedunit"
	"github.com/virtbackup/virtbackup/systemd/jobunit"
	"github.com/virtbackup/virtbackup/systemd/timer"
)

const (
	workerProgram = "/usr/libexec/virtbackup/virtbackup-worker"
	hookProgram   = "/etc/libvirt/hooks/qemu.d/virtbackup"
	stopWorker    = 30 * time.Second // for a worker to clean up after a cancel
	stopLimit     = 10 * time.Second // for calls under way when the daemon stops
	reconcileEach = time.Minute
	checkLimit    = time.Minute // that the start waits for one repository to be looked at before the next
	reconcileSoon = time.Second // after an event: those that come together cost one look
	// Of systemd's limit for the start: for libvirt to come up, and for what an
	// earlier life left to be cleared up before jobs go on.
	libvirtLimit   = 30 * time.Second
	reconcileLimit = 15 * time.Second
	keepJobsFor    = 90 * 24 * time.Hour
	keepJobs       = 10_000
)

// app is virtbackupd, wired.
type app struct {
	path     string // of the configuration
	log      *slog.Logger
	level    *slog.LevelVar
	settings atomic.Pointer[config.Config]

	catalog    *catalog.Catalog
	hypervisor *hypervisor.Hypervisor
	lifecycle  *lifecycle.Keeper
	workers    *supervise.Supervisor
	units      *jobunit.Manager
	timers     *timer.Manager
	server     *bus.Server
	backup     *backup.Kind
	engine     *job.Engine
	schedules  *schedule.Keeper
	upkeep     *upkeep.Keeper
	validation *validation.Kind
	mounts     *mounts.Keeper
	health     *health.Watcher
	service    *service.Service
	ended      metrics.Counter
}

// run is the life of the daemon: open, take up what was left, serve, let go.
func (a *app) run(ctx context.Context) error {
	if err := a.makeDirectories(); err != nil {
		return err
	}
	polkit, closePolkit, err := policy.ConnectPolkit(a.log)
	if err != nil {
		return err
	}
	defer a.closing("the connection to polkit", closePolkit)
	if a.server, err = bus.New(bus.Config{Authorizer: polkit, Log: a.log, Level: a.level}); err != nil {
		return err
	}
	if err := a.open(ctx); err != nil {
		return err
	}
	defer a.closing("the catalog", a.catalog.Close)
	defer a.hypervisor.Close()
	defer a.units.Close()
	a.timers = timer.New(ctx)
	defer a.timers.Close()
	a.wire()
	return a.serve(ctx)
}

func (a *app) closing(what string, closer func() error) {
	if err := closer(); err != nil {
		a.log.Warn("cannot close "+what, "error", err)
	}
}

// open opens what may be missing or broken.
func (a *app) open(ctx context.Context) error {
	var err error
	if a.catalog, err = catalog.Open(ctx, a.catalogPath()); err != nil {
		if corrupt := new(catalog.CorruptError); !errors.As(err, &corrupt) {
			return err
		}
		a.log.Error("the catalog was damaged; an empty one takes its place, the backups are where they were",
			journal.MessageID, journal.CatalogDamaged, "error", err)
	}
	if a.units, err = jobunit.Connect(ctx); err != nil {
		return errors.Join(err, a.catalog.Close())
	}
	if a.hypervisor, err = a.connect(ctx); err != nil {
		a.units.Close()
		return errors.Join(err, a.catalog.Close())
	}
	return nil
}

// connect waits for libvirt for a while: a daemon that gives up at once soon has
// been started too often for systemd, and stays away when libvirt comes back.
func (a *app) connect(ctx context.Context) (*hypervisor.Hypervisor, error) {
	const interval = time.Second
	for deadline := time.Now().Add(libvirtLimit); ; {
		limited, cancel := context.WithDeadline(ctx, deadline)
		h, err := hypervisor.Connect(limited, a.settings.Load().Libvirt.URI, a.log)
		cancel()
		if err == nil || ctx.Err() != nil || time.Until(deadline) < interval {
			return h, err
		}
		a.log.Warn("cannot connect to libvirt yet", "error", err)
		select {
		case <-time.After(interval):
		case <-ctx.Done():
		}
	}
}

// wire makes the kinds of jobs, the engine that runs them, and the service.
func (a *app) wire() {
	c := a.settings.Load()
	a.workers = supervise.New(a.units, supervise.Options{
		Rates:     a.rates,
		Directory: filepath.Join(c.Daemon.RuntimeDirectory, "jobs"), Worker: workerProgram, StopAfter: stopWorker, Log: a.log,
	})
	a.lifecycle = lifecycle.New(lifecycle.Deps{
		Catalog: a.catalog, Domains: a.hypervisor, SpoolDirectory: spool.Directory, HookPath: hookProgram, Log: a.log,
	})
	a.mounts = a.newMounts()
	a.health = a.newHealth()
	kinds := a.kinds(c)
	a.engine = job.New(a.catalog, kinds.all, job.Options{
		Logger: a.log, KeepFor: keepJobsFor, KeepMost: keepJobs,
		Limits: jobLimits(c), Classes: jobClasses(), Passing: failure.Passing,
	})
	host, err := os.Hostname()
	if err != nil {
		a.log.Warn("cannot tell the name of this host", "error", err)
	}
	a.upkeep = &upkeep.Keeper{Chores: kinds.chores, Jobs: a.engine, Log: a.log}
	a.schedules = schedule.New(a.catalog, a.timers, a.log)
	a.service = service.New(service.Deps{
		Catalog: a.catalog, Jobs: a.engine, Domains: a.hypervisor, Restore: kinds.restores, Lifecycle: a.lifecycle, Schedules: a.schedules, Storage: a.mounts, Ended: &a.ended, Config: c, Reload: a.reload,
		OfferingFiles: func() ([]config.OfferingFile, error) {
			return config.LoadOfferings(filepath.Join(filepath.Dir(a.path), config.OfferingsDirectory))
		},
		Host: host, Version: version, Log: a.log,
	})
	a.service.Notify(a.server)
	a.schedules.Use(a.service)
}

// serve takes up what an earlier life left, answers calls until ctx ends, and
// lets go of what runs: workers outlive us.
func (a *app) serve(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var background sync.WaitGroup
	defer background.Wait()
	defer cancel()
	cleared := make(chan struct{})
	background.Go(func() { a.reconcile(ctx, cleared) })
	select {
	case <-cleared:
	case <-time.After(reconcileLimit):
		a.log.Warn("clearing up what was left over takes long; it goes on beside the jobs")
	case <-ctx.Done():
	}
	a.announce(ctx)
	if err := a.engine.Start(ctx); err != nil {
		return err
	}
	defer a.engine.Stop()
	for _, f := range []func(context.Context){a.service.Run, a.lifecycle.Run, a.schedules.Run, a.upkeep.Run, a.mounts.Run, a.health.Run, a.reloadOnHangup, a.textfile().Run} {
		background.Go(func() { f(ctx) })
	}
	if err := a.service.LoadOfferings(ctx); err != nil {
		a.log.Error("not all offerings are what their files say", "error", err)
	}
	if err := a.server.Start(ctx, a.service); err != nil {
		return err
	}
	a.notify(daemon.SdNotifyReady)
	a.log.Info("virtbackupd is ready", journal.MessageID, journal.Ready, "version", version)
	background.Go(func() { a.checkRepositories(ctx) })
	err := a.tend(ctx)
	a.notify(daemon.SdNotifyStopping)
	limited, done := context.WithTimeout(context.WithoutCancel(ctx), stopLimit)
	defer done()
	return errors.Join(err, a.server.Stop(limited))
}

// announce has the ends of jobs told outside, until the engine stops.
func (a *app) announce(ctx context.Context) {
	told := &announce.Announcer{Catalog: a.catalog, Units: failedunit.Units{}, Log: a.log}
	left, err := told.Untold(ctx)
	if err != nil {
		a.log.Warn("cannot tell how jobs ended", "error", err)
	}
	go func() { // the start does not wait for systemd
		for _, st := range left {
			told.Ended(ctx, st)
		}
	}()
	a.engine.Subscribe(func(st job.Status) {
		if st.State.Ended() {
			a.ended.Count(st.Kind, string(st.State), st.Finished.Sub(cmp.Or(st.Started, st.Finished)))
			told.Ended(ctx, st)
		}
	})
}

// textfile has the metrics written to a file.
func (a *app) textfile() metrics.Textfile {
	settings := func() (string, time.Duration) {
		m := a.settings.Load().Metrics
		return m.Textfile, m.Interval
	}
	return metrics.Textfile{Settings: settings, Text: a.service.Metrics, Log: a.log}
}

// checkRepositories has each repository looked at, and cleared of what was left
// there when the host went down. One after the other: jobs that people ask for
// need not queue up behind them.
func (a *app) checkRepositories(ctx context.Context) {
	all, err := a.catalog.Repositories(ctx)
	if err != nil && ctx.Err() == nil {
		a.log.Warn("cannot tell which repositories to check", "error", err)
	}
	for _, r := range all {
		queued := slices.ContainsFunc(a.engine.Active(), func(j job.Status) bool {
			return j.Repository == r.ID && j.Kind == string(dbus.OperationCheck)
		})
		if queued || ctx.Err() != nil {
			continue
		}
		// A job that hangs would take the place of one that need not.
		if state := a.health.Look(ctx, r); state == health.Hung || state == health.Gone {
			continue
		}
		id, err := a.service.CheckRepository(ctx, bus.Caller{}, r.ID, dbus.CheckRepositoryOptions{})
		if err != nil {
			a.log.Warn("cannot check a repository", "repository", r.Name, "error", err)
			continue
		}
		limited, cancel := context.WithTimeout(ctx, checkLimit)
		_, _ = a.engine.Wait(limited, id) // the job says how it ended
		cancel()
	}
}

// tend tells systemd's watchdog that we live, as long as the catalog answers.
func (a *app) tend(ctx context.Context) error {
	interval, err := daemon.SdWatchdogEnabled(false)
	if err != nil || interval == 0 {
		interval = time.Hour // nobody watches
	}
	tick := time.NewTicker(interval / 3)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-a.server.Done():
			return errors.New("the system bus closed the connection")
		case <-tick.C:
			limited, cancel := context.WithTimeout(ctx, interval/3)
			_, err := a.catalog.UnfinishedJobs(limited)
			cancel()
			if err != nil {
				a.log.Error("the catalog does not answer", "error", err)
				continue
			}
			a.notify(daemon.SdNotifyWatchdog)
		}
	}
}

func (a *app) notify(state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		a.log.Warn("cannot notify systemd", "error", err)
	}
}

// reconcile clears up what an earlier life left, closes cleared, and from then
// on clears up from time to time what could not be cleared up at once; and soon
// after a domain was stopped or went on, for it may have got an internal
// snapshot, to which it can be reverted only without a bitmap of ours.
func (a *app) reconcile(ctx context.Context, cleared chan<- struct{}) {
	events := a.hypervisor.Subscribe(ctx)
	for first := true; ; first = false {
		if err := errors.Join(a.backup.Reconcile(ctx), a.validation.Reconcile(ctx)); err != nil && ctx.Err() == nil {
			a.log.Warn("cannot clear up what was left over; it is tried again", "error", err)
		}
		if first {
			close(cleared)
		}
		if !awaitReconcile(ctx, events) {
			return
		}
	}
}

// awaitReconcile waits until there may be something to clear up; false: the
// daemon goes down.
func awaitReconcile(ctx context.Context, events <-chan hypervisor.Event) bool {
	timer := time.NewTimer(reconcileEach)
	defer timer.Stop()
	for soon := false; ; {
		select {
		case <-ctx.Done():
			return false
		case <-timer.C:
			return true
		case e, ok := <-events:
			if !ok {
				return false
			}
			if e.Kind == hypervisor.EventSnapshot {
				return true // somebody may be about to revert to it
			}
			if !soon && (e.Kind == hypervisor.EventLifecycle || e.Kind == hypervisor.EventMissed) {
				soon = true
				timer.Reset(reconcileSoon)
			}
		}
	}
}

// reloadOnHangup reads the configuration again at "systemctl reload".
func (a *app) reloadOnHangup(ctx context.Context) {
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP)
	defer signal.Stop(hangup)
	for {
		select {
		case <-ctx.Done():
			return
		case <-hangup:
			if err := a.service.Reload(ctx, bus.Caller{}); err != nil {
				a.log.Error("cannot read the configuration again", journal.MessageID, journal.ConfigurationRefused, "error", err)
			}
		}
	}
}

// reload puts a new configuration in force. What only a restart can change is refused.
func (a *app) reload(ctx context.Context) (*config.Config, error) {
	c, err := config.Load(a.path)
	if err != nil {
		return nil, err
	}
	now := a.settings.Load()
	if c.Daemon.StateDirectory != now.Daemon.StateDirectory || c.Daemon.RuntimeDirectory != now.Daemon.RuntimeDirectory || c.Libvirt != now.Libvirt {
		return nil, errors.New("state_directory, runtime_directory and [libvirt] change only with a restart: systemctl restart virtbackupd")
	}
	a.level.Set(c.Daemon.LogLevel.Slog())
	a.settings.Store(c)
	a.engine.SetLimits(jobLimits(c))
	if err := a.workers.Apply(ctx, a.limits()); err != nil {
		a.log.Warn("some jobs that run go on with the limits they had", "error", err)
	}
	return c, nil
}

func (a *app) catalogPath() string {
	return filepath.Join(a.settings.Load().Daemon.StateDirectory, "catalog.sqlite")
}

func (a *app) keyPath() string {
	return filepath.Join(a.settings.Load().Daemon.StateDirectory, "manifest.key")
}

// makeDirectories makes what we and QEMU need, and this host's key. QEMU, under
// its own user, has to get through to its sockets and scratch images.
func (a *app) makeDirectories() error {
	c := a.settings.Load()
	for path, mode := range map[string]os.FileMode{
		c.Daemon.StateDirectory:                               0o711,
		c.Daemon.RuntimeDirectory:                             0o711,
		filepath.Join(c.Daemon.RuntimeDirectory, "jobs"):      0o700,
		filepath.Join(c.Daemon.RuntimeDirectory, "frozen"):    0o700,
		filepath.Join(c.Daemon.RuntimeDirectory, "exports"):   0o700,
		filepath.Join(c.Daemon.RuntimeDirectory, "mounts"):    0o700,
		filepath.Join(c.Daemon.StateDirectory, "credentials"): 0o700,
		c.Backup.ScratchDirectory:                             0o711,
	} {
		if err := os.MkdirAll(path, mode); err != nil {
			return fmt.Errorf("cannot make a directory of virtbackup: %w", err)
		}
		// The umask does not know who else has to get through.
		if err := os.Chmod(path, mode); err != nil {
			return fmt.Errorf("cannot make a directory of virtbackup: %w", err)
		}
	}
	return makeKey(a.keyPath())
}
