//go:build linux

package inputroot_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	fusefs "github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/mettle/worker/inputroot"
)

// The ways to give a command its input root, for the table in README.md. Only the
// first two are those of this package; the others are here to be compared with.

// benchTree is an input root: its digest, and its files by path.
type benchTree struct {
	root  digest.Digest
	files map[string]*repb.Digest
}

// treeOf puts the Directories of files, which all lie in folders of the root.
func (f *fixture) treeOf(t testing.TB, files map[string]*repb.Digest) benchTree {
	t.Helper()
	dirs := map[string]*repb.Directory{}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		dir := path.Dir(name)
		if dirs[dir] == nil {
			dirs[dir] = &repb.Directory{}
		}
		dirs[dir].Files = append(dirs[dir].Files, &repb.FileNode{Name: path.Base(name), Digest: files[name]})
	}
	root := &repb.Directory{}
	for _, dir := range slices.Sorted(maps.Keys(dirs)) {
		root.Directories = append(root.Directories, &repb.DirectoryNode{Name: dir, Digest: f.putMessage(t, dirs[dir])})
	}
	d, err := digest.FromProto(digest.SHA256, f.putMessage(t, root))
	if err != nil {
		t.Fatal(err)
	}
	return benchTree{d, files}
}

// some puts files of 1 KiB in folders of a hundred.
func (f *fixture) some(t testing.TB, n int, salt string) map[string]*repb.Digest {
	t.Helper()
	files := make(map[string]*repb.Digest, n)
	for i := range n {
		files[fmt.Sprintf("dir%02d/file%02d", i/100, i%100)] = f.put(t, fmt.Sprintf("%s %d %1000d", salt, i, i))
	}
	return files
}

// way is how a command gets its input root. What make leaves is at dir until remove.
type way interface {
	make(b *testing.B, tree benchTree, dir string)
	remove(b *testing.B, dir string)
}

// links are hard links, each time anew, or where there is a shelf in kept roots.
type links struct {
	f     *fixture
	shelf *inputroot.Shelf
}

func (w links) make(b *testing.B, tree benchTree, dir string) {
	if _, err := w.f.builder.Build(b.Context(), inputroot.Request{Dir: dir, Digest: tree.root, Owner: slotOwner(), Shelf: w.shelf}); err != nil {
		b.Fatal(err)
	}
}

func (w links) remove(b *testing.B, dir string) {
	err := error(nil)
	if w.shelf != nil {
		err = w.shelf.Remove(dir)
	} else {
		err = inputroot.Remove(dir)
	}
	if err != nil {
		b.Fatal(err)
	}
}

func slotOwner() inputroot.Owner { return inputroot.Owner{Set: true, UID: 65_000, GID: 65_000} }

// overlay mounts a tree that is made once, below a directory for what a command
// writes. A tree that is like the first one is a second layer, of what differs.
type overlay struct {
	f     *fixture
	cache string
	base  benchTree
	lower map[digest.Digest]string
}

func (w *overlay) make(b *testing.B, tree benchTree, dir string) {
	lower, ok := w.lower[tree.root]
	if !ok {
		lower = filepath.Join(w.cache, fmt.Sprint(len(w.lower)))
		if len(w.lower) == 0 {
			w.base = tree
			links{f: w.f}.make(b, tree, lower)
		} else {
			w.difference(b, tree, lower)
			lower += ":" + w.lower[w.base.root]
		}
		w.lower[tree.root] = lower
	}
	for _, d := range []string{dir, dir + ".upper", dir + ".work"} {
		mkdir(b, d)
	}
	if err := unix.Mount("overlay", dir, "overlay", 0, "lowerdir="+lower+",upperdir="+dir+".upper,workdir="+dir+".work"); err != nil {
		b.Skip("overlay: ", err)
	}
}

func (w *overlay) difference(b *testing.B, tree benchTree, dir string) {
	for name, d := range tree.files {
		if w.base.files[name] == d {
			continue
		}
		d, err := digest.FromProto(digest.SHA256, d)
		if err != nil {
			b.Fatal(err)
		}
		if err := os.MkdirAll(filepath.Join(dir, path.Dir(name)), 0o755); err != nil { //nolint:gosec // as input roots are
			b.Fatal(err)
		}
		if err := w.f.store.(blob.Linker).Link(b.Context(), d, filepath.Join(dir, name), blob.LinkRegular); err != nil {
			b.Fatal(err)
		}
	}
}

