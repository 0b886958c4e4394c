package chunked

import (
	"sync"

	"github.com/mettle-build/mettle/elan/blob"
)

// flights lets one caller do what many want, while the others wait. The zero
// flights are ready. Safe for concurrent use.
type flights struct {
	mu sync.Mutex
	// m has a channel for each key that somebody is at, which is closed when he
	// leaves. He may have failed.
	m map[blob.EntryKey]chan struct{}
}

// enter returns either leave, for the caller to do it and then call it, or a
// channel that is closed when another has.
func (f *flights) enter(k blob.EntryKey) (leave func(), wait <-chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if wait, ok := f.m[k]; ok {
		return nil, wait
	}
	if f.m == nil {
		f.m = map[blob.EntryKey]chan struct{}{}
	}
	done := make(chan struct{})
	f.m[k] = done
	return func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		delete(f.m, k)
		close(done)
	}, nil
}
