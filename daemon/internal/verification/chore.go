package verification

import (
	"context"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/job"
	"github.com/virtbackup/virtbackup/daemon/internal/window"
	"github.com/virtbackup/virtbackup/dbus"
)

// Settings are how backups are verified by themselves.
type Settings struct {
	Enabled  bool
	Every    time.Duration  // each chain
	Share    uint64         // bytes in a night; 0 for as many as it takes
	Window   window.Windows // when it may begin; the jobs' own window holds as well
	Attempts int
	Rate     uint64 // bytes per second; 0 is no bound
}

// Name makes it an upkeep.Chore.
func (Verify) Name() string { return "verification" }

// Due returns a job for each chain that is to be verified tonight.
func (k Verify) Due(ctx context.Context, now time.Time) ([]job.Request, error) {
	s := k.Settings()
	if !s.Enabled || s.Window.Next(now).After(now) {
		return nil, nil
	}
	all, err := k.Catalog.VerifiableChains(ctx)
	if err != nil {
		return nil, err
	}
	begun, err := k.Catalog.ListJobs(ctx, catalog.JobFilter{Kind: string(dbus.OperationVerify), Since: now.Add(-night)}, catalog.Page{})
	if err != nil {
		return nil, err
	}
	chainOf := map[string]string{} // by the newest backup
	byID := map[string]catalog.VerifiableChain{}
	var chains []Chain
	for _, c := range all {
		chainOf[c.Newest], byID[c.ID] = c.ID, c
		chains = append(chains, Chain{ID: c.ID, Bytes: c.Bytes, Last: c.Last})
	}
	var tries []Try
	for _, j := range begun {
		if id := chainOf[j.Backup]; j.Origin == catalog.OriginSystem && id != "" {
			tries = append(tries, Try{id, j.Created})
		}
	}
	var due []job.Request
	for _, c := range Due(chains, tries, s.Every, s.Share, now) {
		one := byID[c.ID]
		due = append(due, job.Request{
			Kind: string(dbus.OperationVerify), Domain: one.Domain, Repository: one.Repository, Backup: one.Newest,
			Spec: Request{Backups: []string{one.Newest}}, Attempts: s.Attempts,
		})
	}
	return due, nil
}
