package mem

import (
	"context"
	"errors"
	"fmt"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

var (
	_ blob.Statter      = (*Store)(nil)
	_ blob.EntryStatter = (*Store)(nil)
	_ blob.Checker      = (*Store)(nil)
)

// Stat implements blob.Statter.
func (s *Store) Stat(ctx context.Context, d digest.Digest) (blob.Info, error) {
	if err := checkCall(ctx, d); err != nil {
		return blob.Info{}, fmt.Errorf("stat blob %s: %w", d, err)
	}
	it, ok := s.peek(d)
	if !ok && !d.IsEmpty() {
		return blob.Info{}, fmt.Errorf("stat blob %s: %w", d, blob.ErrNotFound)
	}
	if !ok {
		return blob.Info{Digest: d}, nil
	}
	return blob.Info{Digest: d, StoredBytes: it.cost(), LastUse: it.used}, nil
}

// StatEntry implements blob.EntryStatter.
func (s *Store) StatEntry(ctx context.Context, k blob.EntryKey) (blob.EntryInfo, error) {
	if err := checkCall(ctx, k.Action); err != nil {
		return blob.EntryInfo{}, fmt.Errorf("stat entry %s: %w", k.Action, err)
	}
	it, ok := s.peek(k)
	if !ok {
		return blob.EntryInfo{}, fmt.Errorf("stat entry %s: %w", k.Action, blob.ErrNotFound)
	}
	return blob.EntryInfo{Key: k, Bytes: int64(len(it.data)), LastUse: it.used}, nil
}

// Check implements blob.Checker.
func (s *Store) Check(ctx context.Context, d digest.Digest) error {
	if err := checkCall(ctx, d); err != nil {
		return fmt.Errorf("check blob %s: %w", d, err)
	}
	it, ok := s.peek(d)
	switch {
	case d.IsEmpty():
		return nil
	case s.containers:
		return fmt.Errorf("check blob %s: %w: it is in a container", d, errors.ErrUnsupported)
	case !ok:
		return fmt.Errorf("check blob %s: %w", d, blob.ErrNotFound)
	}
	got := digest.Of(d.Function(), it.data)
	if got == d.Plain() {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if e, ok := s.items[d]; ok {
		s.remove(e)
	}
	return fmt.Errorf("check blob %s: %w: its bytes have digest %s", d, blob.ErrCorrupt, got)
}
