package buckettest

import (
	"bytes"
	"errors"
	"io"
	"testing"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// testContainers: what is written under a digest may have another size than it,
// is read at any offset, and is nothing to a store of blobs in the same bucket.
func testContainers(t *testing.T, o Options) {
	bo := o.fast()
	e, blobs := setUp(t, o, bo)
	bo.Containers = true
	s := e.Open(t, bo)
	defer s.Close() //nolint:errcheck // the test is over
	for _, c := range []struct {
		name         string
		size, stored int
	}{
		{"small", smallSize, 1000},
		{"small_and_more", smallSize + 1, smallSize + 25},
		{"large_in_one_chunk", o.large(), 5000},
		{"large", o.large() + 1, o.large() - 100},
		{"large_and_more", o.large() + 2, o.large() + 26},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := digest.Of(digest.SHA256, random(c.size))
			data := random(c.stored)
			w, err := s.Create(t.Context(), d)
			if err != nil {
				t.Fatal(err)
			}
			_, err = w.Write(data)
			if err := errors.Join(err, w.Commit(), w.Close()); err != nil {
				t.Fatal(err)
			}
			for _, off := range []int64{0, 24, int64(c.stored) - 1} {
				r, err := s.Open(t.Context(), d, off)
				if err != nil {
					t.Errorf("open at %d: %v", off, err)
					continue
				}
				got, err := io.ReadAll(r)
				if err = errors.Join(err, r.Close()); err != nil || !bytes.Equal(got, data[off:]) {
					t.Errorf("read from %d: %d bytes, error %v; want %d", off, len(got), err, len(data[off:]))
				}
			}
			if missing, err := s.FindMissing(t.Context(), []digest.Digest{d}); err != nil || len(missing) > 0 {
				t.Errorf("missing %v, error %v", missing, err)
			}
			if missing, err := blobs.FindMissing(t.Context(), []digest.Digest{d}); err != nil || len(missing) != 1 {
				t.Errorf("a container is taken for a blob, error %v", err)
			}
			if info, err := s.Stat(t.Context(), d); err != nil || info.StoredBytes != int64(c.stored) {
				t.Errorf("%d bytes are stored, error %v; want %d", info.StoredBytes, err, c.stored)
			}
			n := 0
			for info, err := range s.Blobs(t.Context()) {
				if err != nil {
					t.Error(err)
				} else if info.Digest == d {
					n++
				}
			}
			for info, err := range blobs.Blobs(t.Context()) {
				t.Errorf("%s is listed as a blob, error %v", info.Digest, err)
			}
			if n != 1 {
				t.Errorf("listed %d times, want once", n)
			}
			w, err = s.Create(t.Context(), d)
			if err != nil {
				t.Fatal(err)
			}
			_, err = w.Write(make([]byte, blob.MaxContainer(d.Size())+1))
			if err2 := w.Commit(); err == nil && err2 == nil {
				t.Error("more than a container may have: no error")
			}
			_ = w.Close()
		})
	}
}
