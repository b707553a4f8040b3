package overlay

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/chain"
	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/hooks/fingerprint"
)

// Hypervisor is what a Keeper needs of libvirt.
type Hypervisor interface {
	ByUUID(ctx context.Context, uuid string) (hypervisor.Domain, error)
	Domains(ctx context.Context) ([]hypervisor.Domain, error)
	Definition(ctx context.Context, uuid string) (string, error)
	CommitLayer(ctx context.Context, uuid string, c hypervisor.LayerCommit) error
	JoinCommit(ctx context.Context, uuid, target string) error
	SetSource(ctx context.Context, uuid, target string, to hypervisor.Stacked) error
}

// Catalog is where overlays are recorded.
type Catalog interface {
	AddOverlays(ctx context.Context, all []catalog.Overlay) error
	Overlays(ctx context.Context, domain string) ([]catalog.Overlay, error)
	KeptOverlays(ctx context.Context, domain string) ([]catalog.Overlay, error)
	CommittingOverlay(ctx context.Context, path string) error
	CommittedOverlay(ctx context.Context, path string, modified time.Time) error
	RemovedOverlay(ctx context.Context, path string) error
	Backup(ctx context.Context, id string) (catalog.Backup, error)
}

// Lifecycle is told of own work on images of domains that are off.
type Lifecycle interface {
	OwnWork(ctx context.Context, d hypervisor.Domain, targets []string, fn func() error) error
}

// Keeper settles overlays.
type Keeper struct {
	Hypervisor Hypervisor
	Catalog    Catalog
	Lifecycle  Lifecycle
	Log        *slog.Logger
}

// ErrHeld says that an overlay has to stay where it is for now.
var ErrHeld = errors.New("overlay must stay")

// Settle leaves the disks of a domain with the overlays that the catalog says
// are to be kept, see catalog.KeptOverlays.
func (k *Keeper) Settle(ctx context.Context, uuid string) error {
	kept, err := k.Catalog.KeptOverlays(ctx, uuid)
	if err != nil {
		return err
	}
	keep := map[string]string{}
	for _, o := range kept {
		keep[o.Target] = o.Path
	}
	return k.settle(ctx, uuid, keep)
}

// Drop leaves the disks of a domain without overlays of ours.
func (k *Keeper) Drop(ctx context.Context, uuid string) error { return k.settle(ctx, uuid, nil) }

// settle may be done again after whatever ended it, and goes on then. Nobody
// else of us may work on the domain meanwhile.
func (k *Keeper) settle(ctx context.Context, uuid string, keep map[string]string) error {
	d, err := k.Hypervisor.ByUUID(ctx, uuid)
	if errors.Is(err, hypervisor.ErrNoDomain) {
		return nil // its disks are the admin's, whatever they are called
	}
	if err != nil {
		return err
	}
	known, err := k.Catalog.Overlays(ctx, uuid)
	if err != nil {
		return err
	}
	if len(known) == 0 && !Concerned(d) {
		return nil
	}
	if d, err = k.join(ctx, d, known); err != nil {
		return err
	}
	stacks, err := hypervisor.Stacks(ctx, d)
	if err != nil {
		return err
	}
	var failed []error
	for target, stack := range stacks {
		for _, c := range plan(target, stack, keep[target]) {
			err := k.commit(ctx, d, c, known)
			if err != nil && !errors.Is(err, ErrHeld) {
				return err // the domain may not be as it was looked at
			}
			failed = append(failed, err)
		}
	}
	return errors.Join(append(failed, k.collect(ctx, uuid))...)
}

// join waits for commits that an earlier life began, and looks at the domain again.
func (k *Keeper) join(ctx context.Context, d hypervisor.Domain, known []catalog.Overlay) (hypervisor.Domain, error) {
	joined := false
	for _, o := range known {
		if _, has := d.Disk(o.Target); !o.Committing || !d.Active || !has {
			continue
		}
		if err := k.Hypervisor.JoinCommit(ctx, d.UUID, o.Target); err != nil {
			return d, err
		}
		joined = true
	}
	if !joined {
		return d, nil
	}
	return k.Hypervisor.ByUUID(ctx, d.UUID)
}

