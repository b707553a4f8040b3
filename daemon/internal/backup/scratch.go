package backup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/virtbackup/virtbackup/daemon/internal/failure"
	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/dbus"
)

const (
	socketSuffix = ".sock"
	// Others may pass through scratch directories, and list nothing: QEMU has to come to its files.
	passable = 0o711
)

// prepare makes the empty images into which QEMU saves what the guest
// overwrites while it is copied, and the directory for its socket.
func (r live) prepare(ctx context.Context) error {
	s := r.Settings()
	uid, gid, err := hypervisor.User()
	if err != nil {
		return err
	}
	if err := makeSocketDirectory(uid, gid); err != nil {
		return err
	}
	if err := r.remove(); err != nil {
		return err
	}
	if err := makeDirectory(s.ScratchDirectory, passable); err != nil {
		return err
	}
	own := filepath.Join(s.ScratchDirectory, r.Plan.Backup)
	if err := r.setAside(own, s.MinimumFreeScratch); err != nil {
		return err
	}
	if err := os.Chmod(own, passable); err != nil { // the umask took bits away
		return fmt.Errorf("cannot make a scratch directory: %w", err)
	}
	for _, k := range r.Plan.Disks {
		if err := hypervisor.MakeImage(ctx, r.Plan.scratch(s.ScratchDirectory, k.Target), k.Size, uid, gid); err != nil {
			return err
		}
	}
	return nil
}

// setAside makes a backup's scratch directory, if there is space for it beside
// what others have set aside and not used yet.
func (k *Kind) setAside(own string, minimum uint64) error {
	k.mu.Lock() // two that look at once would both find the same space
	defer k.mu.Unlock()
	directory := filepath.Dir(own)
	others, err := os.ReadDir(directory)
	if err != nil {
		return fmt.Errorf("cannot see who uses scratch space: %w", err)
	}
	var used []uint64
	for _, o := range others {
		used = append(used, allocated(filepath.Join(directory, o.Name())))
	}
	if err := checkFree(directory, minimum, used); err != nil {
		return err
	}
	if err := os.Mkdir(own, passable); err != nil {
		return fmt.Errorf("cannot make a scratch directory: %w", err)
	}
	return nil
}

// allocated is how much the files of a directory take.
func allocated(directory string) (bytes uint64) {
	entries, _ := os.ReadDir(directory) // one that has gone meanwhile takes nothing
	for _, e := range entries {
		var s unix.Stat_t
		if unix.Lstat(filepath.Join(directory, e.Name()), &s) == nil {
			bytes += uint64(s.Blocks) * 512
		}
	}
	return bytes
}

// setAsideNow is how much has to be free for one more, when each that is there
// has set as much aside and used so much of it.
func setAsideNow(minimum uint64, used []uint64) uint64 {
	need := minimum
	for _, u := range used {
		need += minimum - min(minimum, u)
	}
	return need
}

// remove removes the scratch images and the socket, if there are any.
func (r live) remove() error {
	return removeScratch(r.Settings().ScratchDirectory, r.Plan.Backup)
}

func removeScratch(directory, backup string) error {
	err := os.RemoveAll(filepath.Join(directory, backup))
	socket := os.Remove(filepath.Join(hypervisor.SocketDirectory, backup+socketSuffix))
	if errors.Is(socket, fs.ErrNotExist) {
		socket = nil
	}
	if err := errors.Join(err, socket); err != nil {
		return fmt.Errorf("cannot remove the scratch images of backup %s: %w", backup, err)
	}
	return nil
}

// makeSocketDirectory makes the directory in which QEMU binds its sockets.
func makeSocketDirectory(uid, gid int) error {
	const parent = 0o711
	if err := makeDirectory(filepath.Dir(hypervisor.SocketDirectory), parent); err != nil {
		return err
	}
	if err := makeDirectory(hypervisor.SocketDirectory, 0o700); err != nil {
		return err
	}
	if err := os.Chown(hypervisor.SocketDirectory, uid, gid); err != nil {
		return fmt.Errorf("cannot give the directory of sockets to QEMU: %w", err)
	}
	return nil
}

// makeDirectory makes a directory with this mode, whatever the umask. One that
// is there stays as it is.
func makeDirectory(path string, mode fs.FileMode) error {
	err := os.Mkdir(path, mode)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err == nil {
		err = os.Chmod(path, mode)
	}
	if err != nil {
		return fmt.Errorf("cannot make a directory: %w", err)
	}
	return nil
}

// checkFree fails when less is free than is set aside for one more, and for
// those that have used so much of theirs.
func checkFree(directory string, minimum uint64, used []uint64) error {
	var s unix.Statfs_t
	if err := unix.Statfs(directory, &s); err != nil {
		return fmt.Errorf("cannot ask for the free space below %s: %w", directory, err)
	}
	need := setAsideNow(minimum, used)
	if free := s.Bavail * uint64(s.Bsize); free < need {
		return failure.Errorf(dbus.ErrLimitsExceeded, "only %d MiB are free for scratch images below %s, and %d MiB are needed: limits.minimum_free_scratch is %d MiB for each of %d backups; make space there, or wait for the others",
			free>>20, directory, need>>20, minimum>>20, len(used)+1)
	}
	return nil
}
