// Package qcow2 writes and reads disk images in QEMU's qcow2 format
// (docs/interop/qcow2.txt in QEMU's source). The writer produces an image in
// one sequential pass, compressing in parallel. The reader opens images that
// nobody vouches for: it never follows a name found in one, never allocates by
// an unchecked number, and takes missing bytes for an error, never for zeros.
package qcow2

import "fmt"

// Compression is how clusters are stored.
type Compression string

// The kinds of compression that QEMU knows.
const (
	CompressionNone Compression = "none"
	CompressionZlib Compression = "zlib"
	CompressionZstd Compression = "zstd"
)

const (
	magic = 0x514649fb // "QFI\xfb"

	headerLengthV2 = 72
	headerLengthV3 = 104
	headerLength   = 112 // with the compression type

	incompatibleDirty       = 1 << 0
	incompatibleCorrupt     = 1 << 1
	incompatibleDataFile    = 1 << 2
	incompatibleCompression = 1 << 3
	incompatibleExtendedL2  = 1 << 4

	compressionTypeZlib = 0
	compressionTypeZstd = 1

	extensionEnd           = 0
	extensionBackingFormat = 0xe2792aca
	extensionEncryption    = 0x0537be77
	extensionDataFile      = 0x44415441

	// Bits of L1 and L2 entries.
	entryCopied     = 1 << 63 // refcount is exactly 1
	entryCompressed = 1 << 62
	entryZero       = 1
	entryOffset     = 0x00fffffffffffe00
	entryReservedL1 = ^uint64(entryCopied | entryOffset)
	entryReservedL2 = ^uint64(entryCopied | entryOffset | entryZero)

	sectorSize      = 512 // the unit of a compressed cluster's length
	maxBackingName  = 1023
	maxL1Bytes      = 32 << 20 // QEMU's limit
	maxRefcountSize = 8 << 20  // QEMU's limit for the refcount table
)

// compressedShift is where a compressed cluster's descriptor has the number of
// additional sectors (chapter "Compressed Clusters Descriptor").
func compressedShift(clusterBits uint32) uint32 { return 62 - (clusterBits - 8) }

// compressedEntry describes a compressed cluster of n bytes at a host offset.
func compressedEntry(clusterBits uint32, offset int64, n int) uint64 {
	sectors := (uint64(offset)+uint64(n)-1)/sectorSize - uint64(offset)/sectorSize
	return entryCompressed | sectors<<compressedShift(clusterBits) | uint64(offset)
}

func roundUp(n, unit uint64) uint64 { return (n + unit - 1) / unit * unit }

func (c Compression) check() error {
	switch c {
	case CompressionNone, CompressionZlib, CompressionZstd:
		return nil
	}
	return fmt.Errorf("compression %q is not known", c)
}
