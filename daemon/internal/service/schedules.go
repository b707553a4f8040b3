package service

import (
	"context"
	"errors"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/bus"
	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/failure"
	"github.com/virtbackup/virtbackup/daemon/internal/schedule"
	"github.com/virtbackup/virtbackup/dbus"
	"github.com/virtbackup/virtbackup/systemd/timer"
)

// CreateSchedule has a domain, or the domains of an offering, backed up by itself.
func (s *Service) CreateSchedule(ctx context.Context, caller bus.Caller, name string, calendars []string, o dbus.CreateScheduleOptions) (string, error) {
	if err := validName("a schedule", name); err != nil {
		return "", err
	}
	made := catalog.Schedule{
		ID: newID(), Name: name, Calendars: calendars, Persistent: o.Persistent == nil || *o.Persistent, Isolated: o.Isolated,
		Overlap: catalog.OverlapSkip, Enabled: !o.Disabled, UID: caller.UID, Created: time.Now(),
	}
	if err := s.scheduleFor(ctx, o, &made); err != nil {
		return "", err
	}
	if err := s.mayChange(ctx, caller, made); err != nil {
		return "", err
	}
	if err := s.applySchedule(ctx, &made, dbus.UpdateScheduleOptions{
		Repository: &o.Repository, RandomizedDelay: &o.RandomizedDelay, Quiesce: o.Quiesce, Overlap: o.Overlap, Calendars: &calendars,
	}); err != nil {
		return "", err
	}
	if err := s.Schedules.Create(ctx, made); err != nil {
		return "", failure.Named(err)
	}
	s.notifier.Added(dbus.Ref{Kind: dbus.KindSchedule, ID: made.ID})
	return made.ID, nil
}

// scheduleFor finds what a schedule is for.
func (s *Service) scheduleFor(ctx context.Context, o dbus.CreateScheduleOptions, made *catalog.Schedule) error {
	if (o.Domain == "") == (o.Offering == "") {
		return dbus.Errorf(dbus.ErrInvalidArgument, "give a domain or an offering, and not both")
	}
	if o.Domain != "" {
		d, err := s.lookup(ctx, o.Domain)
		if err != nil {
			return failure.Named(err)
		}
		made.Domain = d.UUID
		return failure.Named(s.Catalog.SeenDomain(ctx, d.UUID, d.Name))
	}
	ref, err := s.Find(ctx, dbus.KindOffering, o.Offering)
	if err != nil {
		return err
	}
	offering, err := s.offeringByID(ctx, ref.ID)
	made.Offering = offering.Name
	return failure.Named(err)
}

// applySchedule applies what is given to a schedule, and asks systemd about the calendars.
func (s *Service) applySchedule(ctx context.Context, to *catalog.Schedule, o dbus.UpdateScheduleOptions) error {
	if o.Calendars != nil {
		if _, err := s.PreviewCalendars(ctx, *o.Calendars, 1); err != nil {
			return err
		}
		to.Calendars = *o.Calendars
	}
	if o.Repository != nil {
		to.Repository = ""
		if *o.Repository != "" {
			ref, err := s.Find(ctx, dbus.KindRepository, *o.Repository)
			if err != nil {
				return err
			}
			to.Repository = ref.ID
		}
	}
	if o.RandomizedDelay != nil {
		if *o.RandomizedDelay > uint64(timer.MaximumDelay.Microseconds()) {
			return dbus.Errorf(dbus.ErrInvalidArgument, "a randomized delay of more than a year is refused")
		}
		to.RandomizedDelay = time.Duration(*o.RandomizedDelay) * time.Microsecond
	}
	set(&to.Persistent, o.Persistent)
	set(&to.Isolated, o.Isolated)
	setAs(&to.Overlap, o.Overlap)
	if setAs(&to.Quiesce, o.Quiesce); to.Quiesce == string(dbus.ScheduleQuiesceOffering) {
		to.Quiesce = ""
	}
	return nil
}

// mayChange refuses a caller a schedule that the offering leaves to others.
func (s *Service) mayChange(ctx context.Context, caller bus.Caller, c catalog.Schedule) error {
	if caller.UID == root {
		return nil
	}
	if c.Domain != "" {
		return failure.Named(s.MaySchedule(ctx, caller, c.Domain, nil))
	}
	o, err := s.Catalog.Offering(ctx, c.Offering)
	if errors.Is(err, catalog.ErrNotFound) {
		return nil // gone: nobody's any more
	} else if err != nil {
		return failure.Named(err)
	}
	return s.mayUse(caller, o)
}

