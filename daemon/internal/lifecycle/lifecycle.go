// Package lifecycle knows what happens to the disks of domains between two
// backups, where no dirty bitmap sees it: it takes over what libvirt's hook
// recorded, looks at domains, and leaves a mark in the catalog for each disk
// that changed unseen, or may have. A bitmap that was begun before the mark is
// not used any more.
//
// What follows from what is pure, in machine.go. When in doubt there is a mark:
// it costs a read, and a change that was overlooked costs a machine.
//
// What cannot be seen: a disk that is written to in the milliseconds from when
// QEMU closed it until the hook looks at it, and one that somebody writes to
// while virtbackup itself changes that one (OwnWork).
package lifecycle

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/daemon/internal/journal"
	"github.com/virtbackup/virtbackup/hooks/fingerprint"
	"github.com/virtbackup/virtbackup/hooks/spool"
)

// Domains is what a Keeper asks libvirt.
type Domains interface {
	// ByUUID's error is hypervisor.ErrNoDomain when there is none.
	ByUUID(ctx context.Context, uuid string) (hypervisor.Domain, error)
	Subscribe(ctx context.Context) <-chan hypervisor.Event
}

// Deps is what a Keeper is made of.
type Deps struct {
	Catalog        *catalog.Catalog
	Domains        Domains
	SpoolDirectory string // of the hook, spool.Directory
	HookPath       string // of the hook as libvirt calls it
	Log            *slog.Logger
}

// Keeper keeps what is known of all domains. Its methods may be called at the
// same time; they wait for each other, but for own work on another domain,
// which takes as long as its storage does.
type Keeper struct {
	Deps
	mu      sync.Mutex
	working map[string]chan struct{} // by UUID: the domains that OwnWork is at; closed when it is done
	last    atomic.Pointer[entry]    // what the hook told last; nil until somebody asked
}

// New makes a Keeper.
func New(d Deps) *Keeper { return &Keeper{Deps: d, working: map[string]chan struct{}{}} }

// entry is what the catalog has of a domain.
type entry struct {
	Known
	// Record and Told are the number and the time, in µs since the epoch, of the
	// last record of the hook that went into it.
	Record uint64 `json:"record,omitempty"`
	Told   int64  `json:"told,omitempty"`
	// Libvirt is who called the hook then.
	Libvirt string `json:"libvirt,omitempty"`
}

func (k *Keeper) load(ctx context.Context, domain string) (e entry, err error) {
	text, err := k.Catalog.Tracking(ctx, domain)
	if err != nil || text == nil {
		return e, err
	}
	if err := json.Unmarshal(text, &e); err != nil {
		k.Log.Warn("cannot read what was known of a domain; its disks count as changed", "domain", domain, "error", err)
		return entry{}, nil
	}
	return e, nil
}

// save records what is known now, and marks for what was found, at once.
func (k *Keeper) save(ctx context.Context, domain string, e entry, found []Finding, at time.Time) error {
	text, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("cannot record what is known of domain %s: %w", domain, err)
	}
	var marks []catalog.Mark
	for _, f := range found {
		marks = append(marks, catalog.Mark{Target: f.Target, Cause: f.Cause, Detail: f.Detail, Time: at})
		k.Log.Info("a disk may have changed unseen", journal.MessageID, journal.DiskChangedUnseen, "domain", domain, "target", cmp.Or(f.Target, "all"), "cause", f.Cause, "detail", f.Detail)
	}
	return k.Catalog.SetTracking(ctx, domain, text, marks)
}

// Replay takes all that the hook recorded into the catalog, that of a domain
// that own work is at when this is done. It asks nothing of libvirt, so the hook
// may wait for it.
func (k *Keeper) Replay(ctx context.Context) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	for {
		busy, err := k.replay(ctx)
		if err != nil || busy == "" {
			return err
		}
		if err := k.idle(ctx, busy); err != nil {
			return err
		}
	}
}

// replay takes one record after the other, and goes to the next only when the
// one before is gone: then no more than one of a domain can be there that was
// taken already. It leaves those of domains that own work is at, and returns
// one of them.
func (k *Keeper) replay(ctx context.Context) (busy string, err error) {
	records, err := spool.Read(k.SpoolDirectory)
	if err != nil {
		return "", err
	}
	for _, r := range records {
		if r.Err == nil && k.working[r.Record.Domain] != nil {
			busy = r.Record.Domain
			continue
		}
		if err := k.take(ctx, r); err != nil {
			return "", err
		}
		if err := spool.Remove(k.SpoolDirectory, r.Number); err != nil {
			return "", err
		}
	}
	return busy, nil
}

