package digest

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"lukechampine.com/blake3"
)

// Writer writes a file of digests in the order of the disk. It needs no memory
// for them, however big the disk is.
type Writer struct {
	h    *blake3.Hasher
	w    io.Writer
	b    *bufio.Writer // to h and w
	left int
	zero [SumSize]byte
	last [SumSize]byte
}

// NewWriter begins the file of a disk of size bytes.
func NewWriter(w io.Writer, size uint64) (*Writer, error) {
	h := blake3.New(SumSize, nil)
	d := &Writer{h: h, w: w, left: Blocks(size), zero: ZeroSum(BlockSize), last: ZeroSum(lastLength(size))}
	d.b = bufio.NewWriterSize(io.MultiWriter(h, w), 64<<10)
	_, err := d.b.Write(fileHeader(size))
	return d, wrapWrite(err)
}

// Append adds the digest of the next block.
func (d *Writer) Append(sum [SumSize]byte) error {
	if d.left == 0 {
		return errors.New("cannot write digests: there are more than the disk has blocks")
	}
	d.left--
	_, err := d.b.Write(sum[:])
	return wrapWrite(err)
}

// AppendZero adds the digest of the next block, which is all zeros.
func (d *Writer) AppendZero() error {
	if d.left == 1 {
		return d.Append(d.last)
	}
	return d.Append(d.zero)
}

// Close ends the file and returns its root: the digest of all digests and the
// disk's size. It does not close the file.
func (d *Writer) Close() (root [SumSize]byte, err error) {
	if d.left != 0 {
		return root, fmt.Errorf("cannot write digests: those of %d blocks are missing", d.left)
	}
	if err := d.b.Flush(); err != nil {
		return root, wrapWrite(err)
	}
	root = [SumSize]byte(d.h.Sum(nil))
	_, err = d.w.Write(root[:])
	return root, wrapWrite(err)
}

func wrapWrite(err error) error {
	if err != nil {
		return fmt.Errorf("cannot write digests: %w", err)
	}
	return nil
}

// Reader reads a file of digests in the order of the disk. What it returned is
// to be believed only once Close returned the root that was expected.
type Reader struct {
	h    *blake3.Hasher
	b    *bufio.Reader
	left int
}

// NewReader reads the header; a file that is not that of a disk of size bytes
// is refused.
func NewReader(r io.Reader, size uint64) (*Reader, error) {
	d := &Reader{h: blake3.New(SumSize, nil), b: bufio.NewReaderSize(r, 64<<10), left: Blocks(size)}
	want := fileHeader(size)
	got := make([]byte, len(want))
	if _, err := io.ReadFull(d.b, got); err != nil {
		return nil, fmt.Errorf("cannot read digests: %w", noEOF(err))
	}
	if string(got) != string(want) {
		return nil, fmt.Errorf("cannot read digests: the file is not that of a disk of %d bytes in version %d", size, version)
	}
	d.h.Write(got)
	return d, nil
}

// Next returns the digest of the next block; io.EOF behind the last.
func (d *Reader) Next() (sum [SumSize]byte, err error) {
	if d.left == 0 {
		return sum, io.EOF
	}
	if _, err := io.ReadFull(d.b, sum[:]); err != nil {
		return sum, fmt.Errorf("cannot read digests: %w", noEOF(err))
	}
	d.left--
	d.h.Write(sum[:])
	return sum, nil
}

// Close checks what was not read yet and the file's end, and returns the root.
// It does not close the file.
func (d *Reader) Close() (root [SumSize]byte, err error) {
	for d.left > 0 {
		if _, err := d.Next(); err != nil {
			return root, err
		}
	}
	if _, err := io.ReadFull(d.b, root[:]); err != nil {
		return root, fmt.Errorf("cannot read digests: %w", noEOF(err))
	}
	if [SumSize]byte(d.h.Sum(nil)) != root {
		return root, errors.New("cannot read digests: the file is damaged: its closing digest differs")
	}
	if _, err := d.b.ReadByte(); err != io.EOF {
		return root, errors.New("cannot read digests: the file goes on behind its end")
	}
	return root, nil
}

// Blocks is the number of blocks of a disk of size bytes.
func Blocks(size uint64) int { return blocks(size) }

// Length is the length in bytes of a block of such a disk.
func Length(size uint64, block int) int {
	return int(min(BlockSize, size-uint64(block)*BlockSize))
}

func lastLength(size uint64) int {
	if n := Blocks(size); n > 0 {
		return Length(size, n-1)
	}
	return 0
}

func fileHeader(size uint64) []byte {
	b := append(make([]byte, 0, headerSize), magic...)
	b = binary.BigEndian.AppendUint32(b, version)
	b = binary.BigEndian.AppendUint32(b, BlockSize)
	return binary.BigEndian.AppendUint64(b, size)
}
