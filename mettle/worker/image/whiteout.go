//go:build linux

package image

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// How a layer says that something of a layer below is gone: in a tar, by a file of
// a special name beside it; in a tree for overlayfs, by a character device 0:0 in
// its place, which anyone may make, and for all that is in a directory by an
// attribute of that. On a file system that is an overlay itself, such a device
// can't be made; there newer kernels take an empty file with an attribute.
const (
	whiteoutPrefix = ".wh."
	opaqueRest     = ".wh..opq" // after whiteoutPrefix

	opaqueAttr   = "user.overlay.opaque"
	whiteoutAttr = "user.overlay.whiteout"
)

// whiteouts is how a file system takes them.
type whiteouts int

const (
	asDevices whiteouts = iota
	asFiles
)

// findWhiteouts finds out what the file system of dir takes.
func findWhiteouts(dir string) (whiteouts, error) {
	probe, err := os.MkdirTemp(dir, "probe-*"+partSuffix)
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(probe) //nolint:errcheck // else it stays, and does no harm
	if err := unix.Setxattr(probe, opaqueAttr, []byte("y"), 0); err != nil {
		return 0, fmt.Errorf("%w: it takes no attributes, choose a directory on another: %w", ErrUnsupported, err)
	}
	err = unix.Mknod(filepath.Join(probe, "w"), unix.S_IFCHR, 0)
	if err == nil {
		return asDevices, nil
	}
	if !hasFileWhiteouts() {
		return 0, fmt.Errorf("%w: it takes no whiteouts, maybe as it is an overlay itself; choose a directory on another: %w", ErrUnsupported, err)
	}
	return asFiles, nil
}

// hasFileWhiteouts: Linux 6.8 and later.
func hasFileWhiteouts() bool {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return false
	}
	release := string(u.Release[:max(bytes.IndexByte(u.Release[:], 0), 0)])
	major, rest, _ := strings.Cut(release, ".")
	minor, _, _ := strings.Cut(rest, ".")
	a, errA := strconv.Atoi(major)
	b, errB := strconv.Atoi(minor)
	return errA == nil && errB == nil && (a > 6 || a == 6 && b >= 8)
}

// whiteOut handles an entry whose name is whiteoutPrefix and rest.
func (u *unpacker) whiteOut(parent int, rest string) error {
	switch {
	case rest == opaqueRest:
		return u.o.white.opaque(parent, ".")
	case strings.HasPrefix(rest, whiteoutPrefix):
		return nil // aufs's own
	case rest == "" || rest == "." || rest == "..":
		return fmt.Errorf("%w: a whiteout of nothing", ErrUnusable)
	}
	var st unix.Stat_t
	err := unix.Fstatat(parent, rest, &st, unix.AT_SYMLINK_NOFOLLOW)
	switch {
	case errors.Is(err, unix.ENOENT):
		return u.o.white.make(parent, rest)
	case err != nil:
		return err
	case st.Mode&unix.S_IFMT == unix.S_IFDIR:
		// It hides what is below, and not what is in the same layer.
		return u.o.white.opaque(parent, rest)
	}
	return nil
}

// make makes a whiteout, unless its directory hides everything below anyway: there
// it would be seen.
func (w whiteouts) make(parent int, base string) error {
	if isOpaque(parent, ".") {
		return nil
	}
	if w == asDevices {
		return unix.Mknodat(parent, base, unix.S_IFCHR, 0)
	}
	fd, err := unix.Openat(parent, base, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	defer unix.Close(fd) //nolint:errcheck // nothing was written
	if err := unix.Fsetxattr(fd, whiteoutAttr, []byte("y"), 0); err != nil {
		return err
	}
	// The directory says that there are such files in it, unless it is opaque.
	return setAttr(parent, ".", opaqueAttr, "x", unix.XATTR_CREATE)
}

// is reports whether what st is of is a whiteout.
func (w whiteouts) is(parent int, base string, st *unix.Stat_t) bool {
	if w == asDevices {
		return st.Mode&unix.S_IFMT == unix.S_IFCHR
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size > 0 {
		return false
	}
	_, err := unix.Lgetxattr(fmt.Sprintf("/proc/self/fd/%d/%s", parent, base), whiteoutAttr, nil)
	return err == nil
}

func isOpaque(parent int, base string) bool {
	value := make([]byte, 1)
	n, err := unix.Lgetxattr(fmt.Sprintf("/proc/self/fd/%d/%s", parent, base), opaqueAttr, value)
	return err == nil && n == 1 && value[0] == 'y'
}

// opaque has a directory hide what layers below have there. Whiteouts in it would be
// seen from now on.
func (w whiteouts) opaque(parent int, base string) error {
	if isOpaque(parent, base) {
		return nil
	}
	if err := setAttr(parent, base, opaqueAttr, "y", 0); err != nil {
		return err
	}
	fd, err := unix.Openat(parent, base, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	dir := os.NewFile(uintptr(fd), base)
	defer dir.Close() //nolint:errcheck // opened for reading
	names, err := dir.Readdirnames(-1)
	for _, name := range names {
		var st unix.Stat_t
		if err := unix.Fstatat(fd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return err
		}
		if w.is(fd, name, &st) {
			if err := unix.Unlinkat(fd, name, 0); err != nil {
				return err
			}
		}
	}
	return err
}

func setAttr(parent int, base, name, value string, flags int) error {
	fd, err := unix.Openat(parent, base, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd) //nolint:errcheck // nothing was written
	if err := unix.Fsetxattr(fd, name, []byte(value), flags); flags != unix.XATTR_CREATE || !errors.Is(err, unix.EEXIST) {
		return err
	}
	return nil
}
