package file

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/file/pack"
	"github.com/mettle-build/mettle/elan/digest"
)

var (
	_ blob.Statter      = (*Store)(nil)
	_ blob.EntryStatter = (*Store)(nil)
)

// Stat implements blob.Statter: newfstatat of the file and of its executable
// twin. While a recovery goes on it fails as Blobs does.
func (s *Store) Stat(ctx context.Context, d digest.Digest) (blob.Info, error) {
	info, err := s.stat(ctx, d)
	if err != nil {
		return blob.Info{}, fmt.Errorf("stat blob %s: %w", d, err)
	}
	return info, nil
}

func (s *Store) stat(ctx context.Context, d digest.Digest) (blob.Info, error) {
	if err := s.listable(ctx, d); err != nil || d.IsEmpty() {
		return blob.Info{Digest: d}, err
	}
	if s.mayBePacked(d) {
		i, err := s.peekPacked(ctx, d)
		if err == nil {
			return blob.Info{Digest: d, StoredBytes: i.Bytes + s.twinBytes(d), LastUse: i.LastUse}, nil
		}
		if !errors.Is(err, blob.ErrNotFound) || s.onlyPacked(d) {
			return blob.Info{}, err
		}
	}
	path := s.blobPath(d, blob.LinkRegular)
	folderPath, name := filepath.Split(path)
	info, ok := s.info(folder{path: folderPath, fn: d.Function(), cas: true}, name)
	if !ok {
		return blob.Info{}, s.absent(d.Function(), path)
	}
	return info, nil
}

// peekPacked reads the record of d without using it. Where it is damaged, it is
// withdrawn, and not found.
func (s *Store) peekPacked(ctx context.Context, d digest.Digest) (pack.Info, error) {
	var buf keyBuffer
	i, err := s.packed.store.Peek(ctx, appendBlobKey(buf[:0], d))
	if errors.Is(err, blob.ErrCorrupt) {
		err = fmt.Errorf("%w: %w", blob.ErrNotFound, err)
	}
	return i, err
}

// StatEntry implements blob.EntryStatter: it reads the entry, and leaves its last
// use as it was.
func (s *Store) StatEntry(ctx context.Context, k blob.EntryKey) (blob.EntryInfo, error) {
	if err := s.listable(ctx, k.Action); err != nil {
		return blob.EntryInfo{}, fmt.Errorf("stat entry %s: %w", k.Action, err)
	}
	if s.packed.store != nil {
		var buf keyBuffer
		i, err := s.packed.store.Peek(ctx, appendEntryKey(buf[:0], k))
		if err == nil {
			if info, ok := packedEntryInfo(i); ok && info.Key == k {
				return info, nil
			}
		} else if !errors.Is(err, blob.ErrNotFound) && !errors.Is(err, blob.ErrCorrupt) {
			return blob.EntryInfo{}, fmt.Errorf("stat entry %s: %w", k.Action, err)
		}
	}
	path := s.entryPath(k)
	folderPath, name := filepath.Split(path)
	info, ok := entryInfo(folder{path: folderPath, fn: k.Action.Function()}, name)
	if !ok || info.Key != k {
		return blob.EntryInfo{}, fmt.Errorf("stat entry %s: %w", k.Action, s.absent(k.Action.Function(), path))
	}
	return info, nil
}

// listable is check for those who ask from outside, and must not be told that
// something is missing which waits for being verified.
func (s *Store) listable(ctx context.Context, d digest.Digest) error {
	err := s.check(ctx, d)
	if err == nil && s.recovery.active.Load() {
		return fmt.Errorf("%w: blobs are being verified after a crash of the machine", blob.ErrUnavailable)
	}
	return err
}
