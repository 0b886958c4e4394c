//go:build linux

package inputroot

import (
	"sync"

	"github.com/mettle-build/mettle/elan/digest"
)

// cache keeps decoded Directories: those that were used since the older half
// was dropped.
type cache struct {
	maxEntries int

	mu         sync.Mutex // guards all below
	young, old map[digest.Digest]*directory
	entries    int // of young
}

func newCache(maxEntries int) *cache {
	return &cache{maxEntries: maxEntries, young: make(map[digest.Digest]*directory)}
}

func (c *cache) get(d digest.Digest) *directory {
	c.mu.Lock()
	defer c.mu.Unlock()
	if dir, ok := c.young[d]; ok {
		return dir
	}
	dir, ok := c.old[d]
	if ok {
		c.add(d, dir)
	}
	return dir
}

func (c *cache) put(d digest.Digest, dir *directory) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.add(d, dir)
}

// add is called with mu held. One more than the entries counts for the directory
// itself.
func (c *cache) add(d digest.Digest, dir *directory) {
	n := dir.entries() + 1
	if n > c.maxEntries/2 {
		return
	}
	if c.entries+n > c.maxEntries/2 {
		c.old, c.young, c.entries = c.young, make(map[digest.Digest]*directory), 0
	}
	c.young[d] = dir
	c.entries += n
}
