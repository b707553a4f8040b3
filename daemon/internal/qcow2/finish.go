package qcow2

import (
	"encoding/binary"
	"slices"
)

// finish writes what tables are left, and returns the header.
func (l *layout) finish() []byte {
	l.retireRefcounts()
	l.retireL2()
	l1 := l.tables(l.l1)
	table, clusters := l.finishRefcounts()
	l.packAt, l.packEnd = 0, 0
	l.flush()
	return l.header(l1, table, clusters)
}

// finishRefcounts writes the last refcount blocks and their table, all of
// which are counted in them.
func (l *layout) finishRefcounts() (table int64, tableClusters int) {
	used := l.end() >> clusterBits
	var blocks int64
	for total := used; ; {
		blocks = (total + refcountEntries - 1) / refcountEntries
		tableClusters = int((blocks*8 + clusterSize - 1) / clusterSize)
		next := used + blocks - int64(len(l.refcountBlocks)) + int64(tableClusters)
		if next == total {
			break
		}
		total = next
	}
	// They follow one another from here on: count them before writing them.
	total := used + blocks - int64(len(l.refcountBlocks)) + int64(tableClusters)
	counts := slices.Concat(l.refcounts, make([]uint16, total-used))
	for i := used; i < total; i++ {
		counts[i-l.refcountsFrom] = 1
	}
	for len(counts) > 0 {
		offset, p := l.allocate()
		n := min(len(counts), refcountEntries)
		for i, c := range counts[:n] {
			binary.BigEndian.PutUint16(p[i*2:], c)
		}
		counts = counts[n:]
		l.refcountBlocks = append(l.refcountBlocks, uint64(offset))
	}
	return l.tables(l.refcountBlocks), tableClusters
}

// header makes the file's first cluster: the header (version 3), its
// extensions, and the backing file's name.
func (l *layout) header(l1, refcountTable int64, refcountClusters int) []byte {
	b := make([]byte, 0, clusterSize)
	u32 := func(v uint32) { b = binary.BigEndian.AppendUint32(b, v) }
	u64 := func(v uint64) { b = binary.BigEndian.AppendUint64(b, v) }
	var extension []byte
	var backingOffset, incompatible uint64
	if l.options.Backing != "" {
		const format = "qcow2"
		extension = binary.BigEndian.AppendUint32(extension, extensionBackingFormat)
		extension = binary.BigEndian.AppendUint32(extension, uint32(len(format)))
		extension = append(extension, format+"\x00\x00\x00"...) // padded to 8 bytes
		backingOffset = headerLength + uint64(len(extension)) + 8
	}
	compression := byte(compressionTypeZlib)
	if l.options.Compression == CompressionZstd {
		compression, incompatible = compressionTypeZstd, incompatibleCompression
	}
	u32(magic)
	u32(3)
	u64(backingOffset)
	u32(uint32(len(l.options.Backing)))
	u32(clusterBits)
	u64(l.options.Size)
	u32(0) // not encrypted
	u32(uint32(len(l.l1)))
	u64(uint64(l1))
	u64(uint64(refcountTable))
	u32(uint32(refcountClusters))
	u32(0) // snapshots
	u64(0)
	u64(incompatible)
	u64(0) // compatible features
	u64(0) // autoclear features
	u32(4) // refcounts of 1<<4 bits
	u32(headerLength)
	b = append(b, compression, 0, 0, 0, 0, 0, 0, 0)
	b = append(b, extension...)
	u64(extensionEnd)
	b = append(b, l.options.Backing...)
	return b[:clusterSize]
}
