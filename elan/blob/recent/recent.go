// Package recent remembers what was true lately: 128 bits of hash a name, in a
// table of fixed size, each for a window of time. What does not fit pushes out
// what is oldest, so that an answer of no means nothing; an answer of yes does.
//
// It does not know what is true of its names. elan/blob/known keeps in it
// which blobs are there, elan/blob/bucket and elan/blob/tiered which uses they
// have passed on.
package recent

import (
	"encoding/binary"
	"hash/maphash"
	"math/bits"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mettle-build/mettle/elan/digest"
)

const (
	// ways is how many slots a name can be in: enough that a table that is
	// three quarters full pushes out hardly anything young.
	ways = 8
	// locks are for as many parts of the table.
	locks = 64
	// BytesPerName is what one name takes.
	BytesPerName = 24
)

// Stamp is a moment of a Set: no two are equal, and later ones are larger.
type Stamp int64

// Set is names with the moments at which they were true. It is safe for
// concurrent use.
type Set struct {
	window time.Duration
	born   time.Time
	last   atomic.Int64 // the last Stamp, in nanoseconds since born
	seeds  [2]maphash.Seed
	sets   uint64 // of ways slots each

	mu    [locks]sync.Mutex // of the sets whose number ends so
	slots []slot
}

// slot is one name. It has no pointers, so that the garbage collector does not
// look at the table.
type slot struct {
	hash [2]uint64
	at   int64 // twice the Stamp, and 1 where the name was forgotten then; 0: free
}

// New makes an empty Set of at most maxNames, and somewhat more for small
// numbers, which it keeps for window. It allocates all of BytesPerName a name,
// of which the system gives memory to what is used.
func New(maxNames int, window time.Duration) *Set {
	sets := max(1, (maxNames+ways-1)/ways)
	s := &Set{window: window, born: time.Now(), sets: uint64(sets), slots: make([]slot, sets*ways)} //nolint:gosec // positive
	for i := range s.seeds {
		s.seeds[i] = maphash.MakeSeed()
	}
	return s
}

// Now is this moment. Take it before the question whose answer is added.
func (s *Set) Now() Stamp {
	for {
		last := s.last.Load()
		now := max(int64(time.Since(s.born)), last+1)
		if s.last.CompareAndSwap(last, now) {
			return Stamp(now)
		}
	}
}

// Add remembers that a name is true since at, unless it was forgotten after
// that, and reports whether it was not remembered before. Two names are taken
// for one with a chance of one in 2^128.
func (s *Set) Add(name []byte, at Stamp) bool {
	h := s.hash(name)
	set, mu := s.find(h)
	mu.Lock()
	defer mu.Unlock()
	sl, there := place(set, h)
	if there && sl.at/2 >= int64(at) {
		return false // what is known is newer
	}
	fresh := !there || sl.at&1 == 1 || s.over(sl.at/2, time.Since(s.born))
	*sl = slot{hash: h, at: int64(at) * 2}
	return fresh
}

// Has reports whether a name is remembered.
func (s *Set) Has(name []byte) bool {
	h := s.hash(name)
	now := time.Since(s.born)
	set, mu := s.find(h)
	mu.Lock()
	defer mu.Unlock()
	sl, there := place(set, h)
	return there && sl.at&1 == 0 && !s.over(sl.at/2, now)
}

// Claim is Add at this moment for a name that is not remembered. Of several who
// claim a name one is told true.
func (s *Set) Claim(name []byte) bool {
	h := s.hash(name)
	now := s.Now()
	set, mu := s.find(h)
	mu.Lock()
	defer mu.Unlock()
	sl, there := place(set, h)
	if there && sl.at&1 == 0 && !s.over(sl.at/2, time.Duration(now)) {
		return false
	}
	*sl = slot{hash: h, at: int64(now) * 2}
	return true
}

// Forget says that a name is true no longer. What was learned before, and is
// still to be added, is forgotten too.
func (s *Set) Forget(name []byte) {
	h := s.hash(name)
	now := s.Now()
	set, mu := s.find(h)
	mu.Lock()
	defer mu.Unlock()
	sl, _ := place(set, h)
	*sl = slot{hash: h, at: int64(now)*2 + 1}
}

func (s *Set) over(at int64, now time.Duration) bool { return now-time.Duration(at) >= s.window }

func (s *Set) hash(name []byte) [2]uint64 {
	return [2]uint64{maphash.Bytes(s.seeds[0], name), maphash.Bytes(s.seeds[1], name)}
}

// find returns the slots in which a name can be, and their lock.
func (s *Set) find(h [2]uint64) ([]slot, *sync.Mutex) {
	n, _ := bits.Mul64(h[0], s.sets) // h[0] scaled to the number of sets
	return s.slots[n*ways : (n+1)*ways], &s.mu[n%locks]
}

// place returns the slot of a name, or the one to be used for it: one that is
// free, or else that of the oldest.
func place(set []slot, h [2]uint64) (sl *slot, there bool) {
	oldest := &set[0]
	for i := range set {
		sl := &set[i]
		if sl.at != 0 && sl.hash == h {
			return sl, true
		}
		if sl.at < oldest.at {
			oldest = sl
		}
	}
	return oldest, false
}

// NameBytes is room for what AppendName appends.
const NameBytes = 1 + 8 + 128 + 32

// AppendName appends the name of a blob: all of its digest, the space too.
func AppendName(b []byte, d digest.Digest) []byte {
	b = append(b, byte(d.Function()))
	b = binary.LittleEndian.AppendUint64(b, uint64(d.Size())) //nolint:gosec // not negative
	return append(append(b, d.Hash()...), d.Space().String()...)
}
