// Package scan is the jobs that look at all backups of a repository: one makes
// the catalog know what is there, also on a host that has never seen it; the
// other holds what is there against the catalog, as deep as it is asked to.
package scan

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/chain"
	"github.com/virtbackup/virtbackup/daemon/internal/errand"
	"github.com/virtbackup/virtbackup/daemon/internal/failure"
	"github.com/virtbackup/virtbackup/daemon/internal/job"
	"github.com/virtbackup/virtbackup/daemon/internal/journal"
	"github.com/virtbackup/virtbackup/daemon/internal/repository"
	"github.com/virtbackup/virtbackup/daemon/internal/transfer"
	"github.com/virtbackup/virtbackup/daemon/internal/verification"
	"github.com/virtbackup/virtbackup/dbus"
)

// Request asks to look at all backups of the job's repository.
type Request struct {
	Depth transfer.Depth `json:"depth"`
	// Of a scan: whether backups of other hosts are taken, and whether only to tell.
	ImportForeign bool `json:"import_foreign,omitempty"`
	DryRun        bool `json:"dry_run,omitempty"`
}

// Scan is the kind of job that records the backups that are in a repository and
// that the catalog does not know.
type Scan struct {
	Catalog *catalog.Catalog
	Errand  errand.Sender
}

// Inspect is the kind of job that holds what is in a repository against the
// catalog, and records what is damaged or missing.
type Inspect struct {
	Catalog *catalog.Catalog
	Errand  errand.Sender
}

// found is what a worker found in a repository.
type found struct {
	repository catalog.Repository
	request    Request
	known      map[string]chain.BackupState
	settled    map[string]bool        // was complete before the worker looked, and is
	backups    []transfer.BackupState // what others build on comes before them
	hit        []transfer.Hit
}

const stepLooking = "looking"

// stepData is what was known before the worker looked.
type stepData struct {
	Known map[string]chain.BackupState `json:"known"`
}

func look(ctx context.Context, h *job.Handle, c *catalog.Catalog, e errand.Sender) (found, error) {
	var f found
	if err := h.Request(&f.request); err != nil {
		return f, err
	}
	var err error
	if f.repository, err = c.Repository(ctx, h.Job().Repository); err != nil {
		return f, failure.Named(err)
	}
	// Kept, for the worker may be that of a daemon before this one.
	var before stepData
	if h.Job().Step == "" {
		known, err := c.KnownBackups(ctx, f.repository.ID)
		if err != nil {
			return f, err
		}
		before.Known = known
		if err := h.Step(ctx, stepLooking, before); err != nil {
			return f, err
		}
	} else if err := json.Unmarshal(h.Job().StepData, &before); err != nil {
		return f, fmt.Errorf("cannot read the job's step: %w", err)
	}
	result, err := e.Run(ctx, h, f.repository, transfer.Spec{Operation: transfer.OperationInspect, Depth: f.request.Depth})
	if err != nil {
		return f, err
	}
	f.backups, f.hit = result.Backups, result.Hit
	// Parents are older, and ids ascend with time.
	slices.SortFunc(f.backups, func(a, b transfer.BackupState) int { return strings.Compare(a.Backup, b.Backup) })
	if f.known, err = c.KnownBackups(ctx, f.repository.ID); err != nil {
		return f, err
	}
	// Other jobs went on meanwhile: what was committed since may not have been seen.
	f.settled = map[string]bool{}
	for id, state := range f.known {
		f.settled[id] = state == chain.Complete && before.Known[id] == chain.Complete
	}
	// What was deleted or made since is not for a scan to bring back, or to take from its job.
	f.backups = slices.DeleteFunc(f.backups, func(b transfer.BackupState) bool {
		_, was := before.Known[b.Backup]
		_, is := f.known[b.Backup]
		return was && !is || !is && b.Pin == "" && b.Backup > h.Job().ID
	})
	return f, nil
}

// Run records what is not known yet.
func (k Scan) Run(ctx context.Context, h *job.Handle) error {
	f, err := look(ctx, h, k.Catalog, k.Errand)
	if err != nil {
		return err
	}
	s := scanning{Scan: k, found: f, job: h}
	for _, b := range f.backups {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err := s.take(ctx, b); err != nil {
			return err
		}
	}
	h.Log(ctx, slog.LevelInfo, s.summary())
	return h.SetResult(s.counts)
}

// Undo has nothing to undo: what is known by now is there.
func (Scan) Undo(context.Context, *job.Handle) error { return nil }

type scanning struct {
	Scan
	found
	job    *job.Handle
	counts Counts
}

