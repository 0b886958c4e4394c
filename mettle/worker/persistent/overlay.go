//go:build linux

package persistent

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"sync"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// overlay is a store that has, beside its own blobs, the Directories of input roots
// that were split, for as long as they are being built.
type overlay struct {
	blob.Store

	mu    sync.Mutex
	blobs map[digest.Digest]*heldBlob // guarded by mu
}

type heldBlob struct {
	data []byte
	uses int
}

var _ blob.Store = (*overlay)(nil)

// linkOverlay is an overlay of a store whose blobs are files.
type linkOverlay struct {
	*overlay
	blob.Linker
}

// fetchOverlay is a linkOverlay of a store that has part of them elsewhere.
type fetchOverlay struct {
	linkOverlay
	fetcher blob.Fetcher
}

var _ blob.Fetcher = fetchOverlay{}

// withAbilities is o with those abilities of its store that know of what o has: no
// others are seen, because there is no Unwrap.
func (o *overlay) withAbilities() blob.Store {
	linker, isLinker := blob.As[blob.Linker](o.Store)
	fetcher, isFetcher := blob.As[blob.Fetcher](o.Store)
	switch {
	case isLinker && isFetcher:
		return fetchOverlay{linkOverlay{o, linker}, fetcher}
	case isLinker:
		return linkOverlay{o, linker}
	}
	return o
}

func (o *overlay) hold(d digest.Digest, data []byte) {
	o.mu.Lock()
	defer o.mu.Unlock()
	h := o.blobs[d]
	if h == nil {
		h = &heldBlob{data: data}
		o.blobs[d] = h
	}
	h.uses++
}

func (o *overlay) release(ds []digest.Digest) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, d := range ds {
		if h := o.blobs[d]; h != nil {
			if h.uses--; h.uses == 0 {
				delete(o.blobs, d)
			}
		}
	}
}

func (o *overlay) get(d digest.Digest) []byte {
	o.mu.Lock()
	defer o.mu.Unlock()
	if h := o.blobs[d]; h != nil {
		return h.data
	}
	return nil
}

// others are those of ds that o has not.
func (o *overlay) others(ds []digest.Digest) []digest.Digest {
	out := make([]digest.Digest, 0, len(ds))
	for _, d := range ds {
		if o.get(d) == nil {
			out = append(out, d)
		}
	}
	return out
}

// FindMissing implements blob.Finder.
func (o *overlay) FindMissing(ctx context.Context, ds []digest.Digest) ([]digest.Digest, error) {
	return o.Store.FindMissing(ctx, o.others(ds))
}

// Open implements blob.Opener.
func (o *overlay) Open(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	data := o.get(d)
	if data == nil {
		return o.Store.Open(ctx, d, offset)
	}
	if offset < 0 || offset > int64(len(data)) {
		return nil, fmt.Errorf("offset %d of %d bytes", offset, len(data))
	}
	return io.NopCloser(bytes.NewReader(data[offset:])), nil
}

// Fetch implements blob.Fetcher.
func (o fetchOverlay) Fetch(ctx context.Context, ds []digest.Digest) ([]digest.Digest, error) {
	ds = o.others(ds)
	if len(ds) == 0 {
		return nil, nil
	}
	return o.fetcher.Fetch(ctx, ds)
}

// maxCached bounds the Directories that are kept, by the entries in them: some 40 MB.
const maxCached = 100_000

// cache keeps Directories: those that were used since the older half was dropped.
type cache struct {
	mu         sync.Mutex // guards all below
	young, old map[digest.Digest]*repb.Directory
	entries    int // of young
}

func (c *cache) get(d digest.Digest) *repb.Directory {
	c.mu.Lock()
	defer c.mu.Unlock()
	if m, ok := c.young[d]; ok {
		return m
	}
	m, ok := c.old[d]
	if ok {
		c.add(d, m)
	}
	return m
}

func (c *cache) put(d digest.Digest, m *repb.Directory) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.add(d, m)
}

// add is called with mu held. One more than the entries counts for the Directory
// itself.
func (c *cache) add(d digest.Digest, m *repb.Directory) {
	n := len(m.Files) + len(m.Directories) + len(m.Symlinks) + 1
	if n > maxCached/2 {
		return
	}
	if c.entries+n > maxCached/2 {
		c.old, c.young, c.entries = c.young, make(map[digest.Digest]*repb.Directory), 0
	}
	c.young[d] = m
	c.entries += n
}