// idle waits until no own work is at a domain. k.mu is locked, but not while it waits.
func (k *Keeper) idle(ctx context.Context, uuid string) error {
	for k.working[uuid] != nil {
		done := k.working[uuid]
		k.mu.Unlock()
		select {
		case <-done:
		case <-ctx.Done():
		}
		k.mu.Lock()
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
	return nil
}

func (k *Keeper) take(ctx context.Context, r spool.Entry) error {
	if r.Err != nil || r.Record.Domain == "" {
		k.Log.Warn("a record of the hook cannot be read; the disks of all domains count as changed", "number", r.Number, "error", r.Err)
		return k.forgetAll(ctx)
	}
	e, err := k.load(ctx, r.Record.Domain)
	if err != nil || e.Record == r.Number && e.Told == r.Record.Time {
		return err
	}
	k.Log.Debug("the hook told of a domain", "domain", r.Record.Name, "operation", r.Record.Operation, "number", r.Number)
	var found []Finding
	e.Known, found = Next(e.Known, r.Record)
	e.Record, e.Told, e.Libvirt = r.Number, r.Record.Time, r.Record.Libvirt
	if err := k.save(ctx, r.Record.Domain, e, found, time.UnixMicro(r.Record.Time)); err != nil {
		return err
	}
	if last := k.last.Load(); last != nil && e.Told > last.Told {
		k.last.Store(&e)
	}
	return nil
}

// forgetAll makes everything unknown, so that the next word of each domain
// leaves marks.
func (k *Keeper) forgetAll(ctx context.Context) error {
	all, err := k.Catalog.TrackedDomains(ctx)
	if err != nil {
		return err
	}
	for _, domain := range all {
		e, err := k.load(ctx, domain)
		if err != nil {
			return err
		}
		e.Known = Known{}
		if err := k.save(ctx, domain, e, nil, time.Now()); err != nil {
			return err
		}
	}
	return nil
}

// Observe takes what the hook recorded, and looks at a domain that was just
// looked up. It returns the number of the newest mark of all, and the newest
// mark of each disk of this domain ("" for all disks); see Unseen. What a disk
// held from then on is watched until the domain stops or is looked at again.
func (k *Keeper) Observe(ctx context.Context, d hypervisor.Domain) (number int64, newest []catalog.Mark, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if _, err := k.observe(ctx, d); err != nil {
		return 0, nil, err
	}
	marks, err := k.Catalog.Marks(ctx, d.UUID, 0)
	if err != nil {
		return 0, nil, err
	}
	number, err = k.Catalog.LastMark(ctx)
	return number, newestOfEach(marks), err
}

func newestOfEach(marks []catalog.Mark) []catalog.Mark {
	var newest []catalog.Mark
	for _, m := range slices.Backward(marks) {
		if !slices.ContainsFunc(newest, func(n catalog.Mark) bool { return n.Target == m.Target }) {
			newest = append(newest, m)
		}
	}
	return newest
}

// Unseen returns the newest mark of a disk with a number greater than after,
// out of marks as Observe returns them; false: the disk was watched.
func Unseen(marks []catalog.Mark, target string, after int64) (newest catalog.Mark, ok bool) {
	for _, m := range marks {
		if (m.Target == "" || m.Target == target) && m.Number > max(after, newest.Number) {
			newest, ok = m, true
		}
	}
	return newest, ok
}

const (
	// lookAgain is how often a domain is looked up again when it is not what the
	// hook told last: it may just be starting or stopping.
	lookAgain = 3
	// reconnectLimit bounds how long to wait for a libvirtd that was just started
	// to find a domain's QEMU: until then it says that the domain is off.
	reconnectLimit = 10 * time.Second
	reconnectRetry = 100 * time.Millisecond
)

// observe is Observe, with k.mu locked; others may lock it while it waits.
func (k *Keeper) observe(ctx context.Context, d hypervisor.Domain) (entry, error) {
	deadline := time.Now().Add(reconnectLimit)
	for try := 0; ; try++ {
		if err := k.idle(ctx, d.UUID); err != nil {
			return entry{}, err
		}
		if _, err := k.replay(ctx); err != nil {
			return entry{}, err
		}
		e, err := k.load(ctx, d.UUID)
		if err != nil {
			return e, err
		}
		reconnecting := !d.Active && qemuProcess(d.Name) != ""
		if reconnecting && time.Now().After(deadline) {
			return e, fmt.Errorf("cannot tell what domain %s does: libvirt says that it is off, but its QEMU runs", d.Name)
		}
		contradicts := e.Phase != Unknown && (e.Phase == Stopped || d.Active != (e.Phase == Running))
		if reconnecting || contradicts && try < lookAgain {
			if d, err = k.lookAgain(ctx, d.UUID, reconnecting); err != nil {
				return e, err
			}
			continue
		}
		o, err := k.look(ctx, d)
		if err != nil {
			return e, err
		}
		// It may have been looked up before a start that the hook told of since.
		if o.Active && e.Phase == Running && !sameRun(e.Run, o.Run) && try < lookAgain {
			if d, err = k.lookAgain(ctx, d.UUID, false); err != nil {
				return e, err
			}
			continue
		}
		var found []Finding
		e.Known, found = Observed(e.Known, o)
		return e, k.save(ctx, d.UUID, e, found, time.Now())
	}
}

// lookAgain looks a domain up, after a while if asked to. libvirt may be waiting
// for the hook, and that for us, so others go first.
func (k *Keeper) lookAgain(ctx context.Context, uuid string, wait bool) (hypervisor.Domain, error) {
	k.mu.Unlock()
	defer k.mu.Lock()
	if wait {
		select {
		case <-time.After(reconnectRetry):
		case <-ctx.Done():
		}
	}
	return k.Domains.ByUUID(ctx, uuid)
}

// OwnWork runs fn, which changes the images of some disks of a domain that is
// off, or gives them others, and takes what they are afterwards for known. What
// changed before leaves marks, and so do a start meanwhile and what happens to
// other disks. The error is fn's, or that of what is around it.
func (k *Keeper) OwnWork(ctx context.Context, d hypervisor.Domain, targets []string, fn func() error) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	e, err := k.observe(ctx, d)
	if err != nil {
		return err
	}
	if e.Phase != Off {
		return fmt.Errorf("cannot work on the disks of domain %s: it was started", d.Name)
	}
	failed := k.work(d.UUID, fn)
	// A record that cannot be read may have made it unknown meanwhile.
	if e, err = k.load(ctx, d.UUID); err != nil || e.Phase != Off {
		return cmp.Or(failed, err)
	}
	// The work may have given it other images.
	now, err := k.Domains.ByUUID(ctx, d.UUID)
	if err != nil || now.Active {
		return cmp.Or(failed, err)
	}
	o, err := k.look(ctx, now)
	if err != nil {
		return cmp.Or(failed, err)
	}
	records, err := spool.Read(k.SpoolDirectory)
	if err != nil {
		return cmp.Or(failed, err)
	}
	// What is in the spool was seen before what is known now: it has to be
	// compared with what was known before.
	if slices.ContainsFunc(records, func(r spool.Entry) bool { return r.Err != nil || r.Record.Domain == "" || r.Record.Domain == d.UUID }) {
		return failed
	}
	ours := func(d fingerprint.Disk) bool { return slices.Contains(targets, d.Target) }
	found := compare(e.Disks, slices.DeleteFunc(slices.Clone(o.Disks), ours))
	e.Known = Known{Phase: Off, Disks: o.Disks}
	return cmp.Or(failed, k.save(ctx, d.UUID, e, found, time.Now()))
}

