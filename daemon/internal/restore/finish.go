package restore

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"

	"github.com/virtbackup/virtbackup/daemon/internal/chain"
	"github.com/virtbackup/virtbackup/daemon/internal/failure"
	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/daemon/internal/job"
	"github.com/virtbackup/virtbackup/dbus"
)

// define puts the files of a new domain into place and defines it.
func (k *Kind) define(ctx context.Context, h *job.Handle, r Request, s state) error {
	_, err := k.Hypervisor.ByUUID(ctx, s.Plan.DomainUUID)
	if errors.Is(err, hypervisor.ErrNoDomain) {
		err = k.defineNew(ctx, h, r, s)
	}
	if err != nil {
		return err
	}
	// From here on it is somebody's domain, who may have started it: nothing is taken back.
	if err := h.Step(ctx, stepPlaced, s); err != nil {
		return err
	}
	return k.settled(ctx, h, r, s)
}

// newDefinition makes the new domain's definition from the one that a worker
// restored, and tells what is left out.
func (k *Kind) newDefinition(r Request, p Plan) (definition string, dropped []string, err error) {
	document, err := definitionOf(p)
	if err != nil {
		return "", nil, err
	}
	changes := hypervisor.Changes{
		Name: p.DomainName, UUID: p.DomainUUID, KeepMACs: r.KeepMACs, DropInterfaces: r.DropInterfaces,
		Disks: map[string]hypervisor.NewDisk{}, SkipOtherDisks: true, BootDirectories: k.Destinations(),
	}
	for _, d := range p.Disks {
		changes.Disks[d.Target] = hypervisor.NewDisk{Path: d.Destination, Format: d.opened(), Encryption: d.Encryption}
	}
	for _, f := range p.Files {
		if f.Name == nvramName {
			changes.NVRAM = f.Destination
		}
	}
	return hypervisor.NewDefinition(document, changes)
}

func (k *Kind) defineNew(ctx context.Context, h *job.Handle, r Request, s state) error {
	definition, dropped, err := k.newDefinition(r, s.Plan)
	if err != nil {
		return err
	}
	if len(dropped) > 0 {
		slices.Sort(dropped)
		h.Log(ctx, slog.LevelWarn, "the new domain goes without what a backup may not bring along: "+strings.Join(slices.Compact(dropped), ", "))
	}
	if err := makeTPMDirectories(s.Plan); err != nil {
		return err
	}
	for _, f := range s.Files {
		if err := f.place(); err != nil {
			return err
		}
	}
	_, err = k.Hypervisor.Define(ctx, definition)
	return err
}

// undefine takes back what define did.
func (k *Kind) undefine(ctx context.Context, s state) error {
	state, _, err := k.Hypervisor.State(ctx, s.Plan.DomainUUID)
	switch {
	case errors.Is(err, hypervisor.ErrNoDomain):
	case err != nil:
		return err
	case state != hypervisor.StateShutoff:
		return fmt.Errorf("domain %q is %s already: it and its disks stay", s.Plan.DomainName, state)
	}
	if err := k.Hypervisor.Undefine(ctx, s.Plan.DomainUUID, false); err != nil {
		return err
	}
	var problems []error
	for _, f := range s.Files {
		problems = append(problems, f.remove())
	}
	removeTPMDirectories(s.Plan)
	return errors.Join(problems...)
}

// start starts a restored domain. That it does not start is no reason to give
// up what was restored.
func (k *Kind) start(ctx context.Context, h *job.Handle, r Request, p Plan) {
	if !r.Start {
		return
	}
	state, _, err := k.Hypervisor.State(ctx, p.DomainUUID)
	if err == nil && state == hypervisor.StateShutoff {
		err = k.Hypervisor.Start(ctx, p.DomainUUID, false)
	}
	if err != nil {
		h.Log(ctx, slog.LevelWarn, fmt.Sprintf("domain %q is restored, but does not start: %v", p.DomainName, err))
	}
}

// exchange puts the restored disks in the place of the domain's. What was there
// is given up only when all are in place.
func (k *Kind) exchange(ctx context.Context, h *job.Handle, r Request, s state) error {
	if err := k.exchangeAll(ctx, h, s); err != nil {
		return err
	}
	return k.settled(ctx, h, r, s)
}

func (k *Kind) exchangeAll(ctx context.Context, h *job.Handle, s state) error {
	if err := k.endChains(ctx, s.Plan.DomainUUID); err != nil {
		return err
	}
	held, err := lockAll(s.Files)
	if err != nil {
		return failure.Errorf(dbus.ErrBusy, "cannot restore backup %s in place: %w", s.Plan.Backup, err)
	}
	defer held.release()
	if err := k.unused(ctx, s.Plan); err != nil {
		return err
	}
	if err := makeTPMDirectories(s.Plan); err != nil {
		return err
	}
	for _, f := range s.Files {
		if err := f.exchange(); err != nil {
			return err
		}
	}
	if err := k.unused(ctx, s.Plan); err != nil {
		return err
	}
	// From here on nothing is taken back: with the directories the old disks go.
	return h.Step(ctx, stepPlaced, s)
}

// settled ends a restore whose files are all in place.
func (k *Kind) settled(ctx context.Context, h *job.Handle, r Request, s state) error {
	if err := removeStaging(s.Plan); err != nil {
		h.Log(ctx, slog.LevelWarn, "cannot remove what the restore leaves behind: "+err.Error())
	}
	k.start(ctx, h, r, s.Plan)
	return h.SetResult(map[string]string{"domain": s.Plan.DomainUUID, "name": s.Plan.DomainName})
}

// unused refuses to go on with a domain that was started or saved meanwhile.
func (k *Kind) unused(ctx context.Context, p Plan) error {
	d, err := k.Hypervisor.ByUUID(ctx, p.DomainUUID)
	if err != nil {
		return err
	}
	if reason := occupied(d); reason != "" {
		return failure.Errorf(dbus.ErrBusy, "cannot restore backup %s in place: %s", p.Backup, reason)
	}
	return nil
}

// endChains ends the domain's chains before the first disk is exchanged: what
// comes after is no change that a checkpoint has seen.
func (k *Kind) endChains(ctx context.Context, uuid string) error {
	all, err := k.Catalog.Chains(ctx, uuid)
	if err != nil {
		return err
	}
	for _, c := range all {
		if c.State != chain.Open {
			continue
		}
		if err := k.Catalog.EndChain(ctx, c.ID, chain.Finished, chain.Restored); err != nil {
			return err
		}
	}
	return nil
}
