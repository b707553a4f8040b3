package service

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/virtbackup/virtbackup/daemon/internal/backup"
	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/failure"
	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/dbus"
)

// States of a domain that libvirt does not tell.
const (
	stateUndefined = "undefined" // known only by its backups
	stateUnknown   = "unknown"   // libvirt does not answer
)

// view is what domains are described from, read once for all of them.
type view struct {
	live      map[string]hypervisor.Domain // by UUID
	libvirt   error                        // why that may be out of date
	summaries map[string]catalog.Summary   // by UUID
	offerings map[string]catalog.Offering  // by name
	jobs      map[string]string            // by domain: the job at work on it
	due       due
}

// view reads the view of one domain, or of all for "".
func (s *Service) view(ctx context.Context, uuid string) (view, error) {
	v := view{summaries: map[string]catalog.Summary{}, offerings: map[string]catalog.Offering{}, jobs: map[string]string{}}
	s.mu.Lock()
	v.live, v.libvirt = s.domains, s.libvirt // the map is replaced, never changed
	s.mu.Unlock()
	summaries, err := s.Catalog.Summaries(ctx, uuid)
	if err != nil {
		return v, err
	}
	offerings, err := s.Catalog.Offerings(ctx)
	if err != nil {
		return v, err
	}
	for _, o := range offerings {
		v.offerings[o.Name] = o
	}
	for _, j := range s.Jobs.Active() {
		if j.Domain != "" && j.State != catalog.JobQueued {
			v.jobs[j.Domain] = j.ID
		}
	}
	for _, one := range summaries {
		v.summaries[one.UUID] = one
	}
	v.due, err = s.due(ctx)
	return v, err
}

// uuids are those of libvirt's domains, and of those known only by their backups.
func (v view) uuids() []string {
	all := maps.Clone(v.summaries)
	for uuid := range v.live {
		all[uuid] = catalog.Summary{}
	}
	return slices.Sorted(maps.Keys(all))
}

// domain describes a domain without its disks; catalog.ErrNotFound when nobody knows it.
func (v view) domain(uuid string) (dbus.DomainProperties, error) {
	known, inCatalog := v.summaries[uuid]
	live, isLive := v.live[uuid]
	if !inCatalog && !isLive {
		return dbus.DomainProperties{}, catalog.ErrNotFound
	}
	p := dbus.DomainProperties{
		UUID: uuid, Name: known.Name, Offering: known.Offering, LastBackup: known.LastBackup, LastBackupTime: known.LastBackupTime,
		Chain: known.Chain, ChainLength: uint32(known.ChainLength), Job: v.jobs[uuid], State: live.State, Protection: protection(known),
		NextRun: v.due.of(uuid, known.Offering),
	}
	if known.LastJob == catalog.JobFailed {
		p.LastError = known.LastError
	}
	if isLive {
		p.Name = live.Name
	}
	switch {
	case v.libvirt != nil:
		p.State = stateUnknown
	case !isLive:
		p.State = stateUndefined
	}
	return p, nil
}

func protection(s catalog.Summary) dbus.Protection {
	switch {
	case s.Offering == "":
		return dbus.ProtectionUnassigned
	case s.LastJob == catalog.JobFailed:
		return dbus.ProtectionFailing
	case s.LastBackup == "":
		return dbus.ProtectionPending
	}
	return dbus.ProtectionProtected
}

// disks describes a domain's disks, and which of them backups have.
func (v view) disks(uuid string) (all []dbus.DomainDisk, err error) {
	known := v.summaries[uuid]
	var offering *catalog.Offering
	if o, ok := v.offerings[known.Offering]; ok {
		offering = &o
	}
	e, err := effectiveOf(offering, known.Domain)
	if err != nil {
		return nil, err
	}
	for _, disk := range v.live[uuid].Disks {
		left := backup.Skip(disk, e.Settings, v.live[uuid].Active)
		all = append(all, dbus.DomainDisk{
			Target: disk.Target, Source: disk.Source, Format: disk.Format, Size: disk.Capacity, Included: left == "", Cause: left,
		})
	}
	return all, nil
}

