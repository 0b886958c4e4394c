package file

import (
	"context"
	"errors"

	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// Whoever made a file that is adopted is gone, but may have handed it to somebody who
// is not, as an open file or by another name. What that one writes must not get into a
// blob: neither while its digest is computed nor later.

// keepWritersAway takes a lease (fcntl_locking(2)) on the file fd, which is open for
// reading: until release nobody opens it for writing. Where somebody has it open for
// writing already, or mapped, written is true. File systems without leases leave it
// at what they let happen.
func keepWritersAway(fd int) (written bool, release func()) {
	_, err := unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_RDLCK)
	if err != nil {
		return errors.Is(err, unix.EAGAIN), func() {}
	}
	return false, func() {
		_, _ = unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_UNLCK) // closing fd does so too
	}
}

// adoptWritten is adopt for a file that is being written to, which is copied first:
// the copy's digest is that of the blob.
func (s *Store) adoptWritten(ctx context.Context, space digest.Space, fn digest.Function, fd int, size int64) (digest.Digest, error) {
	if err := s.prepare(ctx, fn); err != nil {
		return digest.Digest{}, err
	}
	if err := s.reserve(ctx, size); err != nil {
		return digest.Digest{}, err
	}
	d, taken, err := s.takeWritten(ctx, space, fn, fd, size)
	if err == nil && taken {
		s.settle(size)
		return d, nil
	}
	s.space.cancel(onDisk(size))
	if err == nil {
		err = s.use(ctx, d, blob.LinkRegular)
	}
	return d, err
}

// takeWritten makes a copy of the file fd a blob. It reports false where the blob is
// there already.
func (s *Store) takeWritten(ctx context.Context, space digest.Space, fn digest.Function, fd int, size int64) (d digest.Digest, taken bool, err error) {
	tmp, err := s.copyToTmp(fd, size, blob.LinkRegular)
	if err != nil {
		return d, false, classify(err)
	}
	if d, err = digestOf(ctx, fn, tmp, size); err == nil {
		d = d.In(space)
		err = renameNew(tmp, s.blobPath(d, blob.LinkRegular))
	}
	if err == nil {
		return d, true, nil
	}
	_ = unix.Unlink(tmp)
	if errors.Is(err, unix.EEXIST) {
		return d, false, nil
	}
	if ctxErr := ctx.Err(); ctxErr != nil {
		return d, false, ctxErr
	}
	return d, false, classify(err)
}

// digestOf is the digest of a file of our own, of size bytes.
func digestOf(ctx context.Context, fn digest.Function, path string, size int64) (digest.Digest, error) {
	fd, err := openRead(path)
	if err != nil {
		return digest.Digest{}, err
	}
	defer unix.Close(fd) //nolint:errcheck // opened for reading
	d, err := hashFile(ctx.Done(), fn, fd, size)
	if err == nil && d.Size() != size {
		err = errors.New("its size changed while it was copied")
	}
	return d, err
}
