package blobtest

import (
	"context"
	"sync"
	"sync/atomic"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// Watched is a store whose calls are counted, and that fails as a whole when it is
// told to. It hides all other abilities of the store that it wraps. It is safe for
// concurrent use.
type Watched struct {
	Faulty
	FaultyEntries

	finds atomic.Int64
	mu    sync.Mutex
	err   error // of all calls, if it is set
}

var (
	_ blob.Store   = (*Watched)(nil)
	_ blob.Entries = (*Watched)(nil)
)

// Watch watches s, which keeps both blobs and entries.
func Watch(s interface {
	blob.Store
	blob.Entries
},
) *Watched {
	w := &Watched{}
	fault := func(Op, digest.Digest) error {
		w.mu.Lock()
		defer w.mu.Unlock()
		return w.err
	}
	w.Faulty, w.FaultyEntries = Faulty{Store: s, Fault: fault}, FaultyEntries{Entries: s, Fault: fault}
	return w
}

// Fail makes all calls from now on fail with err; nil ends that.
func (w *Watched) Fail(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.err = err
}

// Finds is how often FindMissing was called since the last time it was asked.
func (w *Watched) Finds() int { return int(w.finds.Swap(0)) }

// FindMissing implements blob.Finder.
func (w *Watched) FindMissing(ctx context.Context, ds []digest.Digest) ([]digest.Digest, error) {
	w.finds.Add(1)
	return w.Faulty.FindMissing(ctx, ds)
}
