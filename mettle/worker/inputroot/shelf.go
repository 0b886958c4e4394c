//go:build linux

package inputroot

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Shelf removes input roots, and keeps for the next ones of the same slot whole roots
// (see kept), and of others the directories, emptied. A rename is cheaper than a removal and a creation, and
// on ext4 much cheaper: that does not give out an inode again for a minute after
// its deletion, and looks at every one of these when it needs another
// (recently_deleted in fs/ext4/ialloc.c), so that a worker which makes and removes
// a thousand directories a second comes to wait 0.4 ms for each.
//
// A directory is kept only if nothing tells it from a new one: owner, mode, flags
// and extended attributes, ACLs among them, are as they were. It is used by one
// goroutine at a time, and commands can't reach it where they have a user of
// their own.
type Shelf struct {
	dir   string
	fd    int
	owner Owner
	flags int // of a new directory
	// exposed says that commands are the worker's own user, and can reach it:
	// what is taken from it is looked at once more.
	exposed bool
	uid     int // of the worker
	spare   []string
	made    int // names so far
	taken   int // directories asked for since the last removal
	want    int // how many are worth keeping
	deep    []string
	buf     []byte
	// resting is the path of a root that was left in its place, empty: the next one
	// of the slot is mostly there too. "": there is none.
	resting string

	// kept are whole input roots, the one used last at the end. Each goes back
	// there by Remove, unless the file system can't be relied on.
	kept     []*kept
	current  *kept // in use; nil: the root in use is not one to be kept
	reliable bool
}

const (
	// maxSpare bounds the directories that are kept: those of the largest
	// usual input roots, a few KiB each on disk.
	maxSpare = 4096
	// maxOpen bounds the directories that are open at the same time; what
	// lies deeper is moved up first.
	maxOpen = 64
	// maxDirBytes is the size of a directory of one block. Directories never
	// shrink on ext4, and a large one is slow to read.
	maxDirBytes = 4096
	// ownFlags are the flags of chattr that a file system sets by itself, as a
	// directory grows and shrinks: indexed, huge, extents, inline data.
	ownFlags = 0x1000 | 0x40000 | 0x80000 | 0x10000000
)

// NewShelf makes a shelf of the directory dir, which it makes, on the file system
// of the input roots. Their directories belong to owner. The caller closes it
// and removes dir.
func NewShelf(dir string, owner Owner) (*Shelf, error) {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	s := &Shelf{dir: dir, fd: fd, owner: owner, uid: os.Geteuid(), buf: make([]byte, 32<<10), reliable: isReliable(fd)}
	if s.exposed = !owner.Set || owner.UID == s.uid; !owner.Set {
		s.owner.UID, s.owner.GID = s.uid, os.Getegid()
	}
	s.flags = flagsOf(fd)
	return s, nil
}

// Close frees the shelf, but leaves its directory.
func (s *Shelf) Close() error { return unix.Close(s.fd) }

// flagsOf are the flags of chattr, without ownFlags; 0 where the file system
// has none.
func flagsOf(fd int) int {
	flags, err := unix.IoctlGetInt(fd, unix.FS_IOC_GETFLAGS)
	if err != nil {
		return 0
	}
	return flags &^ ownFlags
}

