package service

import (
	"context"
	"errors"
	"log/slog"
	"slices"

	"github.com/virtbackup/virtbackup/daemon/internal/bus"
	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/chain"
	"github.com/virtbackup/virtbackup/daemon/internal/compression"
	"github.com/virtbackup/virtbackup/daemon/internal/failure"
	"github.com/virtbackup/virtbackup/daemon/internal/job"
	"github.com/virtbackup/virtbackup/daemon/internal/removal"
	"github.com/virtbackup/virtbackup/daemon/internal/repair"
	"github.com/virtbackup/virtbackup/daemon/internal/restore"
	"github.com/virtbackup/virtbackup/daemon/internal/verification"
	"github.com/virtbackup/virtbackup/dbus"
)

// VerifyChain checks every backup of a chain: those of its newest backup, and so all.
func (s *Service) VerifyChain(ctx context.Context, caller bus.Caller, id string) (string, error) {
	backups, err := s.Catalog.ChainBackups(ctx, id)
	if err != nil {
		return "", failure.Named(err)
	}
	var ids []string
	for _, b := range backups {
		if listed(b.State) {
			ids = append(ids, b.ID)
		}
	}
	if len(ids) == 0 {
		return "", dbus.Errorf(dbus.ErrNotFound, "chain %s has no backup left", id)
	}
	return s.verify(ctx, caller, backups[0], ids)
}

// VerifyBackup checks a backup and all that it builds on.
func (s *Service) VerifyBackup(ctx context.Context, caller bus.Caller, id string) (string, error) {
	b, err := s.Catalog.Backup(ctx, id)
	if err != nil {
		return "", failure.Named(err)
	}
	return s.verify(ctx, caller, b, []string{id})
}

func (s *Service) verify(ctx context.Context, caller bus.Caller, b catalog.Backup, ids []string) (string, error) {
	return s.start(ctx, job.Request{
		Kind: string(dbus.OperationVerify), Domain: b.Domain, Repository: b.Repository, Backup: b.ID, UID: caller.UID,
		Spec: verification.Request{Backups: ids},
	})
}

// RepairBackup repairs a damaged backup.
func (s *Service) RepairBackup(ctx context.Context, caller bus.Caller, id string, o dbus.RepairOptions) (string, error) {
	b, err := s.Catalog.Backup(ctx, id)
	if err != nil {
		return "", failure.Named(err)
	}
	if b.Pin != "" {
		return "", dbus.Errorf(dbus.ErrUnsupported, "backup %s was made by another host: only that one repairs it", id)
	}
	return s.start(ctx, job.Request{
		Kind: string(dbus.OperationRepair), Domain: b.Domain, Repository: b.Repository, Backup: b.ID, UID: caller.UID, Spec: repair.Request{DryRun: o.DryRun},
	})
}

// CompressBackup compresses a backup.
func (s *Service) CompressBackup(ctx context.Context, caller bus.Caller, id string, o dbus.CompressOptions) (string, error) {
	b, err := s.Catalog.Backup(ctx, id)
	if err != nil {
		return "", failure.Named(err)
	}
	if b.State != chain.Complete {
		return "", dbus.Errorf(dbus.ErrBusy, "backup %s is %s, and only complete ones are compressed", id, b.State)
	}
	if b.Pin != "" {
		return "", dbus.Errorf(dbus.ErrUnsupported, "backup %s was made by another host: only that one compresses it", id)
	}
	r := compression.Request{Compression: b.Compression, Level: b.Level}
	if o.Compression != nil {
		r = compression.Request{Compression: string(*o.Compression)}
	} else if b.Compression == string(dbus.CompressionNone) {
		r = compression.Request{Compression: string(dbus.CompressionZstd)}
	}
	if o.Level != nil {
		r.Level = int(*o.Level)
	}
	if r.Compression == string(dbus.CompressionNone) {
		return "", dbus.Errorf(dbus.ErrInvalidArgument, "nothing is compressed by \"none\": say zlib or zstd")
	}
	if err := fit(catalog.Settings{Compression: r.Compression, Level: r.Level}); err != nil {
		return "", err
	}
	j := compression.NewJob(b, r)
	j.UID = caller.UID
	return s.start(ctx, j)
}

