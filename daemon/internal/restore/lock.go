package restore

import (
	"errors"
	"fmt"
	"io"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// The bytes of an image file by whose locks QEMU's processes tell each other
// what they do with it (block/file-posix.c, RAW_LOCK_PERM_BASE and
// RAW_LOCK_SHARED_BASE, each with a byte per permission).
const (
	firstLockedByte = 100
	lockedBytes     = 200
)

// locks keep every QEMU from opening some files: a domain that is started while
// its disks change places must not come up with one that is about to go.
type locks []int

// take locks a file. It fails when a QEMU has the file open.
func (l *locks) take(in directory, name string) error {
	path := filepath.Join(in.path, name)
	fd, err := unix.Openat(in.fd, name, unix.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("cannot open %s: %w", path, err)
	}
	*l = append(*l, fd)
	lock := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart, Start: firstLockedByte, Len: lockedBytes}
	err = unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &lock)
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
		return fmt.Errorf("%s is in use: shut off the domain that has it", path)
	}
	return nil // a file system without locks has none for QEMU either
}

// release lets go of all files.
func (l *locks) release() {
	for _, fd := range *l {
		_ = unix.Close(fd)
	}
	*l = nil
}

// lockAll locks files in both of their places.
func lockAll(files []file) (locks, error) {
	var held locks
	for _, f := range files {
		if f.Fresh {
			continue
		}
		err := f.between(func(staging, final directory) error {
			return errors.Join(held.take(staging, filepath.Base(f.Staged)), held.take(final, filepath.Base(f.Final)))
		})
		if err != nil {
			held.release()
			return nil, err
		}
	}
	return held, nil
}
