package mem

import (
	"context"
	"fmt"
	"iter"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

var (
	_ blob.Lister      = (*Store)(nil)
	_ blob.Remover     = (*Store)(nil)
	_ blob.EntryLister = (*Store)(nil)
)

// Blobs implements blob.Lister. It holds the digests of all blobs meanwhile.
func (s *Store) Blobs(ctx context.Context) iter.Seq2[blob.Info, error] {
	return func(yield func(blob.Info, error) bool) {
		for _, d := range keys[digest.Digest](s) {
			if err := ctx.Err(); err != nil {
				yield(blob.Info{}, fmt.Errorf("list blobs: %w", err))
				return
			}
			it, ok := s.peek(d)
			if ok && !yield(blob.Info{Digest: d, StoredBytes: it.cost(), LastUse: it.used}, nil) {
				return
			}
		}
	}
}

// EntryInfos implements blob.EntryLister.
func (s *Store) EntryInfos(ctx context.Context) iter.Seq2[blob.EntryInfo, error] {
	return func(yield func(blob.EntryInfo, error) bool) {
		for _, k := range keys[blob.EntryKey](s) {
			if err := ctx.Err(); err != nil {
				yield(blob.EntryInfo{}, fmt.Errorf("list entries: %w", err))
				return
			}
			it, ok := s.peek(k)
			if ok && !yield(blob.EntryInfo{Key: k, Bytes: int64(len(it.data)), LastUse: it.used}, nil) {
				return
			}
		}
	}
}

// keys are the keys of that type, of all that is there now.
func keys[K comparable](s *Store) []K {
	s.mu.Lock()
	defer s.mu.Unlock()
	var ks []K
	for key := range s.items {
		if k, ok := key.(K); ok {
			ks = append(ks, k)
		}
	}
	return ks
}

// peek returns the item of key, without beginning its lifetime anew.
func (s *Store) peek(key any) (item, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e, ok := s.items[key]
	if !ok {
		return item{}, false
	}
	return *e.Value.(*item), true
}

// Remove implements blob.Remover. Who has the blob open reads on.
func (s *Store) Remove(ctx context.Context, d digest.Digest) error {
	if err := checkCall(ctx, d); err != nil {
		return fmt.Errorf("remove blob %s: %w", d, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	e, ok := s.items[d]
	if !ok {
		return fmt.Errorf("remove blob %s: %w", d, blob.ErrNotFound)
	}
	s.remove(e)
	return nil
}
