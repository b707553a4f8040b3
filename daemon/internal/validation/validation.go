// Package validation is the job that tries a backup by starting it: a temporary
// domain runs from overlays on the backup's disks, which a worker serves, so that
// QEMU opens no file of the repository and each block is compared with its
// digest. Package step has what is done with the guest, and what follows of it.
//
// A host that cannot try a backup says nothing about it: only what the guest
// itself does not do, or data that is not what was written, makes it not valid.
// Whatever happens, the domain, the worker and all files of it are removed.
package validation

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/chain"
	"github.com/virtbackup/virtbackup/daemon/internal/errand"
	"github.com/virtbackup/virtbackup/daemon/internal/failure"
	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/daemon/internal/job"
	"github.com/virtbackup/virtbackup/daemon/internal/journal"
	"github.com/virtbackup/virtbackup/daemon/internal/transfer"
	"github.com/virtbackup/virtbackup/daemon/internal/validation/step"
	"github.com/virtbackup/virtbackup/dbus"
)

// Hypervisor is what a validation needs of libvirt.
type Hypervisor interface {
	ByUUID(ctx context.Context, uuid string) (hypervisor.Domain, error)
	HasSecret(ctx context.Context, which hypervisor.Secret) (bool, error)
	StartValidation(ctx context.Context, definition string) error
	EndValidation(ctx context.Context, uuid string) error
	Validations(ctx context.Context) ([]hypervisor.Validation, error)
	State(ctx context.Context, uuid string) (name, reason string, err error)
	Subscribe(ctx context.Context) <-chan hypervisor.Event
	PingAgent(ctx context.Context, uuid string) error
	GuestSystem(ctx context.Context, uuid string) (string, error)
	Execute(ctx context.Context, uuid, path string, arguments []string, input []byte) (hypervisor.Executed, error)
	Screenshot(ctx context.Context, uuid string) ([]byte, error)
}

// Settings are how backups are tried, where neither offering nor domain says.
type Settings struct {
	Enabled  bool          // whether it happens by itself
	Interval time.Duration // between two of the same backup
	Attempts int
	Memory   uint64 // bytes that a temporary domain has at most; 0: no bound
	CPUs     int    // the same; 0: no bound
	EndChain bool   // of a backup that is not valid

	MinimumFree                                 uint64 // bytes that must be free for its overlays
	BootTimeout, CommandTimeout, ScreenshotWait time.Duration
}

// Deps is what a Kind works with.
type Deps struct {
	Catalog    *catalog.Catalog
	Hypervisor Hypervisor
	Errand     errand.Sender
	Settings   func() Settings
	// Wanted returns whether and how the backups of a domain are tried.
	Wanted func(ctx context.Context, domain string) (catalog.Validation, error)
	// BootDirectories are those in which kernels for direct boot may be.
	BootDirectories  func() []string
	Directory        string // for overlays, on a local disk
	RuntimeDirectory string // for sockets
	Log              *slog.Logger
}

// Kind is the kind of job that does it.
type Kind struct{ Deps }

// New makes a Kind.
func New(d Deps) *Kind { return &Kind{d} }

// Request asks to try the job's backup.
type Request struct {
	Steps []string `json:"steps,omitempty"` // in place of those that are set
}

// mostDue is how many are asked for at once; there are more next time.
const mostDue = 100

// Name makes it an upkeep.Chore.
func (*Kind) Name() string { return "validation" }

// Due returns a job for the newest backup of each domain in each repository that
// is to be tried, and was not for so long. Older backups were tried when they
// were the newest; that they stay what they were, their digests tell.
func (k *Kind) Due(ctx context.Context, now time.Time) (due []job.Request, err error) {
	s := k.Settings()
	if !s.Enabled {
		return nil, nil
	}
	backups, err := k.Catalog.DueValidations(ctx, now.Add(-s.Interval), now)
	for _, b := range backups {
		if len(due) == mostDue {
			break
		}
		wanted, err := k.Wanted(ctx, b.Domain)
		if err != nil {
			return due, err
		}
		if !wanted.Validate {
			continue
		}
		r := NewJob(b, Request{})
		r.Attempts = s.Attempts
		due = append(due, r)
	}
	return due, err
}

