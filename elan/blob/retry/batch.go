package retry

import (
	"context"
	"errors"
	"sync"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// ReadBatch implements blob.BatchReader where the store inside does. What came is
// not read again with what did not.
func (s *Store) ReadBatch(ctx context.Context, ds []digest.Digest, take func(i int, data []byte, err error)) error {
	b, ok := s.Store.(blob.BatchReader)
	if !ok {
		return errors.ErrUnsupported
	}
	left := make([]int, len(ds)) // the numbers of those that did not come
	for i := range left {
		left[i] = i
	}
	return s.r.try(ctx, func() error {
		asked := make([]digest.Digest, len(left))
		for i, n := range left {
			asked[i] = ds[n]
		}
		var mu sync.Mutex // guards came and away
		came := make([]bool, len(left))
		var away error
		err := b.ReadBatch(ctx, asked, func(i int, data []byte, err error) {
			unavailable := errors.Is(err, blob.ErrUnavailable)
			mu.Lock()
			if came[i] = !unavailable; unavailable {
				away = err
			}
			mu.Unlock()
			if !unavailable {
				take(left[i], data, err)
			}
		})
		kept := left[:0]
		for i, n := range left {
			if !came[i] {
				kept = append(kept, n)
			}
		}
		left = kept
		if err == nil {
			err = away
		}
		return err //nolint:wrapcheck // the store's own
	})
}

// ReadTree implements blob.TreeReader where the store inside does. What has come
// before a failure comes again.
func (s *Store) ReadTree(ctx context.Context, root digest.Digest, take func(data []byte) error) error {
	t, ok := s.Store.(blob.TreeReader)
	if !ok {
		return errors.ErrUnsupported
	}
	return s.r.try(ctx, func() error { return t.ReadTree(ctx, root, take) })
}

// WriteBatch implements blob.BatchWriter where the store inside does.
func (s *Store) WriteBatch(ctx context.Context, bs []blob.Bytes) error {
	b, ok := s.Store.(blob.BatchWriter)
	if !ok {
		return errors.ErrUnsupported
	}
	return s.r.try(ctx, func() error { return b.WriteBatch(ctx, bs) })
}
