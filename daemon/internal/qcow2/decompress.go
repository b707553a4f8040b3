package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"runtime"
	"sync"

	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/zstd"
)

// decompressor unpacks clusters; it may be used from many goroutines at once.
type decompressor interface {
	// decompress fills all of plain from packed, behind whose end there may be
	// other clusters' data. It returns how long what it needed is; 0 if that
	// cannot be told.
	decompress(plain, packed []byte) (n int, err error)
}

func newDecompressor(c Compression) (decompressor, error) {
	if c != CompressionZstd {
		return &inflater{}, nil
	}
	// QEMU's frames ask for windows of 8 MiB at the most.
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(min(runtime.GOMAXPROCS(0), maxThreads)), zstd.WithDecodeAllCapLimit(true), zstd.WithDecoderMaxWindow(8<<20))
	if err != nil {
		return nil, fmt.Errorf("cannot set up zstd: %w", err)
	}
	return zstdDecompressor{d}, nil
}

type inflater struct{ pool sync.Pool }

func (d *inflater) decompress(plain, packed []byte) (n int, err error) {
	r, ok := d.pool.Get().(io.ReadCloser)
	if !ok {
		r = flate.NewReader(nil)
	}
	defer d.pool.Put(r)
	from := bytes.NewReader(packed) // of which no more is read than is needed
	if err := r.(flate.Resetter).Reset(from, nil); err != nil {
		return 0, err
	}
	if _, err = io.ReadFull(r, plain); err == nil && atEnd(r) {
		n = len(packed) - from.Len()
	}
	return n, err
}

type zstdDecompressor struct{ *zstd.Decoder }

func (d zstdDecompressor) decompress(plain, packed []byte) (n int, err error) {
	if n, err = frameLength(packed); err != nil {
		return 0, err
	}
	out, err := d.DecodeAll(packed[:n], plain[:0:len(plain)])
	if err == nil && len(out) != len(plain) {
		err = fmt.Errorf("%d bytes instead of %d", len(out), len(plain))
	}
	return n, err
}

// frameLength finds a frame's end (RFC 8878, chapters 3.1.1 and 3.1.1.2): the
// format does not store it.
func frameLength(p []byte) (int, error) {
	var h zstd.Header
	if err := h.Decode(p); err != nil {
		return 0, err
	}
	if h.Skippable {
		return 0, errors.New("skippable zstd frame")
	}
	const rle = 1
	for at, last := h.HeaderSize, false; ; {
		if last {
			if h.HasCheckSum {
				at += 4
			}
			if at > len(p) {
				return 0, io.ErrUnexpectedEOF
			}
			return at, nil
		}
		if len(p)-at < 3 {
			return 0, io.ErrUnexpectedEOF
		}
		block := uint32(p[at]) | uint32(p[at+1])<<8 | uint32(p[at+2])<<16
		last = block&1 != 0
		at += 3
		if block>>1&3 == rle {
			at++
		} else {
			at += int(block >> 3)
		}
	}
}
