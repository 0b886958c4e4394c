package chunk_test

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/mettle-build/mettle/elan/chunk"
)

// random returns size bytes that are the same in each run.
func random(seed uint64, size int) []byte {
	data := make([]byte, size)
	_, _ = rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), 1}).Read(data) // never fails
	return data
}

func functions(tb testing.TB) map[string]chunk.Function {
	tb.Helper()
	f, err := chunk.NewFastCDC(chunk.DefaultFastCDCAverage, 0)
	if err != nil {
		tb.Fatal(err)
	}
	r, err := chunk.NewRepMaxCDC(chunk.DefaultRepMaxCDCMinimum, chunk.DefaultRepMaxCDCHorizon)
	if err != nil {
		tb.Fatal(err)
	}
	return map[string]chunk.Function{"fastcdc": f, "repmaxcdc": r}
}

func BenchmarkChunks(b *testing.B) {
	data := random(1, 64<<20)
	for name, f := range functions(b) {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(data)))
			b.ReportAllocs()
			for b.Loop() {
				for range chunk.Chunks(f, data) {
				}
			}
		})
	}
}

func BenchmarkReader(b *testing.B) {
	data := random(1, 64<<20)
	for name, f := range functions(b) {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(data)))
			b.ReportAllocs()
			for b.Loop() {
				r := chunk.NewReader(bytes.NewReader(data), f)
				var err error
				for err == nil {
					_, err = r.Next()
				}
				if !errors.Is(err, io.EOF) {
					b.Fatal(err)
				}
			}
		})
	}
}
