package service

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/backup"
	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/chain"
	"github.com/virtbackup/virtbackup/daemon/internal/job"
	"github.com/virtbackup/virtbackup/daemon/internal/supervise"
	"github.com/virtbackup/virtbackup/dbus"
)

// listed tells whether backups in a state are shown: those that run or failed
// are jobs to people, not backups.
func listed(s chain.BackupState) bool { return s != chain.Running && s != chain.Failed }

func (s *Service) repositories(ctx context.Context) ([]dbus.Record, error) {
	list, err := s.Catalog.Repositories(ctx)
	var all []dbus.Record
	for _, r := range list {
		all = append(all, s.repositoryRecord(r))
	}
	return all, err
}

func (s *Service) repositoryRecord(r catalog.Repository) dbus.RepositoryProperties {
	return dbus.RepositoryProperties{
		ID: r.ID, Name: r.Name, Type: r.Type, Path: r.Path, State: dbus.RepositoryState(r.State), StateMessage: r.Problem, StateSince: r.Since,
		TotalBytes: r.Total, FreeBytes: r.Free, MinimumFree: r.MinimumFree, Checked: r.Checked, Created: r.Created,
		Address: r.Address, FileSystem: r.FileSystem, MountOptions: r.Options, HasCredentials: r.Credentials, Mounted: s.Storage != nil && s.Storage.Mounted(r.ID),
	}
}

func (s *Service) offerings(ctx context.Context) ([]dbus.Record, error) {
	list, err := s.Catalog.Offerings(ctx)
	if err != nil {
		return nil, err
	}
	return records(ctx, list, s.offeringRecord)
}

// records makes records of a list.
func records[T any, R dbus.Record](ctx context.Context, list []T, record func(context.Context, T) (R, error)) ([]dbus.Record, error) {
	var all []dbus.Record
	for _, one := range list {
		r, err := record(ctx, one)
		if errors.Is(err, catalog.ErrNotFound) {
			continue // gone meanwhile
		} else if err != nil {
			return nil, err
		}
		all = append(all, r)
	}
	return all, nil
}

func (s *Service) offeringRecord(ctx context.Context, o catalog.Offering) (dbus.OfferingProperties, error) {
	r, err := s.Catalog.Repository(ctx, o.Repository)
	if err != nil {
		return dbus.OfferingProperties{}, err
	}
	assigned, err := s.Catalog.Domains(ctx, o.Name)
	if err != nil {
		return dbus.OfferingProperties{}, err
	}
	p := dbus.OfferingProperties{
		ID: o.ID, Name: o.Name, Repository: r.Name, Mode: dbus.Mode(o.Mode), Compression: dbus.Compression(o.Compression),
		CompressionLevel: uint32(o.Level), Threads: uint32(o.Threads), ChainSize: uint32(o.ChainSize),
		Quiesce: dbus.Quiesce(o.Quiesce), QuiescePolicy: dbus.QuiescePolicy(o.QuiescePolicy),
		Tracking: dbus.Tracking(o.Tracking), Fallback: dbus.Fallback(o.Fallback), Created: o.Created,
		Description: o.Description, Origin: o.Origin, Disabled: o.Disabled, Users: o.Users,
		AllowUserBackups: o.Backups, AllowUserSchedules: o.Schedules, AllowQuickRestore: o.QuickRestore, AllowFileExtraction: o.FileExtraction,
		Validate: o.Validate, ValidationSteps: o.Steps, ValidationBootTimeout: seconds(o.BootTimeout),
		ValidationCommand: o.Command, ValidationArguments: o.Arguments, ValidationExpected: o.Expected,
		ValidationCommandTimeout: seconds(o.CommandTimeout), ValidationScreenshotWait: seconds(o.ScreenshotWait), ValidationPorts: o.Ports,
		CompressionTime: dbus.CompressionTime(o.CompressionTime),
		IncludeDisks:    o.Include, ExcludeDisks: o.Exclude, VolatileDisks: o.Volatile,
		KeepLast: uint32(o.Last), KeepHourly: uint32(o.Hourly), KeepDaily: uint32(o.Daily),
		KeepWeekly: uint32(o.Weekly), KeepMonthly: uint32(o.Monthly), KeepYearly: uint32(o.Yearly),
	}
	for _, d := range assigned {
		p.Domains = append(p.Domains, d.UUID)
	}
	return p, nil
}

