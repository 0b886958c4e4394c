package tiered

import (
	"context"
	"errors"
	"fmt"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// maxTreeBytes bounds the Directories that are taken of one tree: those of some
// million files. What is beyond is fetched as any blob.
const maxTreeBytes = 64 << 20

var errTreeTooLarge = errors.New("the tree is too large to be fetched by one call")

// FetchTree implements blob.TreeFetcher. An error of the authority is none of the
// caller's: its Directories are then fetched as any blob.
func (l local) FetchTree(ctx context.Context, root digest.Digest, some []digest.Digest, wanted func(d digest.Digest, data []byte) bool) error {
	if l.t == nil {
		return nil
	}
	reader, ok := l.s.authority.(blob.TreeReader)
	if !ok {
		return nil
	}
	s := l.s
	s.mu.Lock()
	if f, ok := s.trees[root]; ok {
		s.mu.Unlock()
		select {
		case <-f:
			return nil
		case <-ctx.Done():
			return ctx.Err() //nolint:wrapcheck // as it is
		}
	}
	if len(some) == 0 {
		s.mu.Unlock()
		return nil
	}
	f := make(chan struct{})
	s.trees[root] = f
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.trees, root)
		s.mu.Unlock()
		close(f)
	}()
	absent, err := l.t.Store.FindMissing(ctx, some)
	if err == nil && len(absent) == len(some) {
		err = l.fetchTree(ctx, reader, root, wanted)
	}
	if ctx.Err() != nil {
		return ctx.Err() //nolint:wrapcheck // as it is
	}
	if err != nil {
		s.log.Debug("a tree was not fetched by one call", "root", root, "error", err)
	}
	return nil
}

func (l local) fetchTree(ctx context.Context, reader blob.TreeReader, root digest.Digest, wanted func(d digest.Digest, data []byte) bool) error {
	total := int64(0)
	err := reader.ReadTree(ctx, root, func(data []byte) error {
		if total += int64(len(data)); total > maxTreeBytes {
			return errTreeTooLarge
		}
		d := digest.Of(root.Function(), data).In(root.Space())
		if d.IsEmpty() || !wanted(d, data) || !l.t.takes(d) {
			return nil
		}
		err := blob.WriteBytes(ctx, l.t.Store, d, data)
		l.s.metrics.fill(l.t.Name, err)
		if err != nil {
			return fmt.Errorf("tier %s: %w", l.t.Name, err)
		}
		return nil
	})
	if errors.Is(err, errors.ErrUnsupported) {
		return nil
	}
	return err //nolint:wrapcheck // it says of what
}
