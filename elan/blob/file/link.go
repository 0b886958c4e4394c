package file

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// Link implements blob.Linker: newfstatat, linkat, and for an executable
// newfstatat once more. Where dst exists the error wraps fs.ErrExist. A file that
// is linked for the first time since the store was opened is read before: see trust.
//
// The first link of a blob as executable makes its twin, a second inode with the
// same bytes, by copying within the kernel. A process that another goroutine
// forks in that moment may hold the twin open for writing until it execs, so
// that executing it fails with ETXTBSY (golang/go#22315): retry.
func (s *Store) Link(ctx context.Context, d digest.Digest, dst string, mode blob.LinkMode) error {
	if err := s.link(ctx, d, dst, mode); err != nil {
		return fmt.Errorf("link blob %s to %s: %w", d, dst, err)
	}
	return nil
}

func (s *Store) link(ctx context.Context, d digest.Digest, dst string, mode blob.LinkMode) error {
	if err := s.check(ctx, d); err != nil {
		return err
	}
	src := s.blobPath(d, mode)
	var err error
	for range 2 {
		if err := s.readySound(ctx, d, mode); err != nil {
			return err
		}
		err = s.linkat(src, dst)
		var st unix.Stat_t
		if !errors.Is(err, unix.ENOENT) || unix.Lstat(src, &st) == nil {
			break
		}
		// A twin that was not used for long was evicted in that moment.
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EMLINK):
		if err := s.renew(ctx, d, mode); err != nil {
			return err
		}
		if err = s.linkat(src, dst); err == nil {
			return nil
		}
		return err
	case errors.Is(err, unix.EXDEV), errors.Is(err, unix.EPERM):
		return s.copyOut(d, dst, mode)
	}
	return err
}

// readySound sees to it that the file of d in that mode is there, and that its bytes
// are right. Where they are not, there may be a sound copy to make another of.
func (s *Store) readySound(ctx context.Context, d digest.Digest, mode blob.LinkMode) error {
	var err error
	for range 2 {
		if err = s.ready(ctx, d, mode); err != nil {
			return err
		}
		if err = s.trust(ctx, d, mode); !errors.Is(err, blob.ErrNotFound) {
			return err
		}
	}
	return err
}

// ready sees to it that the file of d in that mode is there and as it was left.
func (s *Store) ready(ctx context.Context, d digest.Digest, mode blob.LinkMode) error {
	there, mayBeFile, err := s.findPacked(ctx, d)
	switch {
	case err != nil:
		return err
	case there:
		if err = s.use(ctx, d, mode); errors.Is(err, blob.ErrNotFound) {
			return s.makePackedTwin(ctx, d, mode)
		}
		return err
	case !mayBeFile:
		return blob.ErrNotFound
	}
	err = s.use(ctx, d, blob.LinkRegular)
	if errors.Is(err, blob.ErrNotFound) && d.IsEmpty() {
		// Nobody needs to have put the empty blob.
		err = s.putEmpty(ctx, d)
	}
	if err != nil || mode == blob.LinkRegular {
		return err
	}
	err = s.use(ctx, d, mode)
	if errors.Is(err, blob.ErrNotFound) {
		return s.makeTwin(ctx, d)
	}
	return err
}

func (s *Store) putEmpty(ctx context.Context, d digest.Digest) error {
	if err := s.reserveBlob(ctx, d); err != nil {
		return err
	}
	tmp := s.tmpPath()
	fd, err := s.createTmp(tmp)
	if err != nil {
		return err
	}
	w := &writer{s: s, ctxErr: ctx.Err, done: ctx.Done(), d: d, tmp: tmp, fd: fd}
	return errors.Join(w.Commit(), w.Close())
}

// makeTwin makes the executable twin of d, once however many want it:
// newfstatat, openat twice, ioctl(FICLONE) or copy_file_range, fchmod, close
// twice, utimensat, renameat.
func (s *Store) makeTwin(ctx context.Context, d digest.Digest) error {
	if err := s.reserve(ctx, d.Size()); err != nil {
		return err
	}
	made, err := s.replaceBy(ctx, d, blob.LinkExecutable, true)
	if err != nil || !made {
		s.space.cancel(onDisk(d.Size()))
		return err
	}
	s.settle(d.Size())
	return nil
}

// renew gives the file of d in that mode a fresh inode, because the old one has
// as many links as the file system allows (65,000 on ext4). Those stay as they are.
func (s *Store) renew(ctx context.Context, d digest.Digest, mode blob.LinkMode) error {
	_, err := s.replaceBy(ctx, d, mode, false)
	if err == nil {
		s.dirty.Store(true)
	}
	return err
}

// replaceBy puts a copy of d's regular file where its file in mode belongs,
// under that file's lock, and reports whether it did: not where onlyNew and it
// is there by now.
func (s *Store) replaceBy(ctx context.Context, d digest.Digest, mode blob.LinkMode, onlyNew bool) (bool, error) {
	path := s.blobPath(d, mode)
	copyIn, err := s.copier(ctx, d)
	if err != nil {
		return false, err
	}
	defer copyIn.close()
	if !s.keys.lock(ctx.Done(), path) {
		return false, ctx.Err()
	}
	defer s.keys.unlock(path)
	var st unix.Stat_t
	if onlyNew && unix.Lstat(path, &st) == nil {
		return false, nil
	}
	tmp, err := copyIn.toTmp(mode)
	if err != nil {
		return false, classify(err)
	}
	if err := unix.Rename(tmp, path); err != nil {
		_ = unix.Unlink(tmp)
		return false, classify(err)
	}
	return true, nil
}

// source is where a copy of a blob is made from: its file, or its bytes.
type source struct {
	s    *Store
	d    digest.Digest
	fd   int
	data []byte // nil: fd is open
}

// copier opens d for copies: pread of a small blob, openat and fstat of others, which
// are sound: their copies will be trusted.
func (s *Store) copier(ctx context.Context, d digest.Digest) (*source, error) {
	src := &source{s: s, d: d, fd: -1}
	var err error
	src.data, err = s.readPacked(ctx, d)
	if errors.Is(err, blob.ErrNotFound) && !s.onlyPacked(d) {
		if err := s.trust(ctx, d, blob.LinkRegular); err != nil {
			return nil, err
		}
		src.fd, err = s.openBlob(ctx, d)
	}
	return src, err
}

func (src *source) toTmp(mode blob.LinkMode) (string, error) {
	if src.data != nil {
		return src.s.bytesToTmp(src.data, mode)
	}
	return src.s.copyToTmp(src.fd, src.d.Size(), mode)
}

func (src *source) close() {
	if src.fd >= 0 {
		_ = unix.Close(src.fd) // opened for reading
	}
}

// copyOut is Link where no hard link can be made.
func (s *Store) copyOut(d digest.Digest, dst string, mode blob.LinkMode) error {
	src, err := openRead(s.blobPath(d, mode))
	if err != nil {
		if errors.Is(err, unix.ENOENT) {
			return blob.ErrNotFound
		}
		return classify(err)
	}
	defer unix.Close(src) //nolint:errcheck // opened for reading
	if err := s.copyTo(dst, src, d.Size(), mode); err != nil {
		if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
			return classify(err)
		}
		return &os.PathError{Op: "copy", Path: dst, Err: err}
	}
	return nil
}
