package file

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

var _ blob.Checker = (*Store)(nil)

// Check implements blob.Checker: openat, fstat, and the reads of a quiet reader.
// Both files of the blob are looked at. Bytes that can't be read are an error
// that wraps ErrUnavailable, and stay: a disk that fails as a whole must not
// empty the store.
func (s *Store) Check(ctx context.Context, d digest.Digest) error {
	err := s.listable(ctx, d)
	if err == nil && !d.IsEmpty() {
		err = s.checkAll(ctx, d)
	}
	if errors.Is(err, errGivenUp) {
		err = ctx.Err()
	}
	if err != nil {
		return fmt.Errorf("check blob %s: %w", d, err)
	}
	return nil
}

// checkAll looks at everything that there is of d.
func (s *Store) checkAll(ctx context.Context, d digest.Digest) error {
	free := func(int64) bool { return true }
	err := s.checkPacked(ctx, d)
	switch {
	case err == nil:
		return s.checkTwins(ctx.Done(), d, free)
	case !errors.Is(err, blob.ErrNotFound), s.onlyPacked(d):
		return err
	}
	if err := s.checkFile(ctx.Done(), d, blob.LinkRegular, free); err != nil {
		return err
	}
	err = s.checkFile(ctx.Done(), d, blob.LinkExecutable, free)
	if errors.Is(err, blob.ErrNotFound) || errors.Is(err, blob.ErrCorrupt) {
		return nil // the twin is a copy, and made again where it is needed
	}
	return err
}

// A pace is asked before n bytes are read, and waits. It returns false where
// they are not to be read any more.
type pace func(n int64) bool

// checkFile reads the file of d in that mode and compares it with d. The error
// is errGivenUp, or wraps ErrNotFound, ErrUnavailable, or ErrCorrupt where the
// file was withdrawn.
func (s *Store) checkFile(done <-chan struct{}, d digest.Digest, mode blob.LinkMode, p pace) error {
	path := s.blobPath(d, mode)
	fd, st, err := openQuiet(path)
	switch {
	case errors.Is(err, unix.ENOENT):
		return s.absent(d.Function(), path)
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.ELOOP):
		return s.mend(done, d, mode) // of another owner, or a symbolic link
	case err != nil:
		return classify(err)
	}
	defer unix.Close(fd) //nolint:errcheck // opened for reading
	if !s.sound(&st, d.Size(), perm(mode)) {
		return s.mend(done, d, mode)
	}
	got, err := hashQuietly(fd, d, p)
	if err != nil || got == d.Plain() {
		return err
	}
	return s.condemn(done, d, mode, st.Ino)
}

// mend has a file that was changed from outside replaced by a copy, or
// withdrawn. The last use that it records stays.
func (s *Store) mend(done <-chan struct{}, d digest.Digest, mode blob.LinkMode) error {
	path := s.blobPath(d, mode)
	if !s.keys.lock(done, path) {
		return errGivenUp
	}
	defer s.keys.unlock(path)
	var st unix.Stat_t
	if unix.Lstat(path, &st) != nil || s.sound(&st, d.Size(), perm(mode)) {
		return nil // somebody else was faster
	}
	switch err := s.repair(d, mode, &st); {
	case errors.Is(err, blob.ErrNotFound):
		return fmt.Errorf("%w: its file was changed", blob.ErrCorrupt)
	case err != nil:
		return err
	}
	if err := setAtime(path, atimeOf(&st)); err != nil {
		return classify(err)
	}
	return nil
}

// condemn withdraws the file of d with that inode, of which the bytes were found
// to be wrong, after reading them once more: what was wrong may have been this
// machine's memory.
func (s *Store) condemn(done <-chan struct{}, d digest.Digest, mode blob.LinkMode, inode uint64) error {
	path := s.blobPath(d, mode)
	if !s.keys.lock(done, path) {
		return errGivenUp
	}
	defer s.keys.unlock(path)
	fd, st, err := openQuiet(path)
	if err != nil {
		return nil //nolint:nilerr // it went away meanwhile
	}
	defer unix.Close(fd) //nolint:errcheck // opened for reading
	if st.Ino != inode {
		return nil // and another came
	}
	got, err := hashFile(done, d.Function(), fd, d.Size())
	switch {
	case errors.Is(err, errGivenUp):
		return err
	case err != nil:
		return classify(err)
	case got == d.Plain():
		return nil
	}
	if err := s.withdraw(d, mode, "its bytes have another digest, "+got.String()); !errors.Is(err, blob.ErrNotFound) {
		return err
	}
	return fmt.Errorf("%w: its bytes have the digest %s", blob.ErrCorrupt, got)
}

