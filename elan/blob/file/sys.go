package file

import (
	"errors"
	"io"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// constMtime, 2000-01-01 UTC, is the modification time of every file of the
// store. Hard-linked inputs so look the same to every run of an action, any
// write to one shows, and the access time is free to tell the last use. The
// date is one that zip files (from 1980) and 32-bit clocks can hold.
const constMtime = 946684800

// copyBufferSize is that of the buffers for hashing and copying.
const copyBufferSize = 256 << 10

//nolint:gochecknoglobals // a pool is shared by design
var copyBuffers = sync.Pool{New: func() any { b := make([]byte, copyBufferSize); return &b }}

// openFile is open(2) with close-on-exec, repeated when a signal interrupts it.
func openFile(path string, flags int, perm uint32) (int, error) {
	for {
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC|unix.O_NOFOLLOW, perm)
		if err != unix.EINTR {
			return fd, err
		}
	}
}

// openRead opens a file of the store for reading. O_NOATIME leaves the access
// time to this package; the kernel grants it to the owner of the file only.
func openRead(path string) (int, error) {
	fd, err := openFile(path, unix.O_RDONLY|unix.O_NOATIME, 0)
	if errors.Is(err, unix.EPERM) {
		return openFile(path, unix.O_RDONLY, 0)
	}
	return fd, err
}

func writeAll(fd int, p []byte) error {
	for len(p) > 0 {
		n, err := unix.Write(fd, p)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return err
		case n == 0:
			return io.ErrShortWrite
		default:
			p = p[n:]
		}
	}
	return nil
}

func pread(fd int, p []byte, off int64) (int, error) {
	for {
		n, err := unix.Pread(fd, p, off)
		if err != unix.EINTR {
			return max(n, 0), err
		}
	}
}

// setTimes sets the access time of path, and its modification time to
// constMtime.
func setTimes(path string, atime time.Time) error {
	ts := [2]unix.Timespec{timespec(atime), {Sec: constMtime}}
	return unix.UtimesNanoAt(unix.AT_FDCWD, path, ts[:], unix.AT_SYMLINK_NOFOLLOW)
}

// setAtime sets the access time of path, and nothing else.
func setAtime(path string, atime time.Time) error {
	ts := [2]unix.Timespec{timespec(atime), {Nsec: unix.UTIME_OMIT}}
	return unix.UtimesNanoAt(unix.AT_FDCWD, path, ts[:], unix.AT_SYMLINK_NOFOLLOW)
}

func timespec(t time.Time) unix.Timespec {
	return unix.NsecToTimespec(t.UnixNano())
}

func atimeOf(st *unix.Stat_t) time.Time {
	return time.Unix(st.Atim.Unix())
}

// copyAll copies size bytes from the start of src to the start of dst: without
// copying where the file system can share blocks, inside the kernel where it
// can do that, and by hand elsewhere.
func copyAll(dst, src int, size int64) error {
	if size == 0 || unix.IoctlFileClone(dst, src) == nil {
		return nil
	}
	var off int64
	for off < size {
		from := off
		n, err := unix.CopyFileRange(src, &from, dst, nil, int(min(size-off, 1<<30)), 0)
		switch {
		case err == unix.EINTR:
		case err == unix.ENOSPC || err == unix.EDQUOT || err == unix.EIO:
			return err
		case err != nil || n == 0:
			return copyByHand(dst, src, off, size)
		default:
			off += int64(n)
		}
	}
	return nil
}

func copyByHand(dst, src int, off, size int64) error {
	buf := copyBuffers.Get().(*[]byte)
	defer copyBuffers.Put(buf)
	for off < size {
		n, err := pread(src, (*buf)[:min(size-off, copyBufferSize)], off)
		if err != nil {
			return err
		}
		if n == 0 {
			return errors.New("the file became shorter while it was copied")
		}
		if err := writeAll(dst, (*buf)[:n]); err != nil {
			return err
		}
		off += int64(n)
	}
	return nil
}
