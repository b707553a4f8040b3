package qcow2

import (
	"bytes"
	"fmt"

	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/zstd"
)

// zlibWindow is what QEMU inflates with (windowBits -12).
const zlibWindow = 4096

// compressor packs one cluster after the other; each worker has its own.
type compressor interface {
	// compress appends the packed plain to dst. What does not get smaller may
	// be left unfinished.
	compress(dst, plain []byte) ([]byte, error)
}

func newCompressor(c Compression, level int) (compressor, error) {
	switch c {
	case CompressionZstd:
		e, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstdLevel(level)),
			zstd.WithWindowSize(clusterSize), zstd.WithEncoderCRC(false),
			zstd.WithLowerEncoderMem(true), zstd.WithAllLitEntropyCompression(true))
		if err != nil {
			return nil, fmt.Errorf("cannot set up zstd: %w", err)
		}
		return zstdCompressor{e}, nil
	case CompressionZlib:
		w, err := flate.NewWriterWindow(nil, zlibWindow)
		if err != nil {
			return nil, fmt.Errorf("cannot set up deflate: %w", err)
		}
		return &zlibCompressor{w: w}, nil
	}
	return nil, nil
}

// zstdLevel maps zstd's levels to those of the encoder at hand. Its fastest,
// made to code literals too, takes as long as zstd's default of 3 and packs
// nearly as well; EncoderLevelFromZstd would be slower throughout. Its best
// takes 34 MiB for each thread, four times as long as the one before, and packs
// clusters of 64 KiB by 3 to 6 % better: it is left out.
func zstdLevel(level int) zstd.EncoderLevel {
	switch {
	case level <= 3:
		return zstd.SpeedFastest
	case level <= 6:
		return zstd.SpeedDefault
	}
	return zstd.SpeedBetterCompression
}

type zstdCompressor struct{ *zstd.Encoder }

func (z zstdCompressor) compress(dst, plain []byte) ([]byte, error) {
	return z.EncodeAll(plain, dst), nil
}

type zlibCompressor struct {
	w   *flate.Writer
	out bytes.Buffer
}

func (z *zlibCompressor) compress(dst, plain []byte) ([]byte, error) {
	z.out.Reset()
	z.w.Reset(&z.out)
	if _, err := z.w.Write(plain); err != nil {
		return dst, err
	}
	if err := z.w.Close(); err != nil {
		return dst, err
	}
	return append(dst, z.out.Bytes()...), nil
}
