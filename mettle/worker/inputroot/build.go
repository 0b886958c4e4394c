//go:build linux

package inputroot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/tree"
)

// work is one Build.
type work struct {
	b     *Builder
	t     *loaded
	owner Owner
	shelf *Shelf
	root  *Root

	seen    map[link]struct{} // what is linked already
	copied  []copied          // what is to be copied
	missing []digest.Digest   // what the store turned out not to have
	stamps  []stamp           // modification times to set when all else is done
}

type copied struct {
	dst  string
	file *fileNode
}

type stamp struct {
	path  string
	mtime time.Time
}

// makeDirectory takes a directory from the shelf; without one it is mkdir, and
// chown where the owner is another.
func makeDirectory(path string, owner Owner, shelf *Shelf) error {
	if shelf.take(path) {
		return nil
	}
	if err := unix.Mkdir(path, 0o755); err != nil {
		return &os.PathError{Op: "mkdir", Path: path, Err: err}
	}
	if owner.Set {
		if err := unix.Lchown(path, owner.UID, owner.GID); err != nil {
			return &os.PathError{Op: "chown", Path: path, Err: err}
		}
	}
	return nil
}

// directory fills the directory at path.
func (w *work) directory(ctx context.Context, path string, d *directory) error {
	if err := context.Cause(ctx); err != nil {
		return err
	}
	for i := range d.files {
		if err := w.file(ctx, path+"/"+d.files[i].name, &d.files[i]); err != nil {
			return err
		}
	}
	for _, l := range d.symlinks {
		dst := path + "/" + l.Name
		if err := unix.Symlink(l.Target, dst); err != nil {
			return &os.LinkError{Op: "symlink", Old: l.Target, New: dst, Err: err}
		}
		w.stamp(dst, l.NodeProperties)
	}
	for _, c := range d.children {
		dst := path + "/" + c.name
		if err := makeDirectory(dst, w.owner, w.shelf); err != nil {
			return err
		}
		if err := w.directory(ctx, dst, w.t.all[c.digest]); err != nil {
			return err
		}
	}
	w.stamp(path, d.props)
	return nil
}

// stamp notes a modification time. Those of directories change while they are
// filled, and with those of their parents only when all is there.
func (w *work) stamp(path string, props *repb.NodeProperties) {
	if m := props.GetMtime(); m != nil {
		w.stamps = append(w.stamps, stamp{path, m.AsTime()})
	}
}

func (w *work) times() error {
	for _, s := range w.stamps {
		if err := setMtime(s.path, s.mtime); err != nil {
			return err
		}
	}
	return nil
}

func setMtime(path string, mtime time.Time) error {
	ts := []unix.Timespec{{Nsec: unix.UTIME_OMIT}, {Sec: mtime.Unix(), Nsec: int64(mtime.Nanosecond())}}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, path, ts, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return &os.PathError{Op: "utimensat", Path: path, Err: err}
	}
	return nil
}

// file links one file, or leaves it to copies.
func (w *work) file(ctx context.Context, dst string, f *fileNode) error {
	l := link{f.digest, f.mode}
	if w.b.linker == nil || f.props != nil || f.digest.IsEmpty() {
		w.copied = append(w.copied, copied{dst, f})
		return nil
	}
	if w.seen != nil {
		if _, again := w.seen[l]; again {
			w.copied = append(w.copied, copied{dst, f})
			return nil
		}
		w.seen[l] = struct{}{}
	}
	err := w.b.linker.Link(ctx, f.digest, dst, f.mode)
	if errors.Is(err, blob.ErrNotFound) {
		w.missing = append(w.missing, f.digest)
		return nil
	}
	if err != nil {
		return err
	}
	if w.root.auditor != nil {
		w.root.linked = append(w.root.linked, l)
	}
	return nil
}

// copies makes the files that are not links.
func (w *work) copies(ctx context.Context) error {
	if w.b.local || len(w.copied) <= 1 {
		for _, c := range w.copied {
			if err := w.copy(ctx, c); errors.Is(err, blob.ErrNotFound) {
				w.missing = append(w.missing, c.file.digest)
			} else if err != nil {
				return err
			}
		}
		return nil
	}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(w.b.o.MaxFetches)
	gone := make([]bool, len(w.copied))
	for i, c := range w.copied {
		group.Go(func() error {
			err := w.copy(ctx, c)
			if gone[i] = errors.Is(err, blob.ErrNotFound); gone[i] {
				return nil
			}
			return err
		})
	}
	err := group.Wait()
	for i, c := range w.copied {
		if gone[i] {
			w.missing = append(w.missing, c.file.digest)
		}
	}
	return err
}

