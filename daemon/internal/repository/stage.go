package repository

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Stage is a backup in the making.
type Stage struct {
	r      *Repository
	backup string
	domain string // set once the directory has its final place
	names  []string
	below  []string // directories in the backup's own
}

// Stage begins a backup. The directory's name carries this host's id, so that
// no other host that uses the repository takes it for its own garbage.
func (r *Repository) Stage(backup string) (*Stage, error) {
	if err := checkName("backup id", ulidPattern, backup); err != nil {
		return nil, err
	}
	dir := r.stagePath(backup)
	err := r.tree.mkdir(dir)
	if errors.Is(err, unix.ENOENT) {
		if err = r.tree.mkdir(stagingName); err == nil || errors.Is(err, unix.EEXIST) {
			err = r.tree.mkdir(dir)
		}
	}
	if errors.Is(err, unix.EEXIST) {
		err = fmt.Errorf("%w: %w", ErrExists, err)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot stage backup %s: %w", backup, err)
	}
	return &Stage{r: r, backup: backup}, nil
}

func (r *Repository) stagePath(backup string) string {
	return stagingName + "/" + backup + "." + r.host
}

// Create makes a new file of the backup, open for writing and reading back. The
// caller syncs and closes it before Commit.
func (s *Stage) Create(name string) (*os.File, error) {
	if err := checkFileName(name); err != nil {
		return nil, err
	}
	dir := s.r.stagePath(s.backup)
	var err error
	if below := path.Dir(name); below != "." && !slices.Contains(s.below, below) {
		if err = s.r.tree.mkdir(dir + "/" + below); err == nil {
			s.below = append(s.below, below)
		}
	}
	var f *os.File
	if err == nil {
		f, err = s.r.tree.create(dir + "/" + name)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot create %s of backup %s: %w", name, s.backup, err)
	}
	s.names = append(s.names, name)
	return f, nil
}

// Commit makes the backup one that counts. Every file must be written and
// synced. The manifest is written beside the files first, the directory gets
// its final place, and giving the manifest its name is the commit point: before
// it, an error or a crash leaves only garbage; after it, the backup is there.
// The context is looked at for the last time just before that.
func (s *Stage) Commit(ctx context.Context, c *Claim, m *Manifest) error {
	if err := s.commit(ctx, c, m); err != nil {
		return fmt.Errorf("cannot commit backup %s: %w", s.backup, err)
	}
	return nil
}

func (s *Stage) commit(ctx context.Context, c *Claim, m *Manifest) error {
	t, dir := s.r.tree, s.r.stagePath(s.backup)
	if err := s.prepare(m); err != nil {
		return err
	}
	content, err := m.sign(s.r.key)
	if err != nil {
		return err
	}
	if err := t.writeNew(dir+"/"+pendingName, content); err != nil {
		return err
	}
	final := m.Domain.UUID + "/" + m.Backup
	if there, err := t.exists(final); err != nil || there {
		return errors.Join(err, fmt.Errorf("%s: %w", final, ErrExists))
	}
	for _, below := range s.below {
		if err := t.sync(dir + "/" + below); err != nil {
			return err
		}
	}
	if err := errors.Join(t.sync(dir), c.Check()); err != nil {
		return err
	}
	if err := t.rename(dir, final); err != nil {
		return err
	}
	s.domain = m.Domain.UUID
	for _, d := range []string{stagingName, m.Domain.UUID, "."} {
		if err := t.sync(d); err != nil {
			return err
		}
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return s.publish(final)
}

// publish gives the manifest its name. If that can't be made durable it is
// taken back, so that an error always means that there is no backup.
func (s *Stage) publish(final string) error {
	t := s.r.tree
	pending, name := final+"/"+pendingName, final+"/"+manifestName
	if err := t.rename(pending, name); err != nil {
		return err
	}
	if err := t.sync(final); err != nil {
		return errors.Join(err, t.rename(name, pending))
	}
	return nil
}

// prepare fills in what only the repository knows and checks that the manifest
// and the staged files agree.
func (s *Stage) prepare(m *Manifest) error {
	m.Format, m.Repository, m.Host = Format, s.r.id, s.r.host
	if m.Backup != s.backup {
		return fmt.Errorf("the manifest is that of backup %s", truncated(m.Backup))
	}
	if err := m.validate(); err != nil {
		return err
	}
	sizes := map[string]uint64{}
	for _, d := range m.Disks {
		sizes[d.File] = d.StoredBytes
	}
	for _, f := range m.Files {
		sizes[f.Name] = f.Size
	}
	for _, name := range s.names {
		if _, listed := sizes[name]; !listed {
			return fmt.Errorf("%s is not in the manifest", name)
		}
	}
	for name, size := range sizes {
		f, info, err := s.r.tree.openRegular(s.r.stagePath(s.backup) + "/" + name)
		if err != nil {
			return err
		}
		f.Close()
		if uint64(info.Size()) != size {
			return fmt.Errorf("%s has %d bytes instead of %d: %w", name, info.Size(), size, ErrDamaged)
		}
	}
	return nil
}

// Discard removes a stage that was not committed. It also undoes a Commit that
// failed before its commit point, and does nothing after one that did not.
func (s *Stage) Discard() error {
	if s.domain != "" {
		return s.r.collectUncommitted(s.domain, s.backup)
	}
	return s.r.tree.removeAll(s.r.stagePath(s.backup))
}

// Discard removes all that a dead job of this host left of a backup that it did
// not commit: its stage, its uncommitted directory and its claim; and ends a
// Rewrite of one that is committed. The domain must be nobody else's.
func (r *Repository) Discard(domain, backup string) error {
	if err := checkBackup(domain, backup); err != nil {
		return err
	}
	if err := r.tree.removeAll(r.stagePath(backup)); err != nil {
		return err
	}
	if err := errors.Join(r.collectUncommitted(domain, backup), r.Settle(domain, backup)); err != nil {
		return err
	}
	return r.dropClaim(domain, func(o owner) bool { return o.Host == r.host && o.Backup == backup })
}

// Delete removes a committed backup. Moving its directory away is the point
// where it stops being one; a crash after that leaves garbage for Collect. A
// backup that another is an increment to is refused: ErrHasChildren. Deleting
// one that is not there is ErrNoBackup.
func (r *Repository) Delete(ctx context.Context, c *Claim, domain, backup string) error {
	if err := r.deletable(domain, backup); err != nil {
		return fmt.Errorf("cannot delete backup %s of domain %s: %w", truncated(backup), truncated(domain), err)
	}
	if err := errors.Join(context.Cause(ctx), c.Check(), r.settleChildren(domain)); err != nil {
		return err
	}
	if err := r.removeBackup(domain, backup); err != nil {
		return fmt.Errorf("cannot delete backup %s of domain %s: %w", backup, domain, err)
	}
	return nil
}

// removeBackup moves a backup's directory to the staging area by one rename, so
// that no half of it is ever found in its place, and removes it there.
func (r *Repository) removeBackup(domain, backup string) error {
	away := r.stagePath(backup)
	if err := r.tree.removeAll(away); err != nil {
		return err
	}
	if err := r.tree.rename(domain+"/"+backup, away); err != nil {
		return err
	}
	for _, d := range []string{domain, stagingName} {
		if err := r.tree.sync(d); err != nil {
			return err
		}
	}
	// It is gone. A directory is not empty while somebody reads what was in it, on
	// NFS: that is collected later.
	err := r.tree.removeAll(away)
	if errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, unix.EEXIST) {
		return nil
	}
	return err
}

