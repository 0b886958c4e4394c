//go:build linux

package inputroot

import (
	"errors"
	"fmt"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// checker looks what a command has done to a kept root, and removes from it what
// is not as it was built. It runs when nothing of the command runs any more.
//
// A directory whose stamp is as it was has the entries that it had: whatever
// changes them changes its ctime, which nobody can set. The files in it are the
// store's owner's, read-only, and so as they were, if commands have a user of their
// own; otherwise each is looked at. A directory that was changed is compared with
// what was built, entry by entry.
type checker struct {
	s     *Shelf
	k     *kept
	fd    int  // the root
	files bool // they are to be looked at too, where commands can change them
}

var errNotAsBuilt = errors.New("the input root is not as it was built")

// check checks the root k, which is at dir, with its files or only the directories.
// With an error it is to be removed.
func (s *Shelf) check(k *kept, dir string, files bool) error {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: dir, Err: err}
	}
	defer unix.Close(fd) //nolint:errcheck // only a handle
	c := checker{s: s, k: k, fd: fd, files: files && s.exposed}
	if ok, err := c.directory(k.root, "."); err != nil || !ok {
		return errors.Join(errNotAsBuilt, err)
	}
	return nil
}

// directory checks the directory n at rel, and all below it. The directories on the
// way there were checked. It reports whether n can stay.
func (c *checker) directory(n *node, rel string) (bool, error) {
	var st unix.Stat_t
	if err := unix.Fstatat(c.fd, rel, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return false, ignoreAbsent(err)
	}
	changed, err := false, error(nil)
	if !n.sure || n.stamp != stampOf(&st) {
		ok := false
		if ok, changed, err = c.compare(n, rel); err != nil || !ok {
			return false, err
		}
	} else if c.files {
		if changed, err = c.lookAtFiles(n, rel); err != nil {
			return false, err
		}
	}
	n.whole = n.hasAll()
	for i, child := range n.children {
		if child == nil {
			continue
		}
		path := rel + "/" + n.dir.children[i].name
		ok, err := c.directory(child, path)
		if err != nil {
			return false, err
		}
		if !ok {
			changed, n.whole = true, false
			c.k.forget(child)
			n.children[i] = nil
			if err := c.remove(path); err != nil {
				return false, err
			}
			continue
		}
		n.whole = n.whole && child.whole
	}
	if changed || !n.sure {
		if err := unix.Fstatat(c.fd, rel, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return false, fmt.Errorf("stat %s: %w", rel, err)
		}
		c.k.mark(n, &st)
	}
	return true, nil
}

func ignoreAbsent(err error) error {
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) || errors.Is(err, unix.EACCES) {
		return nil
	}
	return err
}

// hasAll reports whether nothing of n itself is absent.
func (n *node) hasAll() bool {
	for i := range n.files {
		if n.files[i].ino == 0 {
			return false
		}
	}
	return !slices.Contains(n.symlinks, 0) && !slices.Contains(n.children, nil)
}

// remove removes what is at path, a directory or whatever has taken its place.
func (c *checker) remove(path string) error {
	err := c.s.remove(c.fd, path, 0)
	if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		err = unix.Unlinkat(c.fd, path, 0)
	}
	return errors.Join(err, c.s.removeDeep())
}

// lookAtFiles looks at the files of n, whose entries are as they were.
func (c *checker) lookAtFiles(n *node, rel string) (changed bool, err error) {
	for i := range n.files {
		if n.files[i].ino == 0 {
			continue
		}
		path := rel + "/" + n.dir.files[i].name
		if c.isSound(c.fd, path, n, i) {
			continue
		}
		changed = true
		c.k.forgetFile(n, i)
		if err := unix.Unlinkat(c.fd, path, 0); err != nil {
			return true, fmt.Errorf("unlink %s: %w", path, err)
		}
	}
	return changed, nil
}

