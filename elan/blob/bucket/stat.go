package bucket

import (
	"context"
	"fmt"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

var (
	_ blob.Statter      = (*Store)(nil)
	_ blob.EntryStatter = (*Store)(nil)
)

// Stat implements blob.Statter: one request. It tells also of a blob that counts
// as missing because it is close to its end.
func (s *Store) Stat(ctx context.Context, d digest.Digest) (blob.Info, error) {
	info, err := s.statBlob(ctx, d)
	if err != nil {
		return blob.Info{}, fmt.Errorf("stat blob %s: %w", d, err)
	}
	return info, nil
}

func (s *Store) statBlob(ctx context.Context, d digest.Digest) (blob.Info, error) {
	if err := s.check(ctx, d); err != nil || d.IsEmpty() {
		return blob.Info{Digest: d}, err
	}
	st, err := s.statOne(ctx, s.blobName(d))
	switch {
	case err != nil:
		return blob.Info{}, err
	case !st.Exists:
		return blob.Info{}, blob.ErrNotFound
	}
	return blob.Info{Digest: d, StoredBytes: st.SizeBytes, LastUse: st.Used}, nil
}

// StatEntry implements blob.EntryStatter: one request.
func (s *Store) StatEntry(ctx context.Context, k blob.EntryKey) (blob.EntryInfo, error) {
	err := s.check(ctx, k.Action)
	var st Stat
	if err == nil {
		st, err = s.statOne(ctx, s.entryName(k))
	}
	if err == nil && !st.Exists {
		err = blob.ErrNotFound
	}
	if err != nil {
		return blob.EntryInfo{}, fmt.Errorf("stat entry %s: %w", k.Action, err)
	}
	return blob.EntryInfo{Key: k, Bytes: st.SizeBytes, LastUse: st.Used}, nil
}