// names looks up what things are called that records tell of, each once.
type names struct {
	service      *Service
	domains      map[string]string // by UUID; "" for one that is not known
	repositories map[string]string // by id
}

func (s *Service) newNames() *names {
	return &names{s, map[string]string{}, map[string]string{}}
}

// domain returns the name of a domain; "" when it is not known.
func (n *names) domain(ctx context.Context, uuid string) string {
	name, ok := n.domains[uuid]
	if ok || uuid == "" {
		return name
	}
	if d, known, _ := n.service.domain(uuid); known {
		name = d.Name
	} else if d, err := n.service.Catalog.Domain(ctx, uuid); err == nil {
		name = d.Name
	}
	n.domains[uuid] = name
	return name
}

func (n *names) repository(ctx context.Context, id string) (string, error) {
	if name, ok := n.repositories[id]; ok {
		return name, nil
	}
	r, err := n.service.Catalog.Repository(ctx, id)
	if err == nil {
		n.repositories[id] = r.Name
	}
	return r.Name, err
}

func (n *names) chain(ctx context.Context, c catalog.Chain, links []catalog.Link) (dbus.ChainProperties, error) {
	repository, err := n.repository(ctx, c.Repository)
	p := dbus.ChainProperties{
		ID: c.ID, DomainUUID: c.Domain, DomainName: n.domain(ctx, c.Domain), Repository: repository, Offering: c.Offering,
		State: dbus.ChainState(c.State), Cause: string(c.Cause), Created: c.Created,
	}
	for _, b := range links {
		if listed(b.State) {
			p.Length++
			p.Backups = append(p.Backups, b.ID)
			p.StoredBytes += b.StoredBytes
		}
	}
	return p, err
}

func (n *names) backup(ctx context.Context, b catalog.Backup, children []string) (dbus.BackupProperties, error) {
	repositoryName, err := n.repository(ctx, b.Repository)
	if err != nil {
		return dbus.BackupProperties{}, err
	}
	p := dbus.BackupProperties{
		ID: b.ID, DomainUUID: b.Domain, DomainName: b.DomainName, Repository: repositoryName, Children: children, Offering: b.Offering,
		Chain: b.Chain, Parent: b.Parent, Kind: dbus.BackupKind(b.Kind), Isolated: b.Isolated,
		State: dbus.BackupState(b.State), Consistency: dbus.Consistency(b.Consistency), Quiesce: dbus.Quiesce(b.Quiesce),
		Created: b.Created, Finished: b.Finished, SizeBytes: b.Size, StoredBytes: b.StoredBytes, DataBytes: b.DataBytes,
		Compression: dbus.Compression(b.Compression), Verified: b.Verified,
		HeldUsec: uint64(b.Held.Microseconds()), Shortfall: b.Shortfall, Hold: b.Hold,
	}
	p.ValidationResult, p.Validated = dbus.ValidationResult(b.Validation.Result), b.Validation.Finished
	p.ValidationStep, p.ValidationCause = b.Validation.Step, b.Validation.Cause
	p.CompressionState, p.CompressionError = dbus.CompressionState(b.CompressionState), b.CompressionError
	if b.CompressionTime == string(dbus.CompressionDeferred) && b.CompressionState != catalog.CompressionDone {
		p.Compression = dbus.CompressionNone
	}
	if b.Cause != "" {
		p.Causes = append(p.Causes, string(b.Cause))
	}
	for _, i := range b.Images {
		p.Disks = append(p.Disks, dbus.BackupDisk{
			Target: i.Target, File: i.Target + ".qcow2", Format: i.Format, Size: i.Size, StoredBytes: i.StoredBytes,
			DataBytes: i.DataBytes, ReadBytes: i.ReadBytes, Kind: dbus.BackupKind(i.Kind), Changes: dbus.Tracking(i.Changes),
			Tracking: dbus.Tracking(i.Tracking), Cause: string(i.Cause),
		})
		p.ReadBytes += i.ReadBytes
		if i.Cause != "" && i.Cause != b.Cause {
			p.Causes = append(p.Causes, i.Target+": "+string(i.Cause))
		}
	}
	if b.State == chain.Damaged {
		damage, err := n.service.Catalog.Damage(ctx, b.ID)
		if err != nil {
			return p, err
		}
		for _, d := range damage {
			p.Damage = append(p.Damage, dbus.BackupDamage{Target: d.Target, Offset: d.Offset, Length: d.Length, Image: d.Image, Donor: d.Donor})
		}
	}
	if b.Manifest != nil {
		var m struct{ Host, Version string } // of repository.Manifest
		if err := json.Unmarshal(b.Manifest, &m); err != nil {
			return p, err
		}
		p.Host, p.Version = m.Host, m.Version
	}
	return p, nil
}

