// Package group is the job that has other jobs done as one: all at once, as far
// as the queue lets them, or one after the other. It works nothing itself, and
// so takes no place that they need. What it has started it finds again by their
// parent: so each of its jobs is started once, also when the daemon is restarted.
package group

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/job"
	"github.com/virtbackup/virtbackup/dbus"
)

// KindName is the name under which the Kind is to be registered with the engine.
const KindName = "group"

// Member is one job of a group. A group has one for each domain and repository.
type Member struct {
	Name       string // for people
	Kind       string
	Domain     string // UUID
	Repository string // id
	Backup     string // id
	Spec       json.RawMessage
	Attempts   int
}

// NewMember makes a member of a request. Its user, priority and origin are the group's.
func NewMember(name string, r job.Request) (Member, error) {
	spec, err := json.Marshal(r.Spec)
	return Member{Name: name, Kind: r.Kind, Domain: r.Domain, Repository: r.Repository, Backup: r.Backup, Spec: spec, Attempts: r.Attempts}, err
}

// Request is what a group is asked for.
type Request struct {
	Sequential bool // one after the other, each once the one before has ended
	Members    []Member
}

// Of reads the request of a group.
func Of(j catalog.Job) (r Request, err error) {
	if err := json.Unmarshal(j.Spec, &r); err != nil {
		return r, fmt.Errorf("cannot read the request of group %s: %w", j.ID, err)
	}
	return r, nil
}

// Catalog is where a group finds its jobs.
type Catalog interface {
	ChildJobs(ctx context.Context, parent string) ([]catalog.Job, error)
}

// Kind is registered with the job engine as KindName.
type Kind struct{ Catalog Catalog }

var _ job.Kind = Kind{}

type key struct{ domain, repository string }

// Children returns the jobs of a group by its members; nil for one that was not started.
func Children(ctx context.Context, c Catalog, id string, members []Member) ([]*catalog.Job, error) {
	list, err := c.ChildJobs(ctx, id)
	if err != nil {
		return nil, err
	}
	by := map[key]*catalog.Job{}
	for i, j := range list {
		by[key{j.Domain, j.Repository}] = &list[i]
	}
	all := make([]*catalog.Job, len(members))
	for i, m := range members {
		all[i] = by[key{m.Domain, m.Repository}]
	}
	return all, nil
}

// Run has the jobs done, see job.Kind.
func (k Kind) Run(ctx context.Context, h *job.Handle) error {
	r, err := Of(h.Job())
	if err != nil {
		return err
	}
	children, err := Children(ctx, k.Catalog, h.Job().ID, r.Members)
	if err != nil {
		return err
	}
	ids, refused := make([]string, len(r.Members)), make([]error, len(r.Members))
	ended := 0
	tell := func() { h.Waits(fmt.Sprintf("%d of %d have ended", ended, len(r.Members))) }
	follow := func(i int) error {
		if ids[i] == "" {
			return nil
		}
		_, err := h.Wait(ctx, ids[i])
		ended++
		tell()
		return err
	}
	tell()
	for i, m := range r.Members {
		if children[i] != nil {
			ids[i] = children[i].ID
		} else if ids[i], refused[i] = submit(ctx, h, m); ctx.Err() != nil {
			return context.Cause(ctx)
		} else if errors.Is(refused[i], job.ErrDetach) {
			return refused[i]
		}
		if r.Sequential {
			if err := follow(i); err != nil {
				return err
			}
		}
	}
	for i := 0; i < len(ids) && !r.Sequential; i++ {
		if err := follow(i); err != nil {
			return err
		}
	}
	return k.outcome(ctx, h, r.Members, refused)
}

// roomEach is how often it is tried whether there is room for one more job.
const roomEach = time.Second

// submit starts one job. When there are too many, it waits until there are not.
func submit(ctx context.Context, h *job.Handle, m Member) (string, error) {
	for {
		backup := m.Backup
		if m.Kind == string(dbus.OperationBackup) {
			// As new as the job: what clears up after dead jobs, and the rules of chains, go by its age.
			backup = ulid.Make().String()
		}
		st, err := h.Submit(ctx, job.Request{
			Kind: m.Kind, Domain: m.Domain, Repository: m.Repository, Backup: backup, Spec: m.Spec, Attempts: m.Attempts,
		})
		if !errors.Is(err, job.ErrTooMany) {
			return st.ID, err
		}
		select {
		case <-time.After(roomEach):
		case <-ctx.Done():
			return "", context.Cause(ctx)
		}
	}
}

// Outcome is how one job of a group went: the group's result is a list of them.
type Outcome struct {
	Name  string
	Job   string // "" when it could not be started
	State catalog.JobState
	Error string
}

// mostTold bounds how many failures the error of a group tells.
const mostTold = 3

// outcome sums up how the jobs went.
func (k Kind) outcome(ctx context.Context, h *job.Handle, members []Member, refused []error) error {
	children, err := Children(context.WithoutCancel(ctx), k.Catalog, h.Job().ID, members)
	if err != nil {
		return err
	}
	var all []Outcome
	var failed []string
	for i, m := range members {
		o := Outcome{Name: m.Name, State: catalog.JobFailed, Error: "it could not be started"}
		if refused[i] != nil {
			o.Error = refused[i].Error()
		}
		if j := children[i]; j != nil {
			o.Job, o.State, o.Error = j.ID, j.State, j.ErrorMessage
		}
		if all = append(all, o); o.State != catalog.JobSucceeded {
			failed = append(failed, fmt.Sprintf("%s: %s", m.Name, o.Error))
		}
	}
	if err := h.SetResult(all); err != nil || len(failed) == 0 {
		return err
	}
	more, n := "", len(failed)
	if n > mostTold {
		more, failed = fmt.Sprintf("; and %d more", n-mostTold), failed[:mostTold]
	}
	return fmt.Errorf("%d of %d failed: %s%s", n, len(members), strings.Join(failed, "; "), more)
}

// Undo ends the jobs that have not ended, see job.Kind.
func (k Kind) Undo(ctx context.Context, h *job.Handle) error {
	children, err := k.Catalog.ChildJobs(ctx, h.Job().ID)
	if err != nil {
		return err
	}
	var failed []error
	for _, j := range children {
		if j.State.Ended() {
			continue
		}
		if err := h.Cancel(ctx, j.ID); err != nil && !errors.Is(err, catalog.ErrState) {
			failed = append(failed, err)
		}
	}
	for _, j := range children {
		if _, err := h.Wait(ctx, j.ID); err != nil && !errors.Is(err, catalog.ErrNotFound) {
			failed = append(failed, err)
		}
	}
	return errors.Join(failed...)
}
