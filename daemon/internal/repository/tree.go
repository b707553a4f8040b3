package repository

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

const (
	directoryMode = 0o700
	fileMode      = 0o600
)

// tree is the part of a file system beneath one open directory. Whoever can
// write to a NAS share can put links there, so nothing beneath the root is ever
// opened through one: openat2 walks every path, and the last component of what
// is renamed or removed is never followed by the kernel.
type tree struct{ root *os.File }

func openTree(root string) (tree, error) {
	f, err := os.OpenFile(root, unix.O_DIRECTORY|unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return tree{}, fmt.Errorf("%w: %w", ErrMissing, err)
	}
	if err != nil {
		return tree{}, err
	}
	t := tree{f}
	bare, err := t.exists(NotMounted)
	if err == nil && bare {
		err = ErrNotMounted
	}
	if err != nil {
		return tree{}, errors.Join(err, f.Close())
	}
	return t, nil
}

// open opens name, a clean relative path, and refuses links on the way to it.
func (t tree) open(name string, flags int, mode uint64) (*os.File, error) {
	how := &unix.OpenHow{
		Flags: uint64(flags) | unix.O_CLOEXEC,
		// NO_SYMLINKS implies NO_MAGICLINKS; both are named to be read.
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	}
	if flags&unix.O_CREAT != 0 {
		how.Mode = mode
	}
	for {
		fd, err := unix.Openat2(int(t.root.Fd()), name, how)
		if err == nil {
			return os.NewFile(uintptr(fd), path.Join(t.root.Name(), name)), nil
		}
		// EAGAIN: something was renamed while the kernel walked the path.
		if err != unix.EINTR && err != unix.EAGAIN {
			return nil, t.wrap("open", name, err)
		}
	}
}

// openRegular opens an existing regular file for reading; a FIFO or a device
// put in its place is refused without waiting for it.
func (t tree) openRegular(name string) (*os.File, os.FileInfo, error) {
	f, err := t.open(name, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", f.Name())
	}
	if err != nil {
		return nil, nil, errors.Join(err, f.Close())
	}
	return f, info, nil
}

// create makes a new file; one that is there already is an error.
func (t tree) create(name string) (*os.File, error) {
	return t.open(name, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL, fileMode)
}

func (t tree) readFile(name string, limit int64) ([]byte, error) {
	f, info, err := t.openRegular(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if info.Size() > limit {
		return nil, fmt.Errorf("%s has %d bytes, more than the %d that are allowed", f.Name(), info.Size(), limit)
	}
	// The file may grow while it is read.
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(b)) > limit {
		err = fmt.Errorf("%s grew over %d bytes", f.Name(), limit)
	}
	return b, err
}

// writeNew writes a new file and makes its content durable, not yet its name.
func (t tree) writeNew(name string, content []byte) error {
	f, err := t.create(name)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err == nil {
		err = f.Sync()
	}
	return noSpace(errors.Join(err, f.Close()))
}

// parent opens the directory of name and returns it with name's last component.
func (t tree) parent(name string) (*os.File, string, error) {
	d, err := t.open(path.Dir(name), unix.O_DIRECTORY|unix.O_RDONLY, 0)
	return d, path.Base(name), err
}

func (t tree) mkdir(name string) error {
	return t.at("mkdir", name, func(fd int, base string) error { return unix.Mkdirat(fd, base, directoryMode) })
}

func (t tree) remove(name string, flags int) error {
	return t.at("remove", name, func(fd int, base string) error { return unix.Unlinkat(fd, base, flags) })
}

// renamePatience is longer than the kernel's SMB client keeps files open that
// were closed (mount.cifs(8), closetimeo: a second, unless it is set higher).
const renamePatience = 5 * time.Second

// rename waits a little when it is not permitted: a server of SMB renames no
// directory in which a file is open.
func (t tree) rename(from, to string) error {
	for until := time.Now().Add(renamePatience); ; time.Sleep(100 * time.Millisecond) {
		if err := t.tryRename(from, to); !errors.Is(err, unix.EACCES) || time.Now().After(until) {
			return err
		}
	}
}

func (t tree) tryRename(from, to string) error {
	return t.at("rename", from, func(oldDir int, oldBase string) error {
		return t.at("rename to", to, func(newDir int, newBase string) error {
			return unix.Renameat(oldDir, oldBase, newDir, newBase)
		})
	})
}

// at calls do with the open directory of name and name's last component.
func (t tree) at(verb, name string, do func(fd int, base string) error) error {
	d, base, err := t.parent(name)
	if err != nil {
		return err
	}
	defer d.Close()
	return t.wrap(verb, name, do(int(d.Fd()), base))
}

// sync makes the names in a directory durable. Some network file systems can't
// sync a directory and say EINVAL; they have no more to offer.
func (t tree) sync(name string) error {
	d, err := t.open(name, unix.O_DIRECTORY|unix.O_RDONLY, 0)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := unix.Fsync(int(d.Fd())); err != nil && err != unix.EINVAL && err != unix.ENOTSUP {
		return t.wrap("sync", name, err)
	}
	return nil
}

// names lists a directory in order.
func (t tree) names(name string) ([]string, error) {
	d, err := t.open(name, unix.O_DIRECTORY|unix.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	slices.Sort(names)
	return names, err
}

// removeAll removes name and, if it is a directory, all beneath it. What is
// gone already is no error: a removal that was cut short is simply run again.
func (t tree) removeAll(name string) error {
	err := t.remove(name, 0)
	if err == nil || errors.Is(err, unix.ENOENT) {
		return nil
	}
	if !errors.Is(err, unix.EISDIR) && !errors.Is(err, unix.EPERM) {
		return err
	}
	names, err := t.names(name)
	if err != nil {
		return ignoreMissing(err)
	}
	for _, n := range names {
		if err := t.removeAll(name + "/" + n); err != nil {
			return err
		}
	}
	if err := t.remove(name, unix.AT_REMOVEDIR); err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	return nil
}

func (t tree) exists(name string) (bool, error) {
	f, err := t.open(name, unix.O_PATH|unix.O_NOFOLLOW, 0)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return true, f.Close()
}

func (t tree) wrap(verb, name string, err error) error {
	if err == nil {
		return nil
	}
	var inner *os.PathError
	if !errors.As(err, &inner) {
		err = &os.PathError{Op: verb, Path: path.Join(t.root.Name(), name), Err: err}
	}
	return noSpace(err)
}

// noSpace adds the sentinel that callers ask for to what the kernel said.
func noSpace(err error) error {
	switch {
	case err == nil || errors.Is(err, ErrNoSpace) || errors.Is(err, ErrReadOnly):
		return err
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return fmt.Errorf("%w: %w", ErrNoSpace, err)
	case errors.Is(err, unix.EROFS):
		return fmt.Errorf("%w: %w", ErrReadOnly, err)
	}
	return err
}