func (w *overlay) remove(b *testing.B, dir string) {
	if err := unix.Unmount(dir, 0); err != nil {
		b.Fatal(err)
	}
	for _, d := range []string{dir, dir + ".upper", dir + ".work"} {
		if err := inputroot.Remove(d); err != nil {
			b.Fatal(err)
		}
	}
}

// fuseWay is one file system for all input roots, whose directories are made of
// the Directory messages when they are looked at. It can only be read.
type fuseWay struct {
	f     *fixture
	root  *fusefs.Inode
	blobs string // the files, by hash
	dirs  map[string]*repb.Directory
}

func newFUSE(b *testing.B, f *fixture, at, blobs string) *fuseWay {
	w := &fuseWay{f: f, blobs: blobs, dirs: map[string]*repb.Directory{}}
	mkdir(b, at)
	mkdir(b, blobs)
	hour := time.Hour
	root := &fusefs.Inode{}
	server, err := fusefs.Mount(at, root, &fusefs.Options{
		EntryTimeout: &hour, AttrTimeout: &hour, MountOptions: fuse.MountOptions{DirectMountStrict: true, FsName: "bench"},
	})
	if err != nil {
		b.Skip("FUSE: ", err)
	}
	b.Cleanup(func() {
		if err := server.Unmount(); err != nil {
			b.Error(err)
		}
	})
	w.root = root
	return w
}

func (w *fuseWay) make(b *testing.B, tree benchTree, dir string) {
	n := w.root.NewPersistentInode(context.WithoutCancel(b.Context()), &fuseDir{w: w, d: tree.root.Proto()}, fusefs.StableAttr{Mode: fuse.S_IFDIR})
	w.root.AddChild(filepath.Base(dir), n, true)
}

func (w *fuseWay) remove(_ *testing.B, dir string) {
	w.root.RmChild(filepath.Base(dir))
	_ = w.root.NotifyEntry(filepath.Base(dir)) // where it was looked at
}

// directory is a Directory, which is read once.
func (w *fuseWay) directory(ctx context.Context, d *repb.Digest) *repb.Directory {
	if m, ok := w.dirs[d.Hash]; ok {
		return m
	}
	m := &repb.Directory{}
	if d, err := digest.FromProto(digest.SHA256, d); err != nil || blob.ReadMessage(ctx, w.f.store, d, 1<<20, m) != nil {
		return m
	}
	w.dirs[d.Hash] = m
	return m
}

type fuseDir struct {
	fusefs.Inode
	w *fuseWay
	d *repb.Digest
}

type fuseFile struct {
	fusefs.Inode
	w *fuseWay
	d *repb.Digest
}

var (
	_ fusefs.NodeLookuper  = (*fuseDir)(nil)
	_ fusefs.NodeReaddirer = (*fuseDir)(nil)
	_ fusefs.NodeOpener    = (*fuseFile)(nil)
	_ fusefs.NodeGetattrer = (*fuseFile)(nil)
)

func (n *fuseDir) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fusefs.Inode, syscall.Errno) {
	m := n.w.directory(ctx, n.d)
	if i, ok := slices.BinarySearchFunc(m.Files, name, func(f *repb.FileNode, name string) int { return strings.Compare(f.Name, name) }); ok {
		d := m.Files[i].Digest
		out.Mode, out.Size = fuse.S_IFREG|0o444, uint64(d.SizeBytes) //nolint:gosec // not negative
		return n.NewInode(ctx, &fuseFile{w: n.w, d: d}, fusefs.StableAttr{Mode: fuse.S_IFREG}), 0
	}
	if i, ok := slices.BinarySearchFunc(m.Directories, name, func(d *repb.DirectoryNode, name string) int { return strings.Compare(d.Name, name) }); ok {
		out.Mode = fuse.S_IFDIR | 0o755
		return n.NewInode(ctx, &fuseDir{w: n.w, d: m.Directories[i].Digest}, fusefs.StableAttr{Mode: fuse.S_IFDIR}), 0
	}
	return nil, syscall.ENOENT
}

func (n *fuseDir) Readdir(ctx context.Context) (fusefs.DirStream, syscall.Errno) {
	var all []fuse.DirEntry
	m := n.w.directory(ctx, n.d)
	for _, d := range m.Directories {
		all = append(all, fuse.DirEntry{Name: d.Name, Mode: fuse.S_IFDIR})
	}
	for _, f := range m.Files {
		all = append(all, fuse.DirEntry{Name: f.Name, Mode: fuse.S_IFREG})
	}
	return fusefs.NewListDirStream(all), 0
}