// DeleteBackup deletes a backup, and what builds on it when asked to.
func (s *Service) DeleteBackup(ctx context.Context, caller bus.Caller, id string, o dbus.DeleteBackupOptions) ([]string, string, error) {
	b, err := s.Catalog.Backup(ctx, id)
	if err != nil {
		return nil, "", failure.Named(err)
	}
	return s.remove(ctx, caller, b.Chain, []string{id}, o.WithChildren, o.DryRun)
}

// DeleteChain deletes a whole chain.
func (s *Service) DeleteChain(ctx context.Context, caller bus.Caller, id string, o dbus.DeleteChainOptions) ([]string, string, error) {
	backups, err := s.Catalog.ChainBackups(ctx, id)
	if err != nil {
		return nil, "", failure.Named(err)
	}
	var ids []string // the first one may have been merged into the next
	for _, b := range backups {
		ids = append(ids, b.ID)
	}
	if len(ids) == 0 {
		return nil, "", dbus.Errorf(dbus.ErrNotFound, "chain %s has no backup left", id)
	}
	return s.remove(ctx, caller, id, ids, true, o.DryRun)
}

// DeleteDomainBackups deletes all backups of a domain, with a job for each repository.
func (s *Service) DeleteDomainBackups(ctx context.Context, caller bus.Caller, uuid string, o dbus.DeleteDomainBackupsOptions) (all []string, bytes uint64, jobs []string, err error) {
	chains, err := s.Catalog.Chains(ctx, uuid)
	if err != nil {
		return nil, 0, nil, failure.Named(err)
	}
	going := map[string][]string{} // by repository
	for _, c := range chains {
		backups, err := s.Catalog.ChainBackups(ctx, c.ID)
		if err != nil {
			return nil, 0, nil, failure.Named(err)
		}
		if len(backups) == 0 {
			continue
		}
		ids, err := planRemoval(backups, []string{backups[0].ID}, true)
		if err != nil {
			return nil, 0, nil, err
		}
		going[c.Repository] = append(going[c.Repository], ids...)
		for _, b := range backups {
			bytes += b.StoredBytes
		}
	}
	for repository, ids := range going {
		all = append(all, ids...)
		if o.DryRun {
			continue
		}
		id, err := s.start(ctx, job.Request{
			Kind: string(dbus.OperationDelete), Domain: uuid, Repository: repository, UID: caller.UID,
			Backup: ids[len(ids)-1], Spec: removal.Request{Backups: ids},
		})
		if err != nil {
			return nil, 0, nil, err
		}
		jobs = append(jobs, id)
	}
	slices.Sort(all)
	slices.Reverse(all)
	return all, bytes, jobs, nil
}

// planRemoval returns which backups of a chain go with those that are to, what
// builds on others first.
func planRemoval(backups []catalog.Backup, ids []string, withChildren bool) ([]string, error) {
	var links []chain.Backup
	for _, b := range backups {
		links = append(links, b.Link())
	}
	going, err := chain.PlanDelete(links, ids, withChildren)
	switch {
	case errors.Is(err, chain.ErrHasChildren):
		return nil, dbus.Errorf(dbus.ErrBusy, "%v: delete them with it (with_children), or delete them first", err)
	case errors.Is(err, chain.ErrUnknown):
		return nil, dbus.Errorf(dbus.ErrNotFound, "%v", err)
	case errors.Is(err, chain.ErrRunning):
		return nil, dbus.Errorf(dbus.ErrBusy, "%v: wait for its job, or cancel it", err)
	case err != nil:
		return nil, err
	}
	for _, b := range backups {
		if b.Hold != "" && slices.Contains(going, b.ID) {
			return nil, dbus.Errorf(dbus.ErrBusy, "backup %s is held (%s): release it first", b.ID, b.Hold)
		}
	}
	return going, nil
}

func (s *Service) remove(ctx context.Context, caller bus.Caller, chainID string, ids []string, withChildren, dryRun bool) ([]string, string, error) {
	backups, err := s.Catalog.ChainBackups(ctx, chainID)
	if err != nil {
		return nil, "", failure.Named(err)
	}
	going, err := planRemoval(backups, ids, withChildren)
	if err != nil || dryRun {
		return going, "", err
	}
	id, err := s.start(ctx, job.Request{
		Kind: string(dbus.OperationDelete), Domain: backups[0].Domain, Repository: backups[0].Repository, UID: caller.UID,
		Backup: going[len(going)-1], Spec: removal.Request{Backups: going},
	})
	return going, id, err
}

