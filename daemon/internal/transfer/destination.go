package transfer

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/virtbackup/virtbackup/daemon/internal/qcow2"
)

// destination is a file that is restored, or a block device.
type destination struct {
	f      *os.File
	owner  Owner
	device bool

	directory *os.File // of a file
	name      string   // in directory
	unnamed   bool     // the file has no name yet, and vanishes without one
	published bool
}

// openDestination opens where a disk of size bytes goes.
func openDestination(spec RestoreDisk, size uint64) (*destination, error) {
	if !spec.Device {
		return newFile(spec.Directory, spec.Destination, spec.Owner)
	}
	f, err := os.OpenFile(spec.Destination, unix.O_RDWR|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	if err := checkDevice(f, size); err != nil {
		f.Close()
		return nil, err
	}
	return &destination{f: f, device: true}, nil
}

func checkDevice(f *os.File, size uint64) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if info.Mode()&os.ModeDevice == 0 || info.Mode()&os.ModeCharDevice != 0 {
		return fmt.Errorf("%s is not a block device", f.Name())
	}
	end, err := f.Seek(0, 2)
	if err != nil {
		return err
	}
	if uint64(end) < size {
		return fmt.Errorf("%s has %d bytes, the disk has %d", f.Name(), end, size)
	}
	return nil
}

// newFile makes a file that is not there yet, beneath a directory and without
// following a link on the way. Where the file system can, it has no name until
// it is published: a crash then leaves nothing.
func newFile(directory, name string, owner Owner) (*destination, error) {
	if !filepath.IsAbs(directory) || !filepath.IsLocal(name) || strings.ContainsRune(name, 0) || filepath.Clean(name) != name {
		return nil, fmt.Errorf("cannot restore to %q in %q", name, directory)
	}
	root, err := openat2(unix.AT_FDCWD, directory, unix.O_DIRECTORY|unix.O_RDONLY, 0, unix.RESOLVE_NO_SYMLINKS)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	d := &destination{owner: owner, name: filepath.Base(name)}
	d.directory, err = openat2(int(root.Fd()), filepath.Dir(name), unix.O_DIRECTORY|unix.O_RDONLY, 0, unix.RESOLVE_NO_SYMLINKS|unix.RESOLVE_BENEATH)
	if err != nil {
		return nil, err
	}
	if err := d.create(); err != nil {
		d.directory.Close()
		return nil, err
	}
	return d, nil
}

func (d *destination) create() error {
	dir := int(d.directory.Fd())
	err := unix.Faccessat(dir, d.name, unix.F_OK, unix.AT_SYMLINK_NOFOLLOW)
	if err == nil {
		return &os.PathError{Op: "create", Path: d.path(), Err: unix.EEXIST}
	}
	if !errors.Is(err, unix.ENOENT) {
		return &os.PathError{Op: "create", Path: d.path(), Err: err}
	}
	if d.f, err = openat2(dir, ".", unix.O_TMPFILE|unix.O_RDWR, 0o600, unix.RESOLVE_BENEATH); err == nil {
		d.unnamed = true
		return nil
	}
	if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EISDIR) && !errors.Is(err, unix.EINVAL) {
		return err
	}
	d.f, err = openat2(dir, d.name, unix.O_CREAT|unix.O_EXCL|unix.O_RDWR, 0o600, unix.RESOLVE_BENEATH|unix.RESOLVE_NO_SYMLINKS)
	return err
}

func openat2(dir int, name string, flags int, mode, resolve uint64) (*os.File, error) {
	how := &unix.OpenHow{Flags: uint64(flags) | unix.O_CLOEXEC, Mode: mode, Resolve: resolve | unix.RESOLVE_NO_MAGICLINKS}
	for {
		fd, err := unix.Openat2(dir, name, how)
		if err == nil {
			return os.NewFile(uintptr(fd), name), nil
		}
		if err != unix.EINTR && err != unix.EAGAIN {
			return nil, &os.PathError{Op: "open", Path: name, Err: err}
		}
	}
}