// take makes path a directory from the shelf, and reports whether it could.
func (s *Shelf) take(path string) bool {
	if s == nil {
		return false
	}
	s.taken++
	if s.resting != "" && path == s.resting {
		s.resting = ""
		var st unix.Stat_t
		if s.exposed && s.untouched(unix.AT_FDCWD, path) ||
			!s.exposed && unix.Lstat(path, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR {
			return true
		}
		_ = Remove(path) // or the next way of making it fails
	}
	if len(s.spare) == 0 {
		return false
	}
	name := s.spare[len(s.spare)-1]
	s.spare = s.spare[:len(s.spare)-1]
	if s.exposed && !s.untouched(s.fd, name) {
		_ = Remove(s.dir + "/" + name) // its name is not given again
		return false
	}
	return unix.Renameat(s.fd, name, unix.AT_FDCWD, path) == nil
}

// untouched reports whether a spare directory, name in the directory at, is as it
// was left there.
func (s *Shelf) untouched(at int, name string) bool {
	const flags = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
	fd, err := unix.Openat(at, name, flags, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd) //nolint:errcheck // opened for reading
	for {
		n, err := unix.ReadDirent(fd, s.buf)
		if err != nil || len(parseDirents(s.buf[:n])) > 0 {
			return false
		}
		if n == 0 {
			return s.likeNew(fd)
		}
	}
}

// Remove is like the function Remove, but keeps what can be used again: the whole
// root, without what its command has left in it, if it is large enough, or else its
// directories, of which that of the root may be in its place still, empty: see
// Vacate.
func (s *Shelf) Remove(dir string) error {
	// What the input roots of late needed: without this, the directories that
	// commands make themselves would pile up. A large input root that does not
	// come again is forgotten after some hundred others.
	s.want = min(max(s.taken, s.want-(s.want+63)/64), maxSpare)
	s.taken = 0
	k := s.current
	s.current = nil
	var err error
	if k != nil && k.dir == dir && s.park(k, dir) == nil {
		err = s.evict()
	} else {
		err = s.rest(dir)
	}
	return err
}

// rest is removeAll, but where the directory itself is as good as new it is left in
// its place: to take it from there and to put it back costs as much as all else
// that is done to it.
func (s *Shelf) rest(dir string) error {
	fd, err := openDir(unix.AT_FDCWD, dir)
	if err != nil {
		return s.removeAll(dir)
	}
	keep, err := s.empty(fd, 0)
	keep = keep && err == nil && s.likeNew(fd)
	unix.Close(fd) //nolint:errcheck // opened for reading
	if !keep || s.removeDeep() != nil {
		return s.removeAll(dir)
	}
	s.resting = dir
	return nil
}

// Vacate takes the root that Remove has left in its place away, for who makes one
// there without the shelf.
func (s *Shelf) Vacate() error {
	dir := s.resting
	if dir == "" {
		return nil
	}
	s.resting = ""
	return s.removeAll(dir)
}

// HasRoots reports whether there are kept roots.
func (s *Shelf) HasRoots() bool { return len(s.kept) > 0 }

// Drop removes the kept roots: what they have of a store's blobs takes room on the
// disk also when the store has evicted these.
func (s *Shelf) Drop() error {
	var err error
	for _, k := range s.kept {
		err = errors.Join(err, s.removeAll(s.dir+"/"+k.name))
	}
	s.kept = nil
	return err
}

// evict removes the kept roots that are too many, too large together, or too old.
func (s *Shelf) evict() error {
	entries, n := 0, 0
	var gone []*kept
	for _, k := range slices.Backward(s.kept) {
		entries, n = entries+k.root.entries, n+1
		if n > maxKeptRoots || entries > maxKeptEntries || k.isOld() {
			gone = append(gone, k)
			entries, n = entries-k.root.entries, n-1
		}
	}
	if len(gone) == 0 {
		return nil
	}
	s.kept = slices.DeleteFunc(s.kept, func(k *kept) bool { return slices.Contains(gone, k) })
	var err error
	for _, k := range gone {
		err = errors.Join(err, s.removeAll(s.dir+"/"+k.name))
	}
	return err
}

// removeAll removes dir, and keeps its directories.
func (s *Shelf) removeAll(dir string) error {
	err := s.remove(unix.AT_FDCWD, dir, 0)
	if err == nil {
		err = s.removeDeep()
	}
	if err != nil {
		// Whatever it was: the thorough way, and its error.
		for _, name := range s.deep {
			if err := Remove(s.dir + "/" + name); err != nil {
				return err
			}
		}
		s.deep = nil
		return Remove(dir)
	}
	return nil
}

// removeDeep removes what was put aside because it lies too deep.
func (s *Shelf) removeDeep() error {
	for len(s.deep) > 0 {
		name := s.deep[len(s.deep)-1]
		s.deep = s.deep[:len(s.deep)-1]
		if err := s.remove(s.fd, name, 0); err != nil {
			s.deep = append(s.deep, name)
			return err
		}
	}
	return nil
}

// remove empties and shelves, or removes, the directory name in the directory at.
func (s *Shelf) remove(at int, name string, depth int) error {
	if depth >= maxOpen {
		return s.moveUp(at, name)
	}
	fd, err := openDir(at, name)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open %s: %w", name, err)
	}
	keep, err := s.empty(fd, depth)
	keep = keep && err == nil && len(s.spare) < s.want && s.likeNew(fd)
	unix.Close(fd) //nolint:errcheck // opened for reading
	if err != nil {
		return err
	}
	if keep {
		to := s.newName()
		if unix.Renameat(at, name, s.fd, to) == nil {
			s.spare = append(s.spare, to)
			return nil
		}
	}
	if err := unix.Unlinkat(at, name, unix.AT_REMOVEDIR); err != nil {
		return fmt.Errorf("rmdir %s: %w", name, err)
	}
	return nil
}

func openDir(at int, name string) (int, error) {
	const flags = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
	fd, err := unix.Openat(at, name, flags, 0)
	if errors.Is(err, unix.EACCES) {
		if err := unix.Fchmodat(at, name, 0o700, 0); err != nil {
			return -1, err
		}
		fd, err = unix.Openat(at, name, flags, 0)
	}
	return fd, err
}