func (n *fuseFile) Getattr(_ context.Context, _ fusefs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Mode, out.Size = 0o444, uint64(n.d.SizeBytes) //nolint:gosec // not negative
	return 0
}

func (n *fuseFile) Open(ctx context.Context, _ uint32) (fusefs.FileHandle, uint32, syscall.Errno) {
	name := filepath.Join(n.w.blobs, n.d.Hash)
	fd, err := unix.Open(name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		d, _ := digest.FromProto(digest.SHA256, n.d)
		if n.w.f.store.(blob.Linker).Link(ctx, d, name, blob.LinkRegular) != nil {
			return nil, 0, syscall.EIO
		}
		fd, err = unix.Open(name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	}
	if err != nil {
		return nil, 0, fusefs.ToErrno(err)
	}
	return fusefs.NewLoopbackFile(fd), fuse.FOPEN_KEEP_CACHE, 0
}

// readAll is a command that reads all of its inputs.
func readAll(b *testing.B, dir string, want int) {
	n := 0
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		n++
		_, err = os.ReadFile(path)
		return err
	})
	if err != nil || n != want {
		b.Fatalf("read %d files, %v, want %d", n, err, want)
	}
}

// BenchmarkWays makes the table in README.md: in each iteration a round by each way,
// with a store that has the blobs and was not asked for them yet. The figures are
// medians.
func BenchmarkWays(b *testing.B) {
	if os.Geteuid() != 0 {
		b.Skip("only root can mount and has users for slots")
	}
	took := map[string][]time.Duration{}
	for round := 0; b.Loop(); round++ {
		for _, name := range []string{"links", "kept", "overlay", "fuse"} {
			waysRound(b, name, fmt.Sprint(name, round), took)
		}
	}
	for what, t := range took {
		slices.Sort(t)
		b.ReportMetric(float64(t[len(t)/2].Microseconds())/1000, what+"-ms")
	}
}

func waysRound(b *testing.B, name, salt string, took map[string][]time.Duration) {
	f := newFixture(b, fileStore(b), inputroot.Options{Policy: inputroot.Link})
	base := b.TempDir()
	var w way
	at := base
	switch name {
	case "links":
		w = links{f: f}
	case "kept":
		shelf, err := inputroot.NewShelf(filepath.Join(base, "shelf"), slotOwner())
		if err != nil {
			b.Fatal(err)
		}
		defer shelf.Close()
		w = links{f, shelf}
	case "overlay":
		w = &overlay{f: f, cache: b.TempDir(), lower: map[digest.Digest]string{}}
	case "fuse":
		at = filepath.Join(base, "mnt")
		w = newFUSE(b, f, at, filepath.Join(base, "blobs"))
	}
	n := 0
	once := func(what string, tree benchTree, read bool) {
		n++
		dir := filepath.Join(at, fmt.Sprint("root", n))
		start := time.Now()
		w.make(b, tree, dir)
		note := func(what string) {
			took[name+"-"+what] = append(took[name+"-"+what], time.Since(start))
			start = time.Now()
		}
		note(what)
		if read {
			readAll(b, dir, len(tree.files))
			note("read")
		}
		w.remove(b, dir)
		note(what + "-remove")
	}
	files := f.some(b, 10_000, salt)
	first := f.treeOf(b, files)
	changed := maps.Clone(files)
	changed["dir42/file42"] = f.put(b, salt+" changed")
	second := f.treeOf(b, changed)
	once("cold", first, false)
	once("warm", first, true)
	once("warm", first, true)
	once("changed", second, false)

	tools := f.some(b, 5_000, salt+" tools")
	actions := 100
	if name == "links" {
		actions = 10 // each takes as long
	}
	for i := range actions {
		action := maps.Clone(tools)
		for j := range 5 {
			action[fmt.Sprintf("src/file%d", j)] = f.put(b, fmt.Sprint(salt, " source ", i, j))
		}
		if o, ok := w.(*overlay); ok && i == 0 {
			o.lower, o.cache = map[digest.Digest]string{}, b.TempDir()
		}
		what := "toolchain"
		if i == 0 {
			what = "toolchain-first"
		}
		once(what, f.treeOf(b, action), false)
	}
}