// isSound reports whether name in the directory at is file i of n. A command with a
// user of its own can only have replaced it, by what is its own or by another file of
// the input root; others can have changed it.
func (c *checker) isSound(at int, name string, n *node, i int) bool {
	f, want := &n.files[i], &n.dir.files[i]
	if c.s.exposed {
		return f.look(at, name, want) == fileSound
	}
	var st unix.Stat_t
	return unix.Fstatat(at, name, &st, unix.AT_SYMLINK_NOFOLLOW) == nil &&
		f.ino == st.Ino && st.Mode == unix.S_IFREG|permOf(want.mode) && st.Size == want.digest.Size() && int(st.Uid) == c.s.uid
}

// compare compares the directory n with what was built, and removes the difference.
// It reports whether n can stay, and whether anything was removed.
func (c *checker) compare(n *node, rel string) (ok, changed bool, err error) {
	const flags = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
	fd, err := unix.Openat(c.fd, rel, flags, 0)
	if err != nil {
		return false, false, ignoreAbsent(err)
	}
	defer unix.Close(fd) //nolint:errcheck // opened for reading
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Dev != n.stamp.dev || st.Ino != n.stamp.ino {
		return false, false, err
	}
	// One that a command has filled and emptied is slow to read for ever.
	if st.Size > maxDirBytes+512*int64(n.dir.entries()) || !c.s.isLikeNew(fd, &st) {
		return false, false, nil
	}
	there := presence{files: make([]bool, len(n.files)), symlinks: make([]bool, len(n.symlinks)), children: make([]bool, len(n.children))}
	entries, err := c.s.readAll(fd)
	if err != nil {
		return false, false, err
	}
	for _, e := range entries {
		if c.belongs(fd, n, e, &there) {
			continue
		}
		changed = true
		if err := c.s.removeEntry(fd, e, 0); err != nil {
			return false, true, errors.Join(err, c.s.removeDeep())
		}
	}
	c.drop(n, &there)
	return true, changed, c.s.removeDeep()
}

// presence says what of a node was found.
type presence struct{ files, symlinks, children []bool }

// belongs reports whether an entry of n is what was built, or a directory, which is
// looked at later.
func (c *checker) belongs(fd int, n *node, e dirent, there *presence) bool {
	switch kind, i := n.dir.find(e.name); kind {
	case isFile:
		// What is looked at when the root is taken need not be looked at twice.
		there.files[i] = n.files[i].ino != 0 && (c.s.exposed && !c.files && e.ino == n.files[i].ino || c.isSound(fd, e.name, n, i))
		return there.files[i]
	case isSymlink:
		var st unix.Stat_t
		there.symlinks[i] = !c.s.exposed && n.symlinks[i] != 0 && unix.Fstatat(fd, e.name, &st, unix.AT_SYMLINK_NOFOLLOW) == nil &&
			st.Ino == n.symlinks[i] && st.Mode&unix.S_IFMT == unix.S_IFLNK && int(st.Uid) == c.s.uid
		return there.symlinks[i]
	case isDirectory:
		there.children[i] = e.isDir && n.children[i] != nil
		return there.children[i]
	case isNothing:
	}
	return false
}

// drop forgets what was not found.
func (c *checker) drop(n *node, there *presence) {
	for i, ok := range there.files {
		if !ok {
			c.k.forgetFile(n, i)
		}
	}
	for i, ok := range there.symlinks {
		if !ok {
			n.symlinks[i] = 0
		}
	}
	for i, ok := range there.children {
		if !ok {
			c.k.forget(n.children[i])
			n.children[i] = nil
		}
	}
}

// park puts the root k away for later, checked.
func (s *Shelf) park(k *kept, dir string) error {
	// What commands can change is looked at when it is taken.
	if err := s.check(k, dir, false); err != nil {
		return err
	}
	name := s.newName()
	if err := unix.Renameat(unix.AT_FDCWD, dir, s.fd, name); err != nil {
		return fmt.Errorf("rename %s: %w", dir, err)
	}
	k.name = name
	s.kept = append(s.kept, k)
	var st unix.Stat_t
	if err := unix.Fstatat(s.fd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("stat the kept input root: %w", err)
	}
	k.mark(k.root, &st) // the rename has changed it
	return nil
}
