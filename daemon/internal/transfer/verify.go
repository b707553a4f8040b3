package transfer

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/virtbackup/virtbackup/daemon/internal/damage"
	"github.com/virtbackup/virtbackup/daemon/internal/qcow2"
	"github.com/virtbackup/virtbackup/daemon/internal/repository"
)

// verify reads backups and all that they stand on, and gives a verdict on each.
// A bad backup is a result and no failure of the job.
func (w *worker) verify(ctx context.Context) error {
	r, err := w.open()
	if err != nil {
		return err
	}
	defer r.Close()
	backups, err := w.withParents(r)
	if err != nil {
		return inRepository(err)
	}
	if err := w.status.enter(PhaseVerifying); err != nil {
		return err
	}
	for _, backup := range backups {
		state := BackupState{Domain: w.spec.Domain, Backup: backup}
		err := w.verifyBackup(ctx, r, &state)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		state.Error = failure(ctx, err)
		w.result.Backups = append(w.result.Backups, state)
	}
	if err := w.whoIsHit(ctx, r, w.spec.Domain); err != nil {
		return err
	}
	w.result.HitKnown = true
	return w.offer(ctx, r)
}

// withParents returns the backups to verify, oldest first: ids ascend with time.
func (w *worker) withParents(r *repository.Repository) ([]string, error) {
	var list []string
	for _, backup := range w.spec.Backups {
		for id := backup; id != "" && !slices.Contains(list, id); {
			list = append(list, id)
			m, err := r.Manifest(w.spec.Domain, id)
			if err != nil {
				break // the verdict on it says so
			}
			id = m.Parent
		}
	}
	slices.Sort(list)
	return list, nil
}

// verifyBackup goes on when it has found something: it says all that is damaged.
func (w *worker) verifyBackup(ctx context.Context, r *repository.Repository, state *BackupState) error {
	var err error
	if state.Manifest, err = r.Manifest(state.Domain, state.Backup); err != nil {
		return inRepository(err)
	}
	l, err := trace(r, state.Domain, state.Backup)
	if errors.Is(err, repository.ErrNoBackup) { // it is there itself
		return fail(ClassParent, "what it builds on is gone: %w", err)
	}
	if err != nil {
		return inRepository(err)
	}
	m := state.Manifest
	var found []error
	digests := map[string]bool{} // that are damaged, by target
	for _, f := range m.Files {
		err := w.verifyFile(r, m, f)
		if err != nil && !isDamage(ctx, err) {
			return beside(found, err)
		}
		if err != nil {
			found = append(found, err)
			target, ok := strings.CutSuffix(f.Name, digestSuffix)
			if _, isDisk := m.Disk(target); ok && isDisk {
				digests[target] = true
			} else {
				state.Damage = append(state.Damage, Flaw{File: f.Name})
			}
		}
	}
	for _, d := range m.Disks {
		if d.Kind == repository.KindIncremental && w.broken[image{m.Parent, d.Target}] {
			w.broken[image{m.Backup, d.Target}], state.Unseen = true, true
			continue
		}
		var ranges damage.Ranges
		err := fail(ClassVerification, "its digests are not what was written (a repair makes them anew if the image is well)")
		if !digests[d.Target] {
			ranges, err = w.verifyDisk(ctx, r, l, d)
		}
		if err != nil && !isDamage(ctx, err) {
			return beside(found, inDisk(d.Target, err))
		}
		if err != nil {
			found = append(found, inDisk(d.Target, err))
			ranges = damage.Ranges{{Length: d.Size}}
			w.broken[image{m.Backup, d.Target}] = true
		} else if len(ranges) > 0 {
			found = append(found, inDisk(d.Target, located(ranges)))
		}
		for _, one := range ranges {
			state.Damage = append(state.Damage, Flaw{Target: d.Target, Range: one, Whole: err != nil})
		}
	}
	if len(found) > 1 {
		return fmt.Errorf("%w (and %d more)", found[0], len(found)-1)
	}
	return errors.Join(found...)
}

// beside is what keeps the rest from being looked at, unless damage was found
// before: that is known then, whatever the rest is like.
func beside(found []error, err error) error {
	if len(found) == 0 {
		return err
	}
	return fmt.Errorf("%w (the rest cannot be looked at: %v)", found[0], err) //nolint:errorlint // its class is that of the damage
}

// image is that of a disk in a backup.
type image struct{ backup, target string }

// digestSuffix is that of the name of a disk's digests.
var digestSuffix = repository.DigestName("")

