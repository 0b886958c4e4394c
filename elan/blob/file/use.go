package file

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// maxTouchEvery bounds how coarse the recorded last use is. Writing it down at
// every use would dirty an inode, and so cost a journal write, at every read;
// an hour (cmd/go's cache does the same) is little beside days of lifetime.
const maxTouchEvery = time.Hour

// stale reports whether the last use recorded in st is too long ago to go on
// without recording another. A file that is not stale is safe from eviction,
// which waits for minLifetime + touchEvery after the recorded use: at least
// minLifetime from now.
func (s *Store) stale(st *unix.Stat_t, now time.Time) bool {
	age := now.Sub(atimeOf(st))
	return age > s.touchEvery || age < -s.touchEvery
}

// evictable reports whether a file last used at atime is out of its lifetime.
func (s *Store) evictable(atime, now time.Time) bool {
	return now.Sub(atime) > s.minLifetime+s.touchEvery
}

// sound reports whether st is what this package leaves of a blob of size bytes.
func (s *Store) sound(st *unix.Stat_t, size int64, perm uint32) bool {
	return st.Size == size &&
		st.Mode == unix.S_IFREG|perm &&
		st.Mtim.Sec == constMtime && st.Mtim.Nsec == 0 &&
		st.Uid == s.uid
}

// use tells whether the file of d is there and sound, and starts its lifetime
// anew: newfstatat, and at most once in touchEvery utimensat. The error is
// blob.ErrNotFound, or wraps ErrUnavailable.
func (s *Store) use(ctx context.Context, d digest.Digest, mode blob.LinkMode) error {
	err := s.useDone(ctx.Done(), d, mode)
	if errors.Is(err, errGivenUp) {
		return context.Cause(ctx)
	}
	return err
}

// errGivenUp says that a done channel was closed before there was an answer.
var errGivenUp = errors.New("given up")

// useDone is use for as long as done is not closed; then errGivenUp.
func (s *Store) useDone(done <-chan struct{}, d digest.Digest, mode blob.LinkMode) error {
	path := s.blobPath(d, mode)
	switch s.look(path, d.Size(), perm(mode)) {
	case lookGood:
		return nil
	case lookNothing:
		return s.absent(d.Function(), path)
	}
	return s.useLocked(done, d, mode)
}

// looked is what there is to see of a blob's file without its lock.
type looked int

const (
	lookGood    looked = iota // it is sound, and its lifetime need not be begun anew
	lookNothing               // it is not there, if its folder is
	lookOther                 // something is to be done, under the lock
)

// look looks at the file at path, of a blob of size bytes: newfstatat.
func (s *Store) look(path string, size int64, perm uint32) looked {
	// Asked first: what recovery moves back before it ends, Lstat sees.
	recovering := s.recovery.active.Load()
	var st unix.Stat_t
	err := unix.Lstat(path, &st)
	switch {
	case err == nil && s.sound(&st, size, perm) && !s.stale(&st, time.Now()):
		return lookGood
	case err == unix.ENOENT && !recovering:
		return lookNothing
	}
	return lookOther
}

// useLocked is use where there is something to be done.
func (s *Store) useLocked(done <-chan struct{}, d digest.Digest, mode blob.LinkMode) error {
	path := s.blobPath(d, mode)
	if !s.keys.lock(done, path) {
		return errGivenUp
	}
	defer s.keys.unlock(path)
	var st unix.Stat_t
	err := unix.Lstat(path, &st)
	switch {
	case errors.Is(err, unix.ENOENT):
		if err := s.absent(d.Function(), path); !errors.Is(err, blob.ErrNotFound) || !s.recovery.active.Load() {
			return err
		}
		return s.recovery.find(s, d, mode)
	case err != nil:
		return classify(err)
	case !s.sound(&st, d.Size(), perm(mode)):
		return s.repair(d, mode, &st)
	case !s.stale(&st, time.Now()):
		return nil
	}
	if err := setAtime(path, time.Now()); err != nil {
		return classify(err)
	}
	return nil
}

// absent tells a blob or an entry that is not there from a folder that is not:
// newfstatat of the folder. The error is blob.ErrNotFound or wraps ErrUnavailable.
func (s *Store) absent(fn digest.Function, path string) error {
	if !s.prepared[fn].Load() {
		return blob.ErrNotFound
	}
	if err := checkFolder(filepath.Dir(path)); err != nil {
		return err
	}
	return blob.ErrNotFound
}

// checkFolder finds out whether a folder of blobs or entries is still there.
func checkFolder(path string) error {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return fmt.Errorf("%w: its folder is not there: %w", blob.ErrUnavailable, err)
	}
	return nil
}

// repair looks into a file of d that was changed from outside. Where only its
// mode, owner or time differ and the bytes are right, a fresh copy takes its
// place, because whoever changed the old inode may do it again; where they are
// wrong it is withdrawn. The caller holds the lock of the path.
func (s *Store) repair(d digest.Digest, mode blob.LinkMode, st *unix.Stat_t) error {
	path := s.blobPath(d, mode)
	s.changed.note(path)
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size != d.Size() {
		return s.withdraw(d, mode, fmt.Sprintf("it has %d bytes and mode %o", st.Size, st.Mode))
	}
	src, err := openRead(path)
	if err != nil {
		return classify(err)
	}
	defer unix.Close(src) //nolint:errcheck // opened for reading
	tmp, err := s.copyToTmp(src, d.Size(), mode)
	if err != nil {
		return classify(err)
	}
	right, err := holds(tmp, d)
	if err == nil && right {
		err = unix.Rename(tmp, path)
	}
	if err != nil || !right {
		_ = unix.Unlink(tmp)
	}
	switch {
	case err != nil:
		return classify(err)
	case !right:
		return s.withdraw(d, mode, "its bytes have another digest")
	}
	s.dirty.Store(true)
	s.metrics.repaired.Inc()
	s.log.Warn("blob was changed from outside, and replaced by a copy of the same bytes", "digest", d.String())
	return nil
}

// copyToTmp makes a file in tmp with the first size bytes of src, ready to be
// renamed into place.
func (s *Store) copyToTmp(src int, size int64, mode blob.LinkMode) (string, error) {
	tmp := s.tmpPath()
	if err := s.copyTo(tmp, src, size, mode); err != nil {
		return "", err
	}
	return tmp, nil
}

// copyTo makes the new file dst with the first size bytes of src, of the mode
// and the times that the store's files have. Where it fails it leaves none.
func (s *Store) copyTo(dst string, src int, size int64, mode blob.LinkMode) error {
	fd, err := openFile(dst, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	err = copyAll(fd, src, size)
	if err == nil {
		err = unix.Fchmod(fd, perm(mode))
	}
	if e := unix.Close(fd); err == nil {
		err = e
	}
	if err == nil {
		err = setTimes(dst, time.Now())
	}
	if err != nil {
		_ = unix.Unlink(dst)
	}
	return err
}

// holds reports whether the bytes of the file at path are those of d.
func holds(path string, d digest.Digest) (bool, error) {
	fd, err := openRead(path)
	if err != nil {
		return false, err
	}
	defer unix.Close(fd) //nolint:errcheck // opened for reading
	got, err := hashFile(nil, d.Function(), fd, d.Size())
	return err == nil && got == d.Plain(), err
}

// hashFile computes the digest of the file's bytes, which are to be size bytes,
// until it ends or done is closed. Of a file that has other than size bytes the
// digest has another size too: no more than one byte past it is looked at.
func hashFile(done <-chan struct{}, fn digest.Function, fd int, size int64) (digest.Digest, error) {
	buf := copyBuffers.Get().(*[]byte)
	defer copyBuffers.Put(buf)
	h := fn.New(size)
	var off int64
	limit := size + 1
	for off < limit {
		select {
		case <-done:
			return digest.Digest{}, errGivenUp
		default:
		}
		n, err := pread(fd, (*buf)[:min(limit-off, copyBufferSize)], off)
		if err != nil && !errors.Is(err, io.EOF) {
			return digest.Digest{}, err
		}
		if n == 0 {
			break
		}
		h.Write((*buf)[:n])
		off += int64(n)
	}
	return digest.FromHash(fn, h, off), nil
}

// withdraw takes the file of d away, so that nobody reads wrong bytes, and
// keeps it in quarantine for a look if it is small and there are not many. It
// returns blob.ErrNotFound, or an error that wraps ErrUnavailable. The caller
// holds the lock of the path.
func (s *Store) withdraw(d digest.Digest, mode blob.LinkMode, why string) error {
	path := s.blobPath(d, mode)
	s.changed.note(path)
	s.metrics.corrupt.Inc()
	s.log.Error("blob is corrupt, and withdrawn", "digest", d.String(), "path", path, "why", why)
	if err := s.discard(path, d.Size()); err != nil {
		return classify(err)
	}
	s.space.release(onDisk(d.Size()))
	return blob.ErrNotFound
}

// discard moves the file at path to the quarantine, or removes it.
func (s *Store) discard(path string, size int64) error {
	folder := s.dir + "/quarantine"
	if kept, err := os.ReadDir(folder); err == nil && len(kept) < maxQuarantined && size <= maxQuarantinedBytes {
		to := folder + "/" + filepath.Base(path) + "." + strconv.FormatInt(time.Now().UnixNano(), 36)
		if unix.Rename(path, to) == nil {
			return nil
		}
	}
	return os.RemoveAll(path) // a tampered path may even be a folder
}
