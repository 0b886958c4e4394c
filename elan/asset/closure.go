package asset

import (
	"context"
	"errors"
	"fmt"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/tree"
)

const (
	// findBatch is how many blobs are looked up at once. What waits to be looked up
	// takes some 100 bytes each.
	findBatch = 20_000
	// maxMissing bounds what an error names.
	maxMissing = 1000
)

// missing returns blobs that are not in the store, of those given and of all below
// the directories given: some of them, where there are many. The lifetimes of the
// others start anew.
func missing(ctx context.Context, store blob.Store, files, dirs []digest.Digest) ([]digest.Digest, error) {
	f := &finder{store: store}
	for _, d := range files {
		if err := f.add(ctx, d); err != nil {
			return nil, err
		}
	}
	for _, d := range dirs {
		if err := f.addTree(ctx, d); err != nil {
			return nil, err
		}
	}
	return f.gone, f.flush(ctx)
}

// finder looks many blobs up, a batch at a time.
type finder struct {
	store blob.Store
	due   []digest.Digest
	gone  []digest.Digest
}

func (f *finder) add(ctx context.Context, d digest.Digest) error {
	if d.IsEmpty() {
		return nil
	}
	if f.due = append(f.due, d); len(f.due) < findBatch {
		return nil
	}
	return f.flush(ctx)
}

func (f *finder) flush(ctx context.Context) error {
	if len(f.due) == 0 {
		return nil
	}
	gone, err := f.store.FindMissing(ctx, f.due)
	if err != nil {
		return fmt.Errorf("look up what an asset refers to: %w", err)
	}
	f.due = f.due[:0]
	f.miss(gone...)
	return nil
}

func (f *finder) miss(ds ...digest.Digest) {
	f.gone = append(f.gone, ds[:min(len(ds), maxMissing-len(f.gone))]...)
}

// addTree adds root and all that is below it.
func (f *finder) addTree(ctx context.Context, root digest.Digest) error {
	if root.IsEmpty() {
		return nil
	}
	w := tree.Walk{Opener: f.store, Missing: func(d digest.Digest) { f.miss(d) }}
	err := w.Each(ctx, root, func(d digest.Digest, dir *repb.Directory) error {
		// Reading a Directory has started its lifetime anew.
		for _, file := range dir.Files {
			fd, err := digest.FromProto(d.Function(), file.Digest)
			if err != nil {
				return fmt.Errorf("directory %s: %w", d, err)
			}
			if err := f.add(ctx, fd); err != nil {
				return err
			}
		}
		return nil
	})
	if errors.Is(err, blob.ErrNotFound) {
		f.miss(root)
		return nil
	}
	return err
}