// NewJob asks to try a backup.
func NewJob(b catalog.Backup, r Request) job.Request {
	return job.Request{Kind: string(dbus.OperationValidate), Domain: b.Domain, Repository: b.Repository, Backup: b.ID, Spec: r}
}

// Again makes it a job.Retrier: another try is about the same.
func (*Kind) Again(j catalog.Job) string { return j.Backup }

// Yields makes it a job.Yielder: what nobody has asked for can wait.
func (*Kind) Yields(j catalog.Job) bool { return j.Origin == catalog.OriginSystem }

// Run tries the backup and records what came of it.
func (k *Kind) Run(ctx context.Context, h *job.Handle) error {
	var r Request
	if err := h.Request(&r); err != nil {
		return err
	}
	b, err := k.Catalog.Backup(ctx, h.Job().Backup)
	if err != nil {
		return failure.Named(err)
	}
	if b.State != chain.Complete {
		return failure.Errorf(dbus.ErrDamaged, "backup %s is %s, and only complete ones are tried", b.ID, b.State)
	}
	started := time.Now()
	report, left, err := k.try(ctx, h, r, b)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		report = unable(err)
	}
	if recorded := k.record(ctx, h, b, report, started); recorded != nil {
		return errors.Join(err, recorded)
	}
	k.attach(ctx, h, b, report)
	switch {
	case report.Verdict == step.NotValid:
		return failure.Errorf(dbus.ErrNotValid, "backup %s is not valid: %s", b.ID, said(report))
	case err != nil:
		return prevented(err)
	case report.Verdict != step.Valid:
		return failure.Errorf(dbus.ErrUnable, "cannot tell whether backup %s is valid: %s", b.ID, said(report))
	}
	return left // which Undo removes
}

// unable is the report on a backup that the host could not try; unless that is
// because of what the repository has of it.
func unable(err error) step.Report {
	if errors.Is(err, dbus.ErrDamaged) {
		return step.Report{Verdict: step.NotValid, Step: stepRead, Cause: err.Error()}
	}
	return step.Report{Verdict: step.Unable, Cause: err.Error()}
}

// prevented names what kept a backup from being tried. What has no name is of this
// host at this moment, as a libvirt that is restarted: another try may go well.
func prevented(err error) error {
	var named *failure.Error
	if err = failure.Named(err); errors.As(err, &named) {
		return err
	}
	return failure.Errorf(dbus.ErrUnable, "%w", err)
}

// said says what decided a report.
func said(r step.Report) string {
	if r.Step == "" {
		return r.Cause
	}
	return r.Step + ": " + r.Cause
}

func (k *Kind) record(ctx context.Context, h *job.Handle, b catalog.Backup, r step.Report, started time.Time) error {
	findings, err := json.Marshal(r.Findings)
	if err != nil {
		return err
	}
	ctx = context.WithoutCancel(ctx)
	err = k.Catalog.RecordValidation(ctx, catalog.ValidationRecord{
		ID: ulid.Make().String(), Backup: b.ID, Job: h.Job().ID, Started: started, Findings: findings,
		ValidationSummary: catalog.ValidationSummary{Result: catalog.ValidationResult(r.Verdict), Step: r.Step, Cause: r.Cause, Finished: time.Now()},
	}, r.Screenshot)
	if err != nil {
		return failure.Named(err)
	}
	switch r.Verdict {
	case step.Valid:
		h.Log(ctx, slog.LevelInfo, fmt.Sprintf("backup %s is valid", b.ID))
	case step.NotValid:
		h.Log(ctx, slog.LevelError, fmt.Sprintf("backup %s is not valid: %s", b.ID, said(r)),
			journal.MessageID, journal.BackupNotValid, "detail", said(r))
		return k.endChain(ctx, b)
	default:
		h.Log(ctx, slog.LevelWarn, fmt.Sprintf("cannot tell whether backup %s is valid: %s", b.ID, said(r)))
	}
	return nil
}

