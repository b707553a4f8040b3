// Package mounts has the storage of repositories mounted when it is needed, and
// unmounted when nobody has needed it for a while. Systemd mounts; this package
// decides, and keeps the credentials.
//
// All that lasts is in systemd and in the catalog: a daemon that starts finds
// what is mounted, and what of it is in use by jobs that run. A mount point is
// never looked at, as that would wait for a server that may be gone.
package mounts

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/health"
	"github.com/virtbackup/virtbackup/daemon/internal/repository"
	"github.com/virtbackup/virtbackup/daemon/internal/storage"
	"github.com/virtbackup/virtbackup/systemd/mountunit"
)

// Systemd is what mounts; mountunit.Systemd is one.
type Systemd interface {
	Mount(ctx context.Context, m mountunit.Mount) error
	Unmount(ctx context.Context, where string, limit time.Duration) error
	State(ctx context.Context, where string) (mountunit.State, error)
	Below(ctx context.Context, directory string) ([]mountunit.State, error)
}

// Options of a Keeper.
type Options struct {
	Systemd     Systemd
	Catalog     *catalog.Catalog
	Directory   string                       // of the mount points
	Credentials string                       // directory of the files with them
	Limit       func() time.Duration         // of mounting, and of unmounting
	Idle        func() time.Duration         // after which what nobody needs is unmounted
	Busy        func(repository string) bool // whether a job that runs may use it
	Changed     func(repository string)      // is told when one was mounted or unmounted
	Log         *slog.Logger
}

// Keeper keeps the mounts of this host's repositories. It is safe for concurrent use.
type Keeper struct {
	Options
	mu     sync.Mutex
	points map[string]*point // by repository
}

// point is one mount point. Its own lock is held while systemd works on it.
type point struct {
	working sync.Mutex
	used    time.Time // when it was last seen in use; guarded by the Keeper's mu, as is mounted
	mounted bool
}

// New makes a Keeper. Run has it unmount.
func New(o Options) *Keeper { return &Keeper{Options: o, points: map[string]*point{}} }

// Path is where a repository's storage is mounted.
func (k *Keeper) Path(id string) string { return filepath.Join(k.Directory, id) }

func (k *Keeper) point(id string) *point {
	k.mu.Lock()
	defer k.mu.Unlock()
	p, ok := k.points[id]
	if !ok {
		p = &point{used: time.Now()}
		k.points[id] = p
	}
	return p
}

// Mounted tells whether a repository's storage was mounted when it was last asked for.
func (k *Keeper) Mounted(id string) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	p, ok := k.points[id]
	return ok && p.mounted
}

func (k *Keeper) set(id string, p *point, mounted, used bool) {
	k.mu.Lock()
	changed := p.mounted != mounted
	p.mounted = mounted
	if used {
		p.used = time.Now()
	}
	k.mu.Unlock()
	if changed {
		k.Changed(id)
	}
}

// Ensure has a repository's storage mounted. Whoever uses it then has to be a job
// that Busy knows of, or quick.
func (k *Keeper) Ensure(ctx context.Context, r catalog.Repository) error {
	now, err := k.Catalog.Repository(ctx, r.ID)
	if err != nil {
		return err
	}
	if now.State == string(health.Hung) {
		return fmt.Errorf("%w since %s", ErrHung, now.Since.Local().Format(time.DateTime))
	}
	_, err = k.ensure(ctx, r, true)
	return err
}

// Visit is Ensure for a look that is no use: storage that was mounted for it is
// unmounted soon. It tells whether it was.
func (k *Keeper) Visit(ctx context.Context, r catalog.Repository) (fresh bool, err error) {
	return k.ensure(ctx, r, false)
}

func (k *Keeper) ensure(ctx context.Context, r catalog.Repository, use bool) (fresh bool, err error) {
	if !storage.Mounted(r.Type) {
		return false, nil
	}
	p := k.point(r.ID)
	p.working.Lock()
	defer p.working.Unlock()
	there, err := k.settled(ctx, r.Path)
	if err == nil && !there {
		err = k.mount(ctx, r)
		fresh = err == nil
	}
	k.set(r.ID, p, err == nil, use)
	return fresh, err
}