func (r *Repository) deletable(domain, backup string) error {
	m, err := r.readManifest(domain, backup)
	switch {
	case errors.Is(err, ErrManifest): // damaged: may go
	case err != nil:
		return err
	case m.Host != r.host:
		return m.authenticate(r.key)
	}
	backups, err := r.Backups(domain)
	if err != nil {
		return err
	}
	for _, id := range backups {
		child, err := r.readManifest(domain, id)
		if err == nil && child.Parent == backup {
			return fmt.Errorf("%w: %s", ErrHasChildren, id)
		}
	}
	return nil
}

// Collect removes what dead jobs of this host left behind: stages, uncommitted
// and half deleted backups, files of a Rewrite that did not come to its end. Those whose backup or job keep returns true
// for belong to jobs that live. It never touches a committed backup nor what another host
// left, and may be cut short and run again.
func (r *Repository) Collect(ctx context.Context, keep func(backup string) bool) error {
	staged, err := r.tree.names(stagingName)
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	for _, n := range staged {
		backup, host, _ := strings.Cut(n, ".")
		if host != r.host || keep(backup) {
			continue
		}
		if err := errors.Join(context.Cause(ctx), r.tree.removeAll(stagingName+"/"+n)); err != nil {
			return err
		}
	}
	domains, err := r.Domains()
	if err != nil {
		return err
	}
	for _, domain := range domains {
		if err := r.collectDomain(ctx, domain, keep); err != nil {
			return fmt.Errorf("cannot clear up after dead jobs of domain %s: %w", domain, err)
		}
	}
	return nil
}

func (r *Repository) collectDomain(ctx context.Context, domain string, keep func(string) bool) error {
	names, err := r.tree.names(domain)
	if err != nil {
		return err
	}
	dead := func(o owner) bool { return o.Host == r.host && !keep(o.Backup) }
	// First: a worker that hung, and goes on now, must find its claim gone.
	if err := r.dropClaim(domain, dead); err != nil {
		return err
	}
	for _, n := range names {
		if !ulidPattern.MatchString(n) || keep(n) {
			continue
		}
		if err := errors.Join(context.Cause(ctx), r.collectUncommitted(domain, n), r.settle(domain, n, keep)); err != nil {
			return err
		}
	}
	return r.dropClaim(domain, dead) // and the directory, if nothing is left in it
}

// collectUncommitted removes a backup's directory unless it is committed or
// another host's. A directory gets here only with its manifest written, so its
// writer is always known.
func (r *Repository) collectUncommitted(domain, backup string) error {
	dir := domain + "/" + backup
	names, err := r.tree.names(dir)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil || slices.Contains(names, manifestName) {
		return err
	}
	content, err := r.tree.readFile(dir+"/"+pendingName, manifestLimit)
	if err != nil {
		return ignoreMissing(err)
	}
	m, err := parseManifest(content)
	if err != nil || m.Host != r.host {
		return nil // another host's, or of a newer version
	}
	return r.removeBackup(domain, backup)
}

func ignoreMissing(err error) error {
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}
