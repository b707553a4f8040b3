package service

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/backup"
	"github.com/virtbackup/virtbackup/daemon/internal/bus"
	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/failure"
	"github.com/virtbackup/virtbackup/daemon/internal/group"
	"github.com/virtbackup/virtbackup/daemon/internal/health"
	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/daemon/internal/job"
	"github.com/virtbackup/virtbackup/daemon/internal/schedule"
	"github.com/virtbackup/virtbackup/dbus"
)

// blocked makes an error of what is in the way of one domain's backup.
type blocked struct{ schedule.Obstacle }

func (b *blocked) Error() string { return b.Reason }

func inTheWay(passing bool, format string, args ...any) error {
	return &blocked{schedule.Obstacle{Reason: fmt.Sprintf(format, args...), Passing: passing}}
}

// Prepare finds what a run of a schedule would do, or why there can be none now.
func (s *Service) Prepare(ctx context.Context, c catalog.Schedule) (schedule.Work, *schedule.Obstacle) {
	domains, err := s.scheduled(ctx, c)
	if err != nil {
		return schedule.Work{}, obstacleOf(err)
	}
	var ready []scheduledBackup
	var leftOut []string
	passing := false
	for _, d := range domains {
		b, err := s.scheduledBackup(ctx, c, d)
		var o *blocked
		switch {
		case err == nil:
			ready = append(ready, b)
			continue
		case errors.As(err, &o):
			passing = passing || o.Passing
		}
		leftOut = append(leftOut, fmt.Sprintf("%s is left out: %v", s.DomainName(ctx, d.UUID), err))
	}
	if len(ready) == 0 {
		return schedule.Work{}, &schedule.Obstacle{Reason: strings.Join(leftOut, "; "), Passing: passing}
	}
	start := func(ctx context.Context, run catalog.ScheduleRun) ([]string, error) {
		return s.startRun(ctx, c, ready, run)
	}
	return schedule.Work{LeftOut: leftOut, Start: start}, nil
}

func obstacleOf(err error) *schedule.Obstacle {
	if o := (*blocked)(nil); errors.As(err, &o) {
		return &o.Obstacle
	}
	return &schedule.Obstacle{Reason: err.Error()}
}

// scheduled returns the domains that a schedule is for.
func (s *Service) scheduled(ctx context.Context, c catalog.Schedule) ([]catalog.Domain, error) {
	if c.Domain != "" {
		d, err := s.Catalog.Domain(ctx, c.Domain)
		return []catalog.Domain{d}, err
	}
	o, err := s.Catalog.Offering(ctx, c.Offering)
	switch {
	case errors.Is(err, catalog.ErrNotFound):
		return nil, inTheWay(false, "offering %q is gone", c.Offering)
	case err != nil:
		return nil, err
	case o.Disabled:
		return nil, inTheWay(false, "offering %q is disabled", c.Offering)
	}
	domains, err := s.Catalog.Domains(ctx, c.Offering)
	if err == nil && len(domains) == 0 {
		err = inTheWay(false, "no domain is assigned to offering %q", c.Offering)
	}
	return domains, err
}

// scheduledBackup is what a schedule does with one domain.
type scheduledBackup struct {
	domain  hypervisor.Domain
	request backup.Request
}

// scheduledBackup finds how a domain is backed up: as its offering says, if it
// has one, to the schedule's repository, if that has one.
func (s *Service) scheduledBackup(ctx context.Context, c catalog.Schedule, known catalog.Domain) (b scheduledBackup, err error) {
	b.domain, err = s.lookup(ctx, known.UUID)
	switch {
	case errors.Is(err, hypervisor.ErrNoDomain):
		return b, inTheWay(false, "the domain is gone")
	case err != nil:
		return b, inTheWay(true, "libvirt does not tell of the domain: %v", err)
	}
	if c.Domain != "" {
		// What its maker may do may have changed since.
		if err := s.MaySchedule(ctx, bus.Caller{UID: c.UID}, known.UUID, nil); err != nil {
			return b, inTheWay(false, "%v", err)
		}
	}
	b.request = backup.Request{Domain: known.UUID, Offering: known.Offering, Isolated: c.Isolated}
	var of *catalog.Offering
	if known.Offering != "" {
		o, err := s.Catalog.Offering(ctx, known.Offering)
		switch {
		case err != nil:
			return b, err
		case o.Disabled:
			return b, inTheWay(false, "offering %q is disabled", o.Name)
		}
		of, b.request.Repository = &o, o.Repository
	}
	if c.Repository != "" {
		b.request.Repository = c.Repository
	}
	if b.request.Repository == "" {
		return b, inTheWay(false, "the domain is assigned to no offering, and the schedule names no repository")
	}
	e, err := effectiveOf(of, known)
	if err != nil {
		return b, err
	}
	b.request.Settings = e.Settings
	if c.Quiesce != "" {
		b.request.Quiesce = c.Quiesce
	}
	return b, s.reachable(ctx, b.request.Repository)
}

