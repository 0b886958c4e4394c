package action

import (
	"context"
	"errors"
	"fmt"
	"strings"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"golang.org/x/sync/semaphore"
	"google.golang.org/protobuf/proto"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/tree"
)

// treeReader lists what a Tree refers to: tree.Read for one that was checked
// when it came in, and tree.Check for a new one.
type treeReader func(fn digest.Function, data []byte) (tree.Contents, error)

// closure gathers the digests of all blobs that a result refers to.
type closure struct {
	store        blob.Store
	maxTreeBytes int64
	maxBlobs     int
	reading      *semaphore.Weighted // the Cache's
	fn           digest.Function
	read         treeReader
	digests      []digest.Digest
	// trees and roots are those that were read, so that directories which are alike
	// are gathered once: a few bytes in a result may refer to a Tree of megabytes.
	trees map[digest.Digest]tree.Contents
	roots map[digest.Digest]struct{}
	// gone are Trees and Directories that were found missing on the way, so
	// that what is below them is not known.
	gone []digest.Digest
}

func (c *Cache) closure(k blob.EntryKey, read treeReader) *closure {
	return &closure{store: c.o.Stores(k.Instance), maxTreeBytes: c.o.MaxTreeBytes, maxBlobs: c.o.MaxBlobs, reading: c.trees, fn: k.Action.Function(), read: read}
}

// missing returns those blobs of the closure of r, a stored result, that are
// not there.
func (c *Cache) missing(ctx context.Context, k blob.EntryKey, r *repb.ActionResult) ([]digest.Digest, error) {
	cl := c.closure(k, tree.Read)
	if err := cl.addResult(ctx, r); err != nil || len(cl.gone) > 0 {
		return cl.gone, err
	}
	return cl.find(ctx)
}

// complete makes sure that all blobs of the closure of r, a new result, are
// there, and takes in those of inline that are not.
func (c *Cache) complete(ctx context.Context, k blob.EntryKey, r *repb.ActionResult, inline map[digest.Digest][]byte) error {
	cl := c.closure(k, tree.Check)
	if err := cl.addResult(ctx, r); err != nil {
		return err
	}
	missing, err := cl.find(ctx)
	if err != nil {
		return err
	}
	absent := missing[:0]
	for _, d := range missing {
		data, ok := inline[d]
		if !ok {
			absent = append(absent, d)
			continue
		}
		if err := blob.ReceiveBytes(ctx, cl.store, d, data); err != nil {
			return err
		}
	}
	if len(absent) == 0 {
		// Something that came in between reading and looking up was not checked.
		absent = cl.gone
	}
	if len(absent) > 0 {
		return &blob.MissingError{Digests: absent}
	}
	return nil
}

// find asks the store for everything at once.
func (cl *closure) find(ctx context.Context) ([]digest.Digest, error) {
	if len(cl.digests) == 0 {
		return nil, nil
	}
	missing, err := cl.store.FindMissing(ctx, cl.digests)
	if err != nil {
		return nil, fmt.Errorf("look its blobs up: %w", err)
	}
	return missing, nil
}

// addResult gathers everything of r.
func (cl *closure) addResult(ctx context.Context, r *repb.ActionResult) error {
	for _, f := range r.OutputFiles {
		if err := validatePath("output file", f.GetPath()); err != nil {
			return err
		}
		if f.GetPath() == "" {
			return fmt.Errorf("%w: an output file has an empty path", ErrInvalid)
		}
		if err := cl.add(f.Digest, "output file", f.Path); err != nil {
			return err
		}
	}
	for _, d := range r.OutputDirectories {
		if err := validatePath("output directory", d.GetPath()); err != nil {
			return err
		}
		if err := cl.addDirectory(ctx, d); err != nil {
			return err
		}
	}
	if r.StdoutDigest != nil {
		if err := cl.add(r.StdoutDigest, "stdout", ""); err != nil {
			return err
		}
	}
	if r.StderrDigest != nil {
		return cl.add(r.StderrDigest, "stderr", "")
	}
	return nil
}

// add gathers one blob. The empty one is everywhere and needs no looking up.
func (cl *closure) add(m *repb.Digest, kind, path string) error {
	d, err := digest.FromProto(cl.fn, m)
	if err != nil {
		return fmt.Errorf("%w: %s %q: %w", ErrInvalid, kind, path, err)
	}
	if d.IsEmpty() {
		return nil
	}
	return cl.extend(d)
}

// addDirectory gathers an output directory, which has a Tree, or a Directory
// for a root, or both (Command.output_directory_format).
func (cl *closure) addDirectory(ctx context.Context, o *repb.OutputDirectory) error {
	if o.TreeDigest == nil && o.RootDirectoryDigest == nil {
		return fmt.Errorf("%w: output directory %q has neither tree_digest nor root_directory_digest", ErrInvalid, o.Path)
	}
	var root digest.Digest
	if o.RootDirectoryDigest != nil {
		var err error
		if root, err = digest.FromProto(cl.fn, o.RootDirectoryDigest); err != nil {
			return fmt.Errorf("%w: output directory %q: root_directory_digest: %w", ErrInvalid, o.Path, err)
		}
	}
	if o.TreeDigest == nil {
		return cl.walk(ctx, o.Path, root)
	}
	if err := cl.add(o.TreeDigest, "output directory", o.Path); err != nil {
		return err
	}
	d, err := digest.FromProto(cl.fn, o.TreeDigest)
	if err != nil {
		return fmt.Errorf("%w: output directory %q: %w", ErrInvalid, o.Path, err)
	}
	contents, seen := cl.trees[d]
	if !seen {
		if contents, err = cl.readTree(ctx, o, d); err != nil {
			return err
		}
		if err := cl.extend(contents.Files...); err != nil {
			return err
		}
		contents.Files = nil
		cl.sawTree(d, contents)
	}
	if root.IsZero() {
		return nil
	}
	// Only Check, on the way in, computes the root.
	if !contents.Root.IsZero() && contents.Root != root {
		return fmt.Errorf("%w: output directory %q: root_directory_digest is %s, but the root in the Tree has %s", ErrInvalid, o.Path, root, contents.Root)
	}
	if !root.IsEmpty() {
		cl.digests = append(cl.digests, root)
	}
	err = cl.extend(contents.Directories...)
	contents.Directories = nil
	cl.sawTree(d, contents)
	return err
}