func (s *Service) jobs(ctx context.Context) ([]dbus.Record, error) {
	statuses, err := s.managed(ctx)
	if err != nil {
		return nil, err
	}
	warnings, err := s.Catalog.JobWarnings(ctx, each(statuses, func(st job.Status) string { return st.ID }))
	if err != nil {
		return nil, err
	}
	names := s.newNames()
	return records(ctx, statuses, func(ctx context.Context, st job.Status) (dbus.JobProperties, error) {
		return names.job(ctx, st, warnings[st.ID])
	})
}

// managed returns the jobs that are managed objects: the live ones and the
// newest of those that ended.
func (s *Service) managed(ctx context.Context) ([]job.Status, error) {
	list, err := s.Catalog.ListJobs(ctx, catalog.JobFilter{}, catalog.Page{Limit: managedJobs})
	if err != nil {
		return nil, err
	}
	statuses := s.Jobs.Active()
	for _, j := range list {
		if !slices.ContainsFunc(statuses, func(st job.Status) bool { return st.ID == j.ID }) {
			statuses = append(statuses, job.Status{Job: j})
		}
	}
	return statuses, nil
}

func (n *names) job(ctx context.Context, st job.Status, warnings []string) (dbus.JobProperties, error) {
	p := dbus.JobProperties{
		ID: st.ID, Operation: dbus.Operation(st.Kind), State: dbus.JobState(st.State), Phase: st.Phase,
		BytesDone: st.Done, BytesTotal: st.Total, Rate: uint64(st.Rate), DomainUUID: st.Domain, Backup: st.Backup,
		ErrorMessage: st.ErrorMessage, UID: st.UID, Waiting: st.Waiting, Priority: uint32(st.Priority), Origin: dbus.JobOrigin(st.Origin),
		Schedule: st.Schedule, Parent: st.Parent, Attempt: uint32(st.Attempt), Attempts: uint32(st.Attempts), NextTry: st.NextTry, Unit: supervise.UnitName(st.ID),
		Created: st.Created, Started: st.Started, Finished: st.Finished,
	}
	if st.ErrorName != "" {
		p.Error = dbus.ErrorName("org.virtbackup1.Error." + st.ErrorName)
	}
	switch {
	case st.State == catalog.JobSucceeded:
		p.Progress = 1
	case st.Total > 0:
		p.Progress = min(1, float64(st.Done)/float64(st.Total))
	}
	if st.ETA > 0 {
		p.ETA = time.Now().Add(st.ETA)
	}
	p.DomainName, p.Warnings = n.domain(ctx, st.Domain), warnings
	if name, err := n.repository(ctx, st.Repository); err == nil { // it may be gone
		p.Repository = name
	}
	if st.Kind == string(dbus.OperationBackup) {
		var r backup.Request
		if err := json.Unmarshal(st.Spec, &r); err != nil {
			return p, err
		}
		p.Offering = r.Offering
	}
	return p, nil
}
