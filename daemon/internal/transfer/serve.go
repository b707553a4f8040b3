package transfer

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/nbd"
	"github.com/virtbackup/virtbackup/daemon/internal/repository"
)

const (
	// patience is how long a request may wait for the storage, unless the spec
	// says otherwise. QEMU itself waits for ever.
	patience = 30 * time.Second
	// servedBuffers bounds the bytes of replies of all disks together, as long as
	// they are not more than some.
	servedBuffers = 24 << 20
	// maxSocket is the longest path of a unix socket, unix(7).
	maxSocket = 107
)

// serve serves the disks of a backup until it is told to stop. SIGTERM says the
// same. What was damaged makes the job fail, but only once all is over: whoever
// reads gets EIO for it, as from a bad disk.
func (w *worker) serve(ctx context.Context) (err error) {
	if w.spec.Serve == nil {
		return fail(ClassInternal, "the specification says nothing about what to serve")
	}
	r, err := w.open()
	if err != nil {
		return err
	}
	defer r.Close()
	l, err := trace(r, w.spec.Domain, w.spec.Serve.Backup)
	if err != nil {
		return inRepository(err)
	}
	w.result.Manifest = l[0]
	disks, err := w.openServed(r, l)
	defer func() { closeServed(disks) }()
	if err != nil {
		return err
	}
	if err := w.writeFiles(ctx, r, l[0]); err != nil {
		return err
	}
	listeners, err := w.listen()
	if err != nil {
		return err
	}
	if err := w.status.enter(PhaseServing); err != nil {
		hangUp(listeners)
		return err
	}
	w.serveDisks(ctx, disks, listeners)
	for _, d := range disks {
		w.result.Served = append(w.result.Served, d.served())
	}
	return verdict(w.result.Served)
}

// writeFiles writes the other files of the backup that are asked for. They stay
// whatever comes later.
func (w *worker) writeFiles(ctx context.Context, r *repository.Repository, m *repository.Manifest) (err error) {
	var made []*destination
	defer func() {
		for _, d := range made {
			d.close(err == nil)
		}
	}()
	if err := w.restoreFiles(r, m, w.spec.Serve.Files, &made); err != nil {
		return err
	}
	return w.publish(ctx, made)
}

// openServed opens all disks, which share what may be held in memory.
func (w *worker) openServed(r *repository.Repository, l lineage) (disks []*servedDisk, err error) {
	spec := w.spec.Serve
	if len(spec.Disks) == 0 {
		return nil, fail(ClassInternal, "no disk to serve is named")
	}
	readers := make(chan struct{}, servedReaders)
	cache := newBlockCache(cachedBlocks)
	limit := patience
	if spec.Patience > 0 {
		limit = time.Duration(spec.Patience) * time.Microsecond
	}
	for _, s := range spec.Disks {
		from, err := openDiskWithin(r, l, s.Target, chainTables/int64(len(spec.Disks)))
		if err != nil {
			return disks, err
		}
		disks = append(disks, &servedDisk{
			storedDisk: from, lineage: l, count: w.status.disk(s.Target), log: w.log.With("disk", s.Target),
			readers: readers, cache: cache, wait: spec.Wait, patience: limit,
		})
	}
	return disks, nil
}

// closeServed closes the disks' files, but for those that somebody still reads
// from, in storage that hangs: closing would wait for it. The process ends soon.
func closeServed(disks []*servedDisk) {
	for _, d := range disks {
		if len(d.readers) > 0 {
			return
		}
		d.close()
	}
}

// serveDisks returns when it is told to stop, and nothing is being answered any
// more. What still hangs in a system call is left behind.
func (w *worker) serveDisks(ctx context.Context, disks []*servedDisk, listeners []net.Listener) {
	serving, stop := context.WithCancel(ctx)
	defer stop()
	var all sync.WaitGroup
	for i, d := range disks {
		all.Go(func() { nbd.NewServer(d.Target, d, servedBuffers/int64(len(disks))).Serve(serving, listeners[i]) })
	}
	if err := waitStop(ctx, w.directory); err != nil && ctx.Err() == nil {
		w.log.Error("cannot wait until it is no longer needed", "error", err)
	}
	stop()
	all.Wait()
}

// listen makes the sockets, for their owner alone.
func (w *worker) listen() (listeners []net.Listener, err error) {
	defer func() {
		if err != nil {
			hangUp(listeners)
		}
	}()
	for _, d := range w.spec.Serve.Disks {
		l, err := listenAt(d.Socket, w.spec.Serve.Owner)
		if err != nil {
			return listeners, classify(ClassDestination, inDisk(d.Target, fmt.Errorf("cannot serve it at %s: %w", d.Socket, err)))
		}
		listeners = append(listeners, l)
	}
	return listeners, nil
}

// listenAt makes a socket. The directory is the daemon's: nobody else puts
// anything there.
func listenAt(path string, owner Owner) (net.Listener, error) {
	if !filepath.IsAbs(path) || len(path) > maxSocket {
		return nil, fmt.Errorf("a socket's path is absolute and has %d bytes at most", maxSocket)
	}
	info, err := os.Lstat(path)
	switch {
	case err == nil && info.Mode().Type() != fs.ModeSocket:
		return nil, errors.New("something that is no socket is there")
	case err == nil: // of a worker that was killed
		err = os.Remove(path)
	case errors.Is(err, fs.ErrNotExist):
		err = nil
	}
	if err != nil {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	mode := os.FileMode(owner.Mode & 0o777)
	if mode == 0 {
		mode = 0o600
	}
	err = os.Chmod(path, mode)
	if err == nil && (owner.UID != nil || owner.GID != nil) {
		err = os.Lchown(path, orKeep(owner.UID), orKeep(owner.GID))
	}
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// hangUp closes sockets that nobody has served yet.
func hangUp(listeners []net.Listener) {
	for _, l := range listeners {
		_ = l.Close() // and removes it
	}
}

// verdict is what the job says about all that was read. What the storage gave no
// answer to says nothing about the backup, so damage goes first.
func verdict(served []ServedDisk) error {
	for _, d := range served {
		if len(d.Damage) > 0 {
			first := d.Damage[0]
			return inDisk(d.Target, fail(ClassVerification, "%w: %d bytes at %d, in the image of backup %s: %s",
				errBlock, first.Length, first.Offset, first.Backup, first.Detail))
		}
	}
	for _, d := range served {
		if d.Unanswered != nil {
			return inDisk(d.Target, &classed{d.Unanswered.Class, d.Unanswered})
		}
	}
	return nil
}
