package bench

import (
	"math"
	"math/bits"
	"time"
)

// subBits sets the resolution of a histogram: 2^subBits buckets for each power
// of two, so that a quantile is within 1/128 of the truth.
const subBits = 6

// A histogram counts latencies in buckets of constant relative width, so that
// its size does not depend on how many there are. The zero histogram is empty.
// It is not safe for concurrent use.
type histogram struct {
	counts [(64 - subBits) << subBits]uint64
	n      uint64
	sum    time.Duration
	max    time.Duration
}

func (h *histogram) add(d time.Duration) {
	d = max(d, 0)
	h.counts[bucket(uint64(d))]++
	h.n++
	h.sum += d
	h.max = max(h.max, d)
}

func (h *histogram) merge(o *histogram) {
	for i, c := range o.counts {
		h.counts[i] += c
	}
	h.n += o.n
	h.sum += o.sum
	h.max = max(h.max, o.max)
}

// quantile is the latency that the share q of all does not exceed, by the
// nearest-rank method, to within the resolution. It is 0 of an empty histogram.
func (h *histogram) quantile(q float64) time.Duration {
	rank := uint64(math.Ceil(q * float64(h.n)))
	var seen uint64
	for i, c := range h.counts {
		seen += c
		if seen >= rank && seen > 0 {
			return min(middle(i), h.max)
		}
	}
	return 0
}

// bucket is the index of the bucket of v. Values below 2^(subBits+1) have a
// bucket each; above, the leading subBits+1 bits and the magnitude tell it.
func bucket(v uint64) int {
	shift := max(bits.Len64(v)-subBits-1, 0)
	return shift<<subBits + int(v>>shift)
}

// middle is the value in the middle of bucket i.
func middle(i int) time.Duration {
	shift := max(i>>subBits-1, 0)
	low := uint64(i-shift<<subBits) << shift
	return time.Duration(low + (1<<shift)/2)
}

// median is the middle one of vs, or the mean of the two in the middle; 0 of none.
func median(sorted []float64) float64 {
	n := len(sorted)
	if n == 0 {
		return 0
	}
	return (sorted[(n-1)/2] + sorted[n/2]) / 2
}
