package qcow2

import "encoding/binary"

const (
	l2Entries       = clusterSize / 8
	refcountEntries = clusterSize / 2 // 16 bits each
	stagingSize     = 2 << 20
	// directSize is from what length on a buffer goes to the file as it is,
	// rather than being gathered with others.
	directSize = BufferSize / 2
)

func l1Entries(size uint64) uint64 {
	return max(1, (size+l2Entries*clusterSize-1)/(l2Entries*clusterSize))
}

// layout decides where everything is in the file. Clusters are allocated one
// after the other, tables among them as soon as they are complete, so that
// neither the disk's nor the file's size makes it hold more than one L2 table
// and two refcount blocks.
type layout struct {
	options WriterOptions
	out     *output

	base    int64  // host offset of staging's first byte
	staging []byte // whole clusters, not yet with the output

	// The free rest of the cluster that compressed clusters are packed into,
	// if packAt < packEnd. It is always in staging.
	packAt, packEnd int64

	l1      []uint64
	l2      []uint64
	l2Index uint64
	l2Used  bool

	refcounts      []uint16 // of the clusters from refcountsFrom on
	refcountsFrom  int64    // a multiple of refcountEntries
	refcountBlocks []uint64 // offsets of those written
}

func newLayout(o WriterOptions, out *output) *layout {
	return &layout{
		options:   o,
		out:       out,
		base:      clusterSize,
		l1:        make([]uint64, l1Entries(o.Size)),
		l2:        make([]uint64, l2Entries),
		refcounts: []uint16{1}, // the header
	}
}

// end is the host offset behind all that is allocated.
func (l *layout) end() int64 { return l.base + int64(len(l.staging)) }

// allocate appends a zeroed cluster.
func (l *layout) allocate() (offset int64, p []byte) {
	if len(l.staging)+clusterSize > cap(l.staging) {
		l.flush()
	}
	offset = l.end()
	n := len(l.staging)
	l.staging = l.staging[:n+clusterSize]
	clear(l.staging[n:])
	l.refcounts = append(l.refcounts, 0)
	return offset, l.staging[n:]
}

func (l *layout) reference(offset int64) { l.refcounts[offset>>clusterBits-l.refcountsFrom]++ }

// flush hands the staging over, and takes a new one. The cluster that is being
// packed stays if it is the last, so that packing goes on without a gap.
func (l *layout) flush() {
	full := l.staging
	keep := len(full)
	if l.packAt < l.packEnd && l.packEnd == l.end() {
		keep = int(l.packEnd - clusterSize - l.base)
	} else {
		l.packAt, l.packEnd = 0, 0
	}
	fresh := <-l.out.staging
	if fresh == nil {
		fresh = make([]byte, 0, stagingSize)
	}
	l.staging = append(fresh[:0], full[keep:]...)
	if full == nil {
		return
	}
	if keep == 0 {
		l.out.staging <- full
		return
	}
	l.out.queue <- chunk{offset: l.base, data: full[:keep], release: func() { l.out.staging <- full }}
	l.base += int64(keep)
}

// add lays a job out. It tells whether it has kept the buffer, to be released
// later.
func (l *layout) add(j *job, release func([]byte)) (kept bool) {
	l.retireRefcounts()
	if j.source != nil {
		l.copied(j)
		return false
	}
	if j.zero {
		for at := j.off; at < j.off+j.length; at += clusterSize {
			l.set(at>>clusterBits, entryZero)
		}
		return false
	}
	first := j.off >> clusterBits
	if l.direct(j, first, release) {
		return true
	}
	compressed := j.packed
	for i, c := range j.clusters {
		index := first + uint64(i)
		switch {
		case c.zero && l.options.Backing == "":
			// Unallocated reads as zeros.
		case c.zero:
			l.set(index, entryZero)
		case c.compressed > 0:
			l.prepare(index)
			l.l2[index%l2Entries] = l.pack(compressed[:c.compressed])
			compressed = compressed[c.compressed:]
		default:
			l.prepare(index)
			offset, p := l.allocate()
			copy(p, j.buffer[i*clusterSize:])
			l.reference(offset)
			l.l2[index%l2Entries] = entryCopied | uint64(offset)
		}
	}
	return false
}

