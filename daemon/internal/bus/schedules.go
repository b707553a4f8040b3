package bus

import (
	"context"
	"time"

	godbus "github.com/godbus/dbus/v5"
	"github.com/virtbackup/virtbackup/dbus"
)

func createSchedule(about dbus.Ref, a arguments) (request, error) {
	name, calendars := a.text(0), a[1].([]string)
	var o dbus.CreateScheduleOptions
	if err := a.options(&o); err != nil {
		return request{}, err
	}
	run := func(ctx context.Context, s *Server, c Caller) ([]any, error) {
		id, err := s.backend.CreateSchedule(ctx, c, name, calendars, o)
		return []any{dbus.Ref{Kind: dbus.KindSchedule, ID: id}.Path()}, s.done(c, "create schedule "+name, about, err)
	}
	return request{
		mentions: mentions(mention{dbus.KindDomain, o.Domain}, mention{dbus.KindOffering, o.Offering}, mention{dbus.KindRepository, o.Repository}),
		run:      run,
	}, nil
}

func updateSchedule(about dbus.Ref, a arguments) (request, error) {
	var o dbus.UpdateScheduleOptions
	if err := a.options(&o); err != nil {
		return request{}, err
	}
	r := request{run: func(ctx context.Context, s *Server, c Caller) ([]any, error) {
		return nil, s.done(c, "update schedule", about, s.backend.UpdateSchedule(ctx, c, about.ID, o))
	}}
	if o.Repository != nil {
		r.mentions = mentions(mention{dbus.KindRepository, *o.Repository})
	}
	return r, nil
}

func triggerSchedule(about dbus.Ref, a arguments) (request, error) {
	var o dbus.TriggerOptions
	run := func(ctx context.Context, s *Server, c Caller) ([]any, error) {
		run, err := s.backend.TriggerSchedule(ctx, c, about.ID, o)
		jobs := make([]godbus.ObjectPath, len(run.Jobs))
		for i, id := range run.Jobs {
			jobs[i] = dbus.Ref{Kind: dbus.KindJob, ID: id}.Path()
		}
		return []any{string(run.State), run.Reason, jobs}, s.done(c, "trigger schedule", about, err)
	}
	return request{run: run}, a.options(&o)
}

// normalPreview is how many times are told when nobody says how many.
const normalPreview = 10

func previewCount(count int) (int, error) {
	if count == 0 {
		return normalPreview, nil
	}
	return pageLimit(count)
}

func previewCalendars(_ dbus.Ref, a arguments) (request, error) {
	calendars := a[0].([]string)
	count, err := previewCount(a.number(1))
	run := func(ctx context.Context, s *Server, _ Caller) ([]any, error) {
		times, err := s.backend.PreviewCalendars(ctx, calendars, count)
		return []any{micros(times)}, err
	}
	return request{run: run}, err
}

func previewSchedule(about dbus.Ref, a arguments) (request, error) {
	count, err := previewCount(a.number(0))
	run := func(ctx context.Context, s *Server, _ Caller) ([]any, error) {
		times, err := s.backend.PreviewSchedule(ctx, about.ID, count)
		return []any{micros(times)}, err
	}
	return request{run: run}, err
}

func micros(times []time.Time) []uint64 {
	all := make([]uint64, len(times))
	for i, t := range times {
		all[i] = dbus.Micros(t)
	}
	return all
}

func scheduleRuns(about dbus.Ref, a arguments) (request, error) {
	limit, err := pageLimit(a.number(0))
	run := func(ctx context.Context, s *Server, _ Caller) ([]any, error) {
		runs, err := s.backend.ScheduleRuns(ctx, about.ID, limit)
		return []any{dbus.EncodeRecords(runs)}, err
	}
	return request{run: run}, err
}
