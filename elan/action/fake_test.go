package action_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"sync"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// fakeStore is a store in a map that counts what it is asked, and fails when it
// is told to.
type fakeStore struct {
	mu      sync.Mutex
	blobs   map[digest.Digest][]byte
	entries map[blob.EntryKey][]byte

	finds int   // calls of FindMissing
	err   error // of all calls, if it is set
}

func newFakeStore() *fakeStore {
	return &fakeStore{blobs: map[digest.Digest][]byte{}, entries: map[blob.EntryKey][]byte{}}
}

func (s *fakeStore) put(data []byte) digest.Digest {
	d := digest.Of(digest.SHA256, data)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.blobs[d] = data
	return d
}

func (s *fakeStore) remove(d digest.Digest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.blobs, d)
}

func (s *fakeStore) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.err = err
}

func (s *fakeStore) FindMissing(_ context.Context, ds []digest.Digest) ([]digest.Digest, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.finds++
	if s.err != nil {
		return nil, s.err
	}
	var missing []digest.Digest
	seen := map[digest.Digest]bool{}
	for _, d := range ds {
		if _, ok := s.blobs[d]; !ok && !seen[d] && !d.IsEmpty() {
			missing = append(missing, d)
		}
		seen[d] = true
	}
	return missing, nil
}

func (s *fakeStore) Open(_ context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return nil, s.err
	}
	data, ok := s.blobs[d]
	if !ok && !d.IsEmpty() {
		return nil, fmt.Errorf("fake: %w", blob.ErrNotFound)
	}
	return io.NopCloser(bytes.NewReader(data[offset:])), nil
}

func (s *fakeStore) Create(ctx context.Context, d digest.Digest) (blob.Writer, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return nil, s.err
	}
	return &fakeWriter{ctx: ctx, s: s, d: d}, nil
}

type fakeWriter struct {
	bytes.Buffer
	ctx context.Context //nolint:containedctx // to see that it bounds the writing
	s   *fakeStore
	d   digest.Digest
}

func (w *fakeWriter) Commit() error {
	if err := w.ctx.Err(); err != nil {
		return err
	}
	w.s.mu.Lock()
	defer w.s.mu.Unlock()
	w.s.blobs[w.d] = bytes.Clone(w.Bytes())
	return nil
}

func (w *fakeWriter) Close() error { return nil }

func (s *fakeStore) Entry(_ context.Context, k blob.EntryKey) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return nil, s.err
	}
	v, ok := s.entries[k]
	if !ok {
		return nil, fmt.Errorf("fake: %w", blob.ErrNotFound)
	}
	return bytes.Clone(v), nil
}

func (s *fakeStore) PutEntry(_ context.Context, k blob.EntryKey, value []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return s.err
	}
	s.entries[k] = bytes.Clone(value)
	return nil
}

func (s *fakeStore) DeleteEntry(_ context.Context, k blob.EntryKey) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return s.err
	}
	delete(s.entries, k)
	return nil
}