// isDamage tells whether an error is about what is stored, and not about the way to it.
func isDamage(ctx context.Context, err error) bool {
	f := failure(ctx, err)
	return f.Class == ClassVerification || f.Class == ClassManifest
}

// located says where a disk is damaged.
func located(ranges damage.Ranges) error {
	text := fmt.Sprintf("%d bytes at %d", ranges[0].Length, ranges[0].Offset)
	if n := len(ranges) - 1; n > 0 {
		text += fmt.Sprintf(" (and %d more places, %d bytes in all)", n, ranges.Bytes())
	}
	return fail(ClassVerification, "%w: %s", errBlock, text)
}

func (w *worker) verifyFile(r *repository.Repository, m *repository.Manifest, f repository.File) error {
	from, err := r.OpenImage(m.Domain.UUID, m.Backup, f.Name)
	if err != nil {
		return inRepository(err)
	}
	defer from.Close()
	return checkFile(from, f)
}

// verifyDisk compares what the backup itself holds of a disk with its digests,
// and returns where it differs; what its parents hold is compared with theirs.
func (w *worker) verifyDisk(ctx context.Context, r *repository.Repository, l lineage, d repository.Disk) (damage.Ranges, error) {
	s, err := openDisk(r, l, d.Target)
	if err != nil {
		return nil, err
	}
	defer s.close()
	s.found, s.reads = &finder{}, w.throttle.reads
	err = s.verify(ctx, w.status.disk(d.Target))
	if err == nil && len(s.found.ranges) > mostRanges {
		err = fail(ClassVerification, "%w in %d places", errBlock, len(s.found.ranges))
	}
	return s.found.ranges, err
}

// mostRanges is in how many places a disk is told to be damaged; if there are
// more, it is as a whole.
const mostRanges = 1000

// whoIsHit finds out on which disks of which other backups what was found
// damaged of a domain is seen. What this cannot tell is hit.
func (w *worker) whoIsHit(ctx context.Context, r *repository.Repository, domain string) error {
	var all []*repository.Manifest
	for _, b := range w.result.Backups {
		if b.Domain != domain || len(b.Damage) == 0 {
			continue
		}
		if all == nil {
			var err error
			if all, err = manifests(r, domain); err != nil {
				return inRepository(err)
			}
		}
		for _, d := range b.Manifest.Disks {
			w.spread(ctx, r, b, d.Target, all)
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
		}
	}
	return nil
}

// manifests returns those of a domain's backups that can be read.
func manifests(r *repository.Repository, domain string) (all []*repository.Manifest, err error) {
	ids, err := r.Backups(domain)
	for _, id := range ids {
		if m, err := r.Manifest(domain, id); err == nil {
			all = append(all, m)
		}
	}
	return all, err
}

func (w *worker) spread(ctx context.Context, r *repository.Repository, b BackupState, target string, all []*repository.Manifest) {
	var ranges damage.Ranges
	whole := false
	for _, d := range b.Damage {
		if d.Target == target && d.File == "" {
			ranges, whole = ranges.Add(d.Range), whole || d.Whole
		}
	}
	if len(ranges) == 0 {
		return
	}
	var images []damage.Image
	for _, m := range all {
		d, ok := m.Disk(target)
		if !ok {
			continue
		}
		i := damage.Image{Backup: m.Backup, Parent: m.Parent, Full: d.Kind == repository.KindFull}
		if !whole { // otherwise nothing can be read through it
			i.Holds = w.holds(ctx, r, m, d)
		}
		images = append(images, i)
	}
	for id, seen := range damage.Spread(b.Backup, ranges, images) {
		for _, one := range seen {
			w.result.Hit = append(w.result.Hit, Hit{Domain: b.Domain, Backup: id, Target: target, Range: one, Image: b.Backup})
		}
	}
}

// holds looks into an image for what it holds, once asked.
func (w *worker) holds(ctx context.Context, r *repository.Repository, m *repository.Manifest, d repository.Disk) damage.Holds {
	return func(off, length uint64, fn func(off, length uint64) error) error {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		f, err := r.OpenImage(m.Domain.UUID, m.Backup, d.File)
		if err != nil {
			return err
		}
		defer f.Close()
		image, err := checkImage(f, d, m.Backing(d), qcow2.Limits{Size: d.Size})
		if err != nil {
			return err
		}
		if off >= d.Size { // the parent's disk was larger
			return nil
		}
		return image.Own(off, min(length, d.Size-off), func(off, length uint64, _ qcow2.Kind) error { return fn(off, length) })
	}
}
