package tool

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"golang.org/x/sync/errgroup"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/tree"
)

const (
	// maxNodes bounds the files, directories and symlinks that one tree becomes.
	// Directories that refer to one another more than once become more than
	// they are, without bound.
	maxNodes = 1 << 20
	// maxTreeBytes bounds a Tree message, which is read at once.
	maxTreeBytes = 256 << 20
	// fetches is how many files are fetched at once: what hides the way to a
	// server, and no more than a disk bears.
	fetches = 16
)

// node is a file, a directory or a symlink at its path within a tree.
type node struct {
	path    string
	dir     bool
	target  string         // of a symlink
	file    *repb.FileNode // of a file
	content digest.Digest  // of a file or a directory
}

// FetchTree makes the directory dir of a Directory and all below it, or of a Tree
// message, as output directories have: d is told by what it is. Dir may be there
// if it is empty; it is there whole and verified after that, or as it was.
func FetchTree(ctx context.Context, o blob.Opener, d digest.Digest, dir string) (err error) {
	if entries, err := os.ReadDir(dir); err == nil && len(entries) > 0 {
		return fmt.Errorf("%s is there and not empty; name a new directory", dir)
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err //nolint:wrapcheck // it names the path
	}
	nodes, err := expand(ctx, o, d)
	if err != nil {
		return err
	}
	partial := partialName(dir)
	if err := os.Mkdir(partial, 0o777); err != nil { //nolint:gosec // as the umask has it
		return err //nolint:wrapcheck // it names the path
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(partial))
		}
	}()
	if err := writeNodes(ctx, o, nodes, partial); err != nil {
		return err
	}
	// It goes only if it is empty.
	if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err //nolint:wrapcheck // it names the path
	}
	return os.Rename(partial, dir) //nolint:wrapcheck // it names both
}

// writeNodes makes nodes in the new directory dir. No name leads out of it: it
// is a Root, and its symlinks are made when all else is there.
func writeNodes(ctx context.Context, o blob.Opener, nodes []node, dir string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err //nolint:wrapcheck // it names the path
	}
	defer root.Close() //nolint:errcheck // nothing is written through it
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(fetches)
	for _, n := range nodes {
		switch {
		case n.dir:
			err = root.Mkdir(n.path, 0o777)
		case n.file != nil:
			group.Go(func() error { return writeFile(groupCtx, o, root, n) })
		}
		if err != nil || groupCtx.Err() != nil {
			break
		}
	}
	if err := errors.Join(err, group.Wait()); err != nil {
		return err
	}
	for _, n := range nodes {
		if n.target == "" {
			continue
		}
		if err := root.Symlink(n.target, n.path); err != nil {
			return err //nolint:wrapcheck // it names the path
		}
	}
	return ctx.Err()
}

func writeFile(ctx context.Context, o blob.Opener, root *os.Root, n node) error {
	mode := fs.FileMode(0o666)
	if n.file.IsExecutable {
		mode = 0o777
	}
	f, err := root.OpenFile(n.path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, mode)
	if err != nil {
		return err //nolint:wrapcheck // it names the path
	}
	err = errors.Join(Copy(ctx, o, n.content, f), f.Close())
	p := n.file.NodeProperties
	if err == nil && p.GetUnixMode() != nil {
		err = root.Chmod(n.path, fs.FileMode(p.UnixMode.Value)&fs.ModePerm)
	}
	if err == nil && p.GetMtime() != nil {
		err = root.Chtimes(n.path, p.Mtime.AsTime(), p.Mtime.AsTime())
	}
	if err != nil {
		return fmt.Errorf("file %s: %w", n.path, err)
	}
	return nil
}

// expand lists what d, a Directory or a Tree, has in it, directories before what
// is in them.
func expand(ctx context.Context, o blob.Opener, d digest.Digest) ([]node, error) {
	root, dirs, err := readDirectories(ctx, o, d)
	if err != nil {
		return nil, err
	}
	if tooMany(root, dirs) {
		return nil, fmt.Errorf("tree %s: %w: it becomes more than %d files and directories", d, blob.ErrTooLarge, maxNodes)
	}
	var nodes []node
	queue := []node{{content: root}}
	for len(queue) > 0 {
		at := queue[0]
		queue = queue[1:]
		dir, ok := dirs[at.content]
		if !ok && !at.content.IsEmpty() {
			return nil, fmt.Errorf("tree %s: directory %s: %w", d, at.content, blob.ErrNotFound)
		}
		more, err := children(at, dir, d.Function())
		if err != nil {
			return nil, fmt.Errorf("tree %s: %w", d, err)
		}
		nodes = append(nodes, more...)
		for _, n := range more {
			if n.dir {
				queue = append(queue, n)
			}
		}
	}
	return nodes, nil
}

// tooMany reports whether root becomes more than maxNodes nodes.
func tooMany(root digest.Digest, dirs map[digest.Digest]*repb.Directory) bool {
	count := 0
	queue := []digest.Digest{root}
	for len(queue) > 0 {
		at := queue[len(queue)-1]
		queue = queue[:len(queue)-1]
		dir := dirs[at]
		count += len(dir.GetFiles()) + len(dir.GetSymlinks()) + len(dir.GetDirectories())
		if count > maxNodes {
			return true
		}
		for _, s := range dir.GetDirectories() {
			// What is malformed is found out when it becomes a node.
			if c, err := digest.FromProto(root.Function(), s.Digest); err == nil {
				queue = append(queue, c)
			}
		}
	}
	return false
}

// children are the nodes in dir, which is at the node at.
func children(at node, dir *repb.Directory, fn digest.Function) ([]node, error) {
	var nodes []node
	for _, s := range dir.GetDirectories() {
		c, err := digest.FromProto(fn, s.Digest)
		if err != nil {
			return nil, err //nolint:wrapcheck // validated already
		}
		nodes = append(nodes, node{path: path.Join(at.path, s.Name), dir: true, content: c})
	}
	for _, f := range dir.GetFiles() {
		c, err := digest.FromProto(fn, f.Digest)
		if err != nil {
			return nil, err //nolint:wrapcheck // validated already
		}
		nodes = append(nodes, node{path: path.Join(at.path, f.Name), file: f, content: c})
	}
	for _, l := range dir.GetSymlinks() {
		nodes = append(nodes, node{path: path.Join(at.path, l.Name), target: l.Target})
	}
	return nodes, nil
}

// readDirectories reads all Directories of d, a Directory or a Tree.
func readDirectories(ctx context.Context, o blob.Opener, d digest.Digest) (digest.Digest, map[digest.Digest]*repb.Directory, error) {
	dirs := map[digest.Digest]*repb.Directory{}
	err := tree.Walk{Opener: o}.Each(ctx, d, func(at digest.Digest, dir *repb.Directory) error {
		dirs[at] = dir
		return nil
	})
	if err == nil {
		return d, dirs, nil
	}
	if !errors.Is(err, tree.ErrInvalid) && !errors.Is(err, blob.ErrMalformed) && !errors.Is(err, blob.ErrTooLarge) || len(dirs) > 0 {
		if len(dirs) == 0 {
			err = short(err, d)
		}
		return digest.Digest{}, nil, err
	}
	data, readErr := blob.ReadAll(ctx, o, d, maxTreeBytes)
	if readErr != nil {
		return digest.Digest{}, nil, short(readErr, d)
	}
	root, dirs, treeErr := tree.Expand(d.Function(), data)
	if treeErr != nil {
		return digest.Digest{}, nil, fmt.Errorf("blob %s is neither a Directory (%w) nor a Tree (%w)", d, err, treeErr)
	}
	return root, dirs, nil
}
