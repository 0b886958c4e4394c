package api

import (
	"hash/maphash"
	"sync"

	"github.com/mettle-build/mettle/elan/digest"
)

// maxRecent is how many digests each of the two generations of a recent holds:
// twice that many take some 4 MB.
const maxRecent = 1 << 16

// recent is a set of digests that forgets those not asked for lately. Two
// digests that are confused are as likely as two equal 64-bit hashes under a
// secret seed, and what would come of it is one more cache lookup that succeeds.
// It is safe for concurrent use.
type recent struct {
	seed maphash.Seed

	mu       sync.Mutex // guards both
	new, old map[uint64]struct{}
}

func newRecent() *recent {
	return &recent{seed: maphash.MakeSeed(), new: make(map[uint64]struct{})}
}

func (r *recent) key(d digest.Digest) uint64 { return maphash.Comparable(r.seed, d) }

// has reports whether d is in the set.
func (r *recent) has(d digest.Digest) bool {
	k := r.key(d)
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.new[k]; ok {
		return true
	}
	if _, ok := r.old[k]; !ok {
		return false
	}
	r.put(k)
	return true
}

// add puts d into the set.
func (r *recent) add(d digest.Digest) {
	k := r.key(d)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.put(k)
}

// put is add with the mutex held.
func (r *recent) put(k uint64) {
	if len(r.new) >= maxRecent {
		r.old, r.new = r.new, make(map[uint64]struct{})
	}
	r.new[k] = struct{}{}
}
