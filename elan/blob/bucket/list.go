package bucket

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"strings"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

var (
	_ blob.Lister      = (*Store)(nil)
	_ blob.Remover     = (*Store)(nil)
	_ blob.EntryLister = (*Store)(nil)
)

// Blobs implements blob.Lister: one request for each 1,000 objects. It tells
// also of those that count as missing because they are close to their end.
func (s *Store) Blobs(ctx context.Context) iter.Seq2[blob.Info, error] {
	return func(yield func(blob.Info, error) bool) {
		err := s.list(ctx, s.folder(), func(name string, o Object) bool {
			d, ok := parseDigest(name)
			return !ok || yield(blob.Info{Digest: d, StoredBytes: o.SizeBytes, LastUse: o.Used}, nil)
		})
		if err != nil {
			yield(blob.Info{}, fmt.Errorf("list blobs: %w", err))
		}
	}
}

// EntryInfos implements blob.EntryLister: one request for each 1,000 objects.
// Entries of instances whose names have over 190 bytes are left out: the
// objects' names tell no more than a hash of them.
func (s *Store) EntryInfos(ctx context.Context) iter.Seq2[blob.EntryInfo, error] {
	return func(yield func(blob.EntryInfo, error) bool) {
		err := s.list(ctx, "ac/", func(name string, o Object) bool {
			k, ok := parseEntryName(name)
			return !ok || yield(blob.EntryInfo{Key: k, Bytes: o.SizeBytes, LastUse: o.Used}, nil)
		})
		if err != nil {
			yield(blob.EntryInfo{}, fmt.Errorf("list entries: %w", err))
		}
	}
}

// list calls visit with each object in a folder, and its name in there, until
// visit returns false.
func (s *Store) list(ctx context.Context, folder string, visit func(name string, o Object) bool) error {
	folder = s.prefix + folder
	for token := ""; ; {
		if err := s.check(ctx, digest.Empty(digest.SHA256)); err != nil {
			return err
		}
		var page []Object
		var next string
		err := s.try(ctx, "list", func(ctx context.Context) (err error) {
			page, next, err = s.driver.List(ctx, folder, token)
			return err
		})
		if err != nil {
			return err
		}
		for _, o := range page {
			if !visit(strings.TrimPrefix(o.Name, folder), o) {
				return nil
			}
		}
		if next == "" {
			return nil
		}
		token = next
	}
}

// parseEntryName reads what entryName writes, after the prefix and ac/.
func parseEntryName(name string) (blob.EntryKey, bool) {
	part, rest, ok := strings.Cut(name, "/")
	instance, known := parseInstance(part)
	action, valid := parseDigest(rest)
	return blob.EntryKey{Instance: instance, Action: action}, ok && known && valid
}

// Remove implements blob.Remover: two requests, as S3 does not tell whether
// there was something to delete.
func (s *Store) Remove(ctx context.Context, d digest.Digest) error {
	if err := s.remove(ctx, d); err != nil {
		return fmt.Errorf("remove blob %s: %w", d, err)
	}
	return nil
}

func (s *Store) remove(ctx context.Context, d digest.Digest) error {
	if err := s.check(ctx, d); err != nil {
		return err
	}
	name := s.blobName(d)
	st, err := s.statOne(ctx, name)
	switch {
	case err != nil:
		return err
	case !st.Exists:
		return blob.ErrNotFound
	}
	err = s.try(ctx, "delete", func(ctx context.Context) error { return s.driver.Delete(ctx, name) })
	s.touches.forget(name)
	if errors.Is(err, blob.ErrNotFound) {
		return nil // by an attempt whose answer was lost, or by somebody else
	}
	return err
}
