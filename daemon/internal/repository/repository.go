// Package repository is a directory on secondary storage that holds backups.
//
// It knows the layout, what makes a backup committed, and how to open a file
// there without trusting whoever else can write to the storage: names have a
// strict grammar, nothing is reached through a link, manifests are
// authenticated, and no size is believed. Only the worker uses it; a share that
// hangs then hangs a worker and never the daemon.
//
//	<root>/virtbackup-repository.json            format, id
//	<root>/<domain-uuid>/owner.json              the host that writes here now
//	<root>/<domain-uuid>/<backup>/manifest.json  its presence commits the backup
//	<root>/<domain-uuid>/<backup>/…              images, digests, definition
//	<root>/<domain-uuid>/<backup>/…~<generation> another of a file, see Rewrite
//	<root>/.staging/<backup>.<host>/…            being made, or being removed
//
// A backup directory without a manifest is garbage of a job that died.
package repository

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/oklog/ulid/v2"
	"golang.org/x/sys/unix"
)

// What callers ask about an error. Each error that wraps one of these says more.
var (
	ErrNotRepository   = errors.New("not a virtbackup repository")
	ErrNewerFormat     = errors.New("written by a newer version of virtbackup")
	ErrReadOnly        = errors.New("the repository is read-only")
	ErrMissing         = errors.New("the repository's directory does not exist")
	ErrNotMounted      = errors.New("the repository's storage is not mounted")
	ErrForeign         = errors.New("another host writes backups of this domain to the repository")
	ErrManifest        = errors.New("the backup's manifest is damaged or forged")
	ErrForeignManifest = errors.New("the backup's manifest belongs to another host")
	ErrDamaged         = errors.New("the backup's files do not match its manifest")
	ErrNoBackup        = errors.New("no such backup in the repository")
	ErrExists          = errors.New("already exists in the repository")
	ErrNoSpace         = errors.New("no space left in the repository")
	ErrNotEmpty        = errors.New("the directory is not empty")
	ErrHasChildren     = errors.New("another backup is an increment to this one")
)

// NotMounted is the name of a file in a mount point that nothing is mounted on.
const NotMounted = ".virtbackup-not-mounted"

const (
	repositoryName    = "virtbackup-repository.json"
	repositoryPending = ".virtbackup-repository.pending"
	stagingName       = ".staging"
	headerLimit       = 64 << 10
)

// ID names a repository, whatever path it is mounted at; a ULID.
type ID string

type header struct {
	Format  int   `json:"format"`
	ID      ID    `json:"id"`
	Created int64 `json:"created_usec"`
}

// Repository is an open repository. Its methods may be called concurrently.
type Repository struct {
	tree tree
	id   ID
	key  []byte
	host string
	pins map[string]string // by backup: see Trust
}

// Init makes an empty directory a repository and returns its id. A directory
// that is a repository already is ErrExists, one that holds anything else
// ErrNotEmpty. An Init that was cut short is simply run again.
func Init(ctx context.Context, root string) (ID, error) {
	t, err := openTree(root)
	if err != nil {
		return "", fmt.Errorf("cannot make a repository of %s: %w", root, err)
	}
	defer t.root.Close()
	id, err := initialize(ctx, t)
	if err != nil {
		return "", fmt.Errorf("cannot make a repository of %s: %w", root, noSpace(err))
	}
	return id, nil
}

func initialize(ctx context.Context, t tree) (ID, error) {
	names, err := t.names(".")
	if err != nil {
		return "", err
	}
	if slices.Contains(names, repositoryName) {
		return "", fmt.Errorf("it is one: %w", ErrExists)
	}
	// lost+found is in the root of every ext4 file system.
	ours := []string{stagingName, repositoryPending, "lost+found"}
	for _, n := range names {
		if !slices.Contains(ours, n) {
			return "", fmt.Errorf("%w: there is %q", ErrNotEmpty, n)
		}
	}
	now := time.Now()
	id := ID(ulid.MustNew(ulid.Timestamp(now), rand.Reader).String())
	content, err := json.MarshalIndent(header{Format: Format, ID: id, Created: now.UnixMicro()}, "", "  ")
	if err != nil {
		return "", err
	}
	if err := t.removeAll(repositoryPending); err != nil {
		return "", err
	}
	if err := t.mkdir(stagingName); err != nil && !errors.Is(err, unix.EEXIST) {
		return "", err
	}
	if err := t.writeNew(repositoryPending, append(content, '\n')); err != nil {
		return "", err
	}
	if err := ctx.Err(); err != nil {
		return "", err
	}
	if err := t.rename(repositoryPending, repositoryName); err != nil {
		return "", err
	}
	return id, t.sync(".")
}

