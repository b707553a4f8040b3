package verification

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/chain"
	"github.com/virtbackup/virtbackup/daemon/internal/job"
	"github.com/virtbackup/virtbackup/daemon/internal/transfer"
)

const testDomain = "6c1fc1a8-7c3f-4a0e-9a39-0f0c2a1f6b11"

// host is a repository, and a catalog that knows it.
type host struct {
	*testing.T
	catalog *catalog.Catalog
	path    string
	key     string
	id      string // of the repository in the catalog
}

func newHost(t *testing.T) *host {
	t.Helper()
	h := &host{T: t, path: filepath.Join(t.TempDir(), "repository"), key: filepath.Join(t.TempDir(), "key"), id: ulid.Make().String()}
	key := make([]byte, 32)
	_, _ = rand.Read(key)
	h.must(os.WriteFile(h.key, []byte(hex.EncodeToString(key)), 0o600))
	h.must(os.Mkdir(h.path, 0o700))
	var err error
	h.catalog, err = catalog.Open(t.Context(), filepath.Join(t.TempDir(), "catalog.sqlite"))
	h.must(err)
	t.Cleanup(func() { h.must(h.catalog.Close()) })
	h.must(h.catalog.CreateRepository(t.Context(), catalog.Repository{ID: h.id, Name: "nas", Type: "dir", Path: h.path, Created: time.Now()}))
	return h
}

func (h *host) must(err error) {
	h.Helper()
	if err != nil {
		h.Fatal(err)
	}
}

// work has a worker, in this process, do what a job asks for.
func (h *host) work(s transfer.Spec) *transfer.Result {
	h.Helper()
	dir := h.TempDir()
	s.Version, s.Repository = transfer.SpecVersion, transfer.RepositorySpec{Path: h.path, Name: "nas", KeyFile: h.key}
	h.must(transfer.WriteSpec(dir, &s))
	h.must(transfer.Run(h.Context(), dir, slog.New(slog.DiscardHandler)))
	r, err := transfer.ReadResult(dir)
	h.must(err)
	return r
}

// job records an unfinished job that makes a backup.
func (h *host) job(backup string) string {
	h.Helper()
	id := ulid.Make().String()
	h.must(h.catalog.CreateJob(h.Context(), catalog.Job{
		ID: id, Kind: "backup", Domain: testDomain, Repository: h.id, Backup: backup, Created: time.Now(),
	}))
	return id
}

// TestCheckSparesLiveJobs has a check collect beside jobs that ran, run and will run.
func TestCheckSparesLiveJobs(t *testing.T) {
	h := newHost(t)
	ours := h.work(transfer.Spec{Operation: transfer.OperationInit, Job: ulid.Make().String()}).Repository.Host
	dead, live := ulid.Make().String(), ulid.Make().String()
	ended := h.job(dead)
	h.must(h.catalog.EndJob(t.Context(), ended, catalog.JobEnd{State: catalog.JobFailed, Finished: time.Now()}))
	h.job(live)
	check := h.job("")
	younger := ulid.Make().String()
	stage := func(backup string) string { return filepath.Join(h.path, ".staging", backup+"."+ours) }
	for _, backup := range []string{dead, live, younger} {
		h.must(os.Mkdir(stage(backup), 0o700))
		h.must(os.WriteFile(filepath.Join(stage(backup), "vda.qcow2"), []byte("half"), 0o600))
	}
	ids, err := Check{Catalog: h.catalog}.live(t.Context(), h.id)
	h.must(err)
	h.work(transfer.Spec{Operation: transfer.OperationProbe, Job: check, Collect: true, Live: ids})
	for backup, stays := range map[string]bool{dead: false, live: true, younger: true} {
		if _, err := os.Stat(stage(backup)); errors.Is(err, fs.ErrNotExist) == stays {
			t.Errorf("stage of %s: %v, should stay: %v", backup, err, stays)
		}
	}
}

// recording is a job that records what a worker found.
type recording struct {
	Verify
	found *transfer.Result
}

func (r recording) Run(ctx context.Context, h *job.Handle) error {
	return errors.Join(Record(ctx, r.Catalog, h, r.found), verdict("nas", r.found.Backups))
}

// TestMissingBackupIsRecorded verifies a chain that is not in the repository.
func TestMissingBackupIsRecorded(t *testing.T) {
	h := newHost(t)
	goes := h.backup("", "")
	full := h.backup("", "")
	increment := h.backup(full, full)
	h.must(h.catalog.BeginDelete(t.Context(), []string{goes}, catalog.Step{Job: h.running(), Name: "deleting"}))
	h.work(transfer.Spec{Operation: transfer.OperationInit, Job: ulid.Make().String()})
	found := h.work(transfer.Spec{
		Operation: transfer.OperationVerify, Job: ulid.Make().String(), Domain: testDomain, Backups: []string{full, increment, goes},
	})
	e := job.New(h.catalog, map[string]job.Kind{"verify": recording{Verify{Catalog: h.catalog}, found}},
		job.Options{Logger: slog.New(slog.DiscardHandler), KeepFor: time.Hour, KeepMost: 100})
	h.must(e.Start(t.Context()))
	defer e.Stop()
	s, err := e.Submit(t.Context(), job.Request{Kind: "verify", Repository: h.id})
	h.must(err)
	s, err = e.Wait(t.Context(), s.ID)
	h.must(err)
	if s.State != catalog.JobFailed || s.ErrorName != "Damaged" {
		t.Errorf("the job is %s, %s: %s", s.State, s.ErrorName, s.ErrorMessage)
	}
	for id, want := range map[string]chain.BackupState{full: chain.Damaged, increment: chain.Damaged, goes: chain.Deleting} {
		if b, err := h.catalog.Backup(t.Context(), id); err != nil || b.State != want {
			t.Errorf("backup %s is %s (%s), %v", id, b.State, b.Error, err)
		}
	}
	if c, err := h.catalog.Chain(t.Context(), full); err != nil || c.State != chain.Broken {
		t.Errorf("the chain is %+v, %v", c, err)
	}
}

// running records a job that runs.
func (h *host) running() string {
	h.Helper()
	id := h.job("")
	h.must(h.catalog.StartJob(h.Context(), id, time.Now()))
	return id
}

// backup records a complete backup; parent and in, its chain, may be "".
func (h *host) backup(parent, in string) string {
	h.Helper()
	b := catalog.Backup{
		ID: ulid.Make().String(), Domain: testDomain, DomainName: "web", Repository: h.id, Kind: chain.Full, Cause: chain.FirstBackup, Chain: in, Parent: parent,
		Created: time.Now(), Settings: catalog.Settings{Mode: chain.ModeIncremental},
	}
	if parent != "" {
		b.Kind, b.Cause = chain.Incremental, ""
	}
	b.Job = h.running()
	h.must(h.catalog.CreateBackup(h.Context(), b, "", catalog.Step{Job: b.Job}))
	h.must(h.catalog.CommitBackup(h.Context(), b.ID, catalog.Commit{Finished: time.Now(), Manifest: []byte("{}")}))
	h.must(h.catalog.EndJob(h.Context(), b.Job, catalog.JobEnd{State: catalog.JobSucceeded, Finished: time.Now()}))
	return b.ID
}
