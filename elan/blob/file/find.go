package file

import (
	"context"
	"errors"
	"fmt"
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
	var seen map[digest.Digest]struct{}
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
		if there {
			continue
		}
		if seen == nil {
			seen = make(map[digest.Digest]struct{})
		}
		if _, again := seen[d]; !again {
			seen[d] = struct{}{}
			missing = append(missing, d)
		}
	}
	// Where a folder is there after the look into it, it was so before.
	for folder := range folders {
		if err := checkFolder(folder); err != nil {
			return nil, fmt.Errorf("find %d blobs: %w", len(ds), err)
		}
	}
	return missing, nil
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
