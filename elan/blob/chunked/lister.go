package chunked

import (
	"context"
	"errors"
	"fmt"
	"iter"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// The abilities of those who look after a store. Where the store inside lacks one
// that is needed, the error wraps errors.ErrUnsupported.
var (
	_ blob.Lister      = (*Store)(nil)
	_ blob.EntryLister = (*Store)(nil)
	_ blob.Remover     = (*Store)(nil)
)

func unsupported(what string) error {
	return fmt.Errorf("%s: the store inside can't: %w", what, errors.ErrUnsupported)
}

// Blobs implements blob.Lister: the blobs inside, chunks among them, and those
// that are kept in chunks alone, which take what their lists take. They are
// listed even where a chunk is missing; the chunks' own lines tell.
func (s *Store) Blobs(ctx context.Context) iter.Seq2[blob.Info, error] {
	return func(yield func(blob.Info, error) bool) {
		lister, ok := blob.As[blob.Lister](s.Store)
		entries, ok2 := blob.As[blob.EntryLister](s.entries)
		if !ok || !ok2 {
			yield(blob.Info{}, unsupported("list blobs"))
			return
		}
		lists := map[digest.Digest]blob.EntryInfo{}
		for e, err := range entries.EntryInfos(ctx) {
			if err != nil {
				yield(blob.Info{}, err)
				return
			}
			if d, ok := keptBlob(e.Key); ok {
				lists[d] = e
			}
		}
		for info, err := range lister.Blobs(ctx) {
			delete(lists, info.Digest) // it is there as a whole too
			if !yield(info, err) || err != nil {
				return
			}
		}
		for d, e := range lists {
			if !yield(blob.Info{Digest: d, StoredBytes: e.Bytes, LastUse: e.LastUse}, nil) {
				return
			}
		}
	}
}

// EntryInfos implements blob.EntryLister. It does not list lists.
func (s *Store) EntryInfos(ctx context.Context) iter.Seq2[blob.EntryInfo, error] {
	return func(yield func(blob.EntryInfo, error) bool) {
		entries, ok := blob.As[blob.EntryLister](s.entries)
		if !ok {
			yield(blob.EntryInfo{}, unsupported("list entries"))
			return
		}
		for e, err := range entries.EntryInfos(ctx) {
			if err == nil && isReserved(e.Key) {
				continue
			}
			if !yield(e, err) || err != nil {
				return
			}
		}
	}
}

// Remove implements blob.Remover: of a blob that is kept in chunks it removes the
// list, and leaves the chunks, which others may share.
func (s *Store) Remove(ctx context.Context, d digest.Digest) error {
	remover, ok := blob.As[blob.Remover](s.Store)
	if !ok {
		return unsupported("remove blob")
	}
	_, err := s.kept(ctx, d)
	if err != nil && !errors.Is(err, blob.ErrNotFound) {
		return err
	}
	isKept := err == nil
	if s.mayBeKept(d) {
		for _, k := range []blob.EntryKey{keptKey(d), splitKey(d, blob.ChunkFastCDC2020), splitKey(d, blob.ChunkRepMaxCDC)} {
			if err := s.entries.DeleteEntry(ctx, k); err != nil {
				return fmt.Errorf("remove chunks of %s: %w", d, err)
			}
		}
	}
	if err := remover.Remove(ctx, d); err != nil && (!isKept || !errors.Is(err, blob.ErrNotFound)) {
		return err //nolint:wrapcheck // the store's own words
	}
	return nil
}

// Stat implements blob.Statter.
func (s *Store) Stat(ctx context.Context, d digest.Digest) (blob.Info, error) {
	statter, ok := blob.As[blob.Statter](s.Store)
	if !ok {
		return blob.Info{}, unsupported("stat blob")
	}
	info, err := statter.Stat(ctx, d)
	if err == nil || !errors.Is(err, blob.ErrNotFound) || !s.mayBeKept(d) {
		return info, err //nolint:wrapcheck // the store's own words
	}
	entries, ok := blob.As[blob.EntryStatter](s.entries)
	if !ok {
		return info, unsupported("stat list of chunks")
	}
	e, eerr := entries.StatEntry(ctx, keptKey(d))
	if errors.Is(eerr, blob.ErrNotFound) {
		return info, err //nolint:wrapcheck // as above
	}
	return blob.Info{Digest: d, StoredBytes: e.Bytes, LastUse: e.LastUse}, eerr //nolint:wrapcheck // as above
}

// StatEntry implements blob.EntryStatter.
func (s *Store) StatEntry(ctx context.Context, k blob.EntryKey) (blob.EntryInfo, error) {
	entries, ok := blob.As[blob.EntryStatter](s.entries)
	switch {
	case !ok:
		return blob.EntryInfo{}, unsupported("stat entry")
	case isReserved(k):
		return blob.EntryInfo{}, fmt.Errorf("stat entry %s: %w", k.Action, blob.ErrNotFound)
	}
	return entries.StatEntry(ctx, k) //nolint:wrapcheck // the store's own words
}

// Check implements blob.Checker. Of a blob that is kept in chunks it checks them:
// that they are the blob has been seen when it was spliced. Where the store inside
// is no Checker, the blob is read, which starts its lifetime anew, and stays
// whatever comes of it.
func (s *Store) Check(ctx context.Context, d digest.Digest) error {
	checker, ok := blob.As[blob.Checker](s.Store)
	if !ok {
		return s.compare(ctx, d)
	}
	err := checker.Check(ctx, d)
	if err == nil || !errors.Is(err, blob.ErrNotFound) {
		return err //nolint:wrapcheck // the store's own words
	}
	l, lerr := s.kept(ctx, d)
	if lerr != nil {
		if errors.Is(lerr, blob.ErrNotFound) {
			return err //nolint:wrapcheck // as above
		}
		return lerr
	}
	for _, c := range l.Chunks {
		if err := checker.Check(ctx, c); err != nil {
			return fmt.Errorf("chunk of %s: %w", d, err)
		}
	}
	return nil
}

// compare reads d, and compares it with its digest.
func (s *Store) compare(ctx context.Context, d digest.Digest) error {
	r, err := s.Open(ctx, d, 0)
	if err != nil {
		return err
	}
	defer r.Close() //nolint:errcheck // opened for reading
	return verify(r, d)
}