// Counts are what a scan found, in backups.
type Counts struct {
	Found    int `json:"found"`
	Known    int `json:"known"`    // before
	Imported int `json:"imported"` // or would be
	Damaged  int `json:"damaged"`  // of those imported
	Foreign  int `json:"foreign"`  // of other hosts, and not taken
	Unusable int `json:"unusable"` // without a manifest that can be trusted, or without what they build on
}

func (s *scanning) summary() string {
	c, imported := s.counts, "imported"
	if s.request.DryRun {
		imported = "would be imported"
	}
	text := fmt.Sprintf("%d backups are there: %d were known, %d %s", c.Found, c.Known, c.Imported, imported)
	if c.Damaged > 0 {
		text += fmt.Sprintf(" (%d of them damaged)", c.Damaged)
	}
	if c.Foreign > 0 {
		text += fmt.Sprintf(", %d are of other hosts, and are taken only with import_foreign", c.Foreign)
	}
	if c.Unusable > 0 {
		text += fmt.Sprintf(", %d cannot be used", c.Unusable)
	}
	return text
}

// take imports one backup, or says why not.
func (s *scanning) take(ctx context.Context, b transfer.BackupState) error {
	s.counts.Found++
	if _, known := s.known[b.Backup]; known {
		s.counts.Known++
		return s.again(ctx, b)
	}
	switch {
	case b.Manifest == nil:
		s.counts.Unusable++
		s.job.Log(ctx, slog.LevelWarn, fmt.Sprintf("backup %s of domain %s cannot be used: %s", b.Backup, b.Domain, message(b)))
		return nil
	case b.Pin != "" && !s.request.ImportForeign:
		s.counts.Foreign++
		return nil
	}
	row, err := rowOf(b, s.repository)
	if err != nil {
		return err
	}
	if !s.request.DryRun {
		err = s.Catalog.ImportBackup(ctx, row)
	}
	switch {
	case errors.Is(err, catalog.ErrState):
		s.counts.Unusable++
		s.job.Log(ctx, slog.LevelWarn, fmt.Sprintf("backup %s of domain %q cannot be used: %v", b.Backup, row.DomainName, err))
		return nil
	case errors.Is(err, catalog.ErrExists):
		s.counts.Known++ // by now, or as one of another repository
		return nil
	case err != nil:
		return failure.Named(err)
	}
	s.counts.Imported++
	if row.State == chain.Damaged {
		s.counts.Damaged++
	}
	return nil
}

// again takes a backup of another host as it is now that was imported before, if
// it holds the same as then: its host may have compressed it. That somebody asks
// to import what other hosts made is needed for this too.
func (s *scanning) again(ctx context.Context, b transfer.BackupState) error {
	if b.Pin == "" || b.Manifest == nil || b.Error != nil || !s.request.ImportForeign || s.request.DryRun {
		return nil
	}
	old, err := s.Catalog.Backup(ctx, b.Backup)
	if err != nil || old.Pin == "" || old.Pin == b.Pin {
		return failure.Named(err)
	}
	var before repository.Manifest
	if err := json.Unmarshal(old.Manifest, &before); err != nil {
		return fmt.Errorf("cannot read the manifest of backup %s: %w", b.Backup, err)
	}
	if !sameContent(&before, b.Manifest) {
		s.job.Log(ctx, slog.LevelWarn, fmt.Sprintf("backup %s of domain %s is not what was imported, and is not trusted: delete it, and scan again", b.Backup, b.Domain))
		return nil
	}
	done, err := errand.Rewritten(b.Manifest)
	if err == nil {
		err = s.Catalog.RepinBackup(ctx, done, b.Pin)
	}
	if err != nil {
		return failure.Named(err)
	}
	s.job.Log(ctx, slog.LevelInfo, fmt.Sprintf("backup %s of domain %s was written anew by its host, and holds what it held when it was imported", b.Backup, b.Domain))
	return nil
}

// sameContent tells whether two manifests of a backup vouch for the same disks.
func sameContent(a, b *repository.Manifest) bool {
	if a.Domain.UUID != b.Domain.UUID || a.Chain != b.Chain || a.Parent != b.Parent || a.Created != b.Created || len(a.Disks) != len(b.Disks) {
		return false
	}
	for _, d := range a.Disks {
		other, there := b.Disk(d.Target)
		if !there || other.Size != d.Size || other.DigestRoot != d.DigestRoot || other.Container != d.Container {
			return false
		}
	}
	return true
}

func message(b transfer.BackupState) string {
	if b.Error == nil {
		return "it has no manifest"
	}
	return b.Error.Message
}

