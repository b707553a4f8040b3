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
		s.Catalog.CreateJob(ctx, catalog.Job{ID: id, Kind: "backup", Domain: domainUUID, Spec: []byte("{}"), Created: now}),
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

// TestChainsAreNoManagedObjects has nobody told of chains that come and go:
// there may be ten thousands.
func TestChainsAreNoManagedObjects(t *testing.T) {
	s, told := newService(t)
	withRepositories(t, s, "nas")
	listeners := s.newTold(t.Context())
	var id string
	s.jobChanged(t.Context(), listeners, ended(t, s, "JOB", func(context.Context) { id = backedUp(t, s, "ID-nas", "", created) }))
	if got := told.take(); len(got) > 0 {
		t.Errorf("told %q", got)
	}
	all, err := s.Objects(t.Context())
	for _, r := range all {
		if !r.Ref().Kind.Managed() {
			t.Errorf("%s is a managed object", r.Ref())
		}
	}
	r, gone := s.Object(t.Context(), dbus.Ref{Kind: dbus.KindChain, ID: id})
	if err != nil || gone != nil || r.(dbus.ChainProperties).Length != 1 || r.(dbus.ChainProperties).StoredBytes == 0 {
		t.Errorf("%+v, %v, %v", r, err, gone)
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
