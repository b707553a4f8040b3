package service

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"unicode"

	"github.com/virtbackup/virtbackup/daemon/internal/backup"
	"github.com/virtbackup/virtbackup/daemon/internal/bus"
	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/failure"
	"github.com/virtbackup/virtbackup/daemon/internal/group"
	"github.com/virtbackup/virtbackup/daemon/internal/job"
	"github.com/virtbackup/virtbackup/dbus"
)

// BackupGroup starts the backups of several domains as one job.
func (s *Service) BackupGroup(ctx context.Context, caller bus.Caller, uuids []string, o dbus.GroupOptions) (string, error) {
	if len(uuids) == 0 {
		return "", dbus.Errorf(dbus.ErrInvalidArgument, "say which domains to back up")
	}
	r := group.Request{Sequential: o.Sequential}
	var first job.Request
	for i, uuid := range uuids {
		if slices.Contains(uuids[:i], uuid) {
			continue
		}
		name, j, err := s.askedBackup(ctx, caller, uuid, o.BackupOptions)
		if err != nil {
			return "", err
		}
		m, err := group.NewMember(name, j)
		if err != nil {
			return "", err
		}
		r.Members, first = append(r.Members, m), j
	}
	return s.start(ctx, job.Request{Kind: group.KindName, Spec: r, UID: caller.UID, Priority: first.Priority})
}

// retryable returns what is done again when a job is retried: requests of
// backups, and the group that they were of, if they were of one.
func (s *Service) retryable(ctx context.Context, id string) (j job.Status, of *group.Request, failed []group.Member, err error) {
	if j, err = s.Jobs.Job(ctx, id); err != nil {
		return j, nil, nil, failure.Named(err)
	}
	switch {
	case j.Kind != backup.KindName && j.Kind != group.KindName:
		return j, nil, nil, dbus.Errorf(dbus.ErrUnsupported, "only backups are retried, and job %s is a %s: ask for that anew", id, j.Kind)
	case !j.State.Ended():
		return j, nil, nil, dbus.Errorf(dbus.ErrBusy, "job %s has not ended: wait for it, or cancel it", id)
	case j.State == catalog.JobSucceeded:
		return j, nil, nil, dbus.Errorf(dbus.ErrInvalidArgument, "job %s has succeeded: there is nothing to retry", id)
	case j.Kind == backup.KindName:
		return j, nil, []group.Member{{Kind: j.Kind, Domain: j.Domain, Repository: j.Repository, Spec: j.Spec, Attempts: j.Attempts}}, nil
	}
	r, err := group.Of(j.Job)
	if err != nil {
		return j, nil, nil, err
	}
	children, err := group.Children(ctx, s.Catalog, id, r.Members)
	if err != nil {
		return j, nil, nil, failure.Named(err)
	}
	for i, m := range r.Members {
		if c := children[i]; c == nil || c.State != catalog.JobSucceeded {
			failed = append(failed, m)
		}
	}
	if len(failed) == 0 {
		return j, nil, nil, dbus.Errorf(dbus.ErrInvalidArgument, "all jobs of group %s have succeeded: there is nothing to retry", id)
	}
	return j, &r, failed, nil
}

// RetryDetails returns what polkit is to know of each backup that is made again.
func (s *Service) RetryDetails(ctx context.Context, id string) (all []map[string]string, err error) {
	_, _, failed, err := s.retryable(ctx, id)
	names := s.newNames()
	for _, m := range failed {
		p, err := names.job(ctx, job.Status{Job: catalog.Job{Kind: m.Kind, Domain: m.Domain, Repository: m.Repository, Spec: m.Spec}}, nil)
		if err != nil {
			return nil, failure.Named(err)
		}
		all = append(all, p.Details())
	}
	return all, err
}

// RetryJob makes the backups of a job again that were not made.
func (s *Service) RetryJob(ctx context.Context, caller bus.Caller, id string) (string, error) {
	j, of, failed, err := s.retryable(ctx, id)
	if err != nil {
		return "", err
	}
	if of == nil {
		_, r, err := s.again(ctx, caller, failed[0])
		if err != nil {
			return "", err
		}
		r.Priority = &j.Priority
		return s.start(ctx, r)
	}
	next := group.Request{Sequential: of.Sequential}
	for _, m := range failed {
		name, r, err := s.again(ctx, caller, m)
		if err != nil {
			return "", err
		}
		one, err := group.NewMember(name, r)
		if err != nil {
			return "", err
		}
		next.Members = append(next.Members, one)
	}
	return s.start(ctx, job.Request{Kind: group.KindName, Spec: next, UID: caller.UID, Priority: &j.Priority})
}

// again is the job of a backup that is made again, as it was asked for.
func (s *Service) again(ctx context.Context, caller bus.Caller, m group.Member) (name string, j job.Request, err error) {
	var r backup.Request
	if err := json.Unmarshal(m.Spec, &r); err != nil {
		return "", j, fmt.Errorf("cannot read what was asked for: %w", err)
	}
	d, err := s.lookup(ctx, r.Domain)
	if err != nil {
		return "", j, failure.Named(err)
	}
	var named *catalog.Offering
	if r.Offering != "" {
		o, err := s.Catalog.Offering(ctx, r.Offering)
		if err != nil {
			return "", j, failure.Named(err)
		}
		named = &o
	}
	if err := s.mayBackUp(ctx, caller, r.Domain, named); err != nil {
		return "", j, failure.Named(err)
	}
	if err := s.withinQuota(ctx, caller, d.Name, r); err != nil {
		return "", j, err
	}
	j = backup.NewJob(r, caller.UID)
	j.Attempts = m.Attempts
	return d.Name, j, nil
}

const (
	mostInhibitors = 100
	mostReason     = 200 // characters
)

// Inhibit holds jobs back until ctx ends.
func (s *Service) Inhibit(ctx context.Context, caller bus.Caller, what []string, who, why string) error {
	i := job.Inhibitor{Who: who, Why: why, UID: caller.UID}
	for _, text := range []string{who, why} {
		if text == "" || len(text) > mostReason || strings.ContainsFunc(text, unicode.IsControl) {
			return dbus.Errorf(dbus.ErrInvalidArgument, "say who holds jobs back, and why, each in a line of at most %d bytes", mostReason)
		}
	}
	for _, word := range what {
		c := job.Class(word)
		if !slices.Contains(job.Classes(), c) {
			return dbus.Errorf(dbus.ErrInvalidArgument, "%q is no class of jobs: say any of %v", word, job.Classes())
		}
		i.What = append(i.What, c)
	}
	if len(s.Jobs.Inhibitors()) >= mostInhibitors {
		return dbus.Errorf(dbus.ErrLimitsExceeded, "jobs are held back %d times already", mostInhibitors)
	}
	context.AfterFunc(ctx, s.Jobs.Inhibit(i))
	return nil
}

// ListInhibitors returns what holds jobs back.
func (s *Service) ListInhibitors(context.Context) (all []dbus.Inhibitor, err error) {
	for _, i := range s.Jobs.Inhibitors() {
		one := dbus.Inhibitor{ID: i.ID, Who: i.Who, Why: i.Why, UID: i.UID, Since: i.Since}
		for _, c := range i.What {
			one.What = append(one.What, string(c))
		}
		all = append(all, one)
	}
	return all, nil
}
