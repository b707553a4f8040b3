// Package service is what stands behind the D-Bus API: it answers from the
// catalog, the job engine and a view of the domains, and turns requests into
// jobs. It does no work of its own; the kinds of jobs do.
package service

import (
	"context"
	"log/slog"
	"regexp"
	"sync"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/bus"
	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/config"
	"github.com/virtbackup/virtbackup/daemon/internal/failure"
	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/daemon/internal/job"
	"github.com/virtbackup/virtbackup/daemon/internal/lifecycle"
	"github.com/virtbackup/virtbackup/daemon/internal/metrics"
	"github.com/virtbackup/virtbackup/daemon/internal/restore"
	"github.com/virtbackup/virtbackup/daemon/internal/schedule"
	"github.com/virtbackup/virtbackup/dbus"
)

// Domains is what the service asks libvirt.
type Domains interface {
	Lookup(ctx context.Context, nameOrUUID string) (hypervisor.Domain, error)
	Domains(ctx context.Context) ([]hypervisor.Domain, error)
	Subscribe(ctx context.Context) <-chan hypervisor.Event
}

// Planner tells what a restore would do.
type Planner interface {
	Plan(ctx context.Context, r restore.Request) (restore.Plan, error)
}

// Lifecycle knows what happens to domains between two backups.
type Lifecycle interface {
	// Replay takes over what the libvirt hook has recorded.
	Replay(ctx context.Context) error
	// Hook says whether libvirt tells what it does.
	Hook(ctx context.Context) (lifecycle.HookState, error)
}

// Storage keeps what is mounted for repositories, and their credentials.
type Storage interface {
	Path(id string) string
	Mounted(id string) bool
	Unmount(ctx context.Context, id string) error
	Save(id, credentials string) error
	Forget(id string) error
}

// Deps is what a Service is made of.
type Deps struct {
	Catalog *catalog.Catalog
	Jobs    *job.Engine
	Domains Domains
	Restore Planner
	// Lifecycle may be nil: then nobody takes over what the hook has recorded.
	Lifecycle Lifecycle
	// Storage may be nil: then all repositories are directories.
	Storage Storage
	// Schedules may be nil: then nobody asks for any.
	Schedules *schedule.Keeper
	// People may be nil: then they are looked up on this host.
	People People
	// Ended counts the jobs that have ended; nil: nobody does.
	Ended  *metrics.Counter
	Config *config.Config
	Reload func(ctx context.Context) (*config.Config, error) // reads the configuration again and applies what can be
	// OfferingFiles reads the files of offerings; it may be nil.
	OfferingFiles func() ([]config.OfferingFile, error)
	Host          string
	Version       string
	Log           *slog.Logger
}

// Service implements bus.Backend.
type Service struct {
	Deps
	started time.Time

	mu       sync.Mutex
	config   *config.Config
	notifier bus.Notifier // nil until Notify
	domains  map[string]hypervisor.Domain
	libvirt  error // why domains may be out of date
	// rechecked is when schedules last had a repository looked at, by its id.
	rechecked map[string]time.Time
}

var _ bus.Backend = (*Service)(nil)

// New makes a Service. Run keeps it up to date.
func New(d Deps) *Service {
	if d.People == nil {
		d.People = accounts
	}
	return &Service{Deps: d, started: time.Now(), config: d.Config, domains: map[string]hypervisor.Domain{}, rechecked: map[string]time.Time{}}
}

// Manager returns the state of the daemon.
func (s *Service) Manager(ctx context.Context) (dbus.ManagerProperties, error) {
	p := dbus.ManagerProperties{Version: s.Version, Host: s.Host, Started: s.started}
	for _, j := range s.Jobs.Active() {
		if j.State == catalog.JobQueued {
			p.JobsQueued++
		} else {
			p.JobsRunning++
		}
	}
	if err := s.hook(ctx, &p); err != nil {
		return p, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	p.LibvirtConnected = s.libvirt == nil
	if s.libvirt != nil {
		p.LibvirtError = s.libvirt.Error()
	}
	return p, nil
}

// hook fills in what is known of the libvirt hook.
func (s *Service) hook(ctx context.Context, p *dbus.ManagerProperties) error {
	if s.Lifecycle == nil {
		return nil
	}
	state, err := s.Lifecycle.Hook(ctx)
	if err != nil {
		return failure.Named(err)
	}
	p.HookState, p.HookLast = dbus.HookMissing, state.Last
	switch state.Status {
	case lifecycle.HookInactive:
		p.HookState = dbus.HookInstalled
	case lifecycle.HookActive:
		p.HookState = dbus.HookActive
	}
	return nil
}

// EffectiveConfiguration returns every setting that is in force.
func (s *Service) EffectiveConfiguration(context.Context) ([]dbus.Setting, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []dbus.Setting
	for _, e := range config.Effective(s.config) {
		all = append(all, dbus.Setting{Key: e.Key, Value: e.Value, Source: e.Source})
	}
	return all, nil
}

// Reload reads the configuration again.
func (s *Service) Reload(ctx context.Context, caller bus.Caller) error {
	c, err := s.Deps.Reload(ctx)
	if err != nil {
		return dbus.Errorf(dbus.ErrInvalidArgument, "the settings in force stay: %v", err)
	}
	s.mu.Lock()
	s.config = c
	s.mu.Unlock()
	if err := s.LoadOfferings(ctx); err != nil {
		return dbus.Errorf(dbus.ErrInvalidArgument, "the settings are in force, but not all offerings are what their files say: %v", err)
	}
	s.Log.Info("read the configuration again", "uid", caller.UID)
	return nil
}

// notifyLimit is longer than a hook waits. What is not taken over then, because
// own work is at a domain for as long as its storage takes, is later.
const notifyLimit = 5 * time.Second

// NotifyHook takes over what the libvirt hook has recorded.
func (s *Service) NotifyHook(ctx context.Context) error {
	if s.Lifecycle == nil {
		return dbus.Errorf(dbus.ErrUnavailable, "this daemon does not watch what happens to domains")
	}
	s.notifier.Changed(dbus.Ref{Kind: dbus.KindManager})
	ctx, cancel := context.WithTimeout(ctx, notifyLimit)
	defer cancel()
	return s.Lifecycle.Replay(ctx)
}

// settings returns the configuration in force.
func (s *Service) settings() *config.Config {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.config
}

// namePattern is what the API documents for names of repositories and offerings.
var namePattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)

func validName(what, name string) error {
	if namePattern.MatchString(name) {
		return nil
	}
	return dbus.Errorf(dbus.ErrInvalidArgument,
		"%q cannot be the name of %s: use 1 to 64 letters, digits, dots, underscores and dashes, and start with a letter or digit", name, what)
}

// notFound is the answer for an object that is not there.
func notFound(ref dbus.Ref) error {
	return dbus.Errorf(dbus.ErrNotFound, "there is no %s", ref)
}

// submit records a job.
func (s *Service) submit(ctx context.Context, r job.Request) (string, error) {
	st, err := s.Jobs.Submit(ctx, r)
	return st.ID, failure.Named(err)
}
