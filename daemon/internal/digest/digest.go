// Package digest keeps one BLAKE3-256 digest for each 64 KiB of a disk, so
// that a later backup can be compared with the disk block by block without
// reading the repository's images. A zero block's digest is that of its zeros:
// no state is special.
package digest

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync/atomic"

	"lukechampine.com/blake3"
)

const (
	// BlockSize is the number of bytes that one digest stands for. Only the
	// disk's last block may be shorter; it is digested at its real length.
	BlockSize = 64 << 10
	// SumSize is the length of a digest in bytes.
	SumSize = 32

	// The file: magic, version, block size, disk size (big endian), one digest
	// per block, and the BLAKE3-256 of all that.
	magic      = "VBDIGEST"
	version    = 1
	headerSize = len(magic) + 4 + 4 + 8
	pageBlocks = 1024
)

var zeroBlock [BlockSize]byte

// ZeroSum is the digest of n zero bytes, n ≤ BlockSize.
func ZeroSum(n int) [SumSize]byte { return Sum(zeroBlock[:n]) }

// page holds the digests of pageBlocks blocks.
type page [pageBlocks][SumSize]byte

// Table holds the digests of all blocks of a disk; those never set are those of
// zeros, and pages of them take no memory. Set may be called from many
// goroutines at once for different blocks.
type Table struct {
	size  uint64
	zero  [SumSize]byte // of a whole block
	last  [SumSize]byte // of the last block, when it is all zeros
	pages []atomic.Pointer[page]
}

// New makes the table of a disk of zeros; size is in bytes.
func New(size uint64) *Table {
	t := &Table{size: size, zero: ZeroSum(BlockSize)}
	if n := t.Blocks(); n > 0 {
		t.last = ZeroSum(t.BlockLength(n - 1))
		t.pages = make([]atomic.Pointer[page], (n+pageBlocks-1)/pageBlocks)
	}
	return t
}

// Size is the disk's size in bytes.
func (t *Table) Size() uint64 { return t.size }

// Blocks is the number of blocks.
func (t *Table) Blocks() int { return blocks(t.size) }

func blocks(size uint64) int {
	n := size / BlockSize
	if size%BlockSize != 0 {
		n++
	}
	return int(n)
}

// BlockLength is the block's length in bytes: BlockSize but for the last one.
func (t *Table) BlockLength(block int) int {
	return int(min(BlockSize, t.size-uint64(block)*BlockSize))
}

// zeroSum is what a block's digest is when the block is all zeros.
func (t *Table) zeroSum(block int) [SumSize]byte {
	if block == t.Blocks()-1 {
		return t.last
	}
	return t.zero
}

// Get returns a block's digest.
func (t *Table) Get(block int) [SumSize]byte {
	if p := t.pages[block/pageBlocks].Load(); p != nil {
		return p[block%pageBlocks]
	}
	return t.zeroSum(block)
}

// Set replaces a block's digest.
func (t *Table) Set(block int, sum [SumSize]byte) {
	at := &t.pages[block/pageBlocks]
	p := at.Load()
	if p == nil {
		if sum == t.zeroSum(block) {
			return
		}
		p = t.newPage(block / pageBlocks)
		if !at.CompareAndSwap(nil, p) {
			p = at.Load()
		}
	}
	p[block%pageBlocks] = sum
}

// SetZero says that a block is all zeros.
func (t *Table) SetZero(block int) { t.Set(block, t.zeroSum(block)) }

func (t *Table) newPage(index int) *page {
	p := new(page)
	for i := range p {
		p[i] = t.zero
	}
	if last := t.Blocks() - 1; last/pageBlocks == index {
		p[last%pageBlocks] = t.last
	}
	return p
}

func (t *Table) header() []byte {
	b := append(make([]byte, 0, headerSize), magic...)
	b = binary.BigEndian.AppendUint32(b, version)
	b = binary.BigEndian.AppendUint32(b, BlockSize)
	return binary.BigEndian.AppendUint64(b, t.size)
}

// content writes all but the closing digest.
func (t *Table) content(w io.Writer) error {
	if _, err := w.Write(t.header()); err != nil {
		return err
	}
	for block := range t.Blocks() {
		sum := t.Get(block)
		if _, err := w.Write(sum[:]); err != nil {
			return err
		}
	}
	return nil
}

// Root is the digest of all digests, the disk's size included. It is what the
// file ends with.
func (t *Table) Root() [SumSize]byte {
	h := blake3.New(SumSize, nil)
	w := bufio.NewWriterSize(h, 64<<10)
	_ = t.content(w) // a hash does not fail
	_ = w.Flush()
	return [SumSize]byte(h.Sum(nil))
}

// WriteTo writes the file.
func (t *Table) WriteTo(w io.Writer) (int64, error) {
	h := blake3.New(SumSize, nil)
	b := bufio.NewWriterSize(io.MultiWriter(h, w), 64<<10)
	err := t.content(b)
	if err == nil {
		err = b.Flush()
	}
	if err == nil {
		_, err = w.Write(h.Sum(nil))
	}
	if err != nil {
		return 0, fmt.Errorf("cannot write digests: %w", err)
	}
	return fileSize(t.size), nil
}

// fileSize is the length of the file for a disk, in bytes.
func fileSize(disk uint64) int64 {
	return int64(headerSize) + int64(blocks(disk))*SumSize + SumSize
}

// Read reads a file to its end and checks it. max bounds its length in bytes,
// and so the memory that it takes.
func Read(r io.Reader, max int64) (*Table, error) {
	t, err := read(bufio.NewReaderSize(r, 64<<10), max)
	if err != nil {
		return nil, fmt.Errorf("cannot read digests: %w", err)
	}
	return t, nil
}

func read(r io.Reader, max int64) (*Table, error) {
	h := blake3.New(SumSize, nil)
	hashed := io.TeeReader(r, h)
	header := make([]byte, headerSize)
	if _, err := io.ReadFull(hashed, header); err != nil {
		return nil, err
	}
	numbers := header[len(magic):]
	size := binary.BigEndian.Uint64(numbers[8:])
	switch {
	case string(header[:len(magic)]) != magic:
		return nil, errors.New("not a file of digests")
	case binary.BigEndian.Uint32(numbers) != version:
		return nil, fmt.Errorf("version %d is not known", binary.BigEndian.Uint32(numbers))
	case binary.BigEndian.Uint32(numbers[4:]) != BlockSize:
		return nil, fmt.Errorf("block size %d is not known", binary.BigEndian.Uint32(numbers[4:]))
	case fileSize(size) > max:
		return nil, fmt.Errorf("for a disk of %d bytes the file is longer than the limit of %d bytes", size, max)
	}
	t := New(size)
	var sum [SumSize]byte
	for block := range t.Blocks() {
		if _, err := io.ReadFull(hashed, sum[:]); err != nil {
			return nil, fmt.Errorf("at block %d: %w", block, noEOF(err))
		}
		t.Set(block, sum)
	}
	want := h.Sum(nil)
	if _, err := io.ReadFull(r, sum[:]); err != nil {
		return nil, fmt.Errorf("at the closing digest: %w", noEOF(err))
	}
	if !bytes.Equal(want, sum[:]) {
		return nil, errors.New("the file is damaged: its closing digest differs")
	}
	if n, _ := io.ReadFull(r, sum[:1]); n != 0 {
		return nil, errors.New("the file goes on behind its end")
	}
	return t, nil
}

// noEOF keeps a file cut short from looking like a regular end.
func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
