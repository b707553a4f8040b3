package restore

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/virtbackup/virtbackup/daemon/internal/failure"
	"github.com/virtbackup/virtbackup/dbus"
)

// file is one that the worker wrote, and where it goes.
type file struct {
	Staged string `json:"staged"`
	Final  string `json:"final"`
	Inode  inode  `json:"inode"`
}

// inode names a file whatever it is called at the moment.
type inode struct {
	Device uint64 `json:"device"`
	Number uint64 `json:"number"`
}

// directory is an open directory. Its path is followed only once, without
// links, so that nobody can turn it into another meanwhile.
type directory struct {
	fd   int
	path string
}

func openDirectory(path string) (directory, error) {
	fd, err := unix.Openat2(unix.AT_FDCWD, path, &unix.OpenHow{
		Flags: unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	})
	if err != nil {
		return directory{}, fmt.Errorf("cannot open directory %s: %w", path, err)
	}
	return directory{fd, path}, nil
}

func (d directory) close() { _ = unix.Close(d.fd) }

// inode returns that of a name; the zero one when there is no such name.
func (d directory) inode(name string) (inode, error) {
	var st unix.Stat_t
	err := unix.Fstatat(d.fd, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	if errors.Is(err, unix.ENOENT) {
		return inode{}, nil
	}
	if err != nil {
		return inode{}, fmt.Errorf("cannot look at %s: %w", filepath.Join(d.path, name), err)
	}
	return inode{st.Dev, st.Ino}, nil
}

// stagings returns the job's directories.
func stagings(p Plan) []string {
	var all []string
	for _, d := range p.Disks {
		all = append(all, d.Staging)
	}
	for _, f := range p.Files {
		all = append(all, f.Staging)
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// makeStaging makes the job's directories.
func makeStaging(p Plan) error {
	for _, path := range stagings(p) {
		if err := makeOne(path, p.InPlace); err != nil {
			return fmt.Errorf("cannot make a directory for the restored files: %w", err)
		}
	}
	return nil
}

func makeOne(path string, exchange bool) error {
	parent, err := openDirectory(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer parent.close()
	if err := unix.Mkdirat(parent.fd, filepath.Base(path), 0o700); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if !exchange {
		return nil
	}
	return canExchange(path)
}

// canExchange tries what the restore will need at its end, before it copies
// for an hour: NFS, for one, cannot do it.
func canExchange(path string) error {
	d, err := openDirectory(path)
	if err != nil {
		return err
	}
	defer d.close()
	for _, name := range []string{".a", ".b"} {
		fd, err := unix.Openat(d.fd, name, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_CLOEXEC, 0o600)
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		_ = unix.Close(fd)
	}
	err = unix.Renameat2(d.fd, ".a", d.fd, ".b", unix.RENAME_EXCHANGE)
	err = errors.Join(err, unix.Unlinkat(d.fd, ".a", 0), unix.Unlinkat(d.fd, ".b", 0))
	if err != nil {
		return failure.Errorf(dbus.ErrUnsupported,
			"the file system of %s cannot exchange files, which a restore in place needs; restore as a new domain: %w", filepath.Dir(path), err)
	}
	return nil
}

// removeStaging removes the job's directories and what is in them.
func removeStaging(p Plan) error {
	var problems []error
	for _, path := range stagings(p) {
		parent, err := openDirectory(filepath.Dir(path))
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			problems = append(problems, err)
			continue
		}
		// An os.Root does not leave its directory, whatever links are put there meanwhile.
		root, err := os.OpenRoot(fmt.Sprintf("/proc/self/fd/%d", parent.fd))
		if err == nil {
			err = errors.Join(root.RemoveAll(filepath.Base(path)), root.Close())
		}
		parent.close()
		if err != nil {
			problems = append(problems, fmt.Errorf("cannot remove %s: %w", path, err))
		}
	}
	return errors.Join(problems...)
}

// written lists what the worker wrote and is to stay.
func written(p Plan) ([]file, error) {
	var all []file
	add := func(staging, destination string) error {
		d, err := openDirectory(staging)
		if err != nil {
			return err
		}
		defer d.close()
		f := file{Staged: filepath.Join(staging, filepath.Base(destination)), Final: destination}
		if f.Inode, err = d.inode(filepath.Base(destination)); err != nil {
			return err
		}
		if f.Inode == (inode{}) {
			return fmt.Errorf("the worker did not write %s", f.Staged)
		}
		all = append(all, f)
		return nil
	}
	for _, d := range p.Disks {
		if err := add(d.Staging, d.Destination); err != nil {
			return nil, err
		}
	}
	for _, f := range p.Files {
		if !f.Placed {
			continue
		}
		if err := add(f.Staging, f.Destination); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// between opens the directories of a file's two places for fn.
func (f file) between(fn func(staging, final directory) error) error {
	staging, err := openDirectory(filepath.Dir(f.Staged))
	if err != nil {
		return err
	}
	defer staging.close()
	final, err := openDirectory(filepath.Dir(f.Final))
	if err != nil {
		return err
	}
	defer final.close()
	return fn(staging, final)
}

// rename moves a file from its first place to its second with renameat2(2) and
// makes that last. It does nothing when the file is there already.
func (f file) rename(flags uint) error {
	return f.between(func(staging, final directory) error {
		there, err := final.inode(filepath.Base(f.Final))
		if err != nil || there == f.Inode {
			return err
		}
		staged, err := staging.inode(filepath.Base(f.Staged))
		if err != nil {
			return err
		}
		if staged != f.Inode {
			return fmt.Errorf("%s is not the file that the worker wrote", f.Staged)
		}
		if err := unix.Renameat2(staging.fd, filepath.Base(f.Staged), final.fd, filepath.Base(f.Final), flags); err != nil {
			return fmt.Errorf("cannot put %s into place: %w", f.Final, err)
		}
		return errors.Join(unix.Fsync(staging.fd), unix.Fsync(final.fd))
	})
}

// place moves a file to where nothing is.
func (f file) place() error { return f.rename(unix.RENAME_NOREPLACE) }

// exchange changes places with the file that is there.
func (f file) exchange() error { return f.rename(unix.RENAME_EXCHANGE) }

// exchangeBack brings back what was there, for every file that changed places.
func exchangeBack(files []file) error {
	var problems []error
	for _, f := range files {
		problems = append(problems, f.between(func(staging, final directory) error {
			there, err := final.inode(filepath.Base(f.Final))
			if err != nil || there != f.Inode {
				return err
			}
			if err := unix.Renameat2(staging.fd, filepath.Base(f.Staged), final.fd, filepath.Base(f.Final), unix.RENAME_EXCHANGE); err != nil {
				return fmt.Errorf("cannot bring back what %s was: it is %s now: %w", f.Final, f.Staged, err)
			}
			return errors.Join(unix.Fsync(staging.fd), unix.Fsync(final.fd))
		}))
	}
	return errors.Join(problems...)
}

// remove removes a file from its second place, if it is ours that is there.
func (f file) remove() error {
	final, err := openDirectory(filepath.Dir(f.Final))
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return err
	}
	defer final.close()
	there, err := final.inode(filepath.Base(f.Final))
	if err != nil || there != f.Inode {
		return err
	}
	if err := unix.Unlinkat(final.fd, filepath.Base(f.Final), 0); err != nil {
		return fmt.Errorf("cannot remove %s: %w", f.Final, err)
	}
	return nil
}
