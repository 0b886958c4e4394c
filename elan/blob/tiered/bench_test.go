package tiered_test

import (
	"fmt"
	"io"
	"testing"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/blobtest"
	"github.com/mettle-build/mettle/elan/blob/mem"
	"github.com/mettle-build/mettle/elan/blob/tiered"
)

// What a hit costs, beside the same read of the tier itself.
func BenchmarkRead(b *testing.B) {
	for _, size := range []int{4 << 10, 512 << 10, 64 << 20} {
		data := blobtest.Random(1, size)
		low := newMem(b, mem.Options{})
		for _, c := range []struct {
			name  string
			tier  blob.Store
			trust bool
		}{{"mem", newMem(b, mem.Options{}), true}, {"file", newFile(b), false}} {
			d := put(b, c.tier, data)
			put(b, low, data)
			s := newTiered(b, tiered.Options{Tiers: []tiered.Tier{{Name: "up", Store: c.tier, Trusted: c.trust}, {Name: "low", Store: low}}})
			for _, o := range []struct {
				name string
				from blob.Opener
			}{{"direct", c.tier}, {"tiered", s}} {
				b.Run(fmt.Sprintf("%s/%d/%s", c.name, size, o.name), func(b *testing.B) {
					b.SetBytes(int64(size))
					b.ReportAllocs()
					buf := make([]byte, 1<<20)
					for b.Loop() {
						r, err := o.from.Open(b.Context(), d, 0)
						if err != nil {
							b.Fatal(err)
						}
						n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{r}, buf)
						if err != nil || n != d.Size() {
							b.Fatal(n, err)
						}
						_ = r.Close()
					}
				})
			}
		}
	}
}
