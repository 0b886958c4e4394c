package bucket

import (
	"hash/maphash"
	"sync"
	"time"
)

// maxRecent bounds each of the two halves of a recent: 2 × 2^17 names, in some
// 10 MiB. One that is forgotten too early costs a request.
const maxRecent = 1 << 17

// recent remembers names for a while, at most window and at least half of it
// unless there are too many. It keeps a hash of each: the chance that a name is
// taken for another one is one in 2^46, and would leave one use unwritten.
type recent struct {
	window time.Duration
	seed   maphash.Seed

	mu         sync.Mutex
	born       time.Time // of young
	young, old map[uint64]struct{}
}

func newRecent(window time.Duration) *recent {
	return &recent{window: window, seed: maphash.MakeSeed(), born: time.Now(), young: map[uint64]struct{}{}}
}

// claim remembers a name, and reports whether it was not remembered before.
func (r *recent) claim(name string) bool {
	h := maphash.String(r.seed, name)
	r.mu.Lock()
	defer r.mu.Unlock()
	switch age := time.Since(r.born); {
	case age >= r.window:
		r.young, r.old, r.born = map[uint64]struct{}{}, nil, time.Now()
	case age >= r.window/2 || len(r.young) >= maxRecent:
		r.young, r.old, r.born = map[uint64]struct{}{}, r.young, time.Now()
	}
	if _, ok := r.young[h]; ok {
		return false
	}
	if _, ok := r.old[h]; ok {
		return false
	}
	r.young[h] = struct{}{}
	return true
}

// forget forgets a name.
func (r *recent) forget(name string) {
	h := maphash.String(r.seed, name)
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.young, h)
	delete(r.old, h)
}
