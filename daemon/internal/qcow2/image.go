package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
)

// Image is one file of a chain, open for reading. Its methods may be called
// from many goroutines at once.
type Image struct {
	r        io.ReaderAt
	fileSize int64
	raw      *rawHeader
	l1       []uint64
	limits   Limits
	unpack   decompressor
	most     int // L2 tables held

	mu     sync.Mutex
	tables map[int64][]uint64 // L2 tables by their host offset
	recent []int64            // their offsets, in the order of coming
}

// cacheBytes is how much of the L2 tables an image holds, if the limits allow.
const cacheBytes = 4 << 20

// Open reads an image's header and L1 table. fileSize is the file's length in
// bytes. The backing file is only named, never opened.
func Open(r io.ReaderAt, fileSize int64, lim Limits) (*Image, error) {
	i, err := open(r, fileSize, lim)
	if err != nil {
		return nil, fmt.Errorf("cannot open qcow2 image: %w", err)
	}
	return i, nil
}

func open(r io.ReaderAt, fileSize int64, lim Limits) (*Image, error) {
	h, err := parseHeader(r, fileSize, lim)
	if err != nil {
		return nil, err
	}
	i := &Image{r: r, fileSize: fileSize, raw: h, limits: lim, tables: map[int64][]uint64{}}
	i.most = int(max(1, min(cacheBytes, lim.tables())>>h.clusterBits))
	if i.l1, err = i.readTable(h.l1Offset, int(h.l1Size)); err != nil {
		return nil, fmt.Errorf("cannot read L1 table: %w", err)
	}
	for n, e := range i.l1 {
		if err := i.checkL1(e); err != nil {
			return nil, fmt.Errorf("L1 entry %d: %w", n, err)
		}
	}
	i.unpack, err = newDecompressor(i.Header().Compression)
	return i, err
}

func (i *Image) checkL1(e uint64) error {
	if e&entryReservedL1 != 0 {
		return fmt.Errorf("reserved bits are set in %#x", e)
	}
	offset := int64(e & entryOffset)
	if offset == 0 {
		return nil
	}
	return i.checkTable("L2 table", offset, i.raw.clusterSize)
}

// checkTable refuses a table outside the file, and one on top of those that
// the header names.
func (i *Image) checkTable(name string, offset, length int64) error {
	t := region{name, offset, length}
	if err := t.check(i.raw.clusterSize, i.fileSize); err != nil {
		return err
	}
	for _, o := range i.fixed() {
		if t.overlaps(o) {
			return fmt.Errorf("%s at %d overlaps the %s", name, offset, o.name)
		}
	}
	return nil
}

// fixed are the regions that the header names, itself included.
func (i *Image) fixed() []region {
	return []region{
		{"header", 0, i.raw.clusterSize},
		{"L1 table", i.raw.l1Offset, int64(i.raw.l1Size) * 8},
		{"refcount table", i.raw.refcountTableOffset, i.raw.refcountTableSizeBytes},
	}
}

// Header returns what the image says about itself.
func (i *Image) Header() Header {
	h := Header{
		Version:       i.raw.version,
		Size:          i.raw.size,
		ClusterSize:   uint32(i.raw.clusterSize),
		Backing:       i.raw.backing,
		BackingFormat: i.raw.backingFormat,
		Compression:   CompressionZlib,
	}
	if i.raw.compressionType == compressionTypeZstd {
		h.Compression = CompressionZstd
	}
	return h
}

func (i *Image) readTable(offset int64, entries int) ([]uint64, error) {
	b := make([]byte, entries*8)
	if err := readFull(i.r, b, offset); err != nil {
		return nil, err
	}
	t := make([]uint64, entries)
	for n := range t {
		t[n] = binary.BigEndian.Uint64(b[n*8:])
	}
	return t, nil
}