// endChain has the next backup of the domain not build on one that is not valid.
func (k *Kind) endChain(ctx context.Context, b catalog.Backup) error {
	c, err := k.Catalog.Chain(ctx, b.Chain)
	if errors.Is(err, catalog.ErrNotFound) || err == nil && (c.State != chain.Open || !k.Settings().EndChain) {
		return nil
	}
	if err != nil {
		return err
	}
	return k.Catalog.EndChain(ctx, b.Chain, chain.Broken, chain.ValidationFailed)
}

// Undo removes whatever there is of the job. One that somebody cancelled is not
// begun again by itself before its time.
func (k *Kind) Undo(ctx context.Context, h *job.Handle) error {
	if err := k.clear(ctx, h.Job().ID, uuidOf(h.Job().ID)); err != nil {
		return err
	}
	if h.Job().Again {
		return nil
	}
	if errors.Is(h.Failure(), job.ErrCancelled) {
		return k.Withdrawn(ctx, h.Job())
	}
	// One that took too long, or made no progress, did not come to tell it.
	last, err := k.Catalog.Validations(ctx, h.Job().Backup, 1)
	if err != nil || len(last) > 0 && last[0].Job == h.Job().ID && !last[0].Finished.Before(h.Job().Started) {
		return err
	}
	return k.untold(ctx, h.Job(), h.Failure().Error())
}

// Withdrawn makes it a job.Withdrawer: what somebody has cancelled does not come
// again by itself before its time.
func (k *Kind) Withdrawn(ctx context.Context, j catalog.Job) error {
	return k.untold(ctx, j, "somebody cancelled it")
}

// untold records that a backup could not be tried.
func (k *Kind) untold(ctx context.Context, j catalog.Job, why string) error {
	now := time.Now()
	err := k.Catalog.RecordValidation(ctx, catalog.ValidationRecord{
		ID: ulid.Make().String(), Backup: j.Backup, Job: j.ID, Started: now,
		ValidationSummary: catalog.ValidationSummary{Result: catalog.Unable, Cause: why, Finished: now},
	}, nil)
	if errors.Is(err, catalog.ErrNotFound) {
		return nil
	}
	return err
}

// damaged records what the worker found that is not what was written, and makes
// it the reason of a report.
func (k *Kind) damaged(ctx context.Context, h *job.Handle, r step.Report, served []transfer.ServedDisk) (step.Report, error) {
	var errs []error
	told := map[string]bool{}
	for _, d := range served {
		for i, x := range d.Damage {
			text := fmt.Sprintf("%d bytes at %d of disk %s are not what was written, in the image of backup %s", x.Length, x.Offset, d.Target, x.Backup)
			if i == 0 && r.Step != stepRead {
				r = step.Report{Verdict: step.NotValid, Step: stepRead, Cause: text, Findings: r.Findings, Screenshot: r.Screenshot}
				r.Findings = append(r.Findings, step.Finding{Step: stepRead, Verdict: step.NotValid, Cause: text})
			}
			if told[x.Backup] { // where else, verify says
				continue
			}
			told[x.Backup] = true
			h.Log(ctx, slog.LevelError, text, journal.MessageID, journal.BackupDamaged, "damaged", x.Backup, "detail", text)
			if err := k.Catalog.DamagedBackup(context.WithoutCancel(ctx), x.Backup, text); err != nil && !errors.Is(err, catalog.ErrNotFound) && !errors.Is(err, catalog.ErrState) {
				errs = append(errs, err)
			}
		}
	}
	return r, errors.Join(errs...)
}
