// Package compression is the job that compresses a backup after it was made: a
// worker writes its images anew beside the old ones, compares, and exchanges all
// at once. Until then the old ones count, and whatever happens leaves them whole.
package compression

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/chain"
	"github.com/virtbackup/virtbackup/daemon/internal/errand"
	"github.com/virtbackup/virtbackup/daemon/internal/failure"
	"github.com/virtbackup/virtbackup/daemon/internal/job"
	"github.com/virtbackup/virtbackup/daemon/internal/transfer"
	"github.com/virtbackup/virtbackup/dbus"
)

// Settings are how backups are compressed.
type Settings struct {
	Enabled  bool // whether it happens by itself
	Attempts int
	Threads  int     // when the backup's offering does not say
	Factor   float64 // of what the backup takes, which must be free
	Rate     uint64  // bytes per second; 0 is no bound
}

// Request asks to compress the job's backup.
type Request struct {
	Compression string `json:"compression"` // "zlib", "zstd"
	Level       int    `json:"level,omitempty"`
}

// Kind is the kind of job that does it.
type Kind struct {
	Catalog  *catalog.Catalog
	Errand   errand.Sender
	Settings func() Settings
}

// stepCompressing is recorded before the worker starts.
const stepCompressing = "compressing"

// mostDue is how many are asked for at once; there are more next time.
const mostDue = 100

// Name makes it an upkeep.Chore.
func (Kind) Name() string { return "compression" }

// Due returns a job for each backup that is to be compressed.
func (k Kind) Due(ctx context.Context, now time.Time) ([]job.Request, error) {
	s := k.Settings()
	if !s.Enabled {
		return nil, nil
	}
	backups, err := k.Catalog.DueCompressions(ctx, now, mostDue)
	var due []job.Request
	for _, b := range backups {
		r := NewJob(b, Request{Compression: b.Compression, Level: b.Level})
		r.Attempts = s.Attempts
		due = append(due, r)
	}
	return due, err
}

// NewJob asks to compress a backup.
func NewJob(b catalog.Backup, r Request) job.Request {
	return job.Request{Kind: string(dbus.OperationCompress), Domain: b.Domain, Repository: b.Repository, Backup: b.ID, Spec: r}
}

// Again makes it a job.Retrier: another try is about the same.
func (Kind) Again(j catalog.Job) string { return j.Backup }

// Yields makes it a job.Yielder: what nobody has asked for can wait.
func (Kind) Yields(j catalog.Job) bool { return j.Origin == catalog.OriginSystem }

// Run has a worker compress the backup, and records what came of it.
func (k Kind) Run(ctx context.Context, h *job.Handle) error {
	var r Request
	if err := h.Request(&r); err != nil {
		return err
	}
	// Also for a job that was just cancelled: its worker is to be followed to its end.
	b, repo, err := k.subject(context.WithoutCancel(ctx), h)
	if errors.Is(err, catalog.ErrNotFound) || err == nil && (b.State != chain.Complete || b.CompressionState != catalog.CompressionDue) {
		if h.Job().Origin == catalog.OriginSystem && h.Job().Step == "" {
			h.Log(ctx, slog.LevelInfo, "there is nothing to compress any more")
			return nil
		}
	}
	if err != nil {
		return failure.Named(err)
	}
	if b.State != chain.Complete {
		return failure.Errorf(dbus.ErrBusy, "backup %s is %s, and only complete ones are compressed", b.ID, b.State)
	}
	if err := h.Step(ctx, stepCompressing, nil); err != nil {
		return err
	}
	s := k.Settings()
	threads := b.Threads
	if threads == 0 {
		threads = s.Threads
	}
	result, err := k.Errand.Run(ctx, h, repo, transfer.Spec{
		Operation: transfer.OperationCompress, Domain: b.Domain, Most: s.Rate,
		Compress: &transfer.CompressSpec{
			Backup: b.ID, Compression: r.Compression, Level: r.Level, Threads: threads, Free: uint64(s.Factor * float64(b.StoredBytes)),
		},
	})
	if err != nil {
		return err
	}
	return k.record(ctx, h, b, result)
}

// subject is what a job is about.
func (k Kind) subject(ctx context.Context, h *job.Handle) (b catalog.Backup, r catalog.Repository, err error) {
	if b, err = k.Catalog.Backup(ctx, h.Job().Backup); err == nil {
		r, err = k.Catalog.Repository(ctx, b.Repository)
	}
	return b, r, err
}

