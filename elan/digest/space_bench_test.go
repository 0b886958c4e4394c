package digest_test

import (
	"fmt"
	"testing"

	"github.com/mettle-build/mettle/elan/digest"
)

// BenchmarkDigest: what a store does with each digest, in a space and in none.
func BenchmarkDigest(b *testing.B) {
	ds := make([]digest.Digest, 1000)
	for i := range ds {
		ds[i] = digest.Of(digest.SHA256, fmt.Append(nil, i))
	}
	space := digest.SpaceOf("main")
	for name, in := range map[string]bool{"plain": false, "in_a_space": true} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			n := 0
			for b.Loop() {
				for _, d := range ds {
					if in {
						d = d.In(space)
					}
					n += len(d.Hash()) + len(d.Space().String())
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(len(ds)), "ns/digest")
		})
	}
}
