package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// Limits bound what an image may claim.
type Limits struct {
	// Size is the disk's size in bytes that the image must have; 0 for any.
	Size uint64
	// Tables is how many bytes of tables may be held at a time; 0 for 64 MiB.
	Tables int64
}

// Header is what an image says about itself.
type Header struct {
	Version       uint32
	Size          uint64 // of the disk, in bytes
	ClusterSize   uint32 // in bytes
	Backing       string // as it stands in the image; "" for none
	BackingFormat string
	Compression   Compression // of those clusters that are compressed
}

// rawHeader has the fields by the specification's names.
type rawHeader struct {
	version, clusterBits                uint32
	backingOffset                       uint64
	backingSize                         uint32
	size                                uint64
	cryptMethod                         uint32
	l1Size                              uint32
	l1Offset                            int64
	refcountTableOffset                 int64
	refcountTableClusters, snapshots    uint32
	incompatible                        uint64
	refcountOrder, length               uint32
	compressionType                     byte
	backing, backingFormat              string
	clusterSize, refcountTableSizeBytes int64
}

// parseHeader reads and checks the header, its extensions and the backing
// file's name, all of which are in the first cluster.
func parseHeader(r io.ReaderAt, fileSize int64, lim Limits) (*rawHeader, error) {
	fixed := make([]byte, headerLength)
	n, err := r.ReadAt(fixed, 0)
	if n < headerLengthV2 {
		return nil, fmt.Errorf("shorter than a header: %w", noEOF(err))
	}
	if binary.BigEndian.Uint32(fixed) != magic {
		return nil, errors.New("not a qcow2 image")
	}
	h := &rawHeader{
		version:               binary.BigEndian.Uint32(fixed[4:]),
		backingOffset:         binary.BigEndian.Uint64(fixed[8:]),
		backingSize:           binary.BigEndian.Uint32(fixed[16:]),
		clusterBits:           binary.BigEndian.Uint32(fixed[20:]),
		size:                  binary.BigEndian.Uint64(fixed[24:]),
		cryptMethod:           binary.BigEndian.Uint32(fixed[32:]),
		l1Size:                binary.BigEndian.Uint32(fixed[36:]),
		l1Offset:              int64(binary.BigEndian.Uint64(fixed[40:])),
		refcountTableOffset:   int64(binary.BigEndian.Uint64(fixed[48:])),
		refcountTableClusters: binary.BigEndian.Uint32(fixed[56:]),
		snapshots:             binary.BigEndian.Uint32(fixed[60:]),
		refcountOrder:         4,
		length:                headerLengthV2,
	}
	if h.version == 3 {
		if n < headerLengthV3 {
			return nil, io.ErrUnexpectedEOF
		}
		h.incompatible = binary.BigEndian.Uint64(fixed[72:])
		h.refcountOrder = binary.BigEndian.Uint32(fixed[96:])
		h.length = binary.BigEndian.Uint32(fixed[100:])
		if h.length > headerLengthV3 && n > headerLengthV3 {
			h.compressionType = fixed[104]
		}
	}
	if err := h.check(lim); err != nil {
		return nil, err
	}
	if err := h.checkTables(fileSize, lim); err != nil {
		return nil, err
	}
	return h, h.parseRest(r, fileSize)
}

func (h *rawHeader) check(lim Limits) error {
	switch {
	case h.version != 2 && h.version != 3:
		return fmt.Errorf("version %d is not supported", h.version)
	case h.incompatible&incompatibleDataFile != 0:
		return errors.New("data in another file is not allowed")
	case h.incompatible&incompatibleExtendedL2 != 0:
		return errors.New("subclusters (extended L2 entries) are not supported")
	case h.incompatible&incompatibleCorrupt != 0:
		return errors.New("marked as corrupt")
	case h.incompatible&incompatibleDirty != 0:
		return errors.New("marked as dirty: it was not closed")
	case h.incompatible&^incompatibleCompression != 0:
		return fmt.Errorf("unknown incompatible features %#x", h.incompatible)
	case h.cryptMethod != 0:
		return errors.New("encryption is not supported")
	case h.clusterBits < 9 || h.clusterBits > 21:
		return fmt.Errorf("clusters of 2^%d bytes are not allowed", h.clusterBits)
	case h.version == 3 && (h.length < headerLengthV3 || h.length%8 != 0 || uint64(h.length) > 1<<h.clusterBits):
		return fmt.Errorf("header of %d bytes is not allowed", h.length)
	case h.refcountOrder > 6:
		return fmt.Errorf("refcounts of 2^%d bits are not allowed", h.refcountOrder)
	case h.compressionType > compressionTypeZstd,
		(h.compressionType != compressionTypeZlib) != (h.incompatible&incompatibleCompression != 0):
		return fmt.Errorf("compression type %d with features %#x is not allowed", h.compressionType, h.incompatible)
	case h.snapshots != 0:
		return errors.New("internal snapshots are not supported")
	case lim.Size != 0 && h.size != lim.Size:
		return fmt.Errorf("the disk has %d bytes where %d are expected", h.size, lim.Size)
	}
	h.clusterSize = 1 << h.clusterBits
	return nil
}

