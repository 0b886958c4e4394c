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
	plan  plan
	keep  *kept // nil: the root is not one to be kept

	links   map[link]struct{} // what is linked; nil where there is only one file
	copied  []copied          // what is to be copied
	missing []digest.Digest   // what the store turned out not to have
	dated   []dated           // modification times to set when all else is done
	modes   []directoryMode   // and then these
}

type copied struct {
	dst  string
	file *fileNode
}

// directoryMode is that of a directory that has one of its own: without bits that give
// rights to others, like setuid, and such that its owner can enter it, or nothing
// could be run there.
type directoryMode struct {
	path string
	perm os.FileMode
}

type dated struct {
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

// do makes what is planned.
func (w *work) do(ctx context.Context) error {
	for i := range w.plan.steps {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		if s := &w.plan.steps[i]; s.node != nil {
			if err := w.clear(s); err != nil {
				return err
			}
			if err := w.fill(ctx, s); err != nil {
				return err
			}
		}
	}
	return nil
}

// clear removes what is not wanted any more.
func (w *work) clear(s *step) error {
	for _, i := range s.unlink {
		if err := unlink(s.path + "/" + s.old.dir.files[i].name); err != nil {
			return err
		}
		w.keep.forgetFile(s.old, i)
	}
	for _, i := range s.unlinkSy {
		if err := unlink(s.path + "/" + s.old.dir.symlinks[i].Name); err != nil {
			return err
		}
	}
	for _, i := range s.remove {
		if err := w.shelf.removeAll(s.path + "/" + s.old.dir.children[i].name); err != nil {
			return err
		}
		w.keep.forget(s.old.children[i])
	}
	return nil
}

func unlink(path string) error {
	if err := unix.Unlink(path); err != nil {
		return &os.PathError{Op: "unlink", Path: path, Err: err}
	}
	return nil
}

// fill makes what is new in a directory.
func (w *work) fill(ctx context.Context, s *step) error {
	if s.make {
		if err := makeDirectory(s.path, w.owner, w.shelf); err != nil {
			return err
		}
	}
	d := s.node.dir
	for _, i := range s.files {
		if err := w.file(ctx, s.path+"/"+d.files[i].name, &d.files[i], &s.node.files[i]); err != nil {
			return err
		}
	}
	for _, i := range s.symlinks {
		l := d.symlinks[i]
		dst := s.path + "/" + l.Name
		if err := unix.Symlink(l.Target, dst); err != nil {
			return &os.LinkError{Op: "symlink", Old: l.Target, New: dst, Err: err}
		}
		w.date(dst, l.NodeProperties)
	}
	w.date(s.path, d.props)
	if m := d.props.GetUnixMode(); m != nil {
		w.modes = append(w.modes, directoryMode{s.path, os.FileMode(m.Value).Perm() | 0o500})
	}
	return nil
}

// date notes a modification time. Those of directories change while they are
// filled, and with those of their parents only when all is there.
func (w *work) date(path string, props *repb.NodeProperties) {
	if m := props.GetMtime(); m != nil {
		w.dated = append(w.dated, dated{path, m.AsTime()})
	}
}

// times sets what is done last.
func (w *work) times() error {
	for _, s := range w.dated {
		if err := setMtime(s.path, s.mtime); err != nil {
			return err
		}
	}
	// Those within others first, which may be closed then.
	for _, m := range slices.Backward(w.modes) {
		if err := os.Chmod(m.path, m.perm); err != nil {
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
func (w *work) file(ctx context.Context, dst string, f *fileNode, state *fileState) error {
	l := linkOf(f)
	if w.b.linker == nil || f.props != nil || f.digest.IsEmpty() {
		w.copied = append(w.copied, copied{dst, f})
		return nil
	}
	if w.links != nil {
		if _, again := w.links[l]; again {
			w.copied = append(w.copied, copied{dst, f})
			return nil
		}
		w.links[l] = struct{}{}
	}
	err := w.b.linker.Link(ctx, f.digest, dst, f.mode)
	if errors.Is(err, blob.ErrNotFound) {
		w.missing = append(w.missing, f.digest)
		return nil
	}
	if err != nil {
		return err
	}
	state.linked = true
	if w.root.auditor != nil && w.keep == nil {
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

// lookUp finds name in d, which may be nil: a directory that is not of the tree.
func (w *work) lookUp(d *directory, name string) (kind, *directory) {
	if d == nil {
		return isNothing, nil
	}
	kind, i := d.find(name)
	if kind == isDirectory {
		return kind, w.t.all[d.children[i].digest]
	}
	return kind, nil
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
