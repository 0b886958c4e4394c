//go:build linux

package inputroot

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"golang.org/x/sync/errgroup"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/tree"
)

// directory is a valid Directory message, decoded. It is immutable.
type directory struct {
	files    []fileNode
	children []childNode
	symlinks []*repb.SymlinkNode
	props    *repb.NodeProperties // nil: none that matter
	plain    bool                 // there are no properties that matter in it
}

type fileNode struct {
	name   string
	digest digest.Digest
	mode   blob.LinkMode
	props  *repb.NodeProperties // nil: none that matter
}

type childNode struct {
	name   string
	digest digest.Digest
}

func (d *directory) entries() int { return len(d.files) + len(d.children) + len(d.symlinks) }

func decode(fn digest.Function, m *repb.Directory) (*directory, error) {
	if err := tree.Validate(fn, m); err != nil {
		return nil, err
	}
	d := &directory{
		files:    make([]fileNode, len(m.Files)),
		children: make([]childNode, len(m.Directories)),
		symlinks: m.Symlinks,
		props:    properties(m.NodeProperties),
	}
	d.plain = d.props == nil && !slices.ContainsFunc(m.Symlinks, func(l *repb.SymlinkNode) bool { return properties(l.NodeProperties) != nil })
	for i, f := range m.Files {
		fd, err := digest.FromProto(fn, f.Digest)
		if err != nil {
			return nil, err
		}
		d.files[i] = fileNode{name: f.Name, digest: fd, props: properties(f.NodeProperties)}
		if f.IsExecutable {
			d.files[i].mode = blob.LinkExecutable
		}
		d.plain = d.plain && d.files[i].props == nil
	}
	for i, c := range m.Directories {
		cd, err := digest.FromProto(fn, c.Digest)
		if err != nil {
			return nil, err
		}
		d.children[i] = childNode{name: c.Name, digest: cd}
	}
	return d, nil
}

type kind uint8

const (
	isNothing kind = iota
	isFile
	isSymlink
	isDirectory
)

// find finds name in d, and which of its kind it is.
func (d *directory) find(name string) (kind, int) {
	if i, ok := slices.BinarySearchFunc(d.children, name, func(c childNode, name string) int { return strings.Compare(c.name, name) }); ok {
		return isDirectory, i
	}
	if i, ok := slices.BinarySearchFunc(d.files, name, func(f fileNode, name string) int { return strings.Compare(f.name, name) }); ok {
		return isFile, i
	}
	if i, ok := slices.BinarySearchFunc(d.symlinks, name, func(l *repb.SymlinkNode, name string) int { return strings.Compare(l.Name, name) }); ok {
		return isSymlink, i
	}
	return isNothing, 0
}

// properties is p if it has any that change a file on disk.
func properties(p *repb.NodeProperties) *repb.NodeProperties {
	if p.GetMtime() == nil && p.GetUnixMode() == nil {
		return nil
	}
	return p
}

// loaded is all Directories of one input root.
type loaded struct {
	root  *directory
	all   map[digest.Digest]*directory // nil where there is only the root
	sizes map[*directory]size          // likewise
	size                               // on disk
}

// load reads every Directory below root.
func (b *Builder) load(ctx context.Context, root digest.Digest) (*loaded, error) {
	t := &loaded{}
	level := []digest.Digest{root}
	var missing []digest.Digest
	entries := 0
	for depth := 0; len(level) > 0; depth++ {
		if depth > b.o.MaxDepth {
			return nil, fmt.Errorf("%w: directories are over %d levels deep", tree.ErrInvalid, b.o.MaxDepth)
		}
		if depth == 1 && len(missing) == 0 {
			if err := b.bringTree(ctx, root, level); err != nil {
				return nil, err
			}
		}
		got, err := b.fetch(ctx, level)
		if err != nil {
			return nil, err
		}
		if t.root == nil && got[0] != nil && len(got[0].children) == 0 {
			t.root = got[0] // by far the most usual root has no maps made for it
			break
		}
		if t.all == nil {
			t.root, t.all = got[0], make(map[digest.Digest]*directory)
		}
		for i, d := range got {
			t.all[level[i]] = d
			if d == nil {
				missing = append(missing, level[i])
			} else if entries += d.entries(); entries > b.o.MaxEntries {
				return nil, b.tooMany()
			}
		}
		level = t.unseen(got)
	}
	if len(missing) > 0 {
		return nil, b.missingWithFiles(ctx, t, missing)
	}
	return t, b.measure(t)
}