// sawTree notes what is left to be gathered of the Tree d.
func (cl *closure) sawTree(d digest.Digest, rest tree.Contents) {
	if cl.trees == nil {
		cl.trees = map[digest.Digest]tree.Contents{}
	}
	cl.trees[d] = rest
}

// extend gathers blobs as far as there may be so many.
func (cl *closure) extend(ds ...digest.Digest) error {
	if len(ds) > cl.maxBlobs-len(cl.digests) {
		return fmt.Errorf("%w: it refers to more than %d blobs", ErrInvalid, cl.maxBlobs)
	}
	cl.digests = append(cl.digests, ds...)
	return nil
}

// readTree reads the Tree d of o. One that is not there is noted in gone.
func (cl *closure) readTree(ctx context.Context, o *repb.OutputDirectory, d digest.Digest) (tree.Contents, error) {
	n := min(d.Size(), cl.maxTreeBytes)
	if err := cl.reading.Acquire(ctx, n); err != nil {
		return tree.Contents{}, fmt.Errorf("output directory %q: wait for other Trees: %w", o.Path, err)
	}
	defer cl.reading.Release(n)
	data, err := blob.ReadAll(ctx, cl.store, d, cl.maxTreeBytes)
	if errors.Is(err, blob.ErrNotFound) {
		cl.gone = append(cl.gone, d)
		return tree.Contents{}, nil
	}
	if err != nil {
		return tree.Contents{}, fmt.Errorf("output directory %q: %w", o.Path, err)
	}
	contents, err := cl.read(cl.fn, data)
	if err != nil {
		return tree.Contents{}, fmt.Errorf("%w: output directory %q: Tree %s: %w", ErrInvalid, o.Path, d, err)
	}
	return contents, nil
}

// walk gathers the Directories from root on and their files.
func (cl *closure) walk(ctx context.Context, path string, root digest.Digest) error {
	if _, seen := cl.roots[root]; seen || root.IsEmpty() {
		return nil
	}
	if cl.roots == nil {
		cl.roots = map[digest.Digest]struct{}{}
	}
	cl.roots[root] = struct{}{}
	cl.digests = append(cl.digests, root)
	miss := func(d digest.Digest) {
		cl.gone = append(cl.gone, d)
		cl.digests = append(cl.digests, d)
	}
	w := tree.Walk{Opener: cl.store, Missing: miss}
	err := w.Each(ctx, root, func(d digest.Digest, dir *repb.Directory) error {
		if err := cl.extend(d); err != nil {
			return err
		}
		for _, f := range dir.Files {
			if err := cl.add(f.Digest, "file", f.Name); err != nil {
				return err
			}
		}
		return nil
	})
	switch {
	case errors.Is(err, blob.ErrNotFound):
		cl.gone = append(cl.gone, root)
		return nil
	case errors.Is(err, tree.ErrInvalid), errors.Is(err, blob.ErrMalformed):
		return fmt.Errorf("%w: output directory %q: %w", ErrInvalid, path, err)
	case err != nil:
		return fmt.Errorf("output directory %q: %w", path, err)
	}
	return nil
}

// validatePath checks an output's path, relative to the working directory. It
// may be below its parent: the working directory need not be the input root.
func validatePath(kind, path string) error {
	if strings.HasPrefix(path, "/") || strings.IndexByte(path, 0) >= 0 {
		return fmt.Errorf("%w: %s %q, want a relative path without NUL", ErrInvalid, kind, path)
	}
	return nil
}

// outline returns r without inline contents, and these by their digests, which
// it checks. It does not change r, and returns r itself if there are none.
func outline(fn digest.Function, r *repb.ActionResult) (*repb.ActionResult, map[digest.Digest][]byte, error) {
	has := len(r.StdoutRaw) > 0 || len(r.StderrRaw) > 0
	for _, f := range r.OutputFiles {
		has = has || len(f.GetContents()) > 0
	}
	if !has {
		return r, nil, nil
	}
	inline := map[digest.Digest][]byte{}
	take := func(what string, data []byte, want *repb.Digest) (*repb.Digest, error) {
		if len(data) == 0 {
			return want, nil
		}
		d := digest.Of(fn, data)
		if want != nil && (want.Hash != d.Hash() || want.SizeBytes != d.Size()) {
			return nil, fmt.Errorf("%w: the inline contents of %s have digest %s, but its digest field says %s/%d", ErrInvalid, what, d, want.Hash, want.SizeBytes)
		}
		inline[d] = data
		return d.Proto(), nil
	}
	r = proto.CloneOf(r)
	var err error
	if r.StdoutDigest, err = take("stdout", r.StdoutRaw, r.StdoutDigest); err != nil {
		return nil, nil, err
	}
	if r.StderrDigest, err = take("stderr", r.StderrRaw, r.StderrDigest); err != nil {
		return nil, nil, err
	}
	r.StdoutRaw, r.StderrRaw = nil, nil
	for _, f := range r.OutputFiles {
		if f.Digest, err = take(f.Path, f.Contents, f.Digest); err != nil {
			return nil, nil, err
		}
		f.Contents = nil
	}
	return r, inline, nil
}
