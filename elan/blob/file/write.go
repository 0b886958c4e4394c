package file

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// Create implements blob.Creator: newfstatat, openat. Write is write; Commit is
// close, utimensat, renameat2; there is no fsync (README.md says why). A blob
// that is there already is not written again.
func (s *Store) Create(ctx context.Context, d digest.Digest) (blob.Writer, error) {
	if err := s.check(ctx, d); err != nil {
		return nil, fmt.Errorf("create blob %s: %w", d, err)
	}
	w := &writer{s: s, ctxErr: ctx.Err, done: ctx.Done(), d: d, fd: -1}
	if d.IsEmpty() || s.have(ctx, d) {
		return w, nil
	}
	if s.packable(d) {
		pw, err := s.createPacked(ctx, d)
		if err != nil {
			return nil, fmt.Errorf("create blob %s: %w", d, err)
		}
		return pw, nil
	}
	if err := s.reserveBlob(ctx, d); err != nil {
		return nil, fmt.Errorf("create blob %s: %w", d, err)
	}
	tmp := s.tmpPath()
	fd, err := s.createTmp(tmp)
	if err != nil {
		s.space.cancel(onDisk(d.Size()))
		return nil, fmt.Errorf("create blob %s: %w", d, err)
	}
	w.tmp, w.fd = tmp, fd
	return w, nil
}

// have reports whether d is surely there, starting its lifetime anew if so.
func (s *Store) have(ctx context.Context, d digest.Digest) bool {
	there, mayBeFile, err := s.findPacked(ctx, d)
	if there || !mayBeFile || err != nil {
		return there
	}
	var st unix.Stat_t
	if unix.Lstat(s.blobPath(d, blob.LinkRegular), &st) != nil {
		return false
	}
	return s.use(ctx, d, blob.LinkRegular) == nil
}

// createTmp makes an empty file of a blob's mode.
func (s *Store) createTmp(tmp string) (int, error) {
	fd, err := openFile(tmp, writerFlags, regularPerm)
	if err != nil {
		return -1, classify(err)
	}
	if s.needChmod {
		if err := unix.Fchmod(fd, regularPerm); err != nil {
			_, _ = unix.Close(fd), unix.Unlink(tmp)
			return -1, classify(err)
		}
	}
	return fd, nil
}

// writer is a blob being written. Where tmp is empty, the blob is there
// already, and the bytes are counted only.
type writer struct {
	s      *Store
	ctxErr func() error // of the context that bounds the writing
	done   <-chan struct{}
	d      digest.Digest
	tmp    string // the file that is written
	fd     int    // of tmp, -1 when it is closed
	n      int64  // bytes written
}

func (w *writer) Write(p []byte) (int, error) {
	if err := w.ctxErr(); err != nil {
		return 0, err
	}
	if w.n+int64(len(p)) > w.d.Size() {
		w.n = w.d.Size() + 1 // so that it can't be committed any more
		return 0, fmt.Errorf("%w: more than the %d bytes of %s", blob.ErrCorrupt, w.d.Size(), w.d)
	}
	if w.tmp != "" {
		if w.fd < 0 {
			return 0, errors.New("write to a closed blob")
		}
		if err := writeAll(w.fd, p); err != nil {
			return 0, w.s.refuse(classify(err))
		}
	}
	w.n += int64(len(p))
	return len(p), nil
}

func (w *writer) Commit() error {
	if err := w.ctxErr(); err != nil {
		return err
	}
	if w.n != w.d.Size() {
		return fmt.Errorf("%w: %d bytes of %s were written", blob.ErrCorrupt, w.n, w.d)
	}
	if w.tmp == "" {
		return w.confirm()
	}
	if w.fd < 0 {
		return errors.New("commit of a closed blob")
	}
	fd := w.fd
	w.fd = -1
	if err := unix.Close(fd); err != nil {
		return classify(err)
	}
	if err := setTimes(w.tmp, time.Now()); err != nil {
		return classify(err)
	}
	err := renameNew(w.tmp, w.s.blobPath(w.d, blob.LinkRegular))
	switch {
	case err == nil:
		w.tmp = ""
		w.s.settle(w.d.Size())
		return nil
	case errors.Is(err, unix.EEXIST):
		return w.confirm() // another writer was faster; Close removes ours
	}
	return classify(err)
}

// confirm is the Commit of a blob that was there without this writer.
func (w *writer) confirm() error {
	if w.d.IsEmpty() {
		return nil
	}
	if w.s.hasPacked(w.d) {
		return nil // Create began its lifetime anew
	}
	err := w.s.useDone(w.done, w.d, blob.LinkRegular)
	switch {
	case errors.Is(err, errGivenUp):
		return w.ctxErr()
	case errors.Is(err, blob.ErrNotFound):
		return fmt.Errorf("%w: %s was withdrawn while it was written again", blob.ErrUnavailable, w.d)
	}
	return err
}

func (w *writer) Close() error {
	w.n = w.d.Size() + 1 // so that it can't be committed any more
	var err error
	if w.fd >= 0 {
		err = unix.Close(w.fd)
		w.fd = -1
	}
	if w.tmp != "" {
		if e := unix.Unlink(w.tmp); err == nil {
			err = e
		}
		w.tmp = ""
		w.s.space.cancel(onDisk(w.d.Size()))
	}
	return err
}

// renameNew gives the file from the name to, which must be free (EEXIST). File
// systems without renameat2's RENAME_NOREPLACE get linkat and unlinkat.
func renameNew(from, to string) error {
	err := unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE)
	if err == unix.EINVAL || err == unix.ENOSYS {
		if err = unix.Link(from, to); err == nil {
			return unix.Unlink(from)
		}
	}
	return err
}

// settle says that a file of size bytes, for which space was reserved, is in
// place.
func (s *Store) settle(size int64) {
	s.space.settle(onDisk(size))
	s.soil()
}

// soil says that something was written that a power failure would take.
func (s *Store) soil() {
	if !s.dirty.Load() { // a read shares the cache line, a write does not
		s.dirty.Store(true)
	}
}
