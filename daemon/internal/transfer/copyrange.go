package transfer

import (
	"errors"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// copyRange copies a part of a file into another. Where the file system can, the
// data is shared between them, or copied where it lies, as by an NFS server
// (copy_file_range(2)).
func copyRange(to *os.File, off int64, from *os.File, at, length int64) error {
	for length > 0 {
		n, err := unix.CopyFileRange(int(from.Fd()), &at, int(to.Fd()), &off, int(length), 0)
		switch {
		case err == unix.EINTR:
			continue
		case errors.Is(err, errors.ErrUnsupported) || err == unix.EXDEV || err == unix.EINVAL:
			// By hand. What was copied so far stays.
			_, err := io.Copy(io.NewOffsetWriter(to, off), io.NewSectionReader(from, at, length))
			return err
		case err != nil:
			return &os.PathError{Op: "copy_file_range", Path: to.Name(), Err: err}
		case n == 0:
			return io.ErrUnexpectedEOF
		}
		length -= int64(n) // the offsets are moved by the call
	}
	return nil
}
