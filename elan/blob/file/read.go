package file

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// Open implements blob.Opener: of a large blob openat, fstat, and at most once in
// touchEvery utimensat; of a small one pread, which reads it whole. The reader is
// a *Reader.
func (s *Store) Open(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	if err := s.check(ctx, d); err != nil {
		return nil, fmt.Errorf("open blob %s: %w", d, err)
	}
	if offset < 0 || offset > d.Size() {
		return nil, fmt.Errorf("open blob %s: offset %d is outside of it", d, offset)
	}
	if d.IsEmpty() {
		return &Reader{cancelled: ctx.Err, fd: -1}, nil
	}
	data, err := s.readPacked(ctx, d)
	if err == nil {
		return &Reader{cancelled: ctx.Err, fd: -1, data: data, off: offset, size: d.Size()}, nil
	}
	fd := -1
	if errors.Is(err, blob.ErrNotFound) && !s.onlyPacked(d) {
		fd, err = s.openBlob(ctx, d)
	}
	if err != nil {
		return nil, fmt.Errorf("open blob %s: %w", d, err)
	}
	return &Reader{cancelled: ctx.Err, fd: fd, off: offset, size: d.Size()}, nil
}

// openBlob opens the regular file of d, sound and with its lifetime begun anew.
func (s *Store) openBlob(ctx context.Context, d digest.Digest) (int, error) {
	path := s.blobPath(d, blob.LinkRegular)
	// The first round fails where the file is not as it should be; after use
	// put that right the second succeeds. Only somebody who changes the file
	// all the time makes a third necessary.
	for range 3 {
		fd, err := openRead(path)
		if err == nil {
			var st unix.Stat_t
			err = unix.Fstat(fd, &st)
			if err == nil && s.sound(&st, d.Size(), regularPerm) && !s.stale(&st, time.Now()) {
				return fd, nil
			}
			_ = unix.Close(fd)
		}
		if err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ELOOP) {
			return -1, classify(err)
		}
		if err := s.use(ctx, d, blob.LinkRegular); err != nil {
			return -1, err
		}
	}
	return -1, fmt.Errorf("%w: its file keeps changing", blob.ErrUnavailable)
}

// Reader reads one blob. Read is for one goroutine at a time; ReadAt and Close
// may be called at any time. What is open stays readable when the blob is
// evicted.
type Reader struct {
	cancelled func() error // the Err of the context that bounds the reading
	off, size int64

	mu sync.RWMutex // held while fd is used, so that Close can't let its number go to another file
	fd int          // -1: closed, or there is no file
	// data is the blob, where it is no file; nil when it is closed.
	data []byte
}

// Read implements io.Reader: pread64.
func (r *Reader) Read(p []byte) (int, error) {
	n, err := r.ReadAt(p, r.off)
	r.off += int64(n)
	if n > 0 && errors.Is(err, io.EOF) {
		err = nil
	}
	return n, err
}

// ReadAt implements io.ReaderAt. Offset 0 is the blob's first byte, whatever
// the offset it was opened at.
func (r *Reader) ReadAt(p []byte, off int64) (int, error) {
	if err := r.cancelled(); err != nil {
		return 0, err
	}
	if off >= r.size {
		return 0, io.EOF
	}
	r.mu.RLock()
	defer r.mu.RUnlock()
	switch {
	case r.data != nil:
		n := copy(p, r.data[off:])
		if n < len(p) {
			return n, io.EOF
		}
		return n, nil
	case r.fd < 0:
		return 0, errors.New("read from a closed blob")
	}
	want := min(int64(len(p)), r.size-off)
	got := int64(0)
	for got < want {
		n, err := pread(r.fd, p[got:want], off+got)
		if err != nil {
			return int(got), classify(err)
		}
		if n == 0 {
			return int(got), fmt.Errorf("%w: the store's file ends at byte %d of %d", blob.ErrCorrupt, off+got, r.size)
		}
		got += int64(n)
	}
	if got < int64(len(p)) {
		return int(got), io.EOF
	}
	return int(got), nil
}

// Size is the size of the whole blob in bytes.
func (r *Reader) Size() int64 { return r.size }

// Close frees the file. Closing again does nothing.
func (r *Reader) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.data = nil
	if r.fd < 0 {
		return nil
	}
	fd := r.fd
	r.fd = -1
	return unix.Close(fd)
}