// openQuiet opens a file without making it look used.
func openQuiet(path string) (fd int, st unix.Stat_t, err error) {
	if fd, err = openFile(path, unix.O_RDONLY|unix.O_NOATIME|unix.O_NONBLOCK, 0); err != nil {
		return -1, st, err
	}
	if err := unix.Fstat(fd, &st); err != nil {
		_ = unix.Close(fd)
		return -1, st, err
	}
	// No more than is asked for, or what was read ahead would look like what
	// others had read.
	_ = unix.Fadvise(fd, 0, 0, unix.FADV_RANDOM)
	return fd, st, nil
}

// hashQuietly computes the digest of a file, of which as much is read as d has
// bytes, and one more.
func hashQuietly(fd int, d digest.Digest, p pace) (digest.Digest, error) {
	buf := copyBuffers.Get().(*[]byte)
	defer copyBuffers.Put(buf)
	h := d.Function().New(d.Size())
	n, err := io.CopyBuffer(h, io.LimitReader(&quiet{fd: fd, pace: p}, d.Size()+1), *buf)
	if err != nil {
		return digest.Digest{}, err
	}
	return digest.FromHash(d.Function(), h, n), nil
}

// quiet reads a file and leaves the page cache as it was: what was not in it
// before is not in it afterwards, so that reading all of a store does not drive
// out what its users read. Where the kernel does not tell what is cached (older
// than 4.14, and some file systems), it reads like anybody.
type quiet struct {
	fd    int
	off   int64
	pace  pace
	plain bool // the kernel does not tell
}

// Read implements io.Reader: preadv2 with RWF_NOWAIT, which yields what is
// cached, and where nothing is pread64 and fadvise64.
func (q *quiet) Read(b []byte) (int, error) {
	if !q.pace(int64(len(b))) {
		return 0, errGivenUp
	}
	if !q.plain {
		n, err := preadCached(q.fd, b, q.off)
		q.off += int64(n)
		switch {
		case n > 0:
			return n, nil
		case err == nil:
			return 0, io.EOF
		case !errors.Is(err, unix.EAGAIN):
			q.plain = true
		}
	}
	n, err := pread(q.fd, b, q.off)
	if err != nil {
		return 0, classify(err)
	}
	if n == 0 {
		return 0, io.EOF
	}
	if !q.plain {
		_ = unix.Fadvise(q.fd, q.off, int64(n), unix.FADV_DONTNEED)
	}
	q.off += int64(n)
	return n, nil
}

// preadCached is pread of what is in the page cache. EAGAIN: nothing is.
func preadCached(fd int, b []byte, off int64) (int, error) {
	for {
		n, err := unix.Preadv2(fd, [][]byte{b}, off, unix.RWF_NOWAIT)
		if err != unix.EINTR {
			return max(n, 0), err
		}
	}
}

// pacer spreads reading over time.
type pacer struct {
	bytesPerSecond int64
	closing        <-chan struct{}
	due            time.Time // when what was asked for so far may have been read
}

// pacerStep is how far reading may be ahead: timers are not finer than that on
// a busy machine.
const pacerStep = 20 * time.Millisecond

// wait is a pace.
func (p *pacer) wait(n int64) bool {
	now := time.Now()
	if p.due.Before(now) {
		p.due = now
	}
	p.due = p.due.Add(time.Duration(float64(n) / float64(p.bytesPerSecond) * float64(time.Second)))
	ahead := p.due.Sub(now)
	if ahead < pacerStep {
		select {
		case <-p.closing:
			return false
		default:
			return true
		}
	}
	t := time.NewTimer(ahead)
	defer t.Stop()
	select {
	case <-p.closing:
		return false
	case <-t.C:
		return true
	}
}
