package qcow2

import (
	"context"
	"errors"
	"fmt"
)

// Check reads all tables: every entry points into the file, no cluster is used
// twice (compressed clusters may share one), and the refcount of each used
// cluster is at least 1. What is used by nobody is not looked for.
func (i *Image) Check(ctx context.Context) error {
	c, err := newChecker(i)
	if err == nil {
		err = c.markTables()
	}
	if err == nil {
		err = c.markClusters(ctx)
	}
	if err == nil {
		err = c.compareRefcounts(ctx)
	}
	if err != nil {
		return fmt.Errorf("cannot trust qcow2 image: %w", err)
	}
	return nil
}

// checker marks what clusters of the file are used.
type checker struct {
	*Image
	clusters  int64
	exclusive bitmap // tables, plain clusters
	shared    bitmap // compressed data
	refcounts []uint64
}

type bitmap []uint64

func (b bitmap) has(n int64) bool { return b[n/64]&(1<<(n%64)) != 0 }
func (b bitmap) set(n int64)      { b[n/64] |= 1 << (n % 64) }

func newChecker(i *Image) (*checker, error) {
	clusters := (i.fileSize + i.raw.clusterSize - 1) >> i.raw.clusterBits
	words := clusters/64 + 1
	if words*16 > i.limits.tables() {
		return nil, fmt.Errorf("a file of %d bytes with clusters of %d is too big to check", i.fileSize, i.raw.clusterSize)
	}
	return &checker{Image: i, clusters: clusters, exclusive: make(bitmap, words), shared: make(bitmap, words)}, nil
}

// use marks a range of the file as used by one thing.
func (c *checker) use(what string, offset, length int64) error {
	for n := offset >> c.raw.clusterBits; n < (offset+length+c.raw.clusterSize-1)>>c.raw.clusterBits; n++ {
		if c.exclusive.has(n) || c.shared.has(n) {
			return fmt.Errorf("%s at host offset %d is on top of something else", what, offset)
		}
		c.exclusive.set(n)
	}
	return nil
}

// share marks what a compressed cluster touches.
func (c *checker) share(offset, length int64) error {
	for n := offset >> c.raw.clusterBits; n <= (offset+length-1)>>c.raw.clusterBits; n++ {
		if c.exclusive.has(n) {
			return fmt.Errorf("compressed data at host offset %d is on top of something else", offset)
		}
		c.shared.set(n)
	}
	return nil
}

func (c *checker) markTables() error {
	for _, r := range c.fixed() {
		if err := c.use(r.name, r.offset, r.length); err != nil {
			return err
		}
	}
	for _, e := range c.l1 {
		if offset := int64(e & entryOffset); offset != 0 {
			if err := c.use("L2 table", offset, c.raw.clusterSize); err != nil {
				return err
			}
		}
	}
	var err error
	if c.refcounts, err = c.readTable(c.raw.refcountTableOffset, int(c.raw.refcountTableSizeBytes/8)); err != nil {
		return fmt.Errorf("cannot read refcount table: %w", err)
	}
	for _, e := range c.refcounts {
		if e == 0 {
			continue
		}
		if err := c.checkTable("refcount block", int64(e), c.raw.clusterSize); err != nil {
			return err
		}
		if err := c.use("refcount block", int64(e), c.raw.clusterSize); err != nil {
			return err
		}
	}
	return nil
}

func (c *checker) markClusters(ctx context.Context) error {
	perTable := uint64(c.raw.clusterSize / 8)
	for n, l1 := range c.l1 {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		if l1&entryOffset == 0 {
			continue
		}
		table, err := c.readTable(int64(l1&entryOffset), int(perTable))
		if err != nil {
			return fmt.Errorf("cannot read L2 table at %d: %w", l1&entryOffset, err)
		}
		for k, e := range table {
			off := (uint64(n)*perTable + uint64(k)) << c.raw.clusterBits
			if err := c.mark(e, off); err != nil {
				return fmt.Errorf("cluster at %d: %w", off, err)
			}
		}
	}
	return nil
}

func (c *checker) mark(e, off uint64) error {
	if off >= c.raw.size {
		if e != 0 {
			return errors.New("it is behind the disk's end")
		}
		return nil
	}
	m, err := c.entry(e, off)
	switch {
	case err != nil:
		return err
	case m.state == compressed:
		return c.share(m.host, m.packed)
	case m.state == plain:
		return c.use("data", m.host, c.raw.clusterSize)
	}
	if host := int64(e & entryOffset); host != 0 { // zeros with a place of their own
		if err := c.checkTable("zero cluster", host, c.raw.clusterSize); err != nil {
			return err
		}
		return c.use("zero cluster", host, c.raw.clusterSize)
	}
	return nil
}

// compareRefcounts goes through the refcount blocks (chapter "Host cluster
// management").
func (c *checker) compareRefcounts(ctx context.Context) error {
	bits := int64(1) << c.raw.refcountOrder
	perBlock := c.raw.clusterSize * 8 / bits
	block := make([]byte, c.raw.clusterSize)
	for first := int64(0); first < c.clusters; first += perBlock {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		clear(block)
		if n := first / perBlock; n < int64(len(c.refcounts)) && c.refcounts[n] != 0 {
			if err := readFull(c.r, block, int64(c.refcounts[n])); err != nil {
				return fmt.Errorf("cannot read refcount block at %d: %w", c.refcounts[n], err)
			}
		}
		for n := first; n < min(first+perBlock, c.clusters); n++ {
			used := c.exclusive.has(n) || c.shared.has(n)
			if used && !counted(block, n-first, bits) {
				return fmt.Errorf("host cluster at %d is used, and its refcount is 0", n<<c.raw.clusterBits)
			}
		}
	}
	return nil
}

// counted tells whether the n-th refcount of so many bits is not 0.
func counted(block []byte, n, bits int64) bool {
	if bits < 8 {
		mask := byte(1<<bits - 1)
		return block[n*bits/8]>>(n*bits%8)&mask != 0
	}
	for _, b := range block[n*bits/8:][:bits/8] {
		if b != 0 {
			return true
		}
	}
	return false
}