// checkTables holds the tables to the file and to the limits.
func (h *rawHeader) checkTables(fileSize int64, lim Limits) error {
	perL2 := uint64(h.clusterSize) * uint64(h.clusterSize/8)
	needed := h.size / perL2
	if h.size%perL2 != 0 {
		needed++
	}
	h.refcountTableSizeBytes = int64(h.refcountTableClusters) << h.clusterBits
	l1 := region{"L1 table", h.l1Offset, int64(h.l1Size) * 8}
	refcounts := region{"refcount table", h.refcountTableOffset, h.refcountTableSizeBytes}
	switch {
	case l1.length > maxL1Bytes || l1.length > lim.tables():
		return fmt.Errorf("L1 table of %d bytes is too big", l1.length)
	case uint64(h.l1Size) < needed:
		return fmt.Errorf("L1 table of %d entries does not cover the disk of %d bytes", h.l1Size, h.size)
	case refcounts.length == 0 || refcounts.length > maxRefcountSize || refcounts.length > lim.tables():
		return fmt.Errorf("refcount table of %d bytes is not allowed", refcounts.length)
	}
	for _, t := range []region{l1, refcounts} {
		if err := t.check(h.clusterSize, fileSize); err != nil {
			return err
		}
	}
	if l1.overlaps(refcounts) {
		return errors.New("L1 table and refcount table overlap")
	}
	return nil
}

func (lim Limits) tables() int64 {
	if lim.Tables == 0 {
		return 64 << 20
	}
	return lim.Tables
}

// region is a table in the file.
type region struct {
	name           string
	offset, length int64
}

func (t region) check(clusterSize, fileSize int64) error {
	switch {
	case t.length == 0:
		return nil
	case t.offset < clusterSize || t.offset%clusterSize != 0:
		return fmt.Errorf("%s at %d is not allowed", t.name, t.offset)
	case t.offset > fileSize || t.length > fileSize-t.offset:
		return fmt.Errorf("%s at %d of %d bytes is outside the file of %d bytes", t.name, t.offset, t.length, fileSize)
	}
	return nil
}

func (t region) overlaps(o region) bool {
	return t.offset < o.offset+o.length && o.offset < t.offset+t.length
}

// parseRest reads the extensions and the backing file's name.
func (h *rawHeader) parseRest(r io.ReaderAt, fileSize int64) error {
	cluster := make([]byte, min(h.clusterSize, fileSize))
	if err := readFull(r, cluster, 0); err != nil {
		return fmt.Errorf("cannot read header: %w", err)
	}
	end := uint64(len(cluster))
	if h.backingOffset != 0 {
		if h.backingSize == 0 || h.backingSize > maxBackingName || h.backingOffset < uint64(h.length) ||
			h.backingOffset > end || uint64(h.backingSize) > end-h.backingOffset {
			return fmt.Errorf("backing file's name at %d of %d bytes is not allowed", h.backingOffset, h.backingSize)
		}
		h.backing = string(cluster[h.backingOffset:][:h.backingSize])
		end = h.backingOffset
	}
	for rest := cluster[h.length:end]; len(rest) >= 8; {
		kind, length := binary.BigEndian.Uint32(rest), uint64(binary.BigEndian.Uint32(rest[4:]))
		rest = rest[8:]
		switch {
		case kind == extensionEnd:
			return nil
		case kind == extensionEncryption || kind == extensionDataFile:
			return fmt.Errorf("header extension %#x is not allowed", kind)
		case length > uint64(len(rest)):
			return fmt.Errorf("header extension %#x of %d bytes is too long", kind, length)
		case kind == extensionBackingFormat:
			h.backingFormat = string(rest[:length])
		}
		rest = rest[min(uint64(len(rest)), roundUp(length, 8)):]
	}
	return nil
}

// readFull reads all of p or fails: a file cut short is an error.
func readFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	return noEOF(err)
}

func noEOF(err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
