package repository

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Rewrite is another set of files for a committed backup, in the making: they
// hold the same disks, on another base or packed otherwise.
//
// The new files are written beside the old ones, as NAME~GENERATION. Giving the
// new manifest its name is the one commit point, for all files at once: which of
// two files counts, the manifest's generation says. Only then each new file
// takes the old one's name, so that what builds on the backup finds its parent by
// the same path at every moment, also by QEMU alone; whatever is left of that is
// done by Settle. What the old files stand on must stay until it is done.
type Rewrite struct {
	r     *Repository
	claim *Claim
	m     *Manifest // the committed one
	names []string
}

const generationMark = "~"

// generation is a set of files of a backup. It names the job that makes them:
// whoever clears up must not take those of a job that lives for garbage, nor
// files that were made since he looked for those that he saw.
type generation struct {
	number int
	job    string // ULID
}

func (m *Manifest) generation() generation { return generation{m.Generation, m.Rewriter} }

// name is the name of a file of the generation until it takes its own.
func (g generation) name(file string) string {
	return fmt.Sprintf("%s%s%d.%s", file, generationMark, g.number, g.job)
}

// parseGeneration is the inverse of generation.name.
func parseGeneration(file string) (name string, g generation, ok bool) {
	name, rest, ok := strings.Cut(file, generationMark)
	if !ok {
		return "", generation{}, false
	}
	number, job, _ := strings.Cut(rest, ".")
	n, err := strconv.Atoi(number)
	g = generation{n, job}
	return name, g, err == nil && n > 0 && ulidPattern.MatchString(job) && g.name(name) == file
}

// Rewrite begins to replace files of a backup of this host, in the name of the
// job that has the claim. What an earlier try left is removed.
func (r *Repository) Rewrite(c *Claim, backup string) (*Rewrite, error) {
	if err := r.Settle(c.domain, backup); err != nil {
		return nil, err
	}
	m, err := r.Manifest(c.domain, backup)
	if err == nil && m.Host != r.host {
		err = fmt.Errorf("cannot replace files of backup %s: %w", backup, ErrForeignManifest)
	}
	if err != nil {
		return nil, err
	}
	return &Rewrite{r: r, claim: c, m: m}, nil
}

// Manifest returns the committed manifest.
func (w *Rewrite) Manifest() *Manifest { return w.m }

func (w *Rewrite) path(name string) string {
	return w.m.Domain.UUID + "/" + w.m.Backup + "/" + name
}

func (w *Rewrite) generation() generation {
	return generation{w.m.Generation + 1, w.claim.owner.Backup}
}

// Create makes another file with the name of one of the backup's. The caller
// syncs and closes it before Commit.
func (w *Rewrite) Create(name string) (*os.File, error) {
	if err := checkFileName(name); err != nil {
		return nil, err
	}
	f, err := w.r.tree.create(w.path(w.generation().name(name)))
	if err != nil {
		return nil, fmt.Errorf("cannot create another %s of backup %s: %w", name, w.m.Backup, err)
	}
	w.names = append(w.names, name)
	return f, nil
}

// Remove takes back Create: the old file stays. It is fine when there is no new one.
func (w *Rewrite) Remove(name string) error {
	i := slices.Index(w.names, name)
	if i < 0 {
		return nil
	}
	w.names = slices.Delete(w.names, i, i+1)
	if err := w.r.tree.remove(w.path(w.generation().name(name)), 0); err != nil {
		return fmt.Errorf("cannot remove another %s of backup %s: %w", name, w.m.Backup, err)
	}
	return nil
}

// Commit makes the new files those of the backup. m is its new manifest; its
// generation is set here. After an error either the old files or the new ones
// count, and both are there, as long as the backup is not settled.
func (w *Rewrite) Commit(ctx context.Context, m *Manifest) error {
	if err := w.commit(ctx, m); err != nil {
		return fmt.Errorf("cannot replace files of backup %s: %w", w.m.Backup, err)
	}
	return nil
}

func (w *Rewrite) commit(ctx context.Context, m *Manifest) error {
	t := w.r.tree
	m.Format, m.Repository, m.Host, m.Generation, m.Rewriter = Format, w.r.id, w.r.host, w.generation().number, w.generation().job
	if m.Domain.UUID != w.m.Domain.UUID || m.Backup != w.m.Backup || m.Chain != w.m.Chain || m.Created != w.m.Created {
		return fmt.Errorf("the manifest is that of backup %s", truncated(m.Backup))
	}
	if err := errors.Join(m.validate(), w.check(m)); err != nil {
		return err
	}
	content, err := m.sign(w.r.key)
	if err != nil {
		return err
	}
	pending := w.path(w.generation().name(manifestName))
	if err := t.writeNew(pending, content); err != nil {
		return err
	}
	if err := errors.Join(t.sync(w.path(".")), w.claim.Check()); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err := t.rename(pending, w.path(manifestName)); err != nil {
		return err
	}
	if err := t.sync(w.path(".")); err != nil {
		return err
	}
	return w.r.Settle(m.Domain.UUID, m.Backup)
}

