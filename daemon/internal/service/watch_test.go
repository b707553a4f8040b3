package service

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/chain"
	"github.com/virtbackup/virtbackup/daemon/internal/job"
	"github.com/virtbackup/virtbackup/dbus"
)

const domainUUID = "6a1f4d5e-0c0b-4b6e-9f1e-3a0d2c9b8f77"

// notes are what listeners were told of objects that come and go.
type notes []string

func (n *notes) Added(r dbus.Ref)               { *n = append(*n, fmt.Sprint("added ", r.Kind, " ", r.ID)) }
func (n *notes) Removed(r dbus.Ref)             { *n = append(*n, fmt.Sprint("removed ", r.Kind, " ", r.ID)) }
func (*notes) Changed(dbus.Ref)                 {}
func (*notes) JobNew(string)                    {}
func (*notes) JobRemoved(string, dbus.JobState) {}
func (n *notes) take() []string                 { taken := *n; *n = nil; return taken }

// newService has a real catalog and engine, and no libvirt.
func newService(t *testing.T) (*Service, *notes) {
	t.Helper()
	c, err := catalog.Open(t.Context(), filepath.Join(t.TempDir(), "catalog"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	log := slog.New(slog.DiscardHandler)
	s := New(Deps{Catalog: c, Log: log, Jobs: job.New(c, nil, job.Options{Logger: log})})
	told := &notes{}
	s.Notify(told)
	return s, told
}

// ended records a job that has succeeded.
func ended(t *testing.T, s *Service, id string, during func(ctx context.Context)) job.Status {
	t.Helper()
	ctx, now := t.Context(), time.Now()
	for _, err := range []error{
		s.Catalog.CreateJob(ctx, catalog.Job{ID: id, Kind: "backup", Domain: domainUUID, Created: now}),
		s.Catalog.StartJob(ctx, id, now),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	during(ctx)
	if err := s.Catalog.EndJob(ctx, id, catalog.JobEnd{State: catalog.JobSucceeded, Finished: now}); err != nil {
		t.Fatal(err)
	}
	j, err := s.Catalog.Job(ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	return job.Status{Job: j}
}

// TestChainsComeAndGo has chains told of when they begin, isolated ones too,
// and when their last backup is deleted.
func TestChainsComeAndGo(t *testing.T) {
	s, told := newService(t)
	if err := s.Catalog.CreateRepository(t.Context(), catalog.Repository{ID: "R", Name: "nas", Path: "/nas"}); err != nil {
		t.Fatal(err)
	}
	listeners := s.newTold(t.Context())
	for _, isolated := range []bool{false, true} {
		id := fmt.Sprint("BACKUP-", isolated)
		s.jobChanged(t.Context(), listeners, ended(t, s, "JOB-"+id, func(ctx context.Context) {
			b := catalog.Backup{ID: id, Domain: domainUUID, DomainName: "web", Repository: "R", Kind: chain.Full, Isolated: isolated}
			if err := s.Catalog.CreateBackup(ctx, b, "", catalog.Step{Job: "JOB-" + id, Name: "planned"}); err != nil {
				t.Fatal(err)
			}
			if err := s.Catalog.CommitBackup(ctx, id, catalog.Commit{Finished: time.Now()}); err != nil {
				t.Fatal(err)
			}
		}))
		if got, want := told.take(), []string{"added chain " + id}; !slices.Equal(got, want) {
			t.Errorf("after a backup: %q, want %q", got, want)
		}
	}
	s.jobChanged(t.Context(), listeners, ended(t, s, "JOB-delete", func(ctx context.Context) {
		if err := s.Catalog.BeginDelete(ctx, []string{"BACKUP-true"}, catalog.Step{Job: "JOB-delete", Name: "deleting"}); err != nil {
			t.Fatal(err)
		}
		if err := s.Catalog.DeleteBackups(ctx, []string{"BACKUP-true"}); err != nil {
			t.Fatal(err)
		}
	}))
	if got, want := told.take(), []string{"removed chain BACKUP-true"}; !slices.Equal(got, want) {
		t.Errorf("after the deletion: %q, want %q", got, want)
	}
}

// TestOldJobsGo has a job that is no managed object any more told to be gone.
func TestOldJobsGo(t *testing.T) {
	s, told := newService(t)
	name := func(i int) string { return fmt.Sprintf("JOB-%03d", i) }
	for i := range managedJobs {
		ended(t, s, name(i), func(context.Context) {})
	}
	listeners := s.newTold(t.Context())
	s.jobChanged(t.Context(), listeners, ended(t, s, name(managedJobs), func(context.Context) {}))
	if got, want := told.take(), []string{"removed job " + name(0)}; !slices.Equal(got, want) {
		t.Errorf("told %q, want %q", got, want)
	}
}