// copy makes one file that shares its inode with nothing.
func (w *work) copy(ctx context.Context, c copied) (err error) {
	var src io.ReadCloser
	if d := c.file.digest; !d.IsEmpty() {
		if src, err = w.b.o.Store.Open(ctx, d, 0); err != nil {
			return fmt.Errorf("open blob %s: %w", d, err)
		}
		defer src.Close() //nolint:errcheck // opened for reading
	}
	f, err := os.OpenFile(c.dst, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if e := f.Close(); err == nil {
			err = e
		}
	}()
	if src != nil {
		r := io.Reader(src)
		if !w.b.local {
			// It came over a network.
			r = digest.NewVerifier(src, c.file.digest)
		}
		n, err := io.Copy(f, r)
		if err == nil && n != c.file.digest.Size() {
			err = fmt.Errorf("%w: %d bytes", blob.ErrCorrupt, n)
		}
		if err != nil {
			return fmt.Errorf("copy blob %s: %w", c.file.digest, err)
		}
	}
	return w.setProperties(f, c.file)
}

func (w *work) setProperties(f *os.File, node *fileNode) error {
	perm := os.FileMode(0o444)
	if node.mode == blob.LinkExecutable {
		perm = 0o555
	}
	if m := node.props.GetUnixMode(); m != nil {
		// No bits that give rights to others, like setuid.
		perm = os.FileMode(m.Value).Perm()
		if w.owner.Set {
			if err := f.Chown(w.owner.UID, w.owner.GID); err != nil {
				return err
			}
		}
	}
	if err := f.Chmod(perm); err != nil {
		return err
	}
	if m := node.props.GetMtime(); m != nil {
		return setMtime(f.Name(), m.AsTime())
	}
	return nil
}

// directories makes those of dirs that the tree does not have.
func (w *work) directories(root string, dirs []string) error {
	var made map[string]struct{}
	for _, dir := range dirs {
		if dir == "" {
			continue
		}
		d, at := w.t.root, 0
		for at < len(dir) {
			name, _, _ := strings.Cut(dir[at:], "/")
			end := at + len(name)
			kind, child := w.lookUp(d, name)
			if kind == isFile {
				return fmt.Errorf("%w: %q is a file, and an output or the working directory is to be below it", tree.ErrInvalid, dir[:end])
			}
			if kind == isSymlink {
				if err := w.beyondSymlink(root, dir); err != nil {
					return err
				}
				break
			}
			if kind == isNothing {
				if made == nil {
					made = make(map[string]struct{})
				}
				if _, ok := made[dir[:end]]; !ok {
					if err := makeDirectory(path.Join(root, dir[:end]), w.owner, w.shelf); err != nil {
						return err
					}
					made[dir[:end]] = struct{}{}
				}
			}
			d, at = child, end+1
		}
	}
	return nil
}

type kind uint8

const (
	isNothing kind = iota
	isFile
	isSymlink
	isDirectory
)

// lookUp finds name in d, which may be nil: a directory that is not of the tree.
func (w *work) lookUp(d *directory, name string) (kind, *directory) {
	if d == nil {
		return isNothing, nil
	}
	if i, ok := slices.BinarySearchFunc(d.children, name, func(c childNode, name string) int { return strings.Compare(c.name, name) }); ok {
		return isDirectory, w.t.all[d.children[i].digest]
	}
	if _, ok := slices.BinarySearchFunc(d.files, name, func(f fileNode, name string) int { return strings.Compare(f.name, name) }); ok {
		return isFile, nil
	}
	if _, ok := slices.BinarySearchFunc(d.symlinks, name, func(l *repb.SymlinkNode, name string) int { return strings.Compare(l.Name, name) }); ok {
		return isSymlink, nil
	}
	return isNothing, nil
}

// beyondSymlink makes a directory whose path leads over a symlink of the tree,
// as long as that leads nowhere out of it. Otherwise it does nothing: an output
// there will not be collected either.
func (w *work) beyondSymlink(root, dir string) error {
	r, err := os.OpenRoot(root)
	if err != nil {
		return err
	}
	defer r.Close() //nolint:errcheck // only a handle
	for i := 0; i <= len(dir); i++ {
		if i < len(dir) && dir[i] != '/' {
			continue
		}
		if r.Mkdir(dir[:i], 0o755) == nil && w.owner.Set {
			if err := r.Lchown(dir[:i], w.owner.UID, w.owner.GID); err != nil {
				return err
			}
		}
	}
	return nil
}