// work runs fn without k.mu: it may take long, or for ever when storage hangs.
func (k *Keeper) work(uuid string, fn func() error) error {
	done := make(chan struct{})
	k.working[uuid] = done
	k.mu.Unlock()
	defer func() {
		k.mu.Lock()
		delete(k.working, uuid)
		close(done)
	}()
	return fn()
}

// takeLimit bounds how long storage may take to answer.
const takeLimit = 10 * time.Second

// look sees a domain as it is now.
func (k *Keeper) look(ctx context.Context, d hypervisor.Domain) (Observation, error) {
	boot, err := spool.BootID()
	if err != nil {
		return Observation{}, err
	}
	o := Observation{Active: d.Active, Run: Run{Boot: boot}}
	if d.Active {
		definition, err := parse(d.XML)
		if err != nil {
			return o, fmt.Errorf("cannot read the definition of domain %s: %w", d.Name, err)
		}
		o.Run.ID, o.Run.Process, o.Nodes = definition.ID, qemuProcess(d.Name), definition.nodes()
		return o, nil
	}
	sources, err := fingerprint.Sources([]byte(d.XML))
	if err != nil {
		return o, err
	}
	ctx, cancel := context.WithTimeout(ctx, takeLimit)
	defer cancel()
	o.Disks = fingerprint.TakeAll(ctx, sources)
	return o, nil
}
