package pack

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/elan/blob"
)

// bufferBytes is that of the buffers for scanning and copying segments: some
// four of the largest records.
const bufferBytes = 1 << 20

//nolint:gochecknoglobals // pools are shared by design
var (
	buffers      = sync.Pool{New: func() any { b := make([]byte, bufferBytes); return &b }}
	smallBuffers = sync.Pool{New: func() any { b := make([]byte, 0, 20<<10); return &b }}
)

// ErrStopped says that a done channel, or the store, was closed before the work
// was done.
var ErrStopped = errors.New("stopped")

// classify wraps an error of the operating system, about the packs' own files,
// in its class.
func classify(err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fmt.Errorf("%w: %w", blob.ErrFull, err)
	}
	return fmt.Errorf("%w: %w", blob.ErrUnavailable, err)
}

func openFile(path string, flags int) (int, error) {
	for {
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
		if err != unix.EINTR {
			return fd, err
		}
	}
}

// preadFull fills p from off, or returns io.ErrUnexpectedEOF where the file ends.
func preadFull(fd int, p []byte, off int64) error {
	for len(p) > 0 {
		n, err := unix.Pread(fd, p, off)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return err
		case n == 0:
			return io.ErrUnexpectedEOF
		default:
			p, off = p[n:], off+int64(n)
		}
	}
	return nil
}

func pwriteFull(fd int, p []byte, off int64) error {
	for len(p) > 0 {
		n, err := unix.Pwrite(fd, p, off)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return err
		case n == 0:
			return io.ErrShortWrite
		default:
			p, off = p[n:], off+int64(n)
		}
	}
	return nil
}

// writeDurably makes data the content of path, at once and for good.
func writeDurably(path string, data []byte) error {
	tmp := path + newSuffix
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// stopped reports whether done is closed.
func stopped(done <-chan struct{}) bool {
	select {
	case <-done:
		return true
	default:
		return false
	}
}