// check compares the new files, and those that stay, with the new manifest.
func (w *Rewrite) check(m *Manifest) error {
	check := func(name string, size uint64) error {
		if slices.Contains(w.names, name) {
			name = w.generation().name(name)
		}
		f, info, err := w.r.tree.openRegular(w.path(name))
		if err != nil {
			return err
		}
		f.Close()
		if uint64(info.Size()) != size {
			return fmt.Errorf("%s has %d bytes instead of %d: %w", name, info.Size(), size, ErrDamaged)
		}
		return nil
	}
	var errs []error
	for _, d := range m.Disks {
		errs = append(errs, check(d.File, d.StoredBytes))
	}
	for _, f := range m.Files {
		errs = append(errs, check(f.Name, f.Size))
	}
	return errors.Join(errs...)
}

// Discard removes the new files, unless they are those that count.
func (w *Rewrite) Discard() error { return w.r.Settle(w.m.Domain.UUID, w.m.Backup) }

// Settle ends what a Rewrite began: files of the manifest's generation take
// their names, and all others are removed. It does nothing to a backup that has
// none, is not committed, or is another host's, and may be cut short and run
// again. It is for who has the domain's claim.
func (r *Repository) Settle(domain, backup string) error {
	return r.settle(domain, backup, func(string) bool { return false })
}

// settle leaves alone what jobs make for which keep returns true.
func (r *Repository) settle(domain, backup string, keep func(job string) bool) error {
	err := checkBackup(domain, backup)
	if err == nil {
		err = r.settleFiles(domain, backup, keep)
	}
	if err != nil {
		return fmt.Errorf("cannot settle the files of backup %s: %w", truncated(backup), err)
	}
	return nil
}

func (r *Repository) settleFiles(domain, backup string, keep func(job string) bool) error {
	dir := domain + "/" + backup
	names, err := r.tree.names(dir)
	if err != nil {
		return ignoreMissing(err)
	}
	// Before the manifest is read: what is made from now on is not touched.
	names = slices.DeleteFunc(names, func(n string) bool { _, g, ok := parseGeneration(n); return !ok || keep(g.job) })
	if len(names) == 0 {
		return nil
	}
	m, err := r.Manifest(domain, backup)
	switch {
	case errors.Is(err, ErrNoBackup), errors.Is(err, ErrForeignManifest), errors.Is(err, ErrNewerFormat), errors.Is(err, ErrManifest):
		return nil
	case err != nil:
		return err
	case m.Host != r.host:
		return nil
	}
	// A rename that hung may still give a manifest its name: not any more once it
	// is gone; and when it has just done so, all is to be looked at again.
	for _, file := range names {
		if name, _, _ := parseGeneration(file); name != manifestName {
			continue
		}
		err := r.tree.remove(dir+"/"+file, 0)
		if errors.Is(err, unix.ENOENT) {
			return r.settleFiles(domain, backup, keep)
		}
		if err != nil {
			return err
		}
	}
	// The manifest must last before anything is done because of it.
	if err := r.tree.sync(dir); err != nil {
		return err
	}
	// New names first: an old file that is to be replaced is in nobody's way.
	for _, file := range names {
		name, g, _ := parseGeneration(file)
		if g == m.generation() && name != manifestName {
			// Missing: somebody else has just settled it.
			if err := ignoreMissing(r.tree.rename(dir+"/"+file, dir+"/"+name)); err != nil {
				return err
			}
		}
	}
	if err := r.tree.sync(dir); err != nil {
		return err
	}
	for _, file := range names {
		if err := ignoreMissing(r.tree.remove(dir+"/"+file, 0)); err != nil {
			return err
		}
	}
	return nil
}

// settleChildren settles all backups of a domain: before a backup is removed,
// no file that counts, or that QEMU would find by its name, may stand on it.
func (r *Repository) settleChildren(domain string) error {
	backups, err := r.Backups(domain)
	for _, id := range backups {
		err = errors.Join(err, r.Settle(domain, id))
	}
	return err
}

// openFile opens the file that counts of those with a name.
func (r *Repository) openFile(domain, backup, name string) (*os.File, os.FileInfo, error) {
	dir := domain + "/" + backup
	names, err := r.tree.names(dir)
	if err != nil {
		return nil, nil, err
	}
	if slices.ContainsFunc(names, func(n string) bool { of, _, ok := parseGeneration(n); return ok && of == name }) {
		m, err := r.readManifest(domain, backup)
		if err != nil {
			return nil, nil, err
		}
		f, info, err := r.tree.openRegular(dir + "/" + m.generation().name(name))
		if !errors.Is(err, unix.ENOENT) {
			return f, info, err
		}
	}
	return r.tree.openRegular(dir + "/" + name)
}

// Whole returns a backup's manifest once its files were held against it. Errors
// are those of Manifest, and of Check, with the manifest.
func (r *Repository) Whole(domain, backup string) (*Manifest, error) {
	for {
		m, err := r.Manifest(domain, backup)
		if err != nil {
			return nil, err
		}
		damage := r.Check(m)
		if damage == nil {
			return m, nil
		}
		// A job may have replaced the files between the one look and the other.
		if now, err := r.Manifest(domain, backup); err != nil || now.generation() == m.generation() {
			return m, damage
		}
	}
}
