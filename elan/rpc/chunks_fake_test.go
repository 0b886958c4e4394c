package rpc_test

import (
	"context"
	"fmt"
	"sync"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// fakeChunker is a store that says of every blob what it is told to.
type fakeChunker struct {
	*fakeStore
	params blob.ChunkParams

	mu      sync.Mutex
	list    blob.ChunkList // what Split returns
	err     error          // what both return
	prefer  blob.ChunkFunction
	of      digest.Digest
	spliced blob.ChunkList
	splices int
}

func newFakeChunker() *fakeChunker {
	return &fakeChunker{fakeStore: newFakeStore(), params: blob.ChunkParams{
		FastCDCAverageBytes: 4 << 10, FastCDCSeed: 7, RepMaxCDCMinimumBytes: 2 << 10, RepMaxCDCHorizonBytes: 9 << 10, MaxChunks: 1 << 19,
	}}
}

var _ blob.Chunker = (*fakeChunker)(nil)

func (f *fakeChunker) ChunkParams() blob.ChunkParams { return f.params }

func (f *fakeChunker) Split(_ context.Context, d digest.Digest, prefer blob.ChunkFunction) (blob.ChunkList, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.of, f.prefer = d, prefer
	return f.list, f.err
}

func (f *fakeChunker) Splice(_ context.Context, d digest.Digest, l blob.ChunkList) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.of, f.spliced = d, l
	f.splices++
	return f.err
}

// say sets what Split and Splice return.
func (f *fakeChunker) say(l blob.ChunkList, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.list, f.err = l, err
}

// manyChunks are n chunks of half a MiB, and the blob that they could be.
func manyChunks(n int, fn digest.Function) (digest.Digest, []digest.Digest) {
	ds := make([]digest.Digest, n)
	for i := range ds {
		d, err := digest.New(fn, fmt.Sprintf("%0*x", fn.HexLen(), i+1), 512<<10)
		if err != nil {
			panic(err) // there are digits enough
		}
		ds[i] = d
	}
	d, err := digest.New(fn, fmt.Sprintf("%0*x", fn.HexLen(), 0xb10b), int64(n)*512<<10)
	if err != nil {
		panic(err)
	}
	return d, ds
}