// l2 returns a table by its host offset.
func (i *Image) l2(offset int64) ([]uint64, error) {
	i.mu.Lock()
	t, ok := i.tables[offset]
	i.mu.Unlock()
	if ok {
		return t, nil
	}
	t, err := i.readTable(offset, int(i.raw.clusterSize/8))
	if err != nil {
		return nil, fmt.Errorf("cannot read L2 table at %d: %w", offset, err)
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if _, ok := i.tables[offset]; !ok {
		if len(i.recent) >= i.most {
			delete(i.tables, i.recent[0])
			i.recent = i.recent[1:]
		}
		i.tables[offset] = t
		i.recent = append(i.recent, offset)
	}
	return t, nil
}

// state is where a cluster's content is.
type state int

const (
	unallocated state = iota // in the backing file
	zero
	plain
	compressed
)

// mapping is a part of the disk, within one L2 table, with one state.
type mapping struct {
	state  state
	length uint64 // from the offset asked for
	host   int64  // plain: of the first byte; compressed: of the packed data
	packed int64  // compressed: its length
	inside uint64 // compressed: the offset asked for within the cluster
}

// lookUp maps the disk from off on, for length bytes at most. Neighbouring
// clusters with the same state are taken together, plain ones only if they are
// neighbours in the file too.
func (i *Image) lookUp(off, length uint64) (mapping, error) {
	size := uint64(i.raw.clusterSize)
	perTable := size * size / 8
	length = min(length, perTable-off%perTable)
	l1 := i.l1[off/perTable]
	if l1&entryOffset == 0 {
		return mapping{length: length}, nil
	}
	table, err := i.l2(int64(l1 & entryOffset))
	if err != nil {
		return mapping{}, err
	}
	var m mapping
	for at := off; at < off+length; {
		inside := at % size
		next, err := i.entry(table[at/size%(size/8)], at-inside)
		if err != nil {
			return mapping{}, fmt.Errorf("cluster at %d: %w", at-inside, err)
		}
		n := min(size-inside, off+length-at)
		switch {
		case at == off:
			m = next
			m.inside = inside
			if m.state == plain {
				m.host += int64(inside)
			}
		case next.state != m.state || m.state == compressed || m.state == plain && next.host != m.host+int64(at-off):
			return m, nil
		}
		m.length += n
		at += n
	}
	return m, nil
}

// entry decodes the L2 entry of the cluster at an offset of the disk, and holds
// what it points to against the file.
func (i *Image) entry(e, off uint64) (mapping, error) {
	if e&entryCompressed != 0 {
		return i.compressedEntry(e)
	}
	if e&entryReservedL2 != 0 || i.raw.version == 2 && e&entryZero != 0 {
		return mapping{}, fmt.Errorf("reserved bits are set in %#x", e)
	}
	host := int64(e & entryOffset)
	if host%i.raw.clusterSize != 0 {
		return mapping{}, fmt.Errorf("host offset %d is not at a cluster", host)
	}
	switch {
	case e&entryZero != 0:
		return mapping{state: zero}, nil
	case host == 0 && e&entryCopied != 0:
		return mapping{}, errors.New("host offset 0 is not allowed")
	case host == 0:
		return mapping{state: unallocated}, nil
	}
	// A file may end within its last cluster, behind the disk's end.
	needed := int64(min(uint64(i.raw.clusterSize), i.raw.size-off))
	if host > i.fileSize || needed > i.fileSize-host {
		return mapping{}, fmt.Errorf("%d bytes at host offset %d are outside the file of %d bytes", needed, host, i.fileSize)
	}
	return mapping{state: plain, host: host}, nil
}

func (i *Image) compressedEntry(e uint64) (mapping, error) {
	shift := compressedShift(i.raw.clusterBits)
	host := int64(e & (1<<shift - 1))
	sectors := int64(e &^ (entryCompressed | entryCopied) >> shift)
	length := (sectors+1)*sectorSize - host%sectorSize
	// The last sector need not be there as a whole.
	if host < i.raw.clusterSize || e&entryCopied != 0 || host >= i.fileSize || host+length-sectorSize >= i.fileSize {
		return mapping{}, fmt.Errorf("%d compressed bytes at host offset %d are outside the file of %d bytes, or not allowed", length, host, i.fileSize)
	}
	return mapping{state: compressed, host: host, packed: min(length, i.fileSize-host)}, nil
}
