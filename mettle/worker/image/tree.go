//go:build linux

package image

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// unpacker makes the tree of one layer. Every path of the layer is looked up
// beneath its root, as if that were the root of a file system.
type unpacker struct {
	o       unpackOptions
	root    int // O_PATH
	parent  int // the directory of the last entry, or -1
	path    string
	entries int
	bytes   int64
	buf     []byte
	// dirs are those whose times are to be set at the end, since entries change
	// them, and dirBytes is how long their paths are.
	dirs     []dirTime
	dirBytes int
}

type dirTime struct {
	path string
	at   time.Time
}

const (
	blockBytes = 4096 // what a file system gives out
	maxPath    = 4095 // the kernel's
	// maxDirBytes bounds the memory for directories' times; past it they are as
	// they come.
	maxDirBytes = 32 << 20
)

// Modes of what is unpacked: everything can be read by all, as the root of an
// image can, and is executed by all what someone can execute. Nobody can write to
// a layer that is in use, whatever the mode says.
const (
	dirMode  = 0o755
	fileMode = 0o444
)

func (u *unpacker) close() {
	if u.parent >= 0 {
		unix.Close(u.parent) //nolint:errcheck // only a place
	}
	unix.Close(u.root) //nolint:errcheck // only a place
}

// add adds one entry.
func (u *unpacker) add(h *tar.Header, content io.Reader) error {
	name := path.Clean("/" + h.Name)[1:]
	if len(name) > maxPath {
		return unix.ENAMETOOLONG
	}
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeDir, tar.TypeSymlink, tar.TypeLink, tar.TypeGNUSparse:
	default:
		return nil // devices and the like, and what is about the archive
	}
	if name == "" {
		return nil // its root is ours
	}
	if err := u.count(); err != nil {
		return err
	}
	dir, base := path.Split(name)
	parent, err := u.enter(strings.TrimSuffix(dir, "/"))
	if err != nil {
		return err
	}
	if rest, ok := strings.CutPrefix(base, whiteoutPrefix); ok {
		return u.whiteOut(parent, rest)
	}
	switch h.Typeflag {
	case tar.TypeDir:
		if u.dirBytes += len(name); u.dirBytes <= maxDirBytes {
			u.dirs = append(u.dirs, dirTime{name, h.ModTime})
		}
		return u.makeDir(parent, base)
	case tar.TypeSymlink:
		return u.place(parent, base, func() error { return u.symlink(parent, base, h) })
	case tar.TypeLink:
		return u.link(parent, base, h.Linkname)
	}
	return u.place(parent, base, func() error { return u.write(parent, base, h, content) })
}

// count counts one entry more, which takes room whatever it is.
func (u *unpacker) count() error {
	if u.entries++; u.entries > u.o.maxEntries {
		return fmt.Errorf("%w: it has over %d entries", ErrUnusable, u.o.maxEntries)
	}
	return u.o.reserve(blockBytes)
}

// enter opens a directory, which is made if need be. The descriptor is good until
// the next call, or until something is removed.
func (u *unpacker) enter(dir string) (int, error) {
	if dir == "" {
		return u.root, nil
	}
	if u.parent >= 0 && dir == u.path {
		return u.parent, nil
	}
	u.leave()
	fd, err := u.lookUp(dir)
	if errors.Is(err, unix.ENOENT) {
		if err := u.count(); err != nil {
			return -1, err
		}
		up, base := path.Split(dir)
		parent, err := u.enter(strings.TrimSuffix(up, "/"))
		if err != nil {
			return -1, err
		}
		if err := mkdir(parent, base); err != nil {
			return -1, fmt.Errorf("%.200q: %w", dir, err)
		}
		u.leave()
		fd, err = u.lookUp(dir)
		if err != nil {
			return -1, err
		}
	} else if err != nil {
		return -1, fmt.Errorf("%.200q: %w", dir, err)
	}
	u.parent, u.path = fd, dir
	return fd, nil
}

func (u *unpacker) leave() {
	if u.parent >= 0 {
		unix.Close(u.parent) //nolint:errcheck // only a place
		u.parent = -1
	}
}

// lookUp opens a directory as a process would whose root is that of the layer.
func (u *unpacker) lookUp(dir string) (int, error) {
	for {
		fd, err := unix.Openat2(u.root, dir, &unix.OpenHow{
			Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
		})
		if !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.EAGAIN) {
			return fd, err
		}
	}
}

// place makes something by f, in the place of what an earlier entry has made.
func (u *unpacker) place(parent int, base string, f func() error) error {
	err := f()
	if !errors.Is(err, unix.EEXIST) {
		return err
	}
	if err := u.remove(parent, base); err != nil {
		return err
	}
	return f()
}

// remove removes what is there, which may be the directory that is entered.
func (u *unpacker) remove(parent int, base string) error {
	if u.parent != parent {
		u.leave() // it may be what is removed, or lie behind it
	}
	err := unix.Unlinkat(parent, base, 0)
	if !errors.Is(err, unix.EISDIR) {
		return err
	}
	return os.RemoveAll(fmt.Sprintf("/proc/self/fd/%d/%s", parent, base))
}

