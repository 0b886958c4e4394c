package file

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"math/bits"
	"path/filepath"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// FindMissing implements blob.Finder: nothing for a small blob, and for a large
// one newfstatat, and at most
// once in touchEvery, for each that is there, utimensat; at the end newfstatat
// of each folder in which one was not there.
func (s *Store) FindMissing(ctx context.Context, ds []digest.Digest) ([]digest.Digest, error) {
	var missing []digest.Digest
	folders := map[string]struct{}{}
	for _, d := range ds {
		if err := s.check(ctx, d); err != nil {
			return nil, fmt.Errorf("find blob %s: %w", d, err)
		}
		if d.IsEmpty() {
			continue
		}
		there, mayBeFile, err := s.findPacked(ctx, d)
		if err == nil && mayBeFile {
			there, err = s.find(ctx, d, folders)
		}
		if err != nil {
			return nil, fmt.Errorf("find blob %s: %w", d, err)
		}
		if !there {
			missing = append(missing, d)
		}
	}
	// Where a folder is there after the look into it, it was so before.
	for folder := range folders {
		if err := checkFolder(folder); err != nil {
			return nil, fmt.Errorf("find %d blobs: %w", len(ds), err)
		}
	}
	return unique(missing), nil
}

// unique drops what was mentioned before. It changes ds. Where all of 20,000 are
// missing, a map would take half of the time of the call.
func unique(ds []digest.Digest) []digest.Digest {
	if len(ds) < 2 {
		return ds
	}
	seed := maphash.MakeSeed()
	mask := uint64(1)<<bits.Len(uint(len(ds))) - 1 //nolint:gosec // not negative
	mask = mask<<1 | 1                             // at most half of the places are taken
	seen := make([]int32, mask+1)                  // by hash: the place in once, from 1
	once := ds[:0]
	for _, d := range ds {
		i := maphash.Comparable(seed, d) & mask
		for seen[i] != 0 && once[seen[i]-1] != d {
			i = (i + 1) & mask
		}
		if seen[i] == 0 {
			once = append(once, d)
			seen[i] = int32(len(once)) //nolint:gosec // requests are far smaller
		}
	}
	return once
}

// find is use for one blob of many: it leaves it to the caller to check that the
// folders of those that are not there are, and adds them to folders.
func (s *Store) find(ctx context.Context, d digest.Digest, folders map[string]struct{}) (bool, error) {
	path := s.blobPath(d, blob.LinkRegular)
	switch s.look(path, d.Size(), regularPerm) {
	case lookGood:
		return true, nil
	case lookNothing:
		if s.prepared[d.Function()].Load() {
			folders[filepath.Dir(path)] = struct{}{}
		}
		return false, nil
	}
	err := s.use(ctx, d, blob.LinkRegular)
	if errors.Is(err, blob.ErrNotFound) {
		return false, nil
	}
	return err == nil, err
}
