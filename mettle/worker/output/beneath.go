//go:build linux

package output

import (
	"errors"
	"strings"

	"golang.org/x/sys/unix"
)

// rootDir opens files beneath the input root.
type rootDir struct {
	fd int
	// walk is set where the kernel has no openat2 (before 5.6), or a sandbox
	// around us forbids it. Paths behind symlinks are then refused altogether.
	walk bool
}

func openRootDir(dir string) (*rootDir, error) {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return &rootDir{fd: fd}, nil
}

func (r *rootDir) close() { _ = unix.Close(r.fd) }

// openFlags don't wait for a FIFO's writer, and make no terminal ours.
const openFlags = unix.O_RDONLY | unix.O_NONBLOCK | unix.O_NOCTTY | unix.O_CLOEXEC

// open opens a file or directory, following symlinks on the way to it as long as
// they stay in the root (else EXDEV), but not the last one (ELOOP). The empty
// path is the root.
func (r *rootDir) open(rel string) (fd int, st unix.Stat_t, err error) {
	if fd, err = r.openat2(rel, openFlags|unix.O_NOFOLLOW); err != nil {
		return -1, st, err
	}
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd) //nolint:errcheck // opened for reading
		return -1, st, err
	}
	// For an *os.File, a non-blocking descriptor is one for the poller, which
	// takes no files.
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFL, 0); err != nil {
		unix.Close(fd) //nolint:errcheck // opened for reading
		return -1, st, err
	}
	return fd, st, nil
}

// readlink returns the target of a symlink and its own attributes; EINVAL where
// it is none.
func (r *rootDir) readlink(rel string) (target string, st unix.Stat_t, err error) {
	fd, err := r.openat2(rel, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC)
	if err != nil {
		return "", st, err
	}
	defer unix.Close(fd) //nolint:errcheck // only a handle
	if err := unix.Fstat(fd, &st); err != nil {
		return "", st, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFLNK {
		return "", st, unix.EINVAL
	}
	target, err = readlinkat(fd, "")
	return target, st, err
}

// readlinkat reads a target of any length that a symlink can have.
func readlinkat(fd int, name string) (string, error) {
	var buf [unix.PathMax]byte
	n, err := unix.Readlinkat(fd, name, buf[:])
	if err != nil {
		return "", err
	}
	return string(buf[:n]), nil
}

// isDirectory reports whether rel, behind whatever symlinks within the root, is
// a directory.
func (r *rootDir) isDirectory(rel string) bool {
	fd, err := r.openat2(rel, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC)
	if err != nil {
		return false
	}
	unix.Close(fd) //nolint:errcheck // only a handle
	return true
}

func (r *rootDir) openat2(rel string, flags int) (int, error) {
	if rel == "" {
		rel = "."
	}
	if !r.walk {
		fd, err := unix.Openat2(r.fd, rel, &unix.OpenHow{
			Flags:   uint64(flags),
			Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_MAGICLINKS,
		})
		for range 5 { // somebody moves directories about on this machine
			if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
				break
			}
			fd, err = unix.Openat2(r.fd, rel, &unix.OpenHow{Flags: uint64(flags), Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_MAGICLINKS})
		}
		if !errors.Is(err, unix.ENOSYS) && !errors.Is(err, unix.EPERM) {
			return fd, err
		}
		r.walk = true
	}
	return r.openByWalk(rel, flags)
}

// openByWalk opens one directory after the other.
func (r *rootDir) openByWalk(rel string, flags int) (int, error) {
	at := r.fd
	defer func() {
		if at != r.fd {
			unix.Close(at) //nolint:errcheck // only a handle
		}
	}()
	for {
		name, rest, more := strings.Cut(rel, "/")
		if !more {
			return unix.Openat(at, name, flags|unix.O_NOFOLLOW, 0)
		}
		next, err := unix.Openat(at, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return -1, err
		}
		if at != r.fd {
			unix.Close(at) //nolint:errcheck // only a handle
		}
		at, rel = next, rest
		var st unix.Stat_t
		if err := unix.Fstat(at, &st); err != nil {
			return -1, err
		}
		if st.Mode&unix.S_IFMT == unix.S_IFLNK {
			return -1, unix.EXDEV
		}
	}
}