// Concerned tells by names alone whether a domain has an overlay of ours.
func Concerned(d hypervisor.Domain) bool {
	return slices.ContainsFunc(d.Disks, func(k hypervisor.Disk) bool {
		return pattern.MatchString(k.Source) || slices.ContainsFunc(k.Backing, pattern.MatchString)
	})
}

// Saved tells whether a domain is off because it was saved: its state may be
// restored, with the layers that its disks had then.
func Saved(d hypervisor.Domain) bool {
	return !d.Active && (d.HasManagedSave || d.StateReason == "saved")
}

// commit does one commit, if nothing speaks against it.
func (k *Keeper) commit(ctx context.Context, d hypervisor.Domain, c commit, known []catalog.Overlay) error {
	if err := k.mayCommit(ctx, d, c); err != nil {
		return fmt.Errorf("cannot commit %s into %s: %w", c.layers[0].Path, c.base.Path, err)
	}
	recorded := func(l hypervisor.Stacked) int {
		return slices.IndexFunc(known, func(o catalog.Overlay) bool { return o.Path == l.Path })
	}
	for _, l := range c.layers {
		if recorded(l) < 0 { // the catalog was lost, or the domain came from another host
			backup, _ := Ours(l)
			if err := k.Catalog.AddOverlays(ctx, []catalog.Overlay{{Path: l.Path, Domain: d.UUID, Backup: backup, Target: c.target}}); err != nil {
				return err
			}
		}
		if err := k.Catalog.CommittingOverlay(ctx, l.Path); err != nil {
			return err
		}
	}
	if !d.Active {
		// The commit of another disk may have changed the definition.
		now, err := k.Hypervisor.ByUUID(ctx, d.UUID)
		if err != nil {
			return err
		}
		if now.Active {
			return fmt.Errorf("cannot commit %s: domain %q was started", c.layers[0].Path, d.Name)
		}
		return k.Lifecycle.OwnWork(ctx, now, []string{c.target}, func() error { return k.commitOff(ctx, now, c) })
	}
	err := k.Hypervisor.CommitLayer(ctx, d.UUID, hypervisor.LayerCommit{
		Target: c.target, Top: c.layers[0].Path, Base: c.base.Path, Active: c.above == nil,
	})
	if err != nil {
		return err
	}
	return k.committed(ctx, c)
}