// Open opens the repository at root. The key authenticates manifests and names
// this host; it is the content of the host's key file.
func Open(root string, key []byte) (*Repository, error) {
	if len(key) < 32 {
		return nil, fmt.Errorf("cannot open repository %s: the host key has only %d bytes", root, len(key))
	}
	t, err := openTree(root)
	if err != nil {
		return nil, fmt.Errorf("cannot open repository %s: %w", root, err)
	}
	id, err := readHeader(t)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("cannot open repository %s: %w", root, err), t.root.Close())
	}
	return &Repository{tree: t, id: id, key: bytes.Clone(key), host: HostID(key)}, nil
}

func readHeader(t tree) (ID, error) {
	b, err := t.readFile(repositoryName, headerLimit)
	if errors.Is(err, unix.ENOENT) {
		return "", ErrNotRepository
	}
	if err != nil {
		return "", err
	}
	var h header
	if err := checkFormat(b); errors.Is(err, ErrNewerFormat) {
		return "", err
	}
	if err := json.Unmarshal(b, &h); err != nil || h.Format != Format || !ulidPattern.MatchString(string(h.ID)) {
		return "", fmt.Errorf("%w: %s is damaged", ErrNotRepository, repositoryName)
	}
	return h.ID, nil
}

// Close forgets the repository; files and stages opened from it stay usable.
func (r *Repository) Close() error { return r.tree.root.Close() }

// ID returns the repository's id.
func (r *Repository) ID() ID { return r.id }

// Host returns the id of this host, by which its manifests are known.
func (r *Repository) Host() string { return r.host }

// Space returns the bytes that can still be written and those in all.
func (r *Repository) Space() (free, total uint64, err error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(r.tree.root.Fd()), &st); err != nil {
		return 0, 0, fmt.Errorf("cannot read the free space of repository %s: %w", r.id, err)
	}
	return st.Bavail * uint64(st.Frsize), st.Blocks * uint64(st.Frsize), nil
}

// ReadOnly tells whether the repository's file system refuses all writing.
func (r *Repository) ReadOnly() (bool, error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(r.tree.root.Fd()), &st); err != nil {
		return false, fmt.Errorf("cannot read the state of repository %s: %w", r.id, err)
	}
	return st.Flags&unix.ST_RDONLY != 0, nil
}

// Domains lists the UUIDs of the domains that have a directory here.
func (r *Repository) Domains() ([]string, error) {
	names, err := r.tree.names(".")
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(names, func(n string) bool { return !uuidPattern.MatchString(n) }), nil
}

// Backups lists the ids of a domain's committed backups, oldest first. That a
// backup is committed does not say that it is whole: see Manifest and Check.
func (r *Repository) Backups(domain string) ([]string, error) {
	if err := checkName("domain UUID", uuidPattern, domain); err != nil {
		return nil, err
	}
	names, err := r.tree.names(domain)
	if errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var backups []string
	for _, n := range names {
		if !ulidPattern.MatchString(n) {
			continue
		}
		committed, err := r.tree.exists(domain + "/" + n + "/" + manifestName)
		// What can't be looked at is listed: its manifest then says why.
		if committed || err != nil {
			backups = append(backups, n)
		}
	}
	return backups, nil
}

