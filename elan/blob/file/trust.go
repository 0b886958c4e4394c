package file

import (
	"context"
	"errors"
	"hash/maphash"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// maxTrusted bounds the files that are remembered as sound, at some 20 bytes each:
// as many as the input roots of a day name.
const maxTrusted = 512 << 10

// trusted are the files that were read since the store was opened. Who links a file
// never passes its bytes by anybody who would compare them, and a disk may have
// changed them since the process that wrote them ended, unseen: so each file from
// before is read once before it is linked for the first time.
type trusted struct {
	since time.Time // when the store was opened
	seed  maphash.Seed

	mu    sync.Mutex // guards paths
	paths map[uint64]struct{}
}

func (t *trusted) init() {
	t.since, t.seed, t.paths = time.Now(), maphash.MakeSeed(), make(map[uint64]struct{})
}

func (t *trusted) has(path string) bool {
	key := maphash.String(t.seed, path)
	t.mu.Lock()
	defer t.mu.Unlock()
	_, ok := t.paths[key]
	return ok
}

func (t *trusted) add(path string) {
	key := maphash.String(t.seed, path)
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.paths) >= maxTrusted {
		clear(t.paths) // they are read again, once
	}
	t.paths[key] = struct{}{}
}

// trust sees to it that the bytes of d's file were looked at, by this process: statx,
// and of a file from before it was started, once, openat, statx and pread of all of
// it. The error is blob.ErrNotFound where the file was withdrawn.
func (s *Store) trust(ctx context.Context, d digest.Digest, mode blob.LinkMode) error {
	path := s.blobPath(d, mode)
	if s.trusted.has(path) {
		return nil
	}
	var stx unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_BTIME, &stx)
	if err == nil && stx.Mask&unix.STATX_BTIME != 0 && time.Unix(stx.Btime.Sec, int64(stx.Btime.Nsec)).After(s.trusted.since) {
		s.trusted.add(path)
		return nil
	}
	// Once, however many want it.
	turn := path + "\x00"
	if !s.keys.lock(ctx.Done(), turn) {
		return context.Cause(ctx)
	}
	defer s.keys.unlock(turn)
	if s.trusted.has(path) {
		return nil
	}
	err = s.checkFile(ctx.Done(), d, mode, func(int64) bool { return ctx.Err() == nil })
	switch {
	case errors.Is(err, errGivenUp):
		return context.Cause(ctx)
	case errors.Is(err, blob.ErrCorrupt):
		return blob.ErrNotFound
	case err == nil:
		s.trusted.add(path)
	}
	return err
}
