//go:build linux

package sim_test

import (
	"hash/fnv"
	"sync"
	"time"
)

// dice decide. What they say depends on the seed, on what is asked, and on how
// often that was asked before; so not on what others ask in between, and
// goroutines that run at the same moment get the same in whichever order.
type dice struct {
	seed uint64

	mu    sync.Mutex // guards asked
	asked map[string]uint64
}

func newDice(seed uint64) *dice { return &dice{seed: seed, asked: make(map[string]uint64)} }

func (d *dice) roll(key string) uint64 {
	d.mu.Lock()
	n := d.asked[key]
	d.asked[key] = n + 1
	d.mu.Unlock()
	h := fnv.New64a()
	_, _ = h.Write([]byte(key)) // it never fails
	x := mix(mix(d.seed^h.Sum64()) + n)
	return mix(x)
}

// mix is the finalizer of splitmix64.
func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// chance is true with the probability p.
func (d *dice) chance(key string, p float64) bool {
	return p > 0 && float64(d.roll(key)>>11)/(1<<53) < p
}

// among is a number from 0 to n-1.
func (d *dice) among(key string, n int) int {
	return int(d.roll(key) % uint64(n)) //nolint:gosec // small
}

// between is a time from lo to hi, to the nanosecond, so that no two things
// happen at the same moment by chance.
func (d *dice) between(key string, lo, hi time.Duration) time.Duration {
	return lo + time.Duration(d.roll(key)%uint64(hi-lo)) //nolint:gosec // small
}
