// Package history expects how long actions take, by how long others like them
// took: the same target, mnemonic, program and first output, or where that is
// not known, the same mnemonic and program. A queue can begin with the longest
// then (proto Job.expected). mettle/api, its only caller, tells it what workers
// measured.
//
// For each it keeps an exponentially weighted mean, so that what has changed is
// learned in a few builds. Names are kept as 64-bit hashes under a secret seed:
// two that are confused get a wrong estimate, which does no more harm than any
// other. What was not asked for lately is forgotten, and everything with the
// process: each API server learns anew within one build, from the builds that it
// serves itself, so there is nothing to store or to share.
//
// What it does not do is hedge stragglers, that is start an action a second time
// elsewhere when it takes far longer than expected. It would take: a second job
// under a name of its own for one operation, whose first result wins and whose
// other is withdrawn (the Machine knows one job's attempts); a right to do so,
// since an action may have effects outside that clients count on happening once
// (do_not_cache, tests with the network); a budget, some percent of the slots,
// lest a slow store doubles the load; the quantiles of what an action takes
// instead of its mean; and the certainty that the second goes to another
// machine, which a queue can't promise. Leases already end what a dead worker
// holds; a slow one is seen by its metrics.
package history

import (
	"errors"
	"hash/maphash"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Options are the settings of a History. The zero Options are valid.
type Options struct {
	// MaxKeys bounds what is remembered, each some 40 bytes. Default 131,072.
	MaxKeys int
	// Registerer gets the metrics. Default: none does.
	Registerer prometheus.Registerer
}

// An Action is what is known of an action before it runs. Fields may be empty.
type Action struct {
	Instance string
	// Target and Mnemonic are those of the client's RequestMetadata.
	Target, Mnemonic string
	// Program is argv[0], and Output the path of the first output, which tells
	// apart the actions of a target.
	Program, Output string
}

// A Key stands for an Action in the History that made it. It is comparable.
type Key struct {
	same, like uint64
}

const (
	// sameShare and likeShare are what a new time counts for in the means. The
	// same action takes about as long as last time; of those that are only
	// alike, the mean of many says more.
	sameShare = 0.3
	likeShare = 0.03
)

// History is what actions took. It is safe for concurrent use, does no I/O, and
// takes well under a microsecond a call.
type History struct {
	seed    maphash.Seed
	max     int // of a generation
	metrics *metrics

	mu sync.Mutex // guards both
	// times has the means in seconds, of the keys of two generations: what is
	// used is in the younger one, and what is in neither is forgotten.
	times, older map[uint64]float64
}

// New makes a History that knows nothing.
func New(o Options) (*History, error) {
	if o.MaxKeys < 0 {
		return nil, errors.New("history: MaxKeys is negative")
	}
	if o.MaxKeys == 0 {
		o.MaxKeys = 1 << 17
	}
	h := &History{seed: maphash.MakeSeed(), max: max(o.MaxKeys/2, 1), times: make(map[uint64]float64)}
	var err error
	h.metrics, err = newMetrics(o.Registerer, h)
	return h, err
}

// Key makes the key of a.
func (h *History) Key(a Action) Key {
	like := Action{Instance: a.Instance, Mnemonic: a.Mnemonic, Program: a.Program}
	return Key{same: maphash.Comparable(h.seed, a), like: maphash.Comparable(h.seed, like)}
}

// Expected is how long the action of k is expected to run; false: nobody knows.
func (h *History) Expected(k Key) (time.Duration, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	s, ok := h.expected(k)
	return seconds(s), ok
}

func (h *History) expected(k Key) (float64, bool) {
	if s, ok := h.get(k.same); ok {
		return s, true
	}
	return h.get(k.like)
}

// Observe tells how long an action of k has run. What is not positive tells
// nothing.
func (h *History) Observe(k Key, took time.Duration) {
	if took <= 0 {
		return
	}
	s := took.Seconds()
	h.mu.Lock()
	expected, ok := h.expected(k)
	h.learn(k.same, s, sameShare)
	if k.like != k.same {
		h.learn(k.like, s, likeShare)
	}
	h.mu.Unlock()
	h.metrics.observe(s, expected, ok)
}

// learn takes s into the mean of k. The mutex is held.
func (h *History) learn(k uint64, s, share float64) {
	if mean, ok := h.get(k); ok {
		s = mean + share*(s-mean)
	}
	h.put(k, s)
}

// get finds the mean of k, and has it stay. The mutex is held.
func (h *History) get(k uint64) (float64, bool) {
	if s, ok := h.times[k]; ok {
		return s, true
	}
	s, ok := h.older[k]
	if ok {
		h.put(k, s)
	}
	return s, ok
}

func (h *History) put(k uint64, s float64) {
	if len(h.times) >= h.max {
		h.older, h.times = h.times, make(map[uint64]float64)
	}
	h.times[k] = s
}

// keys counts what is remembered; what was used lately may count twice.
func (h *History) keys() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.times) + len(h.older)
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }
