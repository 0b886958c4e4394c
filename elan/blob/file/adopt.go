package file

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// Adopt implements blob.Adopter: fstat, fchown where the owner is another, a lease,
// pread64 to the end, newfstatat; and for bytes that are new fchmod, utimensat,
// linkat. It changes owner, mode and times of f, so whoever wants to know them asks
// before. A file that has more than one name, or is on another file system, or
// can't be made our own, is copied, and so is one that somebody has open for writing.
func (s *Store) Adopt(ctx context.Context, fn digest.Function, f *os.File) (digest.Digest, error) {
	return s.AdoptIn(ctx, digest.Space{}, fn, f)
}

// AdoptIn implements blob.SpaceAdopter.
func (s *Store) AdoptIn(ctx context.Context, space digest.Space, fn digest.Function, f *os.File) (digest.Digest, error) {
	if !fn.Valid() {
		return digest.Digest{}, fmt.Errorf("adopt %s: %w: digest function %v", f.Name(), digest.ErrInvalid, fn)
	}
	if err := s.check(ctx, digest.Empty(fn)); err != nil {
		return digest.Digest{}, fmt.Errorf("adopt %s: %w", f.Name(), err)
	}
	d, err := s.adopt(ctx, space, fn, f)
	if err != nil {
		return digest.Digest{}, fmt.Errorf("adopt %s: %w", f.Name(), err)
	}
	return d, nil
}

func (s *Store) adopt(ctx context.Context, space digest.Space, fn digest.Function, f *os.File) (digest.Digest, error) {
	fd := int(f.Fd()) // an *os.File of a regular file is blocking already
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return digest.Digest{}, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return digest.Digest{}, fmt.Errorf("mode %o is not that of a regular file", st.Mode)
	}
	// A sparse file costs its maker nothing, but as long to hash as any.
	if err := s.space.fits(st.Size); err != nil {
		return digest.Digest{}, err
	}
	if st.Size > 0 && st.Size <= s.packed.max {
		return s.adoptSmall(ctx, space, fn, fd, st.Size)
	}
	// By its other names it is somebody else's. Its owner may have a lease on a file.
	if st.Uid != s.uid && st.Nlink == 1 && unix.Fchown(fd, int(s.uid), -1) == nil {
		st.Uid = s.uid
	}
	written, release := keepWritersAway(fd)
	defer release()
	if written {
		return s.adoptWritten(ctx, space, fn, fd, st.Size)
	}
	d, err := hashFile(ctx.Done(), fn, fd, st.Size)
	if errors.Is(err, errGivenUp) {
		err = ctx.Err()
	}
	if err != nil {
		return digest.Digest{}, err
	}
	if d.Size() != st.Size {
		return digest.Digest{}, fmt.Errorf("its size changed from %d to %d bytes while it was read", st.Size, d.Size())
	}
	if d = d.In(space); d.IsEmpty() || s.have(ctx, d) {
		return d, nil
	}
	if err := s.reserveBlob(ctx, d); err != nil {
		return d, err
	}
	taken, err := s.take(d, fd, &st)
	if err == nil && !taken {
		taken, err = s.takeCopy(d, fd)
	}
	if err == nil && taken {
		s.settle(d.Size())
		return d, nil
	}
	s.space.cancel(onDisk(d.Size()))
	if err == nil {
		err = s.use(ctx, d, blob.LinkRegular)
	}
	return d, err
}

// adoptSmall copies the file fd, of size bytes, which has to be read anyway, into
// the packs: pread64, pwrite. It does not change f.
func (s *Store) adoptSmall(ctx context.Context, space digest.Space, fn digest.Function, fd int, size int64) (digest.Digest, error) {
	data, err := readAll(fd, size+1)
	if err != nil {
		return digest.Digest{}, err
	}
	if int64(len(data)) != size {
		return digest.Digest{}, fmt.Errorf("its size changed from %d to %d bytes, or more, while it was read", size, len(data))
	}
	d := digest.Of(fn, data).In(space)
	return d, s.storePacked(ctx, d, data)
}

// take makes the file fd itself the blob d, and reports whether it could.
func (s *Store) take(d digest.Digest, fd int, st *unix.Stat_t) (bool, error) {
	if st.Nlink != 1 {
		return false, nil
	}
	if st.Uid != s.uid {
		return false, nil // it could not be changed
	}
	if err := unix.Fchmod(fd, regularPerm); err != nil {
		return false, nil //nolint:nilerr // not ours to change: it is copied
	}
	self := "/proc/self/fd/" + strconv.Itoa(fd)
	ts := [2]unix.Timespec{timespec(time.Now()), {Sec: constMtime}}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, self, ts[:], 0); err != nil {
		return false, nil //nolint:nilerr // as above
	}
	err := unix.Linkat(unix.AT_FDCWD, self, unix.AT_FDCWD, s.blobPath(d, blob.LinkRegular), unix.AT_SYMLINK_FOLLOW)
	switch {
	case err == nil:
		return true, nil
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT), errors.Is(err, unix.EIO):
		return false, classify(err)
	}
	// Another file system, a name that somebody else gave meanwhile, links
	// forbidden: all of which takeCopy can do with.
	return false, nil
}

// takeCopy makes a copy of the file fd the blob d. It reports false where the
// blob came in by another way meanwhile.
func (s *Store) takeCopy(d digest.Digest, fd int) (bool, error) {
	tmp, err := s.copyToTmp(fd, d.Size(), blob.LinkRegular)
	if err != nil {
		return false, classify(err)
	}
	err = renameNew(tmp, s.blobPath(d, blob.LinkRegular))
	if err == nil {
		return true, nil
	}
	_ = unix.Unlink(tmp)
	if errors.Is(err, unix.EEXIST) {
		return false, nil
	}
	return false, classify(err)
}
