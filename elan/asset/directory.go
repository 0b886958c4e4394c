package asset

import (
	"context"
	"maps"
	"slices"
	"strings"
	"unicode/utf8"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/mettle-build/mettle/elan/digest"
)

const (
	// maxEntries bounds the files, directories and symlinks of a directory: more
	// than the largest source trees have, and some 200 MB while it is built.
	maxEntries = 1_000_000
	// maxPathBytes and maxDepth are what file systems bear.
	maxPathBytes = 4096
	maxDepth     = 250
)

// folder is a directory that is being put together.
type folder struct {
	folders map[string]*folder
	files   map[string]file
	links   map[string]string // targets
}

type file struct {
	digest     digest.Digest
	executable bool
}

// builder puts a directory together out of paths, which come from strangers.
type builder struct {
	root    folder
	entries int
}

// split makes names of a path, without "." and empty ones. What would lead out, or
// is no name that a Directory may have, is a FetchError.
func split(path string) ([]string, error) {
	if len(path) > maxPathBytes || strings.HasPrefix(path, "/") || strings.ContainsRune(path, 0) || !utf8.ValidString(path) {
		return nil, failed(Aborted, "it has a file at %.200q, want a relative path in UTF-8", path)
	}
	var names []string
	for name := range strings.SplitSeq(path, "/") {
		switch name {
		case "", ".":
		case "..":
			return nil, failed(Aborted, "it has a file at %.200q, which leads out of it", path)
		default:
			names = append(names, name)
		}
	}
	if len(names) > maxDepth {
		return nil, failed(Aborted, "it has a file %d directories deep, at most %d are taken", len(names), maxDepth)
	}
	return names, nil
}

// count counts an entry.
func (b *builder) count() error {
	if b.entries++; b.entries > maxEntries {
		return failed(TooLarge, "it has more than %d files", maxEntries)
	}
	return nil
}

// at returns the folder of names, which it makes if need be. A symlink or a file is
// no folder: what an archive writes through a symlink is not where it says.
func (b *builder) at(names []string) (*folder, error) {
	dir := &b.root
	for i, name := range names {
		next, ok := dir.folders[name]
		if !ok {
			if dir.taken(name) {
				return nil, failed(Aborted, "%.200q is a file and a directory", strings.Join(names[:i+1], "/"))
			}
			if err := b.count(); err != nil {
				return nil, err
			}
			next = &folder{}
			if dir.folders == nil {
				dir.folders = map[string]*folder{}
			}
			dir.folders[name] = next
		}
		dir = next
	}
	return dir, nil
}

// taken tells whether name is that of a file or a symlink.
func (f *folder) taken(name string) bool {
	_, file := f.files[name]
	_, link := f.links[name]
	return file || link
}

// directory adds a directory.
func (b *builder) directory(path string) error {
	names, err := split(path)
	if err == nil {
		_, err = b.at(names)
	}
	return err
}

// place returns where to put an entry that is no directory, replacing one of the
// same name, as unpacking would.
func (b *builder) place(path string) (*folder, string, error) {
	names, err := split(path)
	if err != nil {
		return nil, "", err
	}
	if len(names) == 0 {
		return nil, "", failed(Aborted, "it has a file without a name")
	}
	if err := b.count(); err != nil {
		return nil, "", err
	}
	last := len(names) - 1
	dir, err := b.at(names[:last])
	if err != nil {
		return nil, "", err
	}
	if _, ok := dir.folders[names[last]]; ok {
		return nil, "", failed(Aborted, "%.200q is a file and a directory", path)
	}
	delete(dir.files, names[last])
	delete(dir.links, names[last])
	return dir, names[last], nil
}

// file adds a file.
func (b *builder) file(path string, f file) error {
	dir, name, err := b.place(path)
	if err != nil {
		return err
	}
	if dir.files == nil {
		dir.files = map[string]file{}
	}
	dir.files[name] = f
	return nil
}

// link adds a symlink.
func (b *builder) link(path, target string) error {
	dir, name, err := b.place(path)
	if err != nil {
		return err
	}
	if target == "" || len(target) > maxPathBytes || strings.ContainsRune(target, 0) || !utf8.ValidString(target) {
		return failed(Aborted, "the symlink %.200q leads to %.200q, want a path in UTF-8", path, target)
	}
	if dir.links == nil {
		dir.links = map[string]string{}
	}
	dir.links[name] = target
	return nil
}

// find returns the file at path, for hard links.
func (b *builder) find(path string) (file, bool) {
	names, err := split(path)
	if err != nil || len(names) == 0 {
		return file{}, false
	}
	dir := &b.root
	for _, name := range names[:len(names)-1] {
		if dir = dir.folders[name]; dir == nil {
			return file{}, false
		}
	}
	f, ok := dir.files[names[len(names)-1]]
	return f, ok
}

// store puts the Directories into the store, from the one at path on, and returns
// its digest.
func (b *builder) store(ctx context.Context, u *uploader, path string) (digest.Digest, error) {
	names, err := split(path)
	if err != nil {
		return digest.Digest{}, err
	}
	dir := &b.root
	for _, name := range names {
		if dir = dir.folders[name]; dir == nil {
			return digest.Digest{}, failed(NotFound, "it has no directory %.200q", path)
		}
	}
	d, err := dir.store(ctx, u)
	if err != nil {
		return digest.Digest{}, err
	}
	return d, u.flush(ctx)
}

// store makes the canonical Directory of f, children first.
func (f *folder) store(ctx context.Context, u *uploader) (digest.Digest, error) {
	m := &repb.Directory{}
	for _, name := range slices.Sorted(maps.Keys(f.folders)) {
		d, err := f.folders[name].store(ctx, u)
		if err != nil {
			return digest.Digest{}, err
		}
		m.Directories = append(m.Directories, &repb.DirectoryNode{Name: name, Digest: d.Proto()})
	}
	for _, name := range slices.Sorted(maps.Keys(f.files)) {
		x := f.files[name]
		m.Files = append(m.Files, &repb.FileNode{Name: name, Digest: x.digest.Proto(), IsExecutable: x.executable})
	}
	for _, name := range slices.Sorted(maps.Keys(f.links)) {
		m.Symlinks = append(m.Symlinks, &repb.SymlinkNode{Name: name, Target: f.links[name]})
	}
	_, data, err := digest.OfMessage(u.fn, m)
	if err != nil {
		return digest.Digest{}, err
	}
	return u.bytesOf(ctx, data)
}