// recheckAfter is how old what is known of a repository that is away may be,
// before a worker is asked to look again.
const recheckAfter = 20 * time.Second

// reachable says why a repository cannot be used. One that was away when it was
// looked at is looked at again, so that a run that waits can begin.
func (s *Service) reachable(ctx context.Context, id string) error {
	r, err := s.Catalog.Repository(ctx, id)
	if err != nil || !away(r) {
		return err
	}
	// One that is hung is looked at by nobody but who watches it.
	if r.State != string(health.Hung) && !s.repositoryInUse(id) && time.Since(r.Checked) > recheckAfter && s.recheck(id) {
		if _, err := s.CheckRepository(ctx, bus.Caller{}, id, dbus.CheckRepositoryOptions{}); err != nil {
			s.Log.Warn("cannot have a repository looked at again", "repository", r.Name, "error", err)
		}
	}
	return inTheWay(true, "repository %q is away: %s", r.Name, r.Problem)
}

// recheck says whether schedules have not had a repository looked at lately: a
// job that ends without having seen it would have the next one started at once.
func (s *Service) recheck(id string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if time.Since(s.rechecked[id]) < recheckAfter {
		return false
	}
	s.rechecked[id] = time.Now()
	return true
}

// away tells whether a repository cannot be backed up to. One that is full may
// yet have room for something small.
func away(r catalog.Repository) bool {
	switch health.State(r.State) {
	case health.Hung, health.Gone, health.Unavailable, health.ReadOnly:
		return true
	}
	return false
}

// startRun starts the job of a run: the backup of its domain, or those of its
// offering's as a group. One that cannot be started does not hold up the others.
func (s *Service) startRun(ctx context.Context, c catalog.Schedule, all []scheduledBackup, run catalog.ScheduleRun) (jobs []string, err error) {
	var leftOut []string
	var members []group.Member
	var j job.Request
	for _, b := range all {
		one, m, err := s.scheduledJob(ctx, b, run)
		if err != nil {
			leftOut = append(leftOut, fmt.Sprintf("%s is left out: %v", b.domain.Name, err))
			continue
		}
		j, members = one, append(members, m)
	}
	if len(members) > 0 {
		if c.Domain == "" {
			j = job.Request{Kind: group.KindName, Spec: group.Request{Members: members}, UID: run.UID}
		}
		j.Schedule = run.Schedule
		if run.Timer {
			j.Origin = catalog.OriginSchedule
		}
		id, err := s.start(ctx, j)
		if err != nil {
			return nil, err
		}
		jobs = []string{id}
	}
	if len(leftOut) > 0 {
		err = errors.New(strings.Join(leftOut, "; "))
	}
	return jobs, err
}

// scheduledJob is the job of one domain, also as a member of a group.
func (s *Service) scheduledJob(ctx context.Context, b scheduledBackup, run catalog.ScheduleRun) (j job.Request, m group.Member, err error) {
	if err := s.Catalog.SeenDomain(ctx, b.domain.UUID, b.domain.Name); err != nil {
		return j, m, failure.Named(err)
	}
	if err := s.withinQuota(ctx, bus.Caller{UID: run.UID}, b.domain.Name, b.request); err != nil {
		return j, m, err
	}
	j = backup.NewJob(b.request, run.UID)
	j.Attempts = s.settings().Jobs.Attempts
	m, err = group.NewMember(b.domain.Name, j)
	return j, m, err
}

var _ schedule.Backups = (*Service)(nil)