func (d *destination) path() string { return filepath.Join(d.directory.Name(), d.name) }

// flush makes the content durable and gives it to its owner.
func (d *destination) flush() error {
	if !d.device {
		if d.owner.UID != nil || d.owner.GID != nil {
			if err := d.f.Chown(orKeep(d.owner.UID), orKeep(d.owner.GID)); err != nil {
				return err
			}
		}
		if d.owner.Mode != 0 {
			if err := d.f.Chmod(os.FileMode(d.owner.Mode & 0o777)); err != nil {
				return err
			}
		}
	}
	return d.f.Sync()
}

func orKeep(id *int) int {
	if id == nil {
		return -1
	}
	return *id
}

// publish gives the file its name, unless something else has it by now.
func (d *destination) publish() error {
	if d.device {
		return nil
	}
	if d.unnamed {
		from := fmt.Sprintf("/proc/self/fd/%d", d.f.Fd())
		if err := unix.Linkat(unix.AT_FDCWD, from, int(d.directory.Fd()), d.name, unix.AT_SYMLINK_FOLLOW); err != nil {
			return &os.PathError{Op: "link", Path: d.path(), Err: err}
		}
	}
	d.published = true
	return d.directory.Sync()
}

// close ends the restore of the file, and removes it if it is not to be kept.
func (d *destination) close(keep bool) {
	if !d.device {
		if !keep && (d.published || !d.unnamed) {
			_ = unix.Unlinkat(int(d.directory.Fd()), d.name, 0)
		}
		d.directory.Close()
	}
	d.f.Close()
}

func (d *diskRestore) openSink(f io.WriterAt) (sink, error) {
	if d.format == FormatQcow2 {
		// Without compression two threads find zeros faster than anything is read.
		w, err := qcow2.NewWriter(f, qcow2.WriterOptions{Size: d.from.Size, ClusterSize: clusterSize, Threads: 2})
		return qcow2Sink{w}, err
	}
	if !d.to.device {
		if err := d.to.f.Truncate(int64(d.from.Size)); err != nil {
			return nil, err
		}
	}
	return &rawSink{f: f, sparse: !d.to.device, buffers: newBuffers(readDepth)}, nil
}

type qcow2Sink struct{ w *qcow2.Writer }

func (q qcow2Sink) buffer() []byte                  { return q.w.GetBuffer() }
func (q qcow2Sink) putBuffer(p []byte)              { q.w.PutBuffer(p) }
func (q qcow2Sink) data(off uint64, p []byte) error { return q.w.WriteData(off, p) }
func (q qcow2Sink) zero(off, length uint64) error   { return q.w.WriteZero(off, length) }
func (q qcow2Sink) finish() error                   { return q.w.Finish() }
func (q qcow2Sink) abort()                          { q.w.Abort() }

// rawSink writes a raw disk. In a new file what is not written is a hole and
// reads as zeros; on a device they are written.
type rawSink struct {
	f       io.WriterAt
	sparse  bool
	buffers buffers
}

func (r *rawSink) buffer() []byte     { return r.buffers.get() }
func (r *rawSink) putBuffer(p []byte) { r.buffers.put(p) }

func (r *rawSink) data(off uint64, p []byte) error {
	defer r.putBuffer(p)
	_, err := r.f.WriteAt(p, int64(off))
	return err
}

func (r *rawSink) zero(off, length uint64) error {
	if r.sparse {
		return nil
	}
	zeros := make([]byte, min(length, qcow2.BufferSize))
	for length > 0 {
		n := min(length, uint64(len(zeros)))
		if _, err := r.f.WriteAt(zeros[:n], int64(off)); err != nil {
			return err
		}
		off, length = off+n, length-n
	}
	return nil
}

func (r *rawSink) finish() error { return nil }
func (r *rawSink) abort()        {}
