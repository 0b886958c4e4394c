package action_test

import (
	"testing"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/blobtest"
	"github.com/mettle-build/mettle/elan/blob/mem"
	"github.com/mettle-build/mettle/elan/digest"
)

// fakeStore is a store in memory that counts what it is asked, and fails when it
// is told to. What tests do behind its back is neither counted nor fails.
type fakeStore struct {
	*blobtest.Watched
	t   testing.TB
	mem *mem.Store
}

func newFakeStore(t testing.TB) *fakeStore {
	t.Helper()
	s, err := mem.New(mem.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return &fakeStore{Watched: blobtest.Watch(s), t: t, mem: s}
}

func (s *fakeStore) put(data []byte) digest.Digest {
	s.t.Helper()
	d, err := blob.PutBytes(s.t.Context(), s.mem, digest.SHA256, data)
	if err != nil {
		s.t.Fatal(err)
	}
	return d
}

func (s *fakeStore) remove(d digest.Digest) {
	s.t.Helper()
	if err := s.mem.Remove(s.t.Context(), d); err != nil {
		s.t.Fatal(err)
	}
}

// entries is how many there are.
func (s *fakeStore) entries() (n int) {
	s.t.Helper()
	for _, err := range s.mem.EntryInfos(s.t.Context()) {
		if err != nil {
			s.t.Fatal(err)
		}
		n++
	}
	return n
}

// bytes are those of the blob d, "" where it is not there.
func (s *fakeStore) bytes(d digest.Digest) string {
	data, err := blob.ReadAll(s.t.Context(), s.mem, d, 1<<20)
	if err != nil {
		return ""
	}
	return string(data)
}
