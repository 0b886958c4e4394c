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

// An entry's file is entryMagic, the CRC-32C of all that follows as 4 bytes
// big-endian, the length of the instance's name as a uvarint, that name, and the
// value. The checksum tells what a power failure left half-written: an entry's
// file name says nothing of its bytes, and of the instance no more than a hash,
// so that the name is in here for EntryInfos. Files of entryMagic1 have no name.
const (
	entryMagic  = "ME2\n"
	entryMagic1 = "ME1\n"
	entryHeader = len(entryMagic) + 4
	// maxEntryBytes bounds what is read at once. ActionResults with inlined
	// outputs stay below the size of a gRPC message, 4 MiB by default.
	maxEntryBytes = 64 << 20
)

//nolint:gochecknoglobals // an immutable table
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Entry implements blob.Entries: of a small entry pread64; of a large one openat,
// fstat, pread64, close, and at most once in touchEvery utimensat.
func (s *Store) Entry(ctx context.Context, k blob.EntryKey) ([]byte, error) {
	if err := s.check(ctx, k.Action); err != nil {
		return nil, fmt.Errorf("entry %s: %w", k.Action, err)
	}
	value, err := s.readPackedEntry(ctx, k)
	if errors.Is(err, blob.ErrNotFound) && s.packed.entryFiles() {
		value, err = s.readEntryFile(ctx, k)
	}
	if err != nil {
		return nil, fmt.Errorf("entry %s: %w", k.Action, err)
	}
	return value, nil
}

// readEntryFile reads the entry that is not in the packs.
func (s *Store) readEntryFile(ctx context.Context, k blob.EntryKey) ([]byte, error) {
	value, st, err := s.readEntry(k.Action.Function(), s.entryPath(k))
	switch {
	case err == nil && s.stale(&st, time.Now()):
	case errors.Is(err, blob.ErrNotFound) && st.Ino == 0:
		// There is no file. A small value may have taken the place of a large one
		// since the look at the packs.
	default:
		return value, err
	}
	return s.useEntry(ctx, k)
}

// useEntry reads the entry under its lock, and marks it as used.
func (s *Store) useEntry(ctx context.Context, k blob.EntryKey) ([]byte, error) {
	path := s.entryPath(k)
	if !s.keys.lock(ctx.Done(), path) {
		return nil, ctx.Err()
	}
	defer s.keys.unlock(path)
	if s.hasPackedEntry(k) {
		return s.readPackedEntry(ctx, k)
	}
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
	data, err := readAll(fd, st.Size)
	if err != nil {
		return nil, st, classify(err)
	}
	e, ok := parseEntry(data)
	if !ok {
		return damaged()
	}
	return e.value, st, nil
}

// entry is the content of an entry's file.
type entry struct {
	instance string
	named    bool // instance is known
	value    []byte
}

// parseEntry reads the content of an entry's file, and reports whether it is
// whole. The value is a part of data.
func parseEntry(data []byte) (e entry, ok bool) {
	if len(data) < entryHeader {
		return e, false
	}
	magic, rest := string(data[:len(entryMagic)]), data[entryHeader:]
	sum := binary.BigEndian.Uint32(data[len(entryMagic):])
	if sum != crc32.Checksum(rest, castagnoli) {
		return e, false
	}
	switch magic {
	case entryMagic1:
		return entry{value: rest}, true
	case entryMagic:
		n, used := binary.Uvarint(rest)
		if used <= 0 || n > uint64(len(rest)-used) {
			return e, false
		}
		name := rest[used : used+int(n)] //nolint:gosec // not over the length of rest
		return entry{instance: string(name), named: true, value: rest[used+len(name):]}, true
	}
	return e, false
}

// formatEntry is the reverse of parseEntry.
func formatEntry(instance string, value []byte) []byte {
	data := make([]byte, entryHeader, entryHeader+binary.MaxVarintLen64+len(instance)+len(value))
	data = binary.AppendUvarint(data, uint64(len(instance)))
	data = append(append(data, instance...), value...)
	copy(data, entryMagic)
	binary.BigEndian.PutUint32(data[len(entryMagic):], crc32.Checksum(data[entryHeader:], castagnoli))
	return data
}

// PutEntry implements blob.Entries: of a small entry pwrite64, twice where it
// replaces another; of a large one openat, write, close, utimensat,
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
	if len(k.Instance)+len(value) > maxEntryBytes-entryHeader-binary.MaxVarintLen64 {
		return fmt.Errorf("%w: an entry has at most %d bytes", blob.ErrTooLarge, maxEntryBytes)
	}
	data := formatEntry(k.Instance, value)
	if len(data) <= s.packed.maxEntry {
		return s.putPackedEntry(ctx, k, data)
	}
	size := int64(len(data))
	if err := s.prepare(ctx, k.Action.Function()); err != nil {
		return err
	}
	if err := s.reserve(ctx, size); err != nil {
		return err
	}
	tmp := s.tmpPath()
	err := s.writeEntry(tmp, data)
	if err == nil {
		err = s.replaceEntry(ctx, tmp, k)
	}
	if err != nil {
		s.space.cancel(onDisk(size))
		_ = unix.Unlink(tmp)
		return err
	}
	s.settle(size)
	return nil
}

func (s *Store) writeEntry(tmp string, data []byte) error {
	fd, err := s.createTmp(tmp)
	if err != nil {
		return err
	}
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

// replaceEntry gives the file tmp the name of the entry k, and counts what that
// frees.
func (s *Store) replaceEntry(ctx context.Context, tmp string, k blob.EntryKey) error {
	s.packed.noEntryFiles.Store(-1)
	path := s.entryPath(k)
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
	return s.deletePackedEntry(ctx, k)
}

// DeleteEntry implements blob.Entries: newfstatat, unlinkat.
func (s *Store) DeleteEntry(ctx context.Context, k blob.EntryKey) error {
	if err := s.check(ctx, k.Action); err != nil {
		return fmt.Errorf("delete entry %s: %w", k.Action, err)
	}
	err := s.deletePackedEntry(ctx, k)
	if err == nil && s.packed.entryFiles() {
		err = s.deleteEntryFile(ctx, k)
	}
	if err != nil {
		return fmt.Errorf("delete entry %s: %w", k.Action, err)
	}
	return nil
}

func (s *Store) deleteEntryFile(ctx context.Context, k blob.EntryKey) error {
	path := s.entryPath(k)
	if !s.keys.lock(ctx.Done(), path) {
		return ctx.Err()
	}
	defer s.keys.unlock(path)
	return s.removeEntryFile(k.Action.Function(), path)
}

// removeEntryFile removes the file of an entry, if there is one. The caller holds
// the lock of its path.
func (s *Store) removeEntryFile(fn digest.Function, path string) error {
	var st unix.Stat_t
	err := unix.Lstat(path, &st)
	if err == nil {
		err = os.Remove(path)
	}
	switch {
	case err == nil:
		s.space.release(onDisk(st.Size))
		return nil
	case !errors.Is(err, unix.ENOENT):
		return classify(err)
	}
	if err = s.absent(fn, path); errors.Is(err, blob.ErrNotFound) {
		return nil
	}
	return err
}