// Manifest returns a backup's authenticated manifest. Errors: ErrNoBackup,
// ErrManifest, ErrForeignManifest, ErrNewerFormat.
func (r *Repository) Manifest(domain, backup string) (*Manifest, error) {
	m, content, err := r.readContent(domain, backup)
	if err == nil && !r.pinned(m, content) {
		err = m.authenticate(r.key)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot read backup %s of domain %s: %w", truncated(backup), truncated(domain), err)
	}
	return m, nil
}

// Trust has manifests of other hosts accepted, each only as it was when somebody
// looked at it and said so: pins are, by backup, those that Foreign returned.
func (r *Repository) Trust(pins map[string]string) { r.pins = pins }

func (r *Repository) pinned(m *Manifest, content []byte) bool {
	pin, there := r.pins[m.Backup]
	return there && m.Host != r.host && pin == pinOf(content)
}

func pinOf(content []byte) string {
	sum := sha256.Sum256(content)
	return hex.EncodeToString(sum[:])
}

// Foreign returns the manifest of a backup that another host made, which nobody
// vouches for, and its pin.
func (r *Repository) Foreign(domain, backup string) (m *Manifest, pin string, err error) {
	m, content, err := r.readContent(domain, backup)
	if err == nil && m.Host == r.host {
		err = fmt.Errorf("backup %s is this host's own", backup)
	}
	if err != nil {
		return nil, "", err
	}
	return m, pinOf(content), nil
}

// readManifest reads a manifest and checks that it belongs where it lies, but
// not yet who wrote it.
func (r *Repository) readManifest(domain, backup string) (*Manifest, error) {
	m, _, err := r.readContent(domain, backup)
	return m, err
}

func (r *Repository) readContent(domain, backup string) (*Manifest, []byte, error) {
	if err := checkBackup(domain, backup); err != nil {
		return nil, nil, err
	}
	b, err := r.tree.readFile(domain+"/"+backup+"/"+manifestName, manifestLimit)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return nil, nil, ErrNoBackup
	}
	if storageFault(err) {
		return nil, nil, fmt.Errorf("cannot read the manifest of backup %s: %w", backup, err)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrManifest, err)
	}
	m, err := parseManifest(b)
	if err != nil {
		return nil, nil, err
	}
	if m.Repository != r.id || m.Domain.UUID != domain || m.Backup != backup {
		return nil, nil, fmt.Errorf("%w: it is that of backup %s of domain %s in repository %s, moved here",
			ErrManifest, m.Backup, m.Domain.UUID, m.Repository)
	}
	return m, b, nil
}

// storageFault tells whether an error is that of storage that does not answer
// as it should. It says nothing of what is stored, which may be whole.
func storageFault(err error) bool {
	for _, fault := range []error{unix.EIO, unix.ESTALE, unix.ETIMEDOUT, unix.ENOTCONN, unix.EHOSTDOWN} {
		if errors.Is(err, fault) {
			return true
		}
	}
	return false
}

// Check compares the directory of a backup with its manifest: every file that
// it lists is there, a regular file, of the size that was written. It reads no
// file's content. Error: ErrDamaged.
func (r *Repository) Check(m *Manifest) error {
	var damage []error
	check := func(name string, size uint64) {
		f, info, err := r.openFile(m.Domain.UUID, m.Backup, name)
		switch {
		case err != nil:
			damage = append(damage, err)
		case uint64(info.Size()) != size:
			damage = append(damage, fmt.Errorf("%s has %d bytes instead of %d", name, info.Size(), size))
		}
		if f != nil {
			f.Close()
		}
	}
	for _, d := range m.Disks {
		check(d.File, d.StoredBytes)
	}
	for _, f := range m.Files {
		check(f.Name, f.Size)
	}
	if len(damage) > 0 {
		return fmt.Errorf("backup %s: %w: %w", m.Backup, ErrDamaged, errors.Join(damage...))
	}
	return nil
}

// OpenImage opens any file of a committed backup, by its name there, to read.
func (r *Repository) OpenImage(domain, backup, file string) (*os.File, error) {
	if err := errors.Join(checkBackup(domain, backup), checkFileName(file)); err != nil {
		return nil, err
	}
	f, _, err := r.openFile(domain, backup, file)
	return f, err
}
