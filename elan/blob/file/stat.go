package file

import (
	"context"
	"fmt"
	"path/filepath"

	"github.com/mettle-build/mettle/elan/blob"
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
	path := s.blobPath(d, blob.LinkRegular)
	folderPath, name := filepath.Split(path)
	info, ok := s.info(folder{path: folderPath, fn: d.Function(), cas: true}, name)
	if !ok {
		return blob.Info{}, s.absent(d.Function(), path)
	}
	return info, nil
}

// StatEntry implements blob.EntryStatter: it reads the entry, and leaves its last
// use as it was.
func (s *Store) StatEntry(ctx context.Context, k blob.EntryKey) (blob.EntryInfo, error) {
	if err := s.listable(ctx, k.Action); err != nil {
		return blob.EntryInfo{}, fmt.Errorf("stat entry %s: %w", k.Action, err)
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
