package transfer

import (
	"container/list"
	"errors"
	"sync"
)

// blockKey names a block of a disk.
type blockKey struct {
	disk *servedDisk
	off  uint64
}

// blockCache holds the blocks that were asked for last. Guests read less than a
// block at a time, and each has to be read, unpacked and digested as a whole.
type blockCache struct {
	most int

	mu     sync.Mutex
	blocks map[blockKey]*cachedBlock
	recent list.List // of *cachedBlock, the last asked for first
}

type cachedBlock struct {
	key     blockKey
	place   *list.Element
	ready   chan struct{} // closed when it is loaded
	content []byte        // never changed
	err     error
}

var errNotLoaded = errors.New("the block was not loaded")

func newBlockCache(most int) *blockCache {
	return &blockCache{most: most, blocks: map[blockKey]*cachedBlock{}}
}

// get returns a block, and loads it if it is not there. Those who ask for it at
// once wait for one load. An error is not kept.
func (c *blockCache) get(key blockKey, load func() ([]byte, error)) ([]byte, error) {
	c.mu.Lock()
	b, ok := c.blocks[key]
	if ok {
		c.recent.MoveToFront(b.place)
		c.mu.Unlock()
		<-b.ready
		return b.content, b.err
	}
	b = &cachedBlock{key: key, ready: make(chan struct{})}
	b.place = c.recent.PushFront(b)
	c.blocks[key] = b
	for len(c.blocks) > c.most {
		c.remove(c.recent.Back().Value.(*cachedBlock))
	}
	c.mu.Unlock()
	b.load(load)
	if b.err != nil {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.blocks[key] == b {
			c.remove(b)
		}
	}
	return b.content, b.err
}

// load lets those who wait go on also when loading panics.
func (b *cachedBlock) load(load func() ([]byte, error)) {
	b.err = errNotLoaded
	defer close(b.ready)
	b.content, b.err = load()
}

func (c *blockCache) remove(b *cachedBlock) {
	c.recent.Remove(b.place)
	delete(c.blocks, b.key)
}