func (s *Shelf) newName() string {
	s.made++
	return strconv.Itoa(s.made)
}

// moveUp puts a directory that lies too deep aside for later.
func (s *Shelf) moveUp(at int, name string) error {
	to := s.newName()
	if err := unix.Renameat(at, name, s.fd, to); err != nil {
		if err := unix.Fchmodat(at, name, 0o700, 0); err != nil {
			return err
		}
		if err := unix.Renameat(at, name, s.fd, to); err != nil {
			return err
		}
	}
	s.deep = append(s.deep, to)
	return nil
}

// likeNew reports whether the empty directory fd differs in nothing from one
// that makeDirectory makes.
func (s *Shelf) likeNew(fd int) bool {
	var st unix.Stat_t
	return unix.Fstat(fd, &st) == nil && st.Size <= maxDirBytes && s.isLikeNew(fd, &st)
}

// isLikeNew is likeNew but for what is in the directory, of which st is known.
func (s *Shelf) isLikeNew(fd int, st *unix.Stat_t) bool {
	if st.Mode != unix.S_IFDIR|0o755 || int(st.Uid) != s.owner.UID || int(st.Gid) != s.owner.GID {
		return false
	}
	n, err := unix.Flistxattr(fd, nil)
	if err != nil && !errors.Is(err, unix.ENOTSUP) || n > 0 && !onlyLabels(fd) {
		return false
	}
	return flagsOf(fd) == s.flags
}

// onlyLabels reports whether the extended attributes of fd are those that a
// security module gives to every file.
func onlyLabels(fd int) bool {
	var names [1024]byte
	n, err := unix.Flistxattr(fd, names[:])
	return err == nil && string(names[:n]) == "security.selinux\x00"
}

// empty removes all that is in the directory fd, and reports whether it saw it
// empty then: read to its end, which only a read that returns nothing tells. One
// that a signal interrupts returns the first names, be it just the dots, and the
// runtime sends signals to its own threads.
func (s *Shelf) empty(fd, depth int) (bool, error) {
	for opened, removed := false, false; ; {
		n, err := unix.ReadDirent(fd, s.buf)
		if err != nil {
			return false, fmt.Errorf("read a directory: %w", err)
		}
		if n == 0 {
			if !removed {
				return true, nil
			}
			removed = false
			if _, err := unix.Seek(fd, 0, unix.SEEK_SET); err != nil {
				return false, err
			}
			continue
		}
		for _, e := range parseDirents(s.buf[:n]) {
			removed = true
			err := s.removeEntry(fd, e, depth)
			if errors.Is(err, unix.EACCES) && !opened {
				// A command has made its own directory read-only.
				opened = true
				if err := unix.Fchmod(fd, 0o700); err != nil {
					return false, err
				}
				err = s.removeEntry(fd, e, depth)
			}
			if err != nil {
				return false, err
			}
		}
	}
}

func (s *Shelf) removeEntry(fd int, e dirent, depth int) error {
	if !e.isDir {
		err := unix.Unlinkat(fd, e.name, 0)
		if !errors.Is(err, unix.EISDIR) {
			return err
		}
	}
	return s.remove(fd, e.name, depth+1)
}

// readAll reads the entries of the directory fd from its beginning.
func (s *Shelf) readAll(fd int) (all []dirent, err error) {
	if _, err := unix.Seek(fd, 0, unix.SEEK_SET); err != nil {
		return nil, err
	}
	for {
		n, err := unix.ReadDirent(fd, s.buf)
		if err != nil {
			return nil, fmt.Errorf("read a directory: %w", err)
		}
		if n <= 0 {
			return all, nil
		}
		all = append(all, parseDirents(s.buf[:n])...)
	}
}

type dirent struct {
	name  string
	ino   uint64
	isDir bool
}

// parseDirents reads what getdents64 has written, without "." and "..".
func parseDirents(b []byte) (entries []dirent) {
	const nameAt = int(unsafe.Offsetof(unix.Dirent{}.Name))
	for len(b) > nameAt {
		size := int(binary.NativeEndian.Uint16(b[unsafe.Offsetof(unix.Dirent{}.Reclen):]))
		if size < nameAt || size > len(b) {
			break
		}
		name, _, _ := bytes.Cut(b[nameAt:size], []byte{0})
		if s := string(name); s != "." && s != ".." {
			entries = append(entries, dirent{s, binary.NativeEndian.Uint64(b), b[unsafe.Offsetof(unix.Dirent{}.Type)] == unix.DT_DIR})
		}
		b = b[size:]
	}
	return entries
}
