package validation

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/errand"
	"github.com/virtbackup/virtbackup/daemon/internal/failure"
	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/daemon/internal/job"
	"github.com/virtbackup/virtbackup/daemon/internal/repository"
	"github.com/virtbackup/virtbackup/daemon/internal/transfer"
	"github.com/virtbackup/virtbackup/daemon/internal/validation/step"
	"github.com/virtbackup/virtbackup/dbus"
)

const (
	// stepTrying is recorded before anything is made.
	stepTrying = "trying"
	// stepRead is the name under which damage is told: it decides before any step.
	stepRead = "read"

	definitionName = "domain.xml"
	nvramName      = "nvram"

	// startLimit bounds how long libvirt may take to start or end a domain.
	startLimit = 2 * time.Minute
	// endAgain is how long after libvirt could not end a domain it is asked again.
	endAgain = time.Second
	// clearLimit bounds how long it takes to clear up once it is over.
	clearLimit = 5 * time.Minute
)

// Phases, beside the names of the steps.
const (
	phaseStarting = "starting"
	phaseEnding   = "ending"
)

// trial is one try.
type trial struct {
	*Kind
	job      *job.Handle
	backup   catalog.Backup
	manifest repository.Manifest
	place
	settings Settings
	wanted   catalog.Validation
	started  time.Time // the domain
}

// try tries a backup, and clears up. That something is left says nothing about
// the backup.
func (k *Kind) try(ctx context.Context, h *job.Handle, r Request, b catalog.Backup) (report step.Report, left, err error) {
	t := &trial{Kind: k, job: h, backup: b, place: k.place(h.Job().ID), settings: k.Settings()}
	if err := json.Unmarshal(b.Manifest, &t.manifest); err != nil {
		return report, nil, fmt.Errorf("cannot read the manifest of backup %s: %w", b.ID, err)
	}
	if t.wanted, err = k.Wanted(ctx, b.Domain); err != nil {
		return report, nil, err
	}
	if len(r.Steps) > 0 {
		t.wanted.Steps = r.Steps
	}
	// A daemon before this one may have begun: what is left of that is of no use.
	if h.Job().Step != "" {
		if err := k.clear(ctx, h.Job().ID, t.uuid); err != nil {
			return report, nil, err
		}
	}
	if err := h.Step(ctx, stepTrying, nil); err != nil {
		return report, nil, err
	}
	defer func() { left = t.end(ctx) }()
	if err := t.possible(ctx); err != nil {
		return report, nil, err
	}
	if err := t.make(); err != nil {
		return report, nil, err
	}
	report, err = t.serve(ctx)
	return report, nil, err
}

// end clears up. A daemon that goes down ends the guest, and leaves the rest to
// the next one.
func (t *trial) end(ctx context.Context) error {
	detached := errors.Is(context.Cause(ctx), job.ErrDetach)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), clearLimit)
	defer cancel()
	if detached {
		return t.Hypervisor.EndValidation(ctx, t.uuid)
	}
	return t.clear(ctx, t.job.Job().ID, t.uuid)
}

// possible refuses what cannot be tried on this host.
func (t *trial) possible(ctx context.Context) error {
	for _, d := range t.manifest.Disks {
		if d.Container != "" {
			return failure.Errorf(dbus.ErrUnsupported, "disk %s is encrypted, and is stored as it is: backups of such disks cannot be tried", d.Target)
		}
	}
	for _, s := range t.manifest.Secrets {
		known, err := t.Hypervisor.HasSecret(ctx, hypervisor.Secret{UUID: s.UUID, Usage: s.Usage})
		if err != nil {
			return err
		}
		if !known {
			return failure.Errorf(dbus.ErrUnsupported, "it needs libvirt's secret %s%s, which is not here", s.UUID, s.Usage)
		}
	}
	return t.free(t.settings.MinimumFree)
}

