package file_test

import (
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/mettle-build/mettle/elan/blob/file"
	"github.com/mettle-build/mettle/elan/digest"
)

// TestStore_packedWriteAmplification: a store at its limit, of which blobs are
// used at random so that those that go are everywhere, does not write much more
// than what comes in, and is well filled.
func TestStore_packedWriteAmplification(t *testing.T) {
	for name, uses := range map[string]int{"first_in_first_out": 0, "used_at_random": 1, "used_much": 4} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				const maxBytes = 16 << 20
				reg := prometheus.NewRegistry()
				s := openQuiet(t, packing(file.Options{MaxBytes: maxBytes, MinLifetime: 6 * time.Minute, Registerer: reg}))
				r := rand.New(rand.NewPCG(1, 2))
				var ds []digest.Digest
				put := func(n int) {
					for range n {
						ds = append(ds, mustPut(t, s, len(ds)))
						for range uses {
							missing(t, s, ds[max(0, len(ds)-1-r.IntN(10_000))])
						}
						time.Sleep(time.Second)
					}
				}
				put(5_000)
				moved := metric(t, reg, "packs_moved_bytes_total")
				const more = 5_000
				put(more)
				moved = metric(t, reg, "packs_moved_bytes_total") - moved
				there := len(ds) - missing(t, s, ds...)
				amplification, fill := 1+moved/(more*block), float64(there*block)/maxBytes
				t.Logf("%.2f bytes written for each that came, %.0f %% of the store filled", amplification, fill*100)
				if amplification > 4 || fill < 0.6 {
					t.Error("want at most 4, and at least 60 %")
				}
			})
		})
	}
}