// changeSchedule changes a schedule for a caller who may.
func (s *Service) changeSchedule(ctx context.Context, caller bus.Caller, id string, change func(*catalog.Schedule) error) error {
	return failure.Named(s.Schedules.Change(ctx, id, func(to *catalog.Schedule) error {
		if err := s.mayChange(ctx, caller, *to); err != nil {
			return err
		}
		return change(to)
	}))
}

// UpdateSchedule changes what is given.
func (s *Service) UpdateSchedule(ctx context.Context, caller bus.Caller, id string, o dbus.UpdateScheduleOptions) error {
	return s.changeSchedule(ctx, caller, id, func(to *catalog.Schedule) error { return s.applySchedule(ctx, to, o) })
}

// EnableSchedule starts a schedule's timer.
func (s *Service) EnableSchedule(ctx context.Context, caller bus.Caller, id string) error {
	return s.changeSchedule(ctx, caller, id, func(to *catalog.Schedule) error { to.Enabled = true; return nil })
}

// DisableSchedule stops a schedule's timer.
func (s *Service) DisableSchedule(ctx context.Context, caller bus.Caller, id string) error {
	return s.changeSchedule(ctx, caller, id, func(to *catalog.Schedule) error { to.Enabled = false; return nil })
}

// RemoveSchedule removes a schedule and its timer.
func (s *Service) RemoveSchedule(ctx context.Context, caller bus.Caller, id string) error {
	c, err := s.Catalog.Schedule(ctx, id)
	if err == nil {
		err = s.mayChange(ctx, caller, c)
	}
	if err != nil {
		return failure.Named(err)
	}
	if err := s.Schedules.Remove(ctx, id); err != nil {
		return failure.Named(err)
	}
	s.notifier.Removed(dbus.Ref{Kind: dbus.KindSchedule, ID: id})
	return nil
}

// TriggerSchedule runs a schedule now.
func (s *Service) TriggerSchedule(ctx context.Context, caller bus.Caller, id string, o dbus.TriggerOptions) (dbus.ScheduleRun, error) {
	if o.Timer && caller.UID != 0 {
		return dbus.ScheduleRun{}, dbus.Errorf(dbus.ErrNotAuthorized, "only root can say that a timer is due: leave out the option timer")
	}
	if err := s.mayTrigger(ctx, caller, id); err != nil {
		return dbus.ScheduleRun{}, failure.Named(err)
	}
	run, err := s.Schedules.Trigger(ctx, id, schedule.Trigger{Timer: o.Timer, UID: caller.UID})
	return runRecord(run), failure.Named(err)
}

// mayTrigger refuses a caller backups at times that the schedule does not say,
// where the offering leaves none to users.
func (s *Service) mayTrigger(ctx context.Context, caller bus.Caller, id string) error {
	if caller.UID == root {
		return nil
	}
	c, err := s.Catalog.Schedule(ctx, id)
	if err != nil {
		return err
	}
	domains, err := s.scheduled(ctx, c)
	for _, d := range domains {
		if err := s.mayBackUp(ctx, caller, d.UUID, nil); err != nil {
			return err
		}
	}
	return err
}

// PreviewCalendars returns when one of the calendars is due next.
func (s *Service) PreviewCalendars(ctx context.Context, calendars []string, count int) ([]time.Time, error) {
	times, err := timer.Elapses(ctx, calendars, time.Now(), count)
	if errors.Is(err, timer.ErrCalendar) {
		return nil, dbus.Errorf(dbus.ErrInvalidArgument, "%v", err)
	}
	return times, failure.Named(err)
}

// PreviewSchedule returns when a schedule is due next, if it were enabled.
func (s *Service) PreviewSchedule(ctx context.Context, id string, count int) ([]time.Time, error) {
	sch, err := s.Catalog.Schedule(ctx, id)
	if err != nil {
		return nil, failure.Named(err)
	}
	return s.PreviewCalendars(ctx, sch.Calendars, count)
}

// ScheduleRuns returns what became of a schedule's runs, newest first.
func (s *Service) ScheduleRuns(ctx context.Context, id string, limit int) ([]dbus.ScheduleRun, error) {
	runs, err := s.Catalog.Runs(ctx, id, limit)
	var all []dbus.ScheduleRun
	for _, r := range runs {
		all = append(all, runRecord(r))
	}
	return all, failure.Named(err)
}

func runRecord(r catalog.ScheduleRun) dbus.ScheduleRun {
	return dbus.ScheduleRun{ID: r.ID, State: dbus.RunState(r.State), Reason: r.Reason, Jobs: r.Jobs, Timer: r.Timer, UID: r.UID,
		Created: r.Created, Finished: r.Finished}
}