// serve has the disks served, and the domain started on them.
func (t *trial) serve(ctx context.Context) (report step.Report, err error) {
	uid, gid, err := hypervisor.User()
	if err != nil {
		return report, err
	}
	owner := transfer.Owner{UID: &uid, GID: &gid}
	spec := &transfer.ServeSpec{Backup: t.backup.ID, Owner: owner, Files: t.files(owner)}
	for _, d := range t.manifest.Disks {
		spec.Disks = append(spec.Disks, transfer.ServeDisk{Target: d.Target, Socket: t.socket(d.Target)})
	}
	repo, err := t.Catalog.Repository(ctx, t.backup.Repository)
	if err != nil {
		return report, err
	}
	t.job.Waits(phaseStarting)
	serving, err := t.Errand.Serve(ctx, t.job, repo, transfer.Spec{Domain: t.backup.Domain, Serve: spec})
	if err != nil {
		return report, err
	}
	report, err = t.guest(ctx, serving, uid, gid)
	if ctx.Err() != nil {
		return report, context.Cause(ctx)
	}
	t.job.Waits(phaseEnding)
	// First who reads, then who serves: a QEMU without its disks says nothing.
	if err := t.endDomain(ctx, t.uuid); err != nil {
		t.job.Logger().WarnContext(ctx, "cannot end the domain of a validation; it is tried again", "error", err)
	}
	result, stopped := serving.Stop(ctx)
	if result == nil {
		return report, errors.Join(err, stopped)
	}
	found, recorded := t.damaged(ctx, t.job, report, result.Served)
	if found.Step == stepRead {
		return found, recorded
	}
	// A guest that got no answer from the repository ran on something else than
	// the backup: whatever the steps found says nothing.
	return report, errors.Join(err, recorded, stopped)
}

// guest starts the domain and lets the steps try it.
func (t *trial) guest(ctx context.Context, serving *errand.Serving, uid, gid int) (report step.Report, err error) {
	for _, d := range t.manifest.Disks {
		if err := hypervisor.MakeImage(ctx, t.overlay(d.Target), d.Size, uid, gid); err != nil {
			return report, err
		}
	}
	if err := t.giveTPM(); err != nil {
		return report, err
	}
	definition, err := t.definition(ctx)
	if err != nil {
		return report, err
	}
	watched, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	g := t.newGuest(watched, serving, cancel)
	go t.watchSpace(watched, g, cancel)
	starting, done := context.WithTimeout(watched, startLimit)
	err = t.Hypervisor.StartValidation(starting, definition)
	done()
	if err != nil {
		if cause := context.Cause(watched); cause != nil { // it is not libvirt that is to blame
			return report, cause
		}
		return report, err
	}
	t.started = time.Now()
	steps, err := t.steps()
	if err != nil {
		return report, err
	}
	return step.Run(watched, g, steps, t.job.Waits)
}

// maximumDefinition bounds a definition, in bytes; libvirt's own are far below.
const maximumDefinition = 4 << 20

func readAtMost(path string, most int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	content, err := io.ReadAll(io.LimitReader(f, most+1))
	if err == nil && int64(len(content)) > most {
		err = fmt.Errorf("it has more than %d bytes", most)
	}
	return content, err
}

// definition is that of the temporary domain.
func (t *trial) definition(ctx context.Context) (string, error) {
	document, err := readAtMost(filepath.Join(t.directory, definitionName), maximumDefinition)
	if err != nil {
		return "", fmt.Errorf("cannot read the domain's definition: %w", err)
	}
	v := hypervisor.ValidationDomain{
		Job: t.job.Job().ID, Backup: t.backup.ID, UUID: t.uuid, Memory: t.settings.Memory, CPUs: t.settings.CPUs,
		Disks: map[string]hypervisor.ValidationDisk{}, BootDirectories: t.BootDirectories(),
	}
	for _, d := range t.manifest.Disks {
		v.Disks[d.Target] = hypervisor.ValidationDisk{Overlay: t.overlay(d.Target), Socket: t.socket(d.Target)}
	}
	v.NVRAM = filepath.Join(t.directory, nvramName) // where libvirt makes one if the backup has none
	// What the domain itself boots from is no secret to its backup.
	if d, err := t.Hypervisor.ByUUID(ctx, t.backup.Domain); err == nil {
		v.BootFiles = d.BootFiles
	}
	definition, err := hypervisor.ValidationDefinition(document, v)
	if err != nil {
		return "", failure.Errorf(dbus.ErrUnsupported, "%w", err)
	}
	return definition, nil
}

// steps are those that are wanted.
func (t *trial) steps() ([]step.Step, error) {
	w := t.wanted
	s := step.Settings{
		BootTimeout: t.settings.BootTimeout, Command: w.Command, Arguments: w.Arguments, CommandTimeout: t.settings.CommandTimeout,
		ScreenshotWait: t.settings.ScreenshotWait,
	}
	for to, from := range map[*time.Duration]time.Duration{
		&s.BootTimeout: w.BootTimeout, &s.CommandTimeout: w.CommandTimeout, &s.ScreenshotWait: w.ScreenshotWait,
	} {
		if from > 0 {
			*to = from
		}
	}
	var err error
	if w.Expected != "" {
		if s.Expected, err = base64.StdEncoding.DecodeString(w.Expected); err != nil {
			return nil, fmt.Errorf("cannot read what the command is to write: %w", err)
		}
	}
	if s.Ports, err = step.ParsePorts(w.Ports); err != nil {
		return nil, err
	}
	return step.New(w.Steps, s, t.started)
}
