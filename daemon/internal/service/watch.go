package service

import (
	"context"
	"slices"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/bus"
	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/daemon/internal/job"
	"github.com/virtbackup/virtbackup/dbus"
)

const (
	// lookAgain bounds how old the view of the domains gets without events.
	lookAgain = time.Minute
	// settle lets events that come together cost one look.
	settle = 200 * time.Millisecond
	// lookLimit bounds how long one look at domains waits for libvirt.
	lookLimit = 30 * time.Second
)

// Notify sets whom changes are told. It is called once, before Run.
func (s *Service) Notify(n bus.Notifier) { s.notifier = n }

// Run keeps the view of the domains up to date and tells changes, until ctx ends.
func (s *Service) Run(ctx context.Context) {
	t := s.newTold(ctx)
	stop := s.Jobs.Subscribe(func(st job.Status) { s.jobChanged(ctx, t, st) })
	defer stop()
	events := s.Domains.Subscribe(ctx)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case _, ok := <-events:
			if !ok {
				return
			}
			timer.Reset(settle)
		case <-timer.C:
			s.look(ctx)
			timer.Reset(lookAgain)
		}
	}
}

// look asks libvirt for all domains, and tells what became of them.
func (s *Service) look(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, lookLimit)
	defer cancel()
	found, err := s.Domains.Domains(ctx)
	s.mu.Lock()
	failedBefore := s.libvirt != nil
	s.libvirt = err
	s.mu.Unlock()
	if failedBefore != (err != nil) {
		s.notifier.Changed(dbus.Ref{Kind: dbus.KindManager})
	}
	if err != nil {
		s.Log.Warn("cannot look at the domains", "error", err)
		return
	}
	now := make(map[string]hypervisor.Domain, len(found))
	for _, d := range found {
		now[d.UUID] = d
	}
	s.mu.Lock()
	before := s.domains
	s.domains = now
	s.mu.Unlock()
	s.tellDomains(ctx, before, now)
}

func (s *Service) tellDomains(ctx context.Context, before, now map[string]hypervisor.Domain) {
	for uuid := range now {
		ref := dbus.Ref{Kind: dbus.KindDomain, ID: uuid}
		if _, known := before[uuid]; known {
			s.notifier.Changed(ref)
		} else {
			s.notifier.Added(ref)
		}
	}
	for uuid := range before {
		ref := dbus.Ref{Kind: dbus.KindDomain, ID: uuid}
		if _, still := now[uuid]; still {
			continue
		}
		if _, err := s.Catalog.Domain(ctx, uuid); err == nil {
			s.notifier.Changed(ref) // known by its backups
		} else {
			s.notifier.Removed(ref)
		}
	}
}

// told is which jobs listeners know of: they come and go.
type told struct{ jobs map[string]bool }

// newTold is what listeners find when they begin.
func (s *Service) newTold(ctx context.Context) *told {
	t := &told{jobs: map[string]bool{}}
	jobs, err := s.managed(ctx)
	if err != nil {
		s.Log.Warn("cannot tell which jobs there were", "error", err)
	}
	for _, j := range jobs {
		t.jobs[j.ID] = true
	}
	return t
}

// jobChanged tells what a job's change means for the objects around it.
func (s *Service) jobChanged(ctx context.Context, t *told, st job.Status) {
	t.jobs[st.ID] = true
	s.notifier.Changed(dbus.Ref{Kind: dbus.KindJob, ID: st.ID})
	s.notifier.Changed(dbus.Ref{Kind: dbus.KindManager})
	if st.Domain != "" {
		s.notifier.Changed(dbus.Ref{Kind: dbus.KindDomain, ID: st.Domain})
	}
	if !st.State.Ended() {
		return
	}
	if s.Schedules != nil {
		s.Schedules.Kick()
	}
	if st.Repository != "" {
		s.repositoryChecked(ctx, st)
	}
	s.pruneAfter(ctx, st)
	if st.Domain != "" {
		s.tellChains(ctx, st.Domain)
	}
	s.notifier.JobRemoved(st.ID, dbus.JobState(st.State))
	s.tellJobsGone(ctx, t)
}

// tellChains tells that a domain's chains may have changed: which of them a job
// has touched is known to the kind of job only, and a chain too many costs next
// to nothing.
func (s *Service) tellChains(ctx context.Context, domain string) {
	chains, err := s.Catalog.Chains(ctx, domain)
	if err != nil {
		s.Log.Warn("cannot tell of the chains of a domain", "domain", domain, "error", err)
		return
	}
	for _, c := range chains {
		s.notifier.Changed(dbus.Ref{Kind: dbus.KindChain, ID: c.ID})
	}
}

// tellJobsGone tells which jobs are managed objects no more, since newer ones have ended.
func (s *Service) tellJobsGone(ctx context.Context, t *told) {
	list, err := s.managed(ctx)
	if err != nil {
		s.Log.Warn("cannot tell which jobs are gone", "error", err)
		return
	}
	for id := range t.jobs {
		if !slices.ContainsFunc(list, func(st job.Status) bool { return st.ID == id }) {
			s.notifier.Removed(dbus.Ref{Kind: dbus.KindJob, ID: id})
			delete(t.jobs, id)
		}
	}
}

// repositoryChecked tells what a job found of a repository; one that could not
// be added is gone again.
func (s *Service) repositoryChecked(ctx context.Context, st job.Status) {
	ref := dbus.Ref{Kind: dbus.KindRepository, ID: st.Repository}
	if _, err := s.Catalog.Repository(ctx, st.Repository); err != nil && st.State != catalog.JobSucceeded {
		s.notifier.Removed(ref)
		return
	}
	s.notifier.Changed(ref)
}

// domain returns what libvirt said last of a domain.
func (s *Service) domain(uuid string) (d hypervisor.Domain, known bool, libvirt error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	d, known = s.domains[uuid]
	return d, known, s.libvirt
}