// RestoreBackup restores a backup as a new domain.
func (s *Service) RestoreBackup(ctx context.Context, caller bus.Caller, id, name string, o dbus.RestoreOptions) (string, error) {
	r := restore.Request{
		Backup: id, Name: name, Destination: o.Destination, Disks: o.Disks,
		KeepMACs: o.KeepMACs, DropInterfaces: o.DropInterfaces, Start: o.Start,
	}
	return s.restore(ctx, caller, r)
}

// RestoreInPlace writes a backup over its domain's disks.
func (s *Service) RestoreInPlace(ctx context.Context, caller bus.Caller, id string, o dbus.RestoreInPlaceOptions) (string, error) {
	return s.restore(ctx, caller, restore.Request{Backup: id, InPlace: true, Disks: o.Disks, Start: o.Start})
}

// restore refuses at once what the plan refuses, and starts the job otherwise.
func (s *Service) restore(ctx context.Context, caller bus.Caller, r restore.Request) (string, error) {
	b, err := s.Catalog.Backup(ctx, r.Backup)
	if err != nil {
		return "", failure.Named(err)
	}
	if _, err := s.Restore.Plan(ctx, r); err != nil {
		return "", failure.Named(err)
	}
	kind := dbus.OperationRestore
	if r.InPlace {
		kind = dbus.OperationRestoreInPlace
	}
	return s.start(ctx, job.Request{
		Kind: string(kind), Domain: b.Domain, Repository: b.Repository, Backup: b.ID, UID: caller.UID, Spec: r,
	})
}

// PlanRestore tells what a restore would do. What would refuse it is part of the answer.
func (s *Service) PlanRestore(ctx context.Context, id string, o dbus.PlanRestoreOptions) (dbus.RestorePlan, error) {
	plan, err := s.Restore.Plan(ctx, restore.Request{
		Backup: id, Name: o.Name, InPlace: o.InPlace, Destination: o.Destination, Disks: o.Disks,
		KeepMACs: o.KeepMACs, DropInterfaces: o.DropInterfaces, Start: o.Start,
	})
	answer := dbus.RestorePlan{
		InPlace: o.InPlace, DomainName: plan.DomainName, DomainUUID: plan.DomainUUID,
		Interfaces: plan.Interfaces, Warnings: plan.Warnings,
	}
	for _, d := range plan.Disks {
		answer.Disks = append(answer.Disks, dbus.PlanDisk{
			Target: d.Target, Destination: d.Destination, Format: d.Format, Size: d.Size, StoredBytes: d.StoredBytes, Images: d.Backups,
		})
	}
	var refused *restore.RefusedError
	if errors.As(err, &refused) {
		answer.Refusals = refused.Reasons
		return answer, nil
	}
	return answer, failure.Named(err)
}

// CancelJob asks a job to end.
func (s *Service) CancelJob(ctx context.Context, caller bus.Caller, id string) error {
	if err := s.Jobs.Cancel(ctx, id); errors.Is(err, catalog.ErrState) {
		return dbus.Errorf(dbus.ErrBusy, "job %s has ended already", id)
	} else if err != nil {
		return failure.Named(err)
	}
	s.Log.Info("asked a job to end", "job", id, "uid", caller.UID)
	return nil
}

// JobLog returns the newest messages of a job, oldest first.
func (s *Service) JobLog(ctx context.Context, id string, limit int) ([]dbus.LogMessage, error) {
	list, err := s.Catalog.JobMessages(ctx, id)
	if err != nil {
		return nil, failure.Named(err)
	}
	if limit > 0 && len(list) > limit {
		list = list[len(list)-limit:]
	}
	var all []dbus.LogMessage
	for _, m := range list {
		all = append(all, dbus.LogMessage{Time: m.Time, Level: levelName(m.Level), Message: m.Text})
	}
	return all, nil
}

// levelName names a level as the journal does.
func levelName(l slog.Level) string {
	switch {
	case l >= slog.LevelError:
		return "err"
	case l >= slog.LevelWarn:
		return "warning"
	case l >= slog.LevelInfo:
		return "info"
	}
	return "debug"
}