// rowOf makes what the catalog knows of a backup of what its manifest says.
func rowOf(b transfer.BackupState, r catalog.Repository) (catalog.Backup, error) {
	m := b.Manifest
	raw, err := json.Marshal(m)
	if err != nil {
		return catalog.Backup{}, err
	}
	row := catalog.Backup{
		ID: m.Backup, Domain: m.Domain.UUID, DomainName: m.Domain.Name, Chain: m.Chain, Parent: m.Parent, Repository: r.ID,
		Kind: chain.Kind(m.Kind), State: chain.Complete, Isolated: m.Isolated, Pin: b.Pin, Consistency: m.Consistency,
		Created: time.UnixMicro(m.Created), Finished: time.UnixMicro(m.Finished), Held: time.Duration(m.Held) * time.Microsecond, Shortfall: m.Shortfall,
		Offering: m.Offering.Name, Manifest: raw, Settings: catalog.Settings{
			Mode: chain.ModeIncremental, Compression: m.Offering.Compression, Level: m.Offering.Level, Quiesce: m.Quiesce,
			QuiescePolicy: string(dbus.QuiesceRequire), Tracking: chain.CBT, Fallback: chain.FallbackDigest,
		},
	}
	if row.Kind == chain.Full {
		row.Cause = chain.Imported
	}
	if b.Error != nil {
		row.State, row.Error = chain.Damaged, b.Error.Message
	}
	for _, d := range m.Disks {
		row.Size += d.Size
		row.Images = append(row.Images, imageOf(m, d))
	}
	return row, nil
}

func imageOf(m *repository.Manifest, d repository.Disk) catalog.Image {
	i := catalog.Image{
		Target: d.Target, Kind: chain.Kind(d.Kind), Tracking: chain.Digest, Changes: chain.Tracking(d.Changes), Source: d.Source, Format: d.Format,
		Size: d.Size, StoredBytes: d.StoredBytes, DataBytes: d.DataBytes, ReadBytes: d.ReadBytes,
	}
	if i.Kind == chain.Full {
		i.Cause = chain.Imported
	}
	return i
}

// Run records what is damaged or missing, and fails if anything is.
func (k Inspect) Run(ctx context.Context, h *job.Handle) error {
	f, err := look(ctx, h, k.Catalog, k.Errand)
	if err != nil {
		return err
	}
	recording := context.WithoutCancel(ctx)
	there := map[string]bool{}
	bad, unknown := []string{}, 0
	for _, b := range f.backups {
		there[b.Backup] = true
		_, known := f.known[b.Backup]
		switch {
		case !known:
			unknown++
			continue
		case !f.settled[b.Backup]:
			continue
		case b.Pin != "": // not one that is trusted, or it would have none
			bad = append(bad, b.Backup)
			err = k.damaged(recording, h, b.Backup, "its manifest is not the one that was trusted")
		case f.request.Depth == transfer.DepthDigests && (b.Error == nil || len(b.Damage) > 0):
			if b.Error != nil {
				bad = append(bad, b.Backup)
			}
			err = verification.Record(recording, k.Catalog, h, &transfer.Result{Backups: []transfer.BackupState{b}, Hit: f.hit, HitKnown: true})
		case b.Error != nil && verification.Damage(b.Error.Class):
			bad = append(bad, b.Backup)
			err = k.damaged(recording, h, b.Backup, b.Error.Message)
		}
		if err != nil {
			return err
		}
	}
	for id, settled := range f.settled {
		if settled && !there[id] {
			bad = append(bad, id)
			if err := k.damaged(recording, h, id, "it is not in the repository any more"); err != nil {
				return err
			}
		}
	}
	if unknown > 0 {
		h.Log(ctx, slog.LevelInfo, fmt.Sprintf("%d backups are not known: virtbackupctl repository scan %s imports them", unknown, f.repository.Name))
	}
	if len(bad) > 0 {
		slices.Sort(bad)
		return failure.Errorf(dbus.ErrDamaged, "%d of %d backups in repository %q cannot be trusted: %s: make new full backups of their domains",
			len(bad), len(f.backups), f.repository.Name, strings.Join(bad[:min(len(bad), mostNamed)], ", "))
	}
	h.Log(ctx, slog.LevelInfo, fmt.Sprintf("%d backups are as they were written, as far as %s say", len(f.backups), f.request.Depth))
	return nil
}

// mostNamed is how many backups an error names at most.
const mostNamed = 10

func (k Inspect) damaged(ctx context.Context, h *job.Handle, id, why string) error {
	h.Log(ctx, slog.LevelError, fmt.Sprintf("backup %s is damaged: %s", id, why),
		journal.MessageID, journal.BackupDamaged, "damaged", id, "detail", why)
	// One may just have been deleted, or merged into another.
	if err := k.Catalog.DamagedBackup(ctx, id, why); err != nil && !errors.Is(err, catalog.ErrNotFound) && !errors.Is(err, catalog.ErrState) {
		return failure.Named(err)
	}
	return nil
}

// Undo has nothing to undo.
func (Inspect) Undo(context.Context, *job.Handle) error { return nil }