// unseen lists the children of ds that are not in t yet, and reserves their
// places.
func (t *loaded) unseen(ds []*directory) (next []digest.Digest) {
	for _, d := range ds {
		if d == nil {
			continue
		}
		for _, c := range d.children {
			if _, ok := t.all[c.digest]; !ok {
				t.all[c.digest] = nil
				next = append(next, c.digest)
			}
		}
	}
	return next
}

// fetch reads the Directories ds; a missing one is nil.
func (b *Builder) fetch(ctx context.Context, ds []digest.Digest) ([]*directory, error) {
	got := make([]*directory, len(ds))
	gone, err := b.bring(ctx, ds)
	if err != nil {
		return nil, err
	}
	var group errgroup.Group
	if b.local || len(ds) == 1 {
		group.SetLimit(1)
	} else {
		group.SetLimit(b.o.MaxFetches)
	}
	for i, d := range ds {
		if got[i] = b.cache.get(d); got[i] != nil || gone[d] {
			continue
		}
		read := func() (err error) {
			got[i], err = b.read(ctx, d)
			return err
		}
		if b.local || len(ds) == 1 {
			if err := read(); err != nil {
				return nil, err
			}
		} else {
			group.Go(read)
		}
	}
	return got, group.Wait()
}

// bring has those of the Directories ds fetched that are not here, and returns which
// are missing.
func (b *Builder) bring(ctx context.Context, ds []digest.Digest) (gone map[digest.Digest]bool, err error) {
	if b.fetcher == nil {
		return nil, nil
	}
	wanted := make([]digest.Digest, 0, len(ds))
	for _, d := range ds {
		// What is too large is refused when it is read.
		if d.Size() <= b.o.MaxDirectoryBytes && b.cache.get(d) == nil {
			wanted = append(wanted, d)
		}
	}
	missing, err := b.fetcher.Fetch(ctx, wanted)
	if err != nil {
		return nil, fmt.Errorf("fetch directories: %w", err)
	}
	if len(missing) > 0 {
		gone = make(map[digest.Digest]bool, len(missing))
		for _, d := range missing {
			gone[d] = true
		}
	}
	return gone, nil
}

// bringTree has all Directories below root fetched by one call, if none of those of
// the first level is here: where some are, most of the tree is likely to be, and the
// few others come level by level. It takes only what belongs to the tree, by digests
// of its own: a Directory after one that refers to it. So a server that sends wrong
// Directories, or too few, costs time and nothing else.
func (b *Builder) bringTree(ctx context.Context, root digest.Digest, level []digest.Digest) error {
	if b.trees == nil {
		return nil
	}
	if slices.ContainsFunc(level, func(d digest.Digest) bool { return d.IsEmpty() || b.cache.get(d) != nil }) {
		level = nil // another slot may be at it, and is waited for
	}
	expected := make(map[digest.Digest]struct{}, len(level))
	for _, d := range level {
		expected[d] = struct{}{}
	}
	entries := 0
	wanted := func(d digest.Digest, data []byte) bool {
		if _, ok := expected[d]; !ok || d.Size() > b.o.MaxDirectoryBytes || entries > b.o.MaxEntries {
			return false
		}
		delete(expected, d) // once
		m := &repb.Directory{}
		if err := blob.UnmarshalMessage(d, data, m); err != nil {
			return false // load finds out
		}
		dir, err := decode(d.Function(), m)
		if err != nil {
			return false
		}
		entries += dir.entries()
		b.cache.put(d, dir)
		for _, c := range dir.children {
			if b.cache.get(c.digest) == nil {
				expected[c.digest] = struct{}{}
			}
		}
		return true
	}
	if err := b.trees.FetchTree(ctx, root, level, wanted); err != nil {
		return fmt.Errorf("fetch directories: %w", err)
	}
	return nil
}

// read reads one Directory; a missing one is nil.
func (b *Builder) read(ctx context.Context, d digest.Digest) (*directory, error) {
	m := &repb.Directory{}
	if !d.IsEmpty() {
		err := blob.ReadMessage(ctx, b.o.Store, d, b.o.MaxDirectoryBytes, m)
		if errors.Is(err, blob.ErrNotFound) {
			return nil, nil //nolint:nilnil // said above
		}
		if err != nil {
			return nil, err
		}
	}
	dir, err := decode(d.Function(), m)
	if err != nil {
		return nil, fmt.Errorf("directory %s: %w", d, err)
	}
	b.cache.put(d, dir)
	return dir, nil
}

