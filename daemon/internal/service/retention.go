package service

import (
	"context"
	"slices"
	"strings"
	"unicode"

	"github.com/virtbackup/virtbackup/daemon/internal/bus"
	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/chain"
	"github.com/virtbackup/virtbackup/daemon/internal/failure"
	"github.com/virtbackup/virtbackup/daemon/internal/job"
	"github.com/virtbackup/virtbackup/daemon/internal/retention"
	"github.com/virtbackup/virtbackup/dbus"
)

// PruneDomain removes those of a domain's backups that need not stay.
func (s *Service) PruneDomain(ctx context.Context, caller bus.Caller, uuid string, o dbus.PruneOptions) ([]dbus.PruneEntry, []string, error) {
	places, err := s.Catalog.Places(ctx, uuid)
	if err != nil {
		return nil, nil, failure.Named(err)
	}
	if o.Repository != "" {
		ref, err := s.Find(ctx, dbus.KindRepository, o.Repository)
		if err != nil {
			return nil, nil, err
		}
		places = slices.DeleteFunc(places, func(id string) bool { return id != ref.ID })
	}
	var all []dbus.PruneEntry
	var jobs []string
	for _, place := range places {
		entries, removed, err := s.planPrune(ctx, uuid, place)
		if err != nil {
			return nil, nil, failure.Named(err)
		}
		all = append(all, entries...)
		if o.DryRun || removed == 0 {
			continue
		}
		id, err := s.start(ctx, pruneJob(uuid, place, retention.Request{}, caller.UID))
		if err != nil {
			return nil, nil, err
		}
		jobs = append(jobs, id)
	}
	return all, jobs, nil
}

func pruneJob(domain, repository string, r retention.Request, uid uint32) job.Request {
	return job.Request{Kind: string(dbus.OperationPrune), Domain: domain, Repository: repository, UID: uid, Spec: r}
}

// planPrune says what becomes of each of a domain's backups in a repository,
// newest first, and how many go.
func (s *Service) planPrune(ctx context.Context, uuid, repository string) (all []dbus.PruneEntry, removed int, err error) {
	policy, err := s.EffectiveRetention(ctx, uuid)
	if err != nil {
		return nil, 0, err
	}
	r, err := s.Catalog.Repository(ctx, repository)
	if err != nil {
		return nil, 0, err
	}
	plan, backups, err := retention.Plan(ctx, s.Catalog, uuid, repository, policy)
	if err != nil {
		return nil, 0, err
	}
	for _, b := range slices.Backward(backups) {
		if b.State == chain.Running {
			continue
		}
		one := dbus.PruneEntry{Repository: r.Name, Backup: b.ID, Created: b.Created, StoredBytes: b.StoredBytes,
			Action: dbus.PruneDelete, Reasons: plan.Keep[b.ID]}
		switch {
		case b.State == chain.Deleting: // a job before did not get to it
			one.Reasons = nil
			removed++
		case len(one.Reasons) > 0:
			one.Action = dbus.PruneKeep
		}
		if i := slices.IndexFunc(plan.Merge, func(m chain.Merge) bool { return slices.Contains(m.Drop, b.ID) }); i >= 0 {
			one.Action, one.Into = dbus.PruneMerge, plan.Merge[i].Into
		}
		all = append(all, one)
	}
	return all, removed + plan.Removed(), nil
}

// prunePriority is below that of backups: who waits for space asks by himself.
const prunePriority = 30

// pruneAfter starts what a backup that was made lets go, if anything.
func (s *Service) pruneAfter(ctx context.Context, st job.Status) {
	if st.Kind != string(dbus.OperationBackup) || st.State != catalog.JobSucceeded {
		return
	}
	// One that waits, as for the maintenance window, makes its plan when it begins.
	waits := slices.ContainsFunc(s.Jobs.Active(), func(j job.Status) bool {
		return j.Kind == string(dbus.OperationPrune) && j.State == catalog.JobQueued && j.Domain == st.Domain && j.Repository == st.Repository
	})
	if waits {
		return
	}
	_, removed, err := s.planPrune(ctx, st.Domain, st.Repository)
	if err == nil && removed > 0 {
		r := pruneJob(st.Domain, st.Repository, retention.Request{Most: s.settings().Retention.MostAtOnce}, root)
		r.Origin, r.Priority = catalog.OriginSystem, new(prunePriority)
		_, err = s.start(ctx, r)
	}
	if err != nil {
		s.Log.Warn("cannot see to it that old backups go; the next backup of the domain tries again", "domain", st.Domain, "error", err)
	}
}

// reasonLimit is the most that the reason of a hold may have, in bytes.
const reasonLimit = 200

// HoldBackup has a backup stay.
func (s *Service) HoldBackup(ctx context.Context, _ bus.Caller, id, reason string) error {
	if reason == "" || len(reason) > reasonLimit || strings.ContainsFunc(reason, unicode.IsControl) {
		return dbus.Errorf(dbus.ErrInvalidArgument, "say why the backup is to stay, in one line of at most %d bytes", reasonLimit)
	}
	return s.hold(ctx, id, reason)
}

// ReleaseBackup lets a backup go again.
func (s *Service) ReleaseBackup(ctx context.Context, _ bus.Caller, id string) error {
	return s.hold(ctx, id, "")
}

func (s *Service) hold(ctx context.Context, id, reason string) error {
	if err := s.Catalog.HoldBackup(ctx, id, reason); err != nil {
		return failure.Named(err)
	}
	s.notifier.Changed(dbus.Ref{Kind: dbus.KindBackup, ID: id})
	return nil
}
