package bus

import (
	"context"

	"github.com/virtbackup/virtbackup/dbus"
)

// How a backup may be asked for.
const (
	mostPriority = 99
	mostAttempts = 100
	mostDomains  = 1000 // of a group
)

// backupAsked checks what a backup is asked for with, and completes a request for one.
func backupAsked(r request, o dbus.BackupOptions) (request, error) {
	switch {
	case o.Offering != "" && o.Repository != "":
		return request{}, dbus.Errorf(dbus.ErrInvalidArgument, "give an offering or a repository, not both")
	case o.Priority != nil && *o.Priority > mostPriority:
		return request{}, dbus.Errorf(dbus.ErrInvalidArgument, "the priority is %d, and 0 to %d can be given", *o.Priority, mostPriority)
	case o.Attempts != nil && (*o.Attempts == 0 || *o.Attempts > mostAttempts):
		return request{}, dbus.Errorf(dbus.ErrInvalidArgument, "there are to be %d attempts, and 1 to %d can be given", *o.Attempts, mostAttempts)
	}
	r.mentions = mentions(mention{dbus.KindOffering, o.Offering}, mention{dbus.KindRepository, o.Repository})
	if o.Repository != "" {
		// In place of the domain's own offering.
		r.names = map[string]string{dbus.DetailOffering: ""}
	}
	return r, nil
}

func backupDomain(about dbus.Ref, a arguments) (request, error) {
	var o dbus.BackupOptions
	if err := a.options(&o); err != nil {
		return request{}, err
	}
	return backupAsked(request{run: func(ctx context.Context, s *Server, c Caller) ([]any, error) {
		job, err := s.backend.BackupDomain(ctx, c, about.ID, o)
		return jobPath(job), s.done(c, "back up domain", about, err)
	}}, o)
}

// backupGroup is authorized as that many calls of Domain.Backup.
func backupGroup(about dbus.Ref, a arguments) (request, error) {
	names := a.texts(0)
	var o dbus.GroupOptions
	if err := a.options(&o); err != nil {
		return request{}, err
	}
	if len(names) > mostDomains {
		return request{}, dbus.Errorf(dbus.ErrInvalidArgument, "%d domains are named, and 1 to %d can be", len(names), mostDomains)
	}
	var uuids []string // those that were authorized
	r, err := backupAsked(request{run: func(ctx context.Context, s *Server, c Caller) ([]any, error) {
		job, err := s.backend.BackupGroup(ctx, c, uuids, o)
		return jobPath(job), s.done(c, "back up domains as a group", about, err)
	}}, o.BackupOptions)
	each := r
	r.apart = func(ctx context.Context, s *Server) (all []map[string]string, missing error) {
		for _, name := range names {
			ref, err := s.backend.Find(ctx, dbus.KindDomain, name)
			if err != nil {
				return nil, err
			}
			each.about = ref
			details, err := s.details(ctx, each)
			if err != nil {
				missing = err
			}
			uuids, all = append(uuids, ref.ID), append(all, details)
		}
		return all, missing
	}
	return r, err
}

// retryJob is authorized for each of the backups that are made again.
func retryJob(about dbus.Ref, a arguments) (request, error) {
	return request{
		run: func(ctx context.Context, s *Server, c Caller) ([]any, error) {
			job, err := s.backend.RetryJob(ctx, c, about.ID)
			return jobPath(job), s.done(c, "retry job", about, err)
		},
		apart: func(ctx context.Context, s *Server) ([]map[string]string, error) {
			return s.backend.RetryDetails(ctx, about.ID)
		},
	}, a.options(&dbus.NoOptions{})
}

// inhibit lasts until its caller leaves the bus.
func inhibit(about dbus.Ref, a arguments) (request, error) {
	what, who, why := a.texts(0), a.text(1), a.text(2)
	run := func(_ context.Context, s *Server, c Caller) ([]any, error) {
		there, leave := s.callers.whileThere(s.ctx, c.Sender)
		_, err := uid(there, s.conn, c.Sender) // or it left before it was watched
		if err == nil {
			err = s.backend.Inhibit(there, c, what, who, why)
		}
		if err != nil {
			leave()
		} else {
			context.AfterFunc(there, leave)
		}
		return nil, s.done(c, "hold jobs back: "+why, about, err)
	}
	return request{run: run}, a.options(&dbus.NoOptions{})
}

func jobLog(about dbus.Ref, a arguments) (request, error) {
	limit := a.number(0)
	run := func(ctx context.Context, s *Server, _ Caller) ([]any, error) {
		messages, err := s.backend.JobLog(ctx, about.ID, limit)
		return []any{dbus.EncodeRecords(messages)}, err
	}
	return request{run: run}, nil
}
