package file_test

import (
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/blobtest"
	"github.com/mettle-build/mettle/elan/blob/file"
)

func BenchmarkStore(b *testing.B) {
	b.Run("file", func(b *testing.B) { blobtest.Bench(b, options(0)) })
	b.Run("packed", func(b *testing.B) { blobtest.Bench(b, options(file.DefaultMaxPackedBytes)) })
}

// BenchmarkNew is the start of a store: one that is new, and one that was there.
func BenchmarkNew(b *testing.B) {
	start := func(b *testing.B, o file.Options) {
		s, err := file.New(o)
		must(b, err)
		b.StopTimer()
		must(b, s.Close())
		b.StartTimer()
	}
	b.Run("new", func(b *testing.B) {
		dir := b.TempDir()
		for n := 0; b.Loop(); n++ {
			start(b, file.Options{Dir: filepath.Join(dir, strconv.Itoa(n))})
		}
	})
	b.Run("again", func(b *testing.B) {
		o := file.Options{Dir: b.TempDir()}
		for b.Loop() {
			start(b, o)
		}
	})
}

// BenchmarkLocal is what a worker in the same process does, each with the
// removal of the name that it made.
func BenchmarkLocal(b *testing.B) {
	for _, mode := range []blob.LinkMode{blob.LinkRegular, blob.LinkExecutable} {
		b.Run("link_"+[]string{"regular", "executable"}[mode], func(b *testing.B) {
			s, dst := open(b, file.Options{}), filepath.Join(b.TempDir(), "f")
			d := mustPut(b, s, 1)
			for b.Loop() {
				must(b, s.Link(b.Context(), d, dst, mode))
				must(b, os.Remove(dst))
			}
		})
	}
	b.Run("adopt_4KiB", func(b *testing.B) {
		s, dir, seed := open(b, file.Options{}), b.TempDir(), uint64(0)
		for b.Loop() {
			b.StopTimer()
			seed++
			path := filepath.Join(dir, "output")
			must(b, os.WriteFile(path, blobtest.Random(seed, block), 0o600))
			b.StartTimer()
			must(b, adoptPath(b.Context(), s, path))
			must(b, os.Remove(path))
		}
	})
}
