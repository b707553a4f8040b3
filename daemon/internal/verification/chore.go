package verification

import (
	"context"
	"encoding/json"
	"fmt"
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

// Due returns a job for the next chain that is to be verified tonight: the one
// after it is asked for when that has ended, if there is still time.
func (k Verify) Due(ctx context.Context, now time.Time) ([]job.Request, error) {
	s := k.Settings()
	if !s.Enabled || s.Window.Next(now).After(now) {
		return nil, nil
	}
	all, err := k.Catalog.VerifiableChains(ctx)
	if err != nil {
		return nil, err
	}
	begun, err := k.Catalog.ListJobs(ctx, catalog.JobFilter{Kind: string(dbus.OperationVerify), Since: now.Add(-s.Every)}, catalog.Page{})
	if err != nil {
		return nil, err
	}
	byID := map[string]catalog.VerifiableChain{}
	var chains []Chain
	for _, c := range all {
		byID[c.ID] = c
		chains = append(chains, Chain{ID: c.ID, Bytes: c.Bytes, Last: c.Last})
	}
	var tries []Try
	for _, j := range begun {
		if j.Origin != catalog.OriginSystem {
			continue
		}
		if !j.State.Ended() {
			return nil, nil
		}
		var r Request
		if err := json.Unmarshal(j.Spec, &r); err != nil {
			return nil, fmt.Errorf("cannot read the request of job %s: %w", j.ID, err)
		}
		tries = append(tries, Try{r.Chain, j.Created})
	}
	due := Due(chains, tries, s.Every, s.Share, now)
	if len(due) == 0 {
		return nil, nil
	}
	one := byID[due[0].ID]
	return []job.Request{{
		Kind: string(dbus.OperationVerify), Domain: one.Domain, Repository: one.Repository, Backup: one.Newest,
		Spec: Request{Backups: []string{one.Newest}, Chain: one.ID}, Attempts: s.Attempts,
	}}, nil
}
