package mounts

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/renameio/v2"
	"github.com/oklog/ulid/v2"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/repository"
)

// Run unmounts what nobody needs, until ctx ends. What was mounted before this
// daemon started counts as needed when it started.
func (k *Keeper) Run(ctx context.Context) {
	const shortest, longest = 200 * time.Millisecond, 30 * time.Second
	for {
		if err := k.tidy(ctx); err != nil && ctx.Err() == nil {
			k.Log.Warn("cannot unmount storage that nobody needs; it is tried again", "error", err)
		}
		select {
		case <-time.After(min(max(k.Idle()/4, shortest), longest)):
		case <-ctx.Done():
			return
		}
	}
}

func (k *Keeper) tidy(ctx context.Context) error {
	mounted, err := k.Systemd.Below(ctx, k.Directory)
	if err != nil {
		return err
	}
	var failed []error
	there := map[string]bool{}
	for _, m := range mounted {
		id := filepath.Base(m.Where)
		if _, err := ulid.ParseStrict(id); err != nil {
			continue // somebody else's
		}
		there[id] = true
		failed = append(failed, k.look(ctx, id))
	}
	k.mu.Lock()
	for id, p := range k.points {
		p.mounted = p.mounted && there[id]
	}
	k.mu.Unlock()
	return errors.Join(append(failed, k.removeUnknown(ctx, there))...)
}

// look unmounts one that has not been in use for long enough.
func (k *Keeper) look(ctx context.Context, id string) error {
	known, err := k.known(ctx, id)
	if err != nil {
		return err
	}
	p := k.point(id)
	if !p.working.TryLock() {
		return nil
	}
	defer p.working.Unlock()
	busy := k.Busy(id)
	k.set(id, p, true, busy)
	k.mu.Lock()
	idle := time.Since(p.used)
	k.mu.Unlock()
	if busy || known && idle < k.Idle() {
		return nil
	}
	err = k.unmount(ctx, id, p)
	if errors.Is(err, ErrBusy) {
		return nil
	}
	if err == nil {
		k.Log.Info("unmounted the storage of a repository that nobody needs", "repository", id, "idle", idle.Round(time.Second))
	}
	return err
}

func (k *Keeper) known(ctx context.Context, id string) (bool, error) {
	_, err := k.Catalog.Repository(ctx, id)
	if errors.Is(err, catalog.ErrNotFound) {
		return false, nil
	}
	return err == nil, err
}

// unknownFor is how old something has to be to be nobody's: credentials are
// there before their repository is in the catalog.
const unknownFor = 10 * time.Minute

// removeUnknown removes mount points and credentials of repositories that are gone.
func (k *Keeper) removeUnknown(ctx context.Context, mounted map[string]bool) error {
	var failed []error
	for _, directory := range []string{k.Directory, k.Credentials} {
		entries, err := os.ReadDir(directory)
		if err != nil {
			failed = append(failed, ignoreMissing(err))
			continue
		}
		for _, e := range entries {
			id := strings.TrimSuffix(e.Name(), ".errors")
			if _, err := ulid.ParseStrict(id); err != nil || mounted[id] || young(id) {
				continue
			}
			if known, err := k.known(ctx, id); err != nil || known {
				failed = append(failed, err)
				continue
			}
			path := filepath.Join(directory, e.Name())
			if directory == k.Directory && e.IsDir() {
				failed = append(failed, ignoreMissing(os.Remove(filepath.Join(path, repository.NotMounted))))
			}
			failed = append(failed, ignoreMissing(os.Remove(path)))
		}
	}
	return errors.Join(failed...)
}

// young tells whether a repository may not be in the catalog yet.
func young(id string) bool {
	u, err := ulid.ParseStrict(id)
	return err == nil && time.Since(ulid.Time(u.Time())) < unknownFor
}

func ignoreMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// Save keeps a repository's credentials, in place of those that it had.
func (k *Keeper) Save(id, content string) error {
	if err := os.MkdirAll(k.Credentials, 0o700); err != nil {
		return fmt.Errorf("cannot keep credentials: %w", err)
	}
	// The error of writing names a path, and no content.
	if err := renameio.WriteFile(k.credentialsFile(id), []byte(content), 0o600); err != nil {
		return fmt.Errorf("cannot keep credentials: %w", err)
	}
	return nil
}

// Forget removes a repository's credentials.
func (k *Keeper) Forget(id string) error { return ignoreMissing(os.Remove(k.credentialsFile(id))) }