// settled tells whether something is mounted at a path, when systemd has ended
// what it may be doing there for a daemon before this one.
func (k *Keeper) settled(ctx context.Context, where string) (bool, error) {
	const interval = 200 * time.Millisecond
	ctx, cancel := context.WithTimeout(ctx, k.Limit())
	defer cancel()
	for {
		state, err := k.Systemd.State(ctx, where)
		if err != nil || !state.Mounted || state.Active == "active" {
			return state.Mounted, err
		}
		select {
		case <-time.After(interval):
		case <-ctx.Done():
			return false, fmt.Errorf("cannot mount %s: it is still %s: %w", where, state.Active, context.Cause(ctx))
		}
	}
}

// mount mounts what is not mounted.
func (k *Keeper) mount(ctx context.Context, r catalog.Repository) error {
	if err := k.prepare(r.Path); err != nil {
		return fmt.Errorf("cannot make the mount point of repository %q: %w", r.Name, err)
	}
	credentials := ""
	if r.Credentials {
		credentials = k.credentialsFile(r.ID)
	}
	place := storage.Place{Type: r.Type, Address: r.Address, FileSystem: r.FileSystem, Options: r.Options}
	// What was written to the catalog by somebody else is trusted no more than a call.
	if err := place.Check(); err != nil {
		return err
	}
	spec, said := place.Spec(credentials), r.Path+".errors"
	err := k.Systemd.Mount(ctx, mountunit.Mount{
		Where: r.Path, What: spec.What, Type: spec.Type, Options: spec.Options, Force: spec.Force,
		Description: "Storage of the virtbackup repository " + r.Name, Timeout: k.Limit(), Errors: said,
	})
	if err == nil {
		k.Log.Info("mounted the storage of a repository", "repository", r.Name, "address", r.Address)
		return nil
	}
	if errors.Is(err, mountunit.ErrTimeout) {
		return fmt.Errorf("cannot mount %s: %w: %w", r.Address, ErrHung, err)
	}
	if why := lastLine(said); why != "" {
		return fmt.Errorf("cannot mount %s: %s", r.Address, why)
	}
	return fmt.Errorf("cannot mount %s: %w", r.Address, err)
}

// prepare makes a mount point that nobody takes for storage: what is there says
// so, and keeps it from being made a repository.
func (k *Keeper) prepare(where string) error {
	if err := os.Mkdir(where, 0); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	f, err := os.OpenFile(filepath.Join(where, repository.NotMounted), os.O_CREATE|os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	return f.Close()
}

// lastLine is what mount(8) said last.
func lastLine(path string) string {
	const limit = 500
	b, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	lines := strings.Split(strings.TrimSpace(strings.ToValidUTF8(string(b), "?")), "\n")
	for _, l := range lines {
		// The first that tells; those after it are advice.
		if l = strings.TrimSpace(l); l != "" {
			return l[:min(len(l), limit)]
		}
	}
	return ""
}

// ErrHung says that a repository's storage does not answer: nothing is begun with
// it that would hang as well.
var ErrHung = health.ErrHung

// ErrBusy says that a job uses the storage.
var ErrBusy = errors.New("a job uses the storage")

// Unmount unmounts a repository's storage now, unless a job uses it.
func (k *Keeper) Unmount(ctx context.Context, id string) error {
	p := k.point(id)
	p.working.Lock()
	defer p.working.Unlock()
	return k.unmount(ctx, id, p)
}

func (k *Keeper) unmount(ctx context.Context, id string, p *point) error {
	if k.Busy(id) {
		return ErrBusy
	}
	if err := k.Systemd.Unmount(ctx, k.Path(id), k.Limit()); err != nil {
		return err
	}
	k.set(id, p, false, false)
	return nil
}

func (k *Keeper) credentialsFile(id string) string { return filepath.Join(k.Credentials, id) }