func (s *Service) schedules(ctx context.Context) ([]dbus.Record, error) {
	list, err := s.Catalog.Schedules(ctx)
	if err != nil {
		return nil, err
	}
	runs, err := s.Catalog.LastRuns(ctx, "")
	if err != nil {
		return nil, err
	}
	of := map[string][]catalog.ScheduleRun{}
	for _, r := range runs {
		of[r.Schedule] = append(of[r.Schedule], r)
	}
	return records(ctx, list, func(ctx context.Context, c catalog.Schedule) (dbus.ScheduleProperties, error) {
		return s.describeSchedule(ctx, c, of[c.ID])
	})
}

func (s *Service) scheduleRecord(ctx context.Context, c catalog.Schedule) (dbus.ScheduleProperties, error) {
	runs, err := s.Catalog.LastRuns(ctx, c.ID)
	if err != nil {
		return dbus.ScheduleProperties{}, err
	}
	return s.describeSchedule(ctx, c, runs)
}

// describeSchedule describes a schedule; runs are its last ones, newest first.
func (s *Service) describeSchedule(ctx context.Context, c catalog.Schedule, runs []catalog.ScheduleRun) (dbus.ScheduleProperties, error) {
	p := dbus.ScheduleProperties{
		ID: c.ID, Name: c.Name, DomainUUID: c.Domain, Offering: c.Offering, Calendars: c.Calendars,
		RandomizedDelay: uint64(c.RandomizedDelay.Microseconds()), Persistent: c.Persistent, Isolated: c.Isolated,
		Quiesce: dbus.ScheduleQuiesce(c.Quiesce), Overlap: dbus.Overlap(c.Overlap), Enabled: c.Enabled,
		Unit: timer.UnitName(c.ID), UID: c.UID, Created: c.Created,
	}
	if p.Quiesce == "" {
		p.Quiesce = dbus.ScheduleQuiesceOffering
	}
	if c.Domain != "" {
		p.DomainName = s.DomainName(ctx, c.Domain)
	}
	if c.Repository != "" {
		r, err := s.Catalog.Repository(ctx, c.Repository)
		if err != nil {
			return p, err
		}
		p.Repository = r.Name
	}
	for i, r := range runs {
		if i == 0 {
			p.LastRun, p.LastState, p.LastReason = r.Created, dbus.RunState(r.State), r.Reason
		}
		switch r.State {
		case catalog.RunRunning:
			p.Jobs = r.Jobs
		case catalog.RunSucceeded:
			if p.LastSuccess.IsZero() {
				p.LastSuccess = r.Created
			}
		}
	}
	s.timerState(ctx, &p)
	return p, nil
}

// due is when schedules are due next, by the UUID of the domain or the name of
// the offering that they are for.
type due struct{ domains, offerings map[string]time.Time }

// of returns when a domain is backed up next by a schedule; zero for never.
func (d due) of(uuid, offering string) time.Time {
	return earlier(d.domains[uuid], d.offerings[offering])
}

func earlier(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

func (s *Service) due(ctx context.Context) (due, error) {
	d := due{map[string]time.Time{}, map[string]time.Time{}}
	all, err := s.Catalog.Schedules(ctx)
	for _, c := range all {
		if !c.Enabled {
			continue
		}
		state, err := s.Schedules.Timer(ctx, c.ID)
		if err != nil {
			continue // told with the schedule
		}
		if c.Domain != "" {
			d.domains[c.Domain] = earlier(d.domains[c.Domain], state.Next)
		} else {
			d.offerings[c.Offering] = earlier(d.offerings[c.Offering], state.Next)
		}
	}
	return d, err
}

// timerState fills in what systemd says of the timer.
func (s *Service) timerState(ctx context.Context, p *dbus.ScheduleProperties) {
	if !p.Enabled {
		return
	}
	state, err := s.Schedules.Timer(ctx, p.ID)
	switch {
	case err != nil:
		p.Problem = err.Error()
	case !state.Active:
		p.Problem = "its timer does not run: see systemctl status " + p.Unit + ", and disable and enable the schedule to set it anew"
	}
	p.NextElapse = state.Next
}

// ScheduleChanged tells that something about a schedule reads differently.
func (s *Service) ScheduleChanged(id string) {
	s.notifier.Changed(dbus.Ref{Kind: dbus.KindSchedule, ID: id})
}

// DomainName is the name of a domain as far as it is known, or its UUID.
func (s *Service) DomainName(ctx context.Context, uuid string) string {
	if d, known, _ := s.domain(uuid); known {
		return d.Name
	}
	if d, err := s.Catalog.Domain(ctx, uuid); err == nil {
		return d.Name
	}
	return uuid
}