// committed records that what the layers hold is in the one below them now.
func (k *Keeper) committed(ctx context.Context, c commit) error {
	for _, l := range c.layers {
		st, err := os.Lstat(l.Path)
		if errors.Is(err, fs.ErrNotExist) {
			continue // libvirt has deleted it
		}
		if err == nil {
			err = k.Catalog.CommittedOverlay(ctx, l.Path, st.ModTime())
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// mayCommit says what would be lost or damaged by a commit.
func (k *Keeper) mayCommit(ctx context.Context, d hypervisor.Domain, c commit) error {
	if c.base.Type != "file" && c.base.Type != "block" || c.base.Format != "qcow2" && c.base.Format != "raw" {
		return fmt.Errorf("the layer below is of type %s and format %q: %w", c.base.Type, c.base.Format, ErrHeld)
	}
	if len(d.Snapshots) > 0 {
		return fmt.Errorf("domain %q has snapshots, delete them first: %w", d.Name, ErrHeld)
	}
	if Saved(d) {
		return fmt.Errorf("domain %q is saved, and its saved state names its layers: %w", d.Name, ErrHeld)
	}
	below, err := hypervisor.ReadImage(ctx, c.base.Path, c.base.Format)
	if err != nil {
		return err
	}
	affected := []string{c.base.Path}
	for _, l := range c.layers {
		i, err := hypervisor.ReadImage(ctx, l.Path, l.Format)
		switch {
		case err != nil:
			return err
		case i.InternalSnapshots:
			return fmt.Errorf("%s has internal snapshots in it, delete them first: %w", l.Path, ErrHeld)
		case i.Size < below.Size:
			return fmt.Errorf("%s is smaller than what is below it, the disk was shrunk: %w", l.Path, ErrHeld)
		}
		affected = append(affected, l.Path)
	}
	return k.usedByOthers(ctx, d.UUID, affected)
}

// usedByOthers finds other domains whose disks are based on what a commit changes.
func (k *Keeper) usedByOthers(ctx context.Context, uuid string, affected []string) error {
	all, err := k.Hypervisor.Domains(ctx)
	if err != nil {
		return err
	}
	var changed []inode
	for _, path := range affected {
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			return fmt.Errorf("cannot look at %s: %w", path, err)
		}
		changed = append(changed, inode{st.Dev, st.Ino})
	}
	for _, d := range all {
		if d.UUID == uuid {
			continue
		}
		used, err := layersOf(ctx, d)
		if err != nil {
			return err
		}
		for i, path := range affected {
			if slices.Contains(used.paths, path) || slices.Contains(used.files, changed[i]) {
				return fmt.Errorf("a disk of domain %q is based on %s: %w", d.Name, path, ErrHeld)
			}
		}
	}
	return nil
}

// inode names a file, whatever path leads to it.
type inode struct{ device, number uint64 }

// layers are those of a domain's disks. Files are known of a domain that is off;
// one that runs has what it uses locked.
type layers struct {
	paths []string
	files []inode
}

// lookLimit bounds how long the storage of another domain may take to answer.
const lookLimit = 10 * time.Second

// layersOf looks at all layers of a domain's disks. The error is ErrHeld when
// its storage does not answer, and nobody can tell.
func layersOf(ctx context.Context, d hypervisor.Domain) (used layers, err error) {
	for _, k := range d.Disks {
		used.paths = append(append(used.paths, k.Source), k.Backing...)
	}
	if d.Active {
		return used, nil
	}
	sources, err := fingerprint.Sources([]byte(d.XML))
	if err != nil {
		return used, fmt.Errorf("domain %q: %w", d.Name, err)
	}
	limited, cancel := context.WithTimeout(ctx, lookLimit)
	defer cancel()
	for _, d := range fingerprint.TakeAll(limited, sources) {
		for _, l := range d.Layers {
			used.paths = append(used.paths, l.Path)
			if l.Kind == fingerprint.KindFile {
				used.files = append(used.files, inode{l.Device, l.Inode})
			}
		}
	}
	if limited.Err() != nil {
		return used, fmt.Errorf("the storage of domain %q does not answer, and its disks may be based on the same layers: %w", d.Name, ErrHeld)
	}
	return used, nil
}

// commitOff commits layers of a domain that is off. Each step leaves a chain
// with the same contents: what is committed stays until nothing names it.
func (k *Keeper) commitOff(ctx context.Context, d hypervisor.Domain, c commit) error {
	top := c.layers[0]
	if err := hypervisor.CommitImage(ctx, c.base, top); err != nil {
		return err
	}
	committed, err := os.Stat(top.Path)
	if err == nil {
		err = k.committed(ctx, c)
	}
	if err != nil {
		return err
	}
	if c.above != nil {
		// It fails for the lock of the image when the domain was started.
		if err := hypervisor.SetBacking(ctx, *c.above, c.base); err != nil {
			return err
		}
		return nil // collect has the definition forget the layer
	}
	// A domain that was started and stopped since has written to the overlay.
	if now, err := os.Stat(top.Path); err != nil || !now.ModTime().Equal(committed.ModTime()) || now.Size() != committed.Size() {
		return errors.Join(err, fmt.Errorf("%s was written to: is domain %q being started?", top.Path, d.Name))
	}
	return k.Hypervisor.SetSource(ctx, d.UUID, c.target, c.base)
}

// collect removes overlays that are no layers of the domain's disks any more.
func (k *Keeper) collect(ctx context.Context, uuid string) error {
	d, err := k.Hypervisor.ByUUID(ctx, uuid)
	if err != nil {
		return err
	}
	stacks, err := hypervisor.Stacks(ctx, d)
	if err != nil {
		return err
	}
	stored, err := k.Hypervisor.Definition(ctx, uuid)
	if err != nil {
		return err
	}
	known, err := k.Catalog.Overlays(ctx, uuid)
	if err != nil {
		return err
	}
	kept, err := k.Catalog.KeptOverlays(ctx, uuid)
	if err != nil {
		return err
	}
	var failed []error
	for _, o := range known {
		// One to keep that is not there may be on a disk that is attached again.
		if inStacks(stacks, o.Path) || slices.Contains(kept, o) && !o.Committing {
			continue
		}
		if named := strings.Contains(stored, "'"+o.Path+"'"); named && d.Active {
			continue // the domain will have it at its next start
		} else if named {
			err := k.Lifecycle.OwnWork(ctx, d, []string{o.Target}, func() error { return k.forgetBelow(ctx, d, stacks[o.Target], o) })
			if err != nil {
				failed = append(failed, err)
				continue
			}
		}
		failed = append(failed, k.remove(ctx, o))
	}
	return errors.Join(failed...)
}

// forgetBelow has the definition of a domain that is off not name an overlay
// any more that is no layer: libvirt records one below the top.
func (k *Keeper) forgetBelow(ctx context.Context, d hypervisor.Domain, stack []hypervisor.Stacked, o catalog.Overlay) error {
	if len(stack) == 0 {
		return fmt.Errorf("%s is named by the definition of domain %q: %w", o.Path, d.Name, ErrHeld)
	}
	return k.Hypervisor.SetSource(ctx, d.UUID, o.Target, stack[0])
}

func inStacks(stacks map[string][]hypervisor.Stacked, path string) bool {
	for _, stack := range stacks {
		if slices.ContainsFunc(stack, func(l hypervisor.Stacked) bool { return l.Path == path }) {
			return true
		}
	}
	return false
}

// remove removes an overlay that nothing uses, unless what it holds is nowhere else.
func (k *Keeper) remove(ctx context.Context, o catalog.Overlay) error {
	st, err := os.Lstat(o.Path)
	if errors.Is(err, fs.ErrNotExist) {
		return k.Catalog.RemovedOverlay(ctx, o.Path)
	}
	if err != nil {
		return fmt.Errorf("cannot remove an overlay: %w", err)
	}
	// A commit that was begun says nothing: it may have failed, and the guest
	// have gone on writing, before somebody detached the disk.
	if o.Committed == 0 || o.Committed != st.ModTime().UnixNano() {
		unused, err := k.neverUsed(ctx, o)
		if err != nil {
			return err
		}
		if !unused {
			k.Log.Warn("an overlay is not a layer of its domain's disk any more, and is left: see whether it is needed, and remove it",
				"path", o.Path, "domain", o.Domain, "disk", o.Target)
			return k.Catalog.RemovedOverlay(ctx, o.Path)
		}
	}
	if err := os.Remove(o.Path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cannot remove an overlay: %w", err)
	}
	return k.Catalog.RemovedOverlay(ctx, o.Path)
}

// neverUsed tells whether an overlay was made, and not put on its disk: the
// backup came to nothing, and nobody has written to it.
func (k *Keeper) neverUsed(ctx context.Context, o catalog.Overlay) (bool, error) {
	b, err := k.Catalog.Backup(ctx, o.Backup)
	if err == nil && b.State != chain.Failed && b.State != chain.Running || err != nil && !errors.Is(err, catalog.ErrNotFound) {
		return false, err
	}
	if st, err := os.Lstat(o.Path); err == nil && st.Mode().IsRegular() && st.Size() == 0 {
		return true, nil
	}
	return hypervisor.EmptyImage(ctx, o.Path)
}
