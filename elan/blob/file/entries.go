package file

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// An entry's file is entryMagic, the CRC-32C of the value as 4 bytes big-endian,
// and the value. The checksum tells what a power failure left half-written: an
// entry's name says nothing of its bytes.
const (
	entryMagic  = "ME1\n"
	entryHeader = len(entryMagic) + 4
	// maxEntryBytes bounds what is read at once. ActionResults with inlined
	// outputs stay below the size of a gRPC message, 4 MiB by default.
	maxEntryBytes = 64 << 20
)

//nolint:gochecknoglobals // an immutable table
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Entry implements blob.Entries: openat, fstat, pread64, close, and at most
// once in touchEvery utimensat.
func (s *Store) Entry(ctx context.Context, k blob.EntryKey) ([]byte, error) {
	if err := s.check(ctx, k.Action); err != nil {
		return nil, fmt.Errorf("entry %s: %w", k.Action, err)
	}
	path := s.entryPath(k)
	value, st, err := s.readEntry(k.Action.Function(), path)
	if err == nil && s.stale(&st, time.Now()) {
		value, err = s.touchEntry(ctx, k)
	}
	if err != nil {
		return nil, fmt.Errorf("entry %s: %w", k.Action, err)
	}
	return value, nil
}

// touchEntry reads the entry again, under its lock, and marks it as used.
func (s *Store) touchEntry(ctx context.Context, k blob.EntryKey) ([]byte, error) {
	path := s.entryPath(k)
	if !s.keys.lock(ctx.Done(), path) {
		return nil, ctx.Err()
	}
	defer s.keys.unlock(path)
	value, _, err := s.readEntry(k.Action.Function(), path)
	if err != nil {
		return nil, err
	}
	if err := setAtime(path, time.Now()); err != nil {
		return nil, classify(err)
	}
	return value, nil
}

// readEntry returns the value in the file at path. What was damaged reads as
// absent: the action runs again.
func (s *Store) readEntry(fn digest.Function, path string) (value []byte, st unix.Stat_t, err error) {
	fd, err := openRead(path)
	if err != nil {
		if errors.Is(err, unix.ENOENT) {
			return nil, st, s.absent(fn, path)
		}
		return nil, st, classify(err)
	}
	defer unix.Close(fd) //nolint:errcheck // opened for reading
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, st, classify(err)
	}
	damaged := func() ([]byte, unix.Stat_t, error) {
		s.metrics.corrupt.Inc()
		s.log.Error("entry is damaged, and taken as absent", "path", path)
		return nil, st, blob.ErrNotFound
	}
	if st.Size < int64(entryHeader) || st.Size > maxEntryBytes || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return damaged()
	}
	data := make([]byte, st.Size)
	for off := 0; off < len(data); {
		n, err := pread(fd, data[off:], int64(off))
		if err != nil {
			return nil, st, classify(err)
		}
		if n == 0 {
			return damaged()
		}
		off += n
	}
	value = data[entryHeader:]
	sum := binary.BigEndian.Uint32(data[len(entryMagic):])
	if string(data[:len(entryMagic)]) != entryMagic || sum != crc32.Checksum(value, castagnoli) {
		return damaged()
	}
	return value, st, nil
}

// PutEntry implements blob.Entries: openat, writev, close, utimensat,
// newfstatat, renameat.
func (s *Store) PutEntry(ctx context.Context, k blob.EntryKey, value []byte) error {
	if err := s.putEntry(ctx, k, value); err != nil {
		return fmt.Errorf("put entry %s: %w", k.Action, err)
	}
	return nil
}

func (s *Store) putEntry(ctx context.Context, k blob.EntryKey, value []byte) error {
	if err := s.check(ctx, k.Action); err != nil {
		return err
	}
	size := int64(entryHeader + len(value))
	if size > maxEntryBytes {
		return fmt.Errorf("%w: an entry has at most %d bytes", blob.ErrTooLarge, maxEntryBytes-entryHeader)
	}
	if err := s.prepare(ctx, k.Action.Function()); err != nil {
		return err
	}
	if err := s.reserve(ctx, size); err != nil {
		return err
	}
	tmp := s.tmpPath()
	err := s.writeEntry(tmp, value)
	if err == nil {
		err = s.replaceEntry(ctx, tmp, s.entryPath(k))
	}
	if err != nil {
		s.space.cancel(onDisk(size))
		_ = unix.Unlink(tmp)
		return err
	}
	s.settle(size)
	return nil
}

func (s *Store) writeEntry(tmp string, value []byte) error {
	fd, err := s.createTmp(tmp)
	if err != nil {
		return err
	}
	var head [entryHeader]byte
	copy(head[:], entryMagic)
	binary.BigEndian.PutUint32(head[len(entryMagic):], crc32.Checksum(value, castagnoli))
	data := append(head[:], value...)
	err = writeAll(fd, data)
	if e := unix.Close(fd); err == nil {
		err = e
	}
	if err == nil {
		err = setTimes(tmp, time.Now())
	}
	if err != nil {
		return classify(err)
	}
	return nil
}

// replaceEntry gives the file tmp the name path, and counts what that frees.
func (s *Store) replaceEntry(ctx context.Context, tmp, path string) error {
	if !s.keys.lock(ctx.Done(), path) {
		return ctx.Err()
	}
	defer s.keys.unlock(path)
	var old unix.Stat_t
	replaces := unix.Lstat(path, &old) == nil
	if err := unix.Rename(tmp, path); err != nil {
		return classify(err)
	}
	if replaces {
		s.space.release(onDisk(old.Size))
	}
	return nil
}

// DeleteEntry implements blob.Entries: newfstatat, unlinkat.
func (s *Store) DeleteEntry(ctx context.Context, k blob.EntryKey) error {
	if err := s.check(ctx, k.Action); err != nil {
		return fmt.Errorf("delete entry %s: %w", k.Action, err)
	}
	path := s.entryPath(k)
	if !s.keys.lock(ctx.Done(), path) {
		return ctx.Err()
	}
	defer s.keys.unlock(path)
	var st unix.Stat_t
	err := unix.Lstat(path, &st)
	if err == nil {
		err = os.Remove(path)
	}
	switch {
	case err == nil:
		s.space.release(onDisk(st.Size))
	case errors.Is(err, unix.ENOENT):
		if err = s.absent(k.Action.Function(), path); errors.Is(err, blob.ErrNotFound) {
			return nil
		}
		return fmt.Errorf("delete entry %s: %w", k.Action, err)
	default:
		return fmt.Errorf("delete entry %s: %w", k.Action, classify(err))
	}
	return nil
}
