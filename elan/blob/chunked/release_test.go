package chunked_test

import (
	"bytes"
	"flag"
	"testing"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/blobtest"
	"github.com/mettle-build/mettle/elan/blob/chunked"
	"github.com/mettle-build/mettle/elan/blob/mem"
	"github.com/mettle-build/mettle/elan/digest"
)

//nolint:gochecknoglobals // a flag
var record = flag.String("record", "", "record the lists that today's code keeps as those of this release")

// recordedBlobs are two: one that is kept in chunks alone, and one that is whole and
// was split.
func recordedBlobs() (kept, split []byte) {
	return bytes.Repeat([]byte("kept in chunks alone. "), 10_000), blobtest.Random(7, 200_000)
}

// newRecorded is a store that has the chunks of the one and all of the other.
func newRecorded(t *testing.T) (s *chunked.Store, m *mem.Store, d digest.Digest, ds []digest.Digest) {
	t.Helper()
	m, err := mem.New(mem.Options{})
	if err != nil {
		t.Fatal(err)
	}
	o := chunked.Options{Store: m, Entries: m}
	o.FastCDC, o.RepMaxCDC = smallFunctions(t)
	if s, err = chunked.New(o); err != nil {
		t.Fatal(err)
	}
	kept, split := recordedBlobs()
	blobtest.Put(t, m, digest.SHA256, split)
	for piece := range chunks(kept) {
		ds = append(ds, blobtest.Put(t, m, digest.SHA256, piece))
	}
	return s, m, digest.Of(digest.SHA256, kept), ds
}

// chunks cuts where it likes: a client may.
func chunks(data []byte) func(yield func([]byte) bool) {
	return func(yield func([]byte) bool) {
		for n := 4000; len(data) > 0; n += 1000 {
			n = min(n, len(data))
			if !yield(data[:n]) {
				return
			}
			data = data[n:]
		}
	}
}

// TestRecord records a release, if it is told to.
func TestRecord(t *testing.T) {
	if *record == "" {
		t.Skip("-record names no release")
	}
	s, m, d, ds := newRecorded(t)
	if err := s.Splice(t.Context(), d, blob.ChunkList{Chunks: ds}); err != nil {
		t.Fatal(err)
	}
	_, split := recordedBlobs()
	if _, err := s.Split(t.Context(), digest.Of(digest.SHA256, split), blob.ChunkFastCDC2020); err != nil {
		t.Fatal(err)
	}
	blobtest.RecordEntries(t, m, *record)
}

// TestRelease: what a program of each release keeps in chunks alone is there, and a list
// of what it has split does no harm.
func TestRelease(t *testing.T) {
	blobtest.EachRelease(t, func(t *testing.T, restore func(blob.Entries)) {
		s, m, d, _ := newRecorded(t)
		restore(m)
		kept, split := recordedBlobs()
		if missing, err := m.FindMissing(t.Context(), []digest.Digest{d}); err != nil || len(missing) != 1 {
			t.Fatalf("the blob is there whole: missing %v, %v", missing, err)
		}
		wantBlob(t, s, d, kept)
		// Its chunks have gone since, so it is split anew.
		whole := digest.Of(digest.SHA256, split)
		l, err := s.Split(t.Context(), whole, blob.ChunkFastCDC2020)
		if err != nil || len(l.Chunks) < 10 {
			t.Errorf("what was split has %d chunks, %v", len(l.Chunks), err)
		}
	})
}
