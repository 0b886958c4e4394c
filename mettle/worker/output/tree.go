//go:build linux

package output

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/mettle-build/mettle/elan/digest"
)

// treeBuilder gathers the Directories of one output directory, each once, with
// children before their parents.
type treeBuilder struct {
	seen map[digest.Digest]struct{}
	dirs []builtDirectory
	size int64 // of the Tree, about
}

type builtDirectory struct {
	digest digest.Digest
	data   []byte
}

// outputDirectory collects the directory fd, which it closes. Both the Tree and
// the Directories themselves become blobs, whatever the format: Please makes
// output directories into inputs by their Directories, and asks for nothing but
// the Tree.
func (w *work) outputDirectory(ctx context.Context, path, rel string, fd int) error {
	t := &treeBuilder{seen: make(map[digest.Digest]struct{})}
	root, err := w.directory(ctx, t, os.NewFile(uintptr(fd), w.req.Root+"/"+rel), rel, 0)
	if err != nil {
		return err
	}
	for _, d := range t.dirs {
		if err := w.put(ctx, d.digest, d.data); err != nil {
			return err
		}
	}
	out := &repb.OutputDirectory{Path: path}
	format := w.req.Command.OutputDirectoryFormat
	if format == repb.Command_DIRECTORY_ONLY || format == repb.Command_TREE_AND_DIRECTORY {
		out.RootDirectoryDigest = root.Proto()
	}
	if format != repb.Command_DIRECTORY_ONLY {
		data := t.encode()
		d := digest.Of(w.req.Function, data)
		if err := w.put(ctx, d, data); err != nil {
			return err
		}
		out.TreeDigest, out.IsTopologicallySorted = d.Proto(), true
	}
	w.got.Result.OutputDirectories = append(w.got.Result.OutputDirectories, out)
	return nil
}

// encode writes the Tree in the form that OutputDirectory.is_topologically_sorted
// describes: the root first, parents before children. As the Directories stand
// children first, that is their reverse, and it depends on nothing but the
// contents.
func (t *treeBuilder) encode() []byte {
	b := make([]byte, 0, t.size)
	for i, d := range slices.Backward(t.dirs) {
		field := protowire.Number(2) // children
		if i == len(t.dirs)-1 {
			field = 1 // root
		}
		b = protowire.AppendTag(b, field, protowire.BytesType)
		b = protowire.AppendBytes(b, d.data)
	}
	return b
}

// directory takes in the directory f, which it closes, and all below it.
func (w *work) directory(ctx context.Context, t *treeBuilder, f *os.File, rel string, depth int) (digest.Digest, error) {
	defer f.Close() //nolint:errcheck // opened for reading
	if depth > w.c.o.MaxDepth {
		return digest.Digest{}, fmt.Errorf("%w: directories are over %d levels deep", ErrUnusable, w.c.o.MaxDepth)
	}
	entries, err := w.readDirectory(f)
	if err != nil {
		return digest.Digest{}, err
	}
	m := &repb.Directory{}
	if w.wantMtime || w.wantMode {
		var st unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &st); err != nil {
			return digest.Digest{}, err
		}
		m.NodeProperties = w.properties(&st)
	}
	for _, e := range entries {
		if err := w.entry(ctx, t, m, entry{dir: f, rel: join(rel, e.Name()), name: e.Name(), kind: e.Type(), depth: depth}); err != nil {
			return digest.Digest{}, err
		}
	}
	d, data, err := digest.OfMessage(w.req.Function, m)
	if err != nil {
		return digest.Digest{}, err
	}
	if _, ok := t.seen[d]; !ok {
		t.seen[d] = struct{}{}
		t.dirs = append(t.dirs, builtDirectory{d, data})
		if t.size += int64(len(data)) + 6; t.size > w.c.o.MaxTreeBytes {
			return digest.Digest{}, fmt.Errorf("%w: its Tree is over %d bytes", ErrUnusable, w.c.o.MaxTreeBytes)
		}
	}
	return d, nil
}

func join(rel, name string) string {
	if rel == "" {
		return name
	}
	return rel + "/" + name
}

// readDirectory lists f by name.
func (w *work) readDirectory(f *os.File) ([]fs.DirEntry, error) {
	var all []fs.DirEntry
	for {
		some, err := f.ReadDir(4096)
		if e := w.count(len(some)); e != nil {
			return nil, e
		}
		all = append(all, some...)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, err
		}
	}
	slices.SortFunc(all, func(a, b fs.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
	return all, nil
}

// entry is one entry of a directory that is open.
type entry struct {
	dir       *os.File
	rel, name string
	kind      fs.FileMode
	depth     int
}

// entry adds one entry to m, by name order.
func (w *work) entry(ctx context.Context, t *treeBuilder, m *repb.Directory, e entry) error {
	if err := checkUTF8("name", e.name); err != nil {
		return err
	}
	switch e.kind {
	case 0, fs.ModeDir:
	case fs.ModeSymlink:
		return w.symlinkEntry(m, e)
	default:
		w.note("%q is not returned: it is a FIFO, a socket or a device", e.rel)
		return nil
	}
	fd, err := unix.Openat(int(e.dir.Fd()), e.name, openFlags|unix.O_NOFOLLOW, 0)
	if errors.Is(err, unix.EACCES) {
		return fmt.Errorf("%w: %q can't be read: %w", ErrUnusable, e.rel, err)
	}
	if err != nil {
		return &os.PathError{Op: "open", Path: e.rel, Err: err}
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFL, 0); err != nil { // see rootDir.open
		unix.Close(fd) //nolint:errcheck // opened for reading
		return &os.PathError{Op: "fcntl", Path: e.rel, Err: err}
	}
	if e.kind == fs.ModeDir {
		d, err := w.directory(ctx, t, os.NewFile(uintptr(fd), w.req.Root+"/"+e.rel), e.rel, e.depth+1)
		if err != nil {
			return err
		}
		m.Directories = append(m.Directories, &repb.DirectoryNode{Name: e.name, Digest: d.Proto()})
		return nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd) //nolint:errcheck // opened for reading
		return &os.PathError{Op: "stat", Path: e.rel, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		// A process that lives has put it there since the directory was listed.
		unix.Close(fd) //nolint:errcheck // opened for reading
		return fmt.Errorf("%q is no file any more", e.rel)
	}
	if w.foreign(&st) {
		unix.Close(fd) //nolint:errcheck // opened for reading
		return fmt.Errorf("%w: %q belongs to somebody else, and the command can't read it", ErrUnusable, e.rel)
	}
	f, err := w.file(ctx, e.rel, fd, &st)
	if err != nil {
		return err
	}
	m.Files = append(m.Files, &repb.FileNode{
		Name: e.name, Digest: f.digest.Proto(), IsExecutable: f.executable, NodeProperties: w.properties(&f.stat),
	})
	return nil
}

func (w *work) symlinkEntry(m *repb.Directory, e entry) error {
	target, err := readlinkat(int(e.dir.Fd()), e.name)
	if err != nil {
		return &os.PathError{Op: "readlink", Path: e.rel, Err: err}
	}
	if err := checkUTF8("symlink target", target); err != nil {
		return err
	}
	node := &repb.SymlinkNode{Name: e.name, Target: target}
	if w.wantMtime || w.wantMode {
		var st unix.Stat_t
		if err := unix.Fstatat(int(e.dir.Fd()), e.name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return &os.PathError{Op: "stat", Path: e.rel, Err: err}
		}
		node.NodeProperties = w.properties(&st)
	}
	m.Symlinks = append(m.Symlinks, node)
	return nil
}
