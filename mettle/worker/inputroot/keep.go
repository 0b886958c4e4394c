//go:build linux

package inputroot

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// What a Build does for a root that will be kept, and with one that was.

// mayKeep reports whether the root is worth keeping, and can be. Files that are
// copies because commands run as root can be changed by them; those with properties
// of their own belong to the command.
func (w *work) mayKeep() bool {
	return w.mayWatch() && w.t.files >= minKeptFiles && !w.t.special
}

// mayWatch reports whether it can be noted what the root is like, so that what its
// command changes shows: for Audit, if not for the next root.
func (w *work) mayWatch() bool {
	return w.shelf != nil && w.shelf.reliable && w.b.linker != nil && w.t.files > 0 && w.t.entries <= maxKeptEntries
}

// prepare chooses the kept root to begin with, if any, and plans. It changes nothing,
// so that the root is still there when a blob turns out to be missing.
func (w *work) prepare(req *Request) (*node, *kept) {
	var base *kept
	var old *node
	if mayKeep := w.mayKeep(); mayKeep || w.b.auditor != nil && w.mayWatch() {
		if mayKeep {
			base, _ = w.shelf.nearest(w.b, w.t, req.Digest)
		}
		if base != nil && w.shelf.exposed && w.shelf.check(base, w.shelf.dir+"/"+base.name, true) != nil {
			base.begun, base = time.Time{}, nil // evict removes it
		}
		if base != nil {
			old = base.root
		}
		if w.keep = base; base == nil {
			w.keep = &kept{builder: w.b, links: make(map[link]struct{}, w.t.files), begun: w.root.begun}
		}
		w.links = w.keep.links
	} else if w.t.files > 1 && w.b.linker != nil {
		w.links = make(map[link]struct{}, w.t.files)
	}
	return w.plan.directory(req.Dir, old, req.Digest, w.t.root, false), base
}

// begin makes the root's directory: the kept one, or a new one.
func (w *work) begin(req *Request, base *kept) error {
	if base == nil {
		return makeDirectory(req.Dir, req.Owner, req.Shelf)
	}
	s := w.shelf
	if err := s.Vacate(); err != nil {
		return err
	}
	s.kept = slices.DeleteFunc(s.kept, func(k *kept) bool { return k == base })
	if err := unix.Renameat(s.fd, base.name, unix.AT_FDCWD, req.Dir); err != nil {
		err = &os.LinkError{Op: "rename", Old: base.name, New: req.Dir, Err: err}
		return errors.Join(err, Remove(s.dir+"/"+base.name))
	}
	base.name = ""
	return nil
}

// seal notes what the new root is like, before anything else is made in it and
// before the command runs.
func (w *work) seal(dir string, root *node) error {
	k := w.keep
	k.root, k.dir = root, dir
	for i := range w.plan.steps {
		if s := &w.plan.steps[i]; s.node != nil {
			if err := w.look(s); err != nil {
				return err
			}
		}
	}
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		return &os.PathError{Op: "stat", Path: dir, Err: err}
	}
	k.mark(root, &st) // it was renamed, at least
	k.settle()
	w.root.kept = k
	for _, c := range w.copied {
		k.copies += c.file.digest.Size()
	}
	if k.copies <= maxKeptCopies && w.mayKeep() {
		w.shelf.current = k
	}
	return nil
}

// look notes the inodes of what was made in a directory.
func (w *work) look(s *step) error {
	fd, err := unix.Open(s.path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: s.path, Err: err}
	}
	defer unix.Close(fd) //nolint:errcheck // opened for reading
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return &os.PathError{Op: "stat", Path: s.path, Err: err}
	}
	w.keep.mark(s.node, &st)
	if len(s.files)+len(s.symlinks) == 0 {
		return nil
	}
	entries, err := w.shelf.readAll(fd)
	if err != nil {
		return fmt.Errorf("%s: %w", s.path, err)
	}
	n := s.node
	for _, e := range entries {
		switch kind, i := n.dir.find(e.name); kind {
		case isFile:
			n.files[i].ino = e.ino
		case isSymlink:
			n.symlinks[i] = e.ino
		case isDirectory, isNothing:
		}
	}
	if err := w.count(fd, s); err != nil || !w.shelf.exposed {
		return err
	}
	for _, i := range s.files {
		if err := unix.Fstatat(fd, n.dir.files[i].name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return &os.PathError{Op: "stat", Path: s.path + "/" + n.dir.files[i].name, Err: err}
		}
		n.files[i].ino, n.files[i].mtime, n.files[i].ctime = st.Ino, st.Mtim.Nano(), st.Ctim.Nano()
	}
	return nil
}

// count finds out whether what the store has linked into a directory are its own
// files: on another file system they are copies, and take room.
func (w *work) count(fd int, s *step) error {
	n := s.node
	for _, i := range s.files {
		if !n.files[i].linked {
			continue
		}
		var st unix.Stat_t
		if err := unix.Fstatat(fd, n.dir.files[i].name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return &os.PathError{Op: "stat", Path: s.path + "/" + n.dir.files[i].name, Err: err}
		}
		if st.Nlink > 1 {
			return nil // one tells of all: what has one name may have been evicted
		}
		n.files[i].linked = false
		w.keep.copies += n.dir.files[i].digest.Size()
	}
	return nil
}