// record records how the backup is stored now. Also when the job was just
// cancelled: the repository knows already.
func (k Kind) record(ctx context.Context, h *job.Handle, b catalog.Backup, result *transfer.Result) error {
	if result == nil || result.Manifest == nil || result.Manifest.Backup != b.ID || result.Manifest.Parent != b.Parent {
		return fmt.Errorf("the worker does not say how backup %s is stored now", b.ID)
	}
	done, err := errand.Rewritten(result.Manifest)
	if err != nil {
		return err
	}
	if err := k.Catalog.CompressedBackup(context.WithoutCancel(ctx), done); err != nil {
		return failure.Named(err)
	}
	var now uint64
	for _, i := range done.Images {
		now += i.StoredBytes
	}
	text := fmt.Sprintf("backup %s takes %d bytes, before it took %d", b.ID, now, b.StoredBytes)
	if now >= b.StoredBytes {
		text = fmt.Sprintf("backup %s stays as it is: compressed it would be no smaller", b.ID)
	}
	h.Log(ctx, slog.LevelInfo, text)
	return nil
}

// Undo removes what the worker left, and finds out whether it had exchanged the
// images all the same. When the repository cannot be asked, the next try finds
// out: it begins with that.
func (k Kind) Undo(ctx context.Context, h *job.Handle) error {
	var unknown error
	if h.Job().Step != "" {
		var done bool
		if done, unknown = k.settle(ctx, h); done || ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if unknown != nil {
			h.Logger().WarnContext(ctx, "cannot tell how the backup is stored now; the next try does", "error", unknown)
		}
	}
	why := h.Failure()
	switch {
	case h.Job().Again:
		return nil
	case errors.Is(why, dbus.ErrCancelled): // nobody asked for that: a worker was ended when the job gave way
		return nil
	case errors.Is(why, job.ErrCancelled):
		return k.withdrawn(ctx, h.Job().Backup)
	case unknown != nil || failure.Passing(why):
		return ended(k.Catalog.PutOffCompression(ctx, h.Job().Backup, why.Error(), time.Now().Add(pause)))
	}
	return ended(k.Catalog.CompressionFailed(ctx, h.Job().Backup, why.Error()))
}

// pause is how long after a job used up its tries another one begins.
const pause = 24 * time.Hour

// Withdrawn makes it a job.Withdrawer: what somebody has cancelled does not come
// again by itself.
func (k Kind) Withdrawn(ctx context.Context, j catalog.Job) error { return k.withdrawn(ctx, j.Backup) }

func (k Kind) withdrawn(ctx context.Context, backup string) error {
	return ended(k.Catalog.CompressionFailed(ctx, backup, "somebody cancelled it"))
}

// ended is fine with a backup that is not to be compressed, or not any more.
func ended(err error) error {
	if errors.Is(err, catalog.ErrState) || errors.Is(err, catalog.ErrNotFound) {
		return nil
	}
	return err
}

// settle clears up, and tells whether the backup is compressed.
func (k Kind) settle(ctx context.Context, h *job.Handle) (done bool, err error) {
	b, repo, err := k.subject(ctx, h)
	if err != nil {
		return false, err
	}
	// In the names of these there may be files and a claim.
	discard := transfer.Spec{Operation: transfer.OperationDiscard, Domain: b.Domain, Backups: []string{b.ID, h.Job().ID}}
	before, err := k.Errand.Started(ctx, h.Job().ID)
	if err != nil {
		return false, err
	}
	if _, err = k.Errand.Run(ctx, h, repo, discard); before { // it was the worker that compresses
		_, err = k.Errand.Run(ctx, h, repo, discard)
	}
	if err != nil {
		return false, err
	}
	found, err := k.Errand.Run(ctx, h, repo, transfer.Spec{Operation: transfer.OperationList, Domain: b.Domain})
	if err != nil {
		return false, err
	}
	for _, s := range found.Backups {
		if s.Backup == b.ID && s.Error == nil && s.Manifest != nil && s.Manifest.Rewriter == h.Job().ID {
			return true, k.record(ctx, h, b, &transfer.Result{Manifest: s.Manifest})
		}
	}
	return false, nil
}
