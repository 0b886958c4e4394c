package bucket

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/mettle-build/mettle/elan/blob"
)

// maxEntryBytes bounds what is read at once. ActionResults with inlined outputs
// stay below the size of a gRPC message, 4 MiB by default.
const maxEntryBytes = 64 << 20

// Entry implements blob.Entries: one request.
func (s *Store) Entry(ctx context.Context, k blob.EntryKey) ([]byte, error) {
	if err := s.check(ctx, k.Action); err != nil {
		return nil, fmt.Errorf("entry %s: %w", k.Action, err)
	}
	var value []byte
	var object Object
	err := s.try(ctx, "get", func(ctx context.Context) (err error) {
		value, object, err = s.getAll(ctx, s.entryName(k))
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("entry %s: %w", k.Action, err)
	}
	s.touches.seen(object)
	return value, nil
}

// getAll is one attempt at reading a whole object.
func (s *Store) getAll(ctx context.Context, name string) ([]byte, Object, error) {
	body, object, err := s.driver.Get(ctx, name, 0)
	if err != nil {
		return nil, Object{}, err
	}
	defer body.Close() //nolint:errcheck // opened for reading
	if object.SizeBytes > maxEntryBytes {
		return nil, Object{}, fmt.Errorf("%w: an entry has at most %d bytes, this one %d", blob.ErrTooLarge, maxEntryBytes, object.SizeBytes)
	}
	value := make([]byte, object.SizeBytes)
	if _, err := io.ReadFull(body, value); err != nil {
		return nil, Object{}, fmt.Errorf("%w: %w", ErrTransient, err)
	}
	if object.CRC32C != nil && CRC32C(value) != *object.CRC32C {
		// Another attempt may show whether it is the bucket or the line.
		return nil, Object{}, fmt.Errorf("%w: the entry's CRC32C is not the bucket's", ErrTransient)
	}
	return value, object, nil
}

// PutEntry implements blob.Entries: one request. It is tried again like all
// others, though nothing tells a second attempt that the first succeeded: the
// value is this call's until it returns, whatever others write meanwhile.
func (s *Store) PutEntry(ctx context.Context, k blob.EntryKey, value []byte) error {
	err := s.check(ctx, k.Action)
	if err == nil && len(value) > maxEntryBytes {
		err = fmt.Errorf("%w: an entry has at most %d bytes", blob.ErrTooLarge, maxEntryBytes)
	}
	if err == nil {
		name := s.entryName(k)
		err = s.try(ctx, "put", func(ctx context.Context) error {
			return written(s.driver.Put(ctx, name, value, Condition{}))
		})
		if err == nil {
			s.touches.fresh(name)
		}
	}
	if err != nil {
		return fmt.Errorf("put entry %s: %w", k.Action, err)
	}
	return nil
}

// DeleteEntry implements blob.Entries: one request.
func (s *Store) DeleteEntry(ctx context.Context, k blob.EntryKey) error {
	err := s.check(ctx, k.Action)
	if err == nil {
		name := s.entryName(k)
		err = s.try(ctx, "delete", func(ctx context.Context) error { return s.driver.Delete(ctx, name) })
		s.touches.forget(name)
	}
	if err != nil && !errors.Is(err, blob.ErrNotFound) {
		return fmt.Errorf("delete entry %s: %w", k.Action, err)
	}
	return nil
}
