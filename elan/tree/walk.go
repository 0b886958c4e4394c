package tree

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"golang.org/x/sync/errgroup"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// The defaults of Walk.
const (
	// defaultMaxDirectories is more than the largest source trees have. What a
	// walk holds grows with it, by some 150 bytes each.
	defaultMaxDirectories = 1 << 20
	// defaultMaxDirectoryBytes lets a Directory fit into a gRPC message of the
	// usual limit, 4 MiB, with room for what is around it.
	defaultMaxDirectoryBytes = 4<<20 - 64<<10
	// defaultReads keeps a remote store busy without flooding it.
	defaultReads = 16
	// batchDirectories and batchBytes bound what is read ahead of visiting.
	batchDirectories = 256
	batchBytes       = 8 << 20
)

// Walk enumerates the Directories below one. The zero value is ready but for
// its Opener.
type Walk struct {
	// Opener holds the Directories.
	Opener blob.Opener
	// MaxDirectories bounds the different Directories of a tree; 0 means a
	// million. With it the depth is bounded too.
	MaxDirectories int
	// MaxDirectoryBytes bounds one Directory; 0 means what a gRPC message holds.
	MaxDirectoryBytes int64
	// Reads is how many Directories are read at once; 0 means 16.
	Reads int
	// Missing, if it is set, is called with each Directory that is not in the
	// store. What lies below it is not visited. The root is never given to it.
	Missing func(digest.Digest)
}

// Each calls visit with root and all Directories below it, each once however
// many refer to it, parents before children, in an order that depends on the
// tree alone. Visit may keep the Directory. An error of visit ends the walk and
// comes back as it is.
//
// Where root is not in the store, the error wraps blob.ErrNotFound. One about a
// Directory that is malformed wraps ErrInvalid or blob.ErrMalformed, one about a
// tree or a Directory over a limit blob.ErrTooLarge. Each has several blobs open
// at a time, and returns after all of them are closed.
func (w Walk) Each(ctx context.Context, root digest.Digest, visit func(digest.Digest, *repb.Directory) error) error {
	return w.each(ctx, root, decode, func(d digest.Digest, dir directory) error { return visit(d, dir.dir) })
}

// EachEncoded is Each for those who need but the bytes of each Directory, which
// visit may keep too.
func (w Walk) EachEncoded(ctx context.Context, root digest.Digest, visit func(digest.Digest, []byte) error) error {
	return w.each(ctx, root, decodeChildren, func(d digest.Digest, dir directory) error { return visit(d, dir.data) })
}

// decoder makes a directory of the bytes of d.
type decoder func(d digest.Digest, data []byte) (directory, error)

// decode is a decoder.
func decode(d digest.Digest, data []byte) (directory, error) {
	dir := &repb.Directory{}
	if err := blob.UnmarshalMessage(d, data, dir); err != nil {
		return directory{}, err //nolint:wrapcheck // the caller says what it is about
	}
	if err := Validate(d.Function(), dir); err != nil {
		return directory{}, err
	}
	children := make([]digest.Digest, len(dir.Directories))
	for i, child := range dir.Directories {
		var err error
		if children[i], err = digest.FromProto(d.Function(), child.Digest); err != nil {
			return directory{}, fmt.Errorf("directory %q: %w", child.Name, err)
		}
	}
	return directory{there: true, dir: dir, data: data, children: children}, nil
}

// decodeChildren is a decoder that makes no message where it need not.
func decodeChildren(d digest.Digest, data []byte) (directory, error) {
	if children, ok := scan(d.Function(), data); ok {
		return directory{there: true, data: data, children: children}, nil
	}
	return decode(d, data)
}

func (w Walk) each(ctx context.Context, root digest.Digest, decode decoder, visit func(digest.Digest, directory) error) error {
	if w.MaxDirectories == 0 {
		w.MaxDirectories = defaultMaxDirectories
	}
	if w.MaxDirectoryBytes == 0 {
		w.MaxDirectoryBytes = defaultMaxDirectoryBytes
	}
	if w.Reads == 0 {
		w.Reads = defaultReads
	}
	// Breadth first: queue is all that was ever found, and next what is due.
	queue := []digest.Digest{root}
	seen := map[digest.Digest]struct{}{root: {}}
	for next := 0; next < len(queue); {
		n := batchLen(queue[next:])
		dirs, err := w.read(ctx, root, queue[next:next+n], decode)
		if err != nil {
			return err
		}
		for i, read := range dirs {
			d := queue[next+i]
			if !read.there {
				if w.Missing != nil {
					w.Missing(d)
				}
				continue
			}
			if err := visit(d, read); err != nil {
				return err
			}
			for _, c := range read.children {
				if _, ok := seen[c]; ok {
					continue
				}
				if len(queue) >= w.MaxDirectories {
					return fmt.Errorf("walk tree %s: %w: it has more than %d directories", root, blob.ErrTooLarge, w.MaxDirectories)
				}
				seen[c] = struct{}{}
				queue = append(queue, c)
			}
		}
		next += n
	}
	return nil
}

// batchLen is how many of ds to read at once, at least one.
func batchLen(ds []digest.Digest) int {
	size := int64(0)
	for i, d := range ds[:min(len(ds), batchDirectories)] {
		// A foreign size may be anything, so that a sum might overflow.
		if d.Size() > batchBytes-size {
			return max(i, 1)
		}
		size += d.Size()
	}
	return min(len(ds), batchDirectories)
}

// directory is one that was read; the zero value is one that is not in the store.
type directory struct {
	there    bool
	dir      *repb.Directory // nil where nobody needs it
	data     []byte
	children []digest.Digest
}

// read returns the Directories ds in their order.
func (w Walk) read(ctx context.Context, root digest.Digest, ds []digest.Digest, decode decoder) ([]directory, error) {
	dirs := make([]directory, len(ds))
	one := func(ctx context.Context, i int) error {
		data, err := blob.ReadAll(ctx, w.Opener, ds[i], w.MaxDirectoryBytes)
		if errors.Is(err, blob.ErrNotFound) && ds[i] != root {
			return nil
		}
		if err == nil {
			dirs[i], err = decode(ds[i], data)
		}
		if err != nil {
			return fmt.Errorf("walk tree %s: directory %s: %w", root, ds[i], err)
		}
		return nil
	}
	if len(ds) == 1 {
		return dirs, one(ctx, 0)
	}
	// A goroutine for each read would cost as much as reading from a local disk.
	var next atomic.Int64
	g, ctx := errgroup.WithContext(ctx)
	for range min(w.Reads, len(ds)) {
		g.Go(func() error {
			for i := int(next.Add(1)) - 1; i < len(ds); i = int(next.Add(1)) - 1 {
				if err := one(ctx, i); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	return dirs, nil
}
