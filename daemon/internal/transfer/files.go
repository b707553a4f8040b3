package transfer

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
	"lukechampine.com/blake3"

	"github.com/virtbackup/virtbackup/daemon/internal/digest"
	"github.com/virtbackup/virtbackup/daemon/internal/repository"
)

// fileLimit is the most that another file of a backup may have, in bytes.
const fileLimit = 1 << 30

// openHostFile opens what a FileSpec names. Such a file (NVRAM, TPM state) lies
// where QEMU may write, so a link or a FIFO put in its place is refused.
func openHostFile(spec FileSpec) (io.ReadCloser, error) {
	if spec.Path == "" {
		return io.NopCloser(bytes.NewReader(spec.Content)), nil
	}
	f, err := os.OpenFile(spec.Path, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	switch {
	case err != nil:
	case !info.Mode().IsRegular():
		err = fmt.Errorf("%s is not a regular file", spec.Path)
	case info.Size() > fileLimit:
		err = fmt.Errorf("%s has %d bytes, more than %d", spec.Path, info.Size(), fileLimit)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// sideError tells errors of reading from those of writing in io.Copy.
type sideError struct {
	io.Reader
	class Class
}

func (s sideError) Read(p []byte) (int, error) {
	n, err := s.Reader.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		err = classify(s.class, err)
	}
	return n, err
}

// writeSummed copies into a new file of a backup and syncs it.
func writeSummed(to *os.File, name string, from io.Reader) (repository.File, error) {
	h := blake3.New(digest.SumSize, nil)
	n, err := io.Copy(io.MultiWriter(to, h), io.LimitReader(sideError{from, ClassSource}, fileLimit+1))
	if err == nil && n > fileLimit {
		err = fail(ClassSource, "it grew over %d bytes", fileLimit)
	}
	if err == nil {
		err = to.Sync()
	}
	return repository.File{Name: name, Size: uint64(n), BLAKE3: fmt.Sprintf("%x", h.Sum(nil))}, classify(ClassRepository, err)
}

// readBack reads a synced file again, from the storage and not from memory as
// far as the file system can be told so.
func readBack(f *os.File, want repository.File) error {
	if err := forget(f); err != nil {
		return err
	}
	return checkFile(io.NewSectionReader(f, 0, int64(want.Size)+1), want)
}

// forget drops what the kernel keeps of a file in memory.
func forget(f *os.File) error {
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		return fail(ClassRepository, "cannot drop %s from memory: %w", f.Name(), err)
	}
	return nil
}