// record describes a domain.
func (v view) record(uuid string) (dbus.DomainProperties, error) {
	p, err := v.domain(uuid)
	if err != nil {
		return p, err
	}
	p.Disks, err = v.disks(uuid)
	return p, err
}

func (s *Service) domainRecord(ctx context.Context, uuid string) (dbus.DomainProperties, error) {
	v, err := s.view(ctx, uuid)
	if err != nil {
		return dbus.DomainProperties{}, err
	}
	return v.record(uuid)
}

// allDomains tells which domains there are, and no more: there may be a thousand,
// and who wants to know about them asks ListDomains.
func (s *Service) allDomains(ctx context.Context) ([]dbus.Record, error) {
	known, err := s.Catalog.Domains(ctx, "")
	if err != nil {
		return nil, err
	}
	uuids := map[string]bool{}
	for _, d := range known {
		uuids[d.UUID] = true
	}
	s.mu.Lock()
	for uuid := range s.domains {
		uuids[uuid] = true
	}
	s.mu.Unlock()
	var all []dbus.Record
	for uuid := range uuids {
		all = append(all, dbus.Bare{Kind: dbus.KindDomain, ID: uuid})
	}
	return all, nil
}

// ListDomains returns one page of domains.
func (s *Service) ListDomains(ctx context.Context, f dbus.DomainFilter, cursor string, limit int) (dbus.DomainPage, error) {
	page := dbus.DomainPage{Counts: map[dbus.Protection]uint32{}}
	offering, err := s.offeringName(ctx, f.Offering)
	if err != nil {
		return page, err
	}
	v, err := s.view(ctx, "")
	if err != nil {
		return page, failure.Named(err)
	}
	after := place{}
	if cursor != "" {
		if after, err = parsePlace(cursor); err != nil {
			return page, err
		}
	}
	var all []dbus.DomainProperties
	for _, uuid := range v.uuids() {
		p, err := v.domain(uuid)
		if err != nil || offering != "" && p.Offering != offering || f.Protection != nil && p.Protection != *f.Protection {
			continue
		}
		page.Counts[p.Protection]++
		if cursor == "" || placeOf(p).compare(after) > 0 {
			all = append(all, p)
		}
	}
	slices.SortFunc(all, func(a, b dbus.DomainProperties) int { return placeOf(a).compare(placeOf(b)) })
	if len(all) > limit {
		all = all[:limit]
		page.Next = placeOf(all[limit-1]).String()
	}
	for i := range all {
		if all[i].Disks, err = v.disks(all[i].UUID); err != nil {
			return page, failure.Named(err)
		}
	}
	page.Domains = all
	return page, nil
}

// place is where a domain stands in the list. It is the cursor: also what has
// another place meanwhile is on no page twice for that.
type place struct {
	rank       int // of its protection, the worst first
	uuid, name string
}

func placeOf(p dbus.DomainProperties) place {
	return place{slices.Index(dbus.Protection("").Values(), string(p.Protection)), p.UUID, p.Name}
}

func (p place) compare(q place) int {
	return cmp.Or(cmp.Compare(p.rank, q.rank), cmp.Compare(p.name, q.name), cmp.Compare(p.uuid, q.uuid))
}

func (p place) String() string { return strconv.Itoa(p.rank) + " " + p.uuid + " " + p.name }

func parsePlace(cursor string) (place, error) {
	parts := strings.SplitN(cursor, " ", 3)
	if len(parts) == 3 {
		if rank, err := strconv.Atoi(parts[0]); err == nil {
			return place{rank, parts[1], parts[2]}, nil
		}
	}
	return place{}, dbus.Errorf(dbus.ErrInvalidArgument, "%q is no cursor of a list of domains", cursor)
}
