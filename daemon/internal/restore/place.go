package restore

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/virtbackup/virtbackup/daemon/internal/failure"
	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/daemon/internal/transfer"
	"github.com/virtbackup/virtbackup/dbus"
)

// file is one that the worker wrote, and where it goes.
type file struct {
	Staged string `json:"staged"`
	Final  string `json:"final"`
	// Inode is its number, by which it is known in either place: both are in the
	// same file system, whose device may have another number after a restart of
	// the host.
	Inode uint64 `json:"inode"`
	Fresh bool   `json:"fresh"` // nothing is in its place
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

// inode returns that of a name; 0 when there is no such name.
func (d directory) inode(name string) (uint64, error) {
	var st unix.Stat_t
	err := unix.Fstatat(d.fd, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	if errors.Is(err, unix.ENOENT) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("cannot look at %s: %w", filepath.Join(d.path, name), err)
	}
	return st.Ino, nil
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
		err := error(nil)
		if filepath.Dir(path) == hypervisor.TPMDirectory { // made by libvirt with the first TPM
			err = makeDirectory(hypervisor.TPMDirectory, transfer.Owner{Mode: 0o711})
		}
		if err == nil {
			err = makeOne(path, p.InPlace)
		}
		if err != nil {
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

// readOwn reads a file that the worker wrote. Whoever may write beside the
// job's directory can put another in its place, but nothing of our own into it.
func readOwn(staging, name string) ([]byte, error) {
	d, err := openDirectory(staging)
	if err != nil {
		return nil, err
	}
	defer d.close()
	fd, err := unix.Openat(d.fd, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot open %s: %w", filepath.Join(staging, name), err)
	}
	f := os.NewFile(uintptr(fd), filepath.Join(staging, name))
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("cannot look at %s: %w", f.Name(), err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Nlink != 1 || int(st.Uid) != os.Geteuid() {
		return nil, fmt.Errorf("%s is not the file that the worker wrote", f.Name())
	}
	return io.ReadAll(f)
}

// written lists what the worker wrote and is to stay.
func written(p Plan) ([]file, error) {
	var all []file
	add := func(staging, destination string, fresh bool) error {
		d, err := openDirectory(staging)
		if err != nil {
			return err
		}
		defer d.close()
		f := file{Staged: filepath.Join(staging, filepath.Base(destination)), Final: destination, Fresh: fresh}
		if f.Inode, err = d.inode(filepath.Base(destination)); err != nil {
			return err
		}
		if f.Inode == 0 {
			return fmt.Errorf("the worker did not write %s", f.Staged)
		}
		all = append(all, f)
		return nil
	}
	for _, d := range p.Disks {
		if err := add(d.Staging, d.Destination, false); err != nil {
			return nil, err
		}
	}
	for _, f := range p.Files {
		if !f.Placed {
			continue
		}
		if err := add(f.Staging, f.Destination, f.Fresh); err != nil {
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
		err = unix.Renameat2(staging.fd, filepath.Base(f.Staged), final.fd, filepath.Base(f.Final), flags)
		if errors.Is(err, unix.EINVAL) && flags == unix.RENAME_NOREPLACE { // NFS does not know it
			err = unix.Linkat(staging.fd, filepath.Base(f.Staged), final.fd, filepath.Base(f.Final), 0)
		}
		if err != nil {
			return fmt.Errorf("cannot put %s into place: %w", f.Final, err)
		}
		return errors.Join(unix.Fsync(staging.fd), unix.Fsync(final.fd))
	})
}

// place moves a file to where nothing is.
func (f file) place() error { return f.rename(unix.RENAME_NOREPLACE) }

// exchange changes places with the file that is there, if there is one.
func (f file) exchange() error {
	if f.Fresh {
		return f.place()
	}
	return f.rename(unix.RENAME_EXCHANGE)
}

// exchangeBack brings back what was there, for every file that changed places.
func exchangeBack(files []file) error {
	var problems []error
	for _, f := range files {
		if f.Fresh {
			problems = append(problems, f.remove())
			continue
		}
		err := f.between(f.giveBack)
		if errors.Is(err, unix.ENOENT) {
			continue // the job's directory went when all was back
		}
		problems = append(problems, err)
	}
	return errors.Join(problems...)
}

func (f file) giveBack(staging, final directory) error {
	there, err := final.inode(filepath.Base(f.Final))
	if err != nil {
		return err
	}
	staged, err := staging.inode(filepath.Base(f.Staged))
	if err != nil {
		return err
	}
	switch {
	case there == f.Inode && staged != 0:
	case staged == f.Inode, staged == 0 && there != f.Inode:
		return nil // it did not change places
	default:
		return fmt.Errorf("cannot tell whether %s was restored: what it was may be %s", f.Final, f.Staged)
	}
	var held locks
	defer held.release()
	err = errors.Join(held.take(staging, filepath.Base(f.Staged)), held.take(final, filepath.Base(f.Final)))
	if err == nil {
		err = unix.Renameat2(staging.fd, filepath.Base(f.Staged), final.fd, filepath.Base(f.Final), unix.RENAME_EXCHANGE)
	}
	if err != nil {
		return fmt.Errorf("cannot bring back what %s was: it is %s now: %w", f.Final, f.Staged, err)
	}
	return errors.Join(unix.Fsync(staging.fd), unix.Fsync(final.fd))
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
