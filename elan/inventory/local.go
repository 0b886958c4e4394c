package inventory

import (
	"context"
	"errors"
	"fmt"
	"iter"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// Options are those of NewLocal.
type Options struct {
	// Store has the blobs, and those abilities of elan/blob by which it can be
	// looked after: blob.As finds them.
	Store blob.Store
	// Entries has the entries, and the abilities that concern them. nil: those
	// calls are not supported.
	Entries blob.Entries
}

// Local is the Inventory of a store in this process.
type Local struct {
	store   blob.Store
	entries blob.Entries
}

var _ Inventory = (*Local)(nil)

// NewLocal returns the Inventory of a store, which the caller closes.
func NewLocal(o Options) (*Local, error) {
	if o.Store == nil {
		return nil, errors.New("inventory: Options need a Store")
	}
	return &Local{store: o.Store, entries: o.Entries}, nil
}

// Blobs implements Lister.
func (l *Local) Blobs(ctx context.Context, f Filter) iter.Seq2[blob.Info, error] {
	lister, ok := blob.As[blob.Lister](l.store)
	if !ok {
		return failing[blob.Info](fmt.Errorf("list blobs: %w", ErrUnsupported))
	}
	return filtered(lister.Blobs(ctx), f.Blob)
}

// Entries implements Lister.
func (l *Local) Entries(ctx context.Context, f Filter) iter.Seq2[blob.EntryInfo, error] {
	lister, ok := blob.As[blob.EntryLister](l.entries)
	if !ok {
		return failing[blob.EntryInfo](fmt.Errorf("list entries: %w", ErrUnsupported))
	}
	return filtered(lister.EntryInfos(ctx), f.Entry)
}

// failing is an enumeration that ends with err at once.
func failing[T any](err error) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		var none T
		yield(none, err)
	}
}

// filtered passes on what fulfils keep, and the error at the end.
func filtered[T any](all iter.Seq2[T, error], keep func(T) bool) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		for t, err := range all {
			if err != nil {
				yield(t, err)
				return
			}
			if keep(t) && !yield(t, nil) {
				return
			}
		}
	}
}

// Stat implements Statter. Of a store that can't tell of a single blob it
// lists all, which takes its time.
func (l *Local) Stat(ctx context.Context, ds []digest.Digest) ([]blob.Info, error) {
	if s, ok := blob.As[blob.Statter](l.store); ok {
		return each(ctx, ds, s.Stat)
	}
	return pick(l.Blobs(ctx, Filter{}), ds, func(i blob.Info) digest.Digest { return i.Digest })
}

// StatEntries implements Statter, as Stat does.
func (l *Local) StatEntries(ctx context.Context, ks []blob.EntryKey) ([]blob.EntryInfo, error) {
	if s, ok := blob.As[blob.EntryStatter](l.entries); ok {
		return each(ctx, ks, s.StatEntry)
	}
	return pick(l.Entries(ctx, Filter{}), ks, func(i blob.EntryInfo) blob.EntryKey { return i.Key })
}

// each gathers what stat tells of keys, without those that are not there.
func each[K, T any](ctx context.Context, keys []K, stat func(context.Context, K) (T, error)) ([]T, error) {
	var found []T
	for _, k := range keys {
		t, err := stat(ctx, k)
		if errors.Is(err, blob.ErrNotFound) {
			continue
		}
		if err != nil {
			return nil, err
		}
		found = append(found, t)
	}
	return found, nil
}

// pick gathers those of all whose keys are asked for, in the order of keys.
func pick[K comparable, T any](all iter.Seq2[T, error], keys []K, key func(T) K) ([]T, error) {
	wanted := make(map[K]*T, len(keys))
	for _, k := range keys {
		wanted[k] = nil
	}
	due := len(wanted)
	for t, err := range all {
		if err != nil {
			return nil, err
		}
		if p, ok := wanted[key(t)]; !ok || p != nil {
			continue
		}
		wanted[key(t)] = &t
		if due--; due == 0 {
			break
		}
	}
	var found []T
	for _, k := range keys {
		if t := wanted[k]; t != nil {
			found = append(found, *t)
		}
	}
	return found, nil
}

// Remove implements Remover.
func (l *Local) Remove(ctx context.Context, ds []digest.Digest) ([]digest.Digest, error) {
	r, ok := blob.As[blob.Remover](l.store)
	if !ok {
		return nil, fmt.Errorf("remove blobs: %w", ErrUnsupported)
	}
	var absent []digest.Digest
	for _, d := range ds {
		err := r.Remove(ctx, d)
		if errors.Is(err, blob.ErrNotFound) {
			absent = append(absent, d)
			continue
		}
		if err != nil {
			return absent, err
		}
	}
	return absent, nil
}

// RemoveEntries implements Remover.
func (l *Local) RemoveEntries(ctx context.Context, ks []blob.EntryKey) ([]blob.EntryKey, error) {
	if l.entries == nil {
		return nil, fmt.Errorf("remove entries: %w", ErrUnsupported)
	}
	var absent []blob.EntryKey
	for _, k := range ks {
		// That an entry is not there is no error of DeleteEntry.
		_, err := l.entries.Entry(ctx, k)
		if errors.Is(err, blob.ErrNotFound) {
			absent = append(absent, k)
			continue
		}
		if err == nil {
			err = l.entries.DeleteEntry(ctx, k)
		}
		if err != nil {
			return absent, err
		}
	}
	return absent, nil
}