// mkdir makes a directory that all can enter, whatever the umask.
func mkdir(parent int, base string) error {
	if err := unix.Mkdirat(parent, base, dirMode); err != nil {
		return err
	}
	return unix.Fchmodat(parent, base, dirMode, 0)
}

func (u *unpacker) makeDir(parent int, base string) error {
	err := mkdir(parent, base)
	if !errors.Is(err, unix.EEXIST) {
		return err
	}
	var st unix.Stat_t
	if err := unix.Fstatat(parent, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return nil
	}
	hidden := u.o.white.is(parent, base, &st)
	if err := u.remove(parent, base); err != nil {
		return err
	}
	if err := mkdir(parent, base); err != nil || !hidden {
		return err
	}
	// What layers below have there was removed, and this directory is a new one.
	return u.o.white.opaque(parent, base)
}

func (u *unpacker) symlink(parent int, base string, h *tar.Header) error {
	if h.Linkname == "" || len(h.Linkname) > maxPath {
		return fmt.Errorf("%w: a symlink to %d bytes", ErrUnusable, len(h.Linkname))
	}
	if err := unix.Symlinkat(h.Linkname, parent, base); err != nil {
		return err
	}
	return setTime(parent, base, h.ModTime)
}

func (u *unpacker) link(parent int, base, target string) error {
	target = path.Clean("/" + target)[1:]
	dir, name := path.Split(target)
	from := u.root
	if dir != "" {
		var err error
		if from, err = u.lookUp(strings.TrimSuffix(dir, "/")); err != nil {
			return fmt.Errorf("hard link to %.200q, which is not in this layer: %w", target, err)
		}
		defer unix.Close(from) //nolint:errcheck // only a place
	}
	var old, now unix.Stat_t
	if err := unix.Fstatat(from, name, &old, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("hard link to %.200q, which is not in this layer: %w", target, err)
	}
	if old.Mode&unix.S_IFMT == unix.S_IFDIR || u.o.white.is(from, name, &old) {
		return fmt.Errorf("%w: hard link to %.200q, which is no file", ErrUnusable, target)
	}
	if unix.Fstatat(parent, base, &now, unix.AT_SYMLINK_NOFOLLOW) == nil && now.Dev == old.Dev && now.Ino == old.Ino {
		return nil // to itself
	}
	return u.place(parent, base, func() error { return unix.Linkat(from, name, parent, base, 0) })
}

// write makes a file.
func (u *unpacker) write(parent int, base string, h *tar.Header, content io.Reader) error {
	if h.Size > u.o.maxBytes-u.bytes {
		return fmt.Errorf("%w: its files have over %d bytes", ErrUnusable, u.o.maxBytes)
	}
	fd, err := unix.Openat(parent, base, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), base)
	err = u.fill(f, h, content)
	if e := f.Close(); err == nil {
		err = e
	}
	if err != nil {
		return err
	}
	return setTime(parent, base, h.ModTime)
}

func (u *unpacker) fill(f *os.File, h *tar.Header, content io.Reader) error {
	if err := u.o.reserve((h.Size + blockBytes - 1) / blockBytes * blockBytes); err != nil {
		return err
	}
	u.bytes += h.Size
	if u.buf == nil {
		u.buf = make([]byte, 128<<10)
	}
	// An error of f is the disk's, one of content the layer's.
	for {
		n, err := content.Read(u.buf)
		if _, e := f.Write(u.buf[:n]); e != nil {
			return e
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return streamError{err}
		}
	}
	mode := uint32(fileMode) | uint32(h.Mode)&0o200 //nolint:gosec // one bit
	if h.Mode&0o111 != 0 {
		mode |= 0o111
	}
	return unix.Fchmod(int(f.Fd()), mode)
}

// setTime sets the time of the last change. Times that the file system can't have
// are left as they are.
func setTime(parent int, base string, at time.Time) error {
	ts, err := unix.TimeToTimespec(at)
	if err != nil {
		return nil //nolint:nilerr // as said
	}
	err = unix.UtimesNanoAt(parent, base, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW)
	if errors.Is(err, unix.EINVAL) {
		return nil
	}
	return err
}

// finish sets the times of directories.
func (u *unpacker) finish() error {
	for _, d := range u.dirs {
		dir, base := path.Split(d.path)
		parent, err := u.lookUp("/" + dir) // "/" is the layer's
		if err != nil {
			continue // a later entry has removed it
		}
		var st unix.Stat_t
		err = unix.Fstatat(parent, base, &st, unix.AT_SYMLINK_NOFOLLOW)
		if err == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR {
			err = setTime(parent, base, d.at)
		}
		unix.Close(parent) //nolint:errcheck // only a place
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return err
		}
	}
	return nil
}
