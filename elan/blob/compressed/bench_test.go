package compressed_test

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/blobtest"
	"github.com/mettle-build/mettle/elan/blob/compressed"
	"github.com/mettle-build/mettle/elan/digest"
)

// goSource is some MiB of the sources of Go's own library, a file after the other.
func goSource(b *testing.B, size int) []byte {
	b.Helper()
	var data bytes.Buffer
	err := filepath.WalkDir(filepath.Join(runtime.GOROOT(), "src"), func(path string, _ fs.DirEntry, err error) error { //nolint:staticcheck // the benchmark is run where it was built
		if err != nil || !strings.HasSuffix(path, ".go") || data.Len() >= size {
			return err
		}
		src, err := os.ReadFile(path)
		data.Write(src)
		return err
	})
	if err != nil || data.Len() < size {
		b.Skipf("no sources of Go: %d bytes, %v", data.Len(), err)
	}
	return data.Bytes()[:size]
}

func BenchmarkStore(b *testing.B) {
	const large = 16 << 20
	source := goSource(b, large)
	for _, c := range []struct {
		name string
		data []byte
	}{{"go_16KiB", source[:16<<10]}, {"go_16MiB", source}, {"random_16KiB", blobtest.Random(1, 16<<10)}, {"random_16MiB", blobtest.Random(1, large)}} {
		d := digest.Of(digest.SHA256, c.data)
		m := newInside(b)
		s := newStore(b, compressed.Options{Store: m})
		blobtest.Put(b, s, digest.SHA256, c.data)
		b.Run("get_"+c.name, func(b *testing.B) {
			b.SetBytes(d.Size())
			b.ReportAllocs()
			for b.Loop() {
				if _, err := blob.ReadAll(b.Context(), s, d, large); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(d.Size())/float64(len(container(b, m, d))), "ratio")
		})
		b.Run("put_"+c.name, func(b *testing.B) {
			b.SetBytes(d.Size())
			b.ReportAllocs()
			for b.Loop() {
				b.StopTimer()
				_ = m.Remove(b.Context(), d)
				b.StartTimer()
				if err := putVerified(b, s, d, c.data); err != nil {
					b.Fatal(err)
				}
			}
		})
		frame := zstdOf(b, c.data)
		b.Run("put_as_zstd_"+c.name, func(b *testing.B) {
			b.SetBytes(d.Size())
			b.ReportAllocs()
			for b.Loop() {
				b.StopTimer()
				_ = m.Remove(b.Context(), d)
				b.StartTimer()
				if err := s.ReceiveCompressed(b.Context(), d, bytes.NewReader(frame)); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// putVerified puts in what was verified, so that hashing is not measured.
func putVerified(b *testing.B, c blob.Creator, d digest.Digest, data []byte) error {
	w, err := c.Create(b.Context(), d)
	if err != nil {
		return err
	}
	defer w.Close()
	if _, err := w.Write(data); err != nil {
		return err
	}
	return w.Commit()
}