// direct hands a buffer to the output without copying, if all of it is stored
// plain.
func (l *layout) direct(j *job, first uint64, release func([]byte)) bool {
	if len(j.buffer) < directSize || l.packAt < l.packEnd {
		return false
	}
	for _, c := range j.clusters {
		if c.zero || c.compressed > 0 {
			return false
		}
	}
	last := first + uint64(len(j.clusters)) - 1
	if l.l2Used && first/l2Entries != l.l2Index || first/l2Entries != last/l2Entries {
		return false // tables come in between
	}
	if len(l.staging) > 0 {
		l.flush()
	}
	l.prepare(first)
	for i := range j.clusters {
		offset := l.base + int64(i)*clusterSize
		l.refcounts = append(l.refcounts, 1)
		l.l2[(first+uint64(i))%l2Entries] = entryCopied | uint64(offset)
	}
	l.out.queue <- chunk{offset: l.base, data: j.buffer, release: func() { release(j.buffer) }}
	l.base += int64(len(j.buffer))
	return true
}

// copied has the output copy what lies in another file, to clusters that follow
// one another.
func (l *layout) copied(j *job) {
	first, count := j.off>>clusterBits, j.length>>clusterBits
	l.prepare(first)
	// What is packed next begins a cluster of its own: this one is not the last any more.
	l.packAt, l.packEnd = 0, 0
	l.flush()
	for i := range count {
		l.refcounts = append(l.refcounts, 1)
		l.l2[(first+i)%l2Entries] = entryCopied | uint64(l.base+int64(i)*clusterSize)
	}
	l.out.queue <- chunk{offset: l.base, source: j.source, host: j.host, length: int64(j.length), release: func() {}}
	l.base += int64(j.length)
}

// pack stores a compressed cluster behind the last one, as QEMU does: at any
// byte, and into the next cluster if that is a neighbour.
func (l *layout) pack(p []byte) uint64 {
	if int64(len(p)) > l.packEnd-l.packAt {
		adjacent := l.packAt < l.packEnd && l.packEnd == l.end()
		offset, _ := l.allocate()
		if !adjacent {
			l.packAt = offset
		}
		l.packEnd = offset + clusterSize
	}
	offset := l.packAt
	copy(l.staging[offset-l.base:], p)
	l.packAt += int64(len(p))
	for at := offset &^ (clusterSize - 1); at < l.packAt; at += clusterSize {
		l.reference(at)
	}
	return compressedEntry(clusterBits, offset, len(p))
}

// set writes an L2 entry.
func (l *layout) set(index, entry uint64) {
	l.prepare(index)
	l.l2[index%l2Entries] = entry
}

// prepare makes the cluster's L2 table the current one.
func (l *layout) prepare(index uint64) {
	if table := index / l2Entries; !l.l2Used || table != l.l2Index {
		l.retireL2()
		l.l2Index, l.l2Used = table, true
	}
}

// retireL2 writes the current L2 table: the disk's order has gone past it.
func (l *layout) retireL2() {
	if !l.l2Used {
		return
	}
	l.l1[l.l2Index] = entryCopied | uint64(l.table(l.l2))
	l.l2Used = false
	clear(l.l2)
}

// table writes a table that fits into one cluster.
func (l *layout) table(entries []uint64) int64 {
	offset, p := l.allocate()
	l.reference(offset)
	for i, e := range entries {
		binary.BigEndian.PutUint64(p[i*8:], e)
	}
	return offset
}

// tables writes a table of any length, at least one cluster.
func (l *layout) tables(entries []uint64) int64 {
	first := l.table(entries[:min(len(entries), l2Entries)])
	for at := l2Entries; at < len(entries); at += l2Entries {
		l.table(entries[at:min(len(entries), at+l2Entries)])
	}
	return first
}

// retireRefcounts writes a refcount block once nothing that it counts can
// change: what is still in staging is far behind it.
func (l *layout) retireRefcounts() {
	for len(l.refcounts) >= 2*refcountEntries {
		l.refcountBlock()
	}
}

// refcountBlock writes the first block of the refcounts.
func (l *layout) refcountBlock() {
	offset, p := l.allocate()
	l.reference(offset)
	n := min(len(l.refcounts), refcountEntries)
	for i, c := range l.refcounts[:n] {
		binary.BigEndian.PutUint16(p[i*2:], c)
	}
	l.refcountBlocks = append(l.refcountBlocks, uint64(offset))
	l.refcounts = append(l.refcounts[:0], l.refcounts[n:]...)
	l.refcountsFrom += refcountEntries
}