// missingWithFiles is the error for missing Directories, with what is missing
// of the files of the others: so a client repairs it in one go.
func (b *Builder) missingWithFiles(ctx context.Context, t *loaded, missing []digest.Digest) error {
	err := b.find(ctx, t.fileDigests())
	var files *blob.MissingError
	switch {
	case errors.As(err, &files):
		missing = append(missing, files.Digests...)
	case err != nil:
		return err
	}
	return &blob.MissingError{Digests: unique(missing)}
}

// haveFiles fetches the files of p that are not on the local disk, if the store can
// do so, or else asks it whether it has all. It returns a *blob.MissingError if not.
func (b *Builder) haveFiles(ctx context.Context, p *plan) error {
	switch {
	case b.fetcher != nil:
		missing, err := b.fetcher.Fetch(ctx, p.newFiles())
		if err != nil {
			return fmt.Errorf("fetch the input files: %w", err)
		}
		if len(missing) > 0 {
			return &blob.MissingError{Digests: missing}
		}
	case !b.local:
		// One question for all of them, rather than one failure at a time.
		return b.find(ctx, p.newFiles())
	}
	return nil
}

// fileDigests are those of all files, each once.
func (t *loaded) fileDigests() []digest.Digest {
	var ds []digest.Digest
	add := func(d *directory) {
		for _, f := range d.files {
			ds = append(ds, f.digest)
		}
	}
	if t.all == nil {
		add(t.root)
	}
	for _, d := range t.all {
		if d != nil {
			add(d)
		}
	}
	return unique(ds)
}

// find asks the store for all files at once, and returns a *blob.MissingError if
// not all are there.
func (b *Builder) find(ctx context.Context, ds []digest.Digest) error {
	if len(ds) == 0 {
		return nil
	}
	missing, err := b.o.Store.FindMissing(ctx, ds)
	if err != nil {
		return fmt.Errorf("find the input files: %w", err)
	}
	if len(missing) > 0 {
		return &blob.MissingError{Digests: missing}
	}
	return nil
}

// size is what a directory is on disk, with all below it.
type size struct {
	entries, files, depth int
	special               bool // some have properties
}

// measure checks the bounds of what t is on disk. Equal subtrees are one message
// however often they stand in the tree, so a few messages can describe more
// files than there are atoms; each is measured once.
func (b *Builder) measure(t *loaded) error {
	s := t.root.size()
	if t.all != nil {
		t.sizes = make(map[*directory]size, len(t.all))
		s = t.sizeOf(t.sizes, t.root, b.o.MaxEntries)
	}
	if s.entries > b.o.MaxEntries {
		return b.tooMany()
	}
	if s.depth > b.o.MaxDepth {
		return fmt.Errorf("%w: directories are over %d levels deep", tree.ErrInvalid, b.o.MaxDepth)
	}
	t.size = s
	return nil
}

// size is that of d alone.
func (d *directory) size() size {
	return size{entries: d.entries(), files: len(d.files), special: !d.plain}
}

// entriesBelow are those of d and all below it.
func (t *loaded) entriesBelow(d *directory) int {
	if d == t.root {
		return t.entries
	}
	return t.sizes[d].entries
}

func (b *Builder) tooMany() error {
	return fmt.Errorf("%w: over %d files, directories and symlinks", tree.ErrInvalid, b.o.MaxEntries)
}

// sizeOf measures d; from maxEntries on it counts no further. There is no loop:
// a Directory can't contain its own digest. The recursion is as deep as the
// directories, of which load has taken MaxDepth levels by the shortest way to
// each; the longest may pass through all of them.
func (t *loaded) sizeOf(memo map[*directory]size, d *directory, maxEntries int) size {
	if s, ok := memo[d]; ok {
		return s
	}
	s := d.size()
	for _, c := range d.children {
		cs := t.sizeOf(memo, t.all[c.digest], maxEntries)
		s.entries = min(s.entries+cs.entries, maxEntries+1)
		s.files = min(s.files+cs.files, maxEntries+1)
		s.depth = max(s.depth, cs.depth+1)
		s.special = s.special || cs.special
	}
	memo[d] = s
	return s
}
