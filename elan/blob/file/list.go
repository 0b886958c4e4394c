package file

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/file/pack"
	"github.com/mettle-build/mettle/elan/digest"
)

var (
	_ blob.Lister      = (*Store)(nil)
	_ blob.Remover     = (*Store)(nil)
	_ blob.EntryLister = (*Store)(nil)
)

// Blobs implements blob.Lister: getdents64, and newfstatat for each. It holds
// no lock and little memory, whatever the number of blobs. While a recovery goes
// on it fails with an error that wraps ErrUnavailable.
func (s *Store) Blobs(ctx context.Context) iter.Seq2[blob.Info, error] {
	return func(yield func(blob.Info, error) bool) {
		err := s.listPacked(ctx, func(i pack.Info) bool {
			d, entry, ok := parseKey(i.Key)
			if entry || !ok {
				return true
			}
			return yield(blob.Info{Digest: d, StoredBytes: i.Bytes + s.twinBytes(d), LastUse: i.LastUse}, nil)
		})
		if err == nil {
			err = s.list(ctx, s.casDir, true, func(f folder, name string) error {
				info, ok := s.info(f, name)
				// What is in the packs too was yielded already.
				if ok && !s.hasPacked(info.Digest) && !yield(info, nil) {
					return errEnough
				}
				return nil
			})
		}
		if errors.Is(err, errEnough) {
			return
		}
		if err != nil {
			yield(blob.Info{}, fmt.Errorf("list blobs: %w", err))
		}
	}
}

// listPacked calls visit with each record of the packs, until that returns
// false: errEnough. One that cleaning moves meanwhile may come twice.
func (s *Store) listPacked(ctx context.Context, visit func(i pack.Info) bool) error {
	if err := s.listable(ctx, digest.Empty(digest.SHA256)); err != nil || s.packed.store == nil {
		return err
	}
	for i, err := range s.packed.store.All(ctx) {
		if err != nil {
			return err
		}
		if !visit(i) {
			return errEnough
		}
	}
	return nil
}

// twinBytes is what the files of a packed blob take: newfstatat of each.
func (s *Store) twinBytes(d digest.Digest) (n int64) {
	for _, mode := range []blob.LinkMode{blob.LinkRegular, blob.LinkExecutable} {
		var st unix.Stat_t
		if unix.Lstat(s.blobPath(d, mode), &st) == nil {
			n += onDisk(st.Size)
		}
	}
	return n
}

// packedEntryInfo is what is told of a record, if it is a whole entry.
func packedEntryInfo(i pack.Info) (blob.EntryInfo, bool) {
	action, isEntry, ok := parseKey(i.Key)
	e, whole := parseEntry(i.Value)
	if !ok || !isEntry || !whole {
		return blob.EntryInfo{}, false
	}
	return blob.EntryInfo{
		Key: blob.EntryKey{Instance: e.instance, Action: action}, Bytes: int64(len(e.value)), LastUse: i.LastUse,
	}, true
}

// list walks one of the two trees for somebody from outside. That visit returns
// errEnough is no error.
func (s *Store) list(ctx context.Context, top string, cas bool, visit func(f folder, name string) error) error {
	if err := s.check(ctx, digest.Empty(digest.SHA256)); err != nil {
		return err
	}
	if s.recovery.active.Load() {
		return fmt.Errorf("%w: blobs are being verified after a crash of the machine", blob.ErrUnavailable)
	}
	err := s.walkTop(top, cas, func(f folder, name string) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		return visit(f, name)
	})
	switch {
	case err == nil, errors.Is(err, errEnough):
		return nil
	case errors.Is(err, errGivenUp):
		return fmt.Errorf("%w: it is closed", blob.ErrUnavailable)
	case ctx.Err() != nil:
		return ctx.Err()
	}
	return classify(err)
}

// info is what is told of the file name, if it is a blob's. The executable twin
// is told of with the regular file.
func (s *Store) info(f folder, name string) (blob.Info, bool) {
	d, mode, ok := parseBlobName(f.fn, name)
	var st, twin unix.Stat_t
	if !ok || mode != blob.LinkRegular || unix.Lstat(f.path+name, &st) != nil || st.Size != d.Size() {
		return blob.Info{}, false
	}
	info := blob.Info{Digest: d, StoredBytes: onDisk(st.Size), LastUse: atimeOf(&st)}
	if unix.Lstat(f.path+name+twinSuffix, &twin) == nil {
		info.StoredBytes += onDisk(twin.Size)
	}
	return info, true
}

// EntryInfos implements blob.EntryLister. It reads each entry, because what its
// file is called tells only a hash of the instance. Entries of another instance
// than the unnamed one that a version before this wrote are left out until they
// are written again: their names are not known.
func (s *Store) EntryInfos(ctx context.Context) iter.Seq2[blob.EntryInfo, error] {
	return func(yield func(blob.EntryInfo, error) bool) {
		err := s.listPacked(ctx, func(i pack.Info) bool {
			info, ok := packedEntryInfo(i)
			return !ok || yield(info, nil)
		})
		if err == nil {
			err = s.list(ctx, s.acDir, false, func(f folder, name string) error {
				info, ok := entryInfo(f, name)
				if ok && !s.hasPackedEntry(info.Key) && !yield(info, nil) {
					return errEnough
				}
				return nil
			})
		}
		if errors.Is(err, errEnough) {
			return
		}
		if err != nil {
			yield(blob.EntryInfo{}, fmt.Errorf("list entries: %w", err))
		}
	}
}

// entryInfo is what is told of the file name, if it is a whole entry.
func entryInfo(f folder, name string) (blob.EntryInfo, bool) {
	action, mode, ok := parseBlobName(f.fn, withoutInstance(name))
	if !ok || mode != blob.LinkRegular {
		return blob.EntryInfo{}, false
	}
	fd, err := openRead(f.path + name)
	if err != nil {
		return blob.EntryInfo{}, false
	}
	defer unix.Close(fd) //nolint:errcheck // opened for reading
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil || st.Size > maxEntryBytes || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return blob.EntryInfo{}, false
	}
	data, err := readAll(fd, st.Size)
	e, whole := parseEntry(data)
	if err != nil || !whole || !e.named && withoutInstance(name) != name {
		return blob.EntryInfo{}, false
	}
	return blob.EntryInfo{
		Key:     blob.EntryKey{Instance: e.instance, Action: action},
		Bytes:   int64(len(e.value)),
		LastUse: atimeOf(&st),
	}, true
}

// withoutInstance cuts the hash of the instance off the name of an entry's file.
func withoutInstance(name string) string {
	if first := strings.IndexByte(name, '-'); first >= 0 {
		if second := strings.IndexByte(name[first+1:], '-'); second >= 0 {
			return name[:first+1+second]
		}
	}
	return name
}

// readAll reads the first size bytes of a file, or as many as there are.
func readAll(fd int, size int64) ([]byte, error) {
	data := make([]byte, size)
	for off := 0; off < len(data); {
		n, err := pread(fd, data[off:], int64(off))
		if err != nil {
			return nil, err
		}
		if n == 0 {
			return data[:off], nil
		}
		off += n
	}
	return data, nil
}

// Remove implements blob.Remover. Who has the blob open reads on, and what is
// linked elsewhere stays there.
func (s *Store) Remove(ctx context.Context, d digest.Digest) error {
	if err := s.remove(ctx, d); err != nil {
		return fmt.Errorf("remove blob %s: %w", d, err)
	}
	return nil
}

func (s *Store) remove(ctx context.Context, d digest.Digest) error {
	if err := s.check(ctx, d); err != nil {
		return err
	}
	// Moves it to its place first, where a recovery goes on.
	there, mayBeFile, err := s.findPacked(ctx, d)
	if err != nil {
		return err
	}
	if there {
		var buf keyBuffer
		if there, err = s.packed.store.Delete(ctx, appendBlobKey(buf[:0], d)); err != nil {
			return err
		}
	}
	if mayBeFile {
		if err := s.use(ctx, d, blob.LinkRegular); err != nil {
			return err
		}
	} else if !there {
		return blob.ErrNotFound
	}
	if err := s.removeFile(ctx, d, blob.LinkRegular); err != nil && (!there || !errors.Is(err, blob.ErrNotFound)) {
		return err
	}
	if err := s.removeFile(ctx, d, blob.LinkExecutable); !errors.Is(err, blob.ErrNotFound) {
		return err
	}
	return nil
}

// removeFile removes the file of d in that mode: newfstatat, unlinkat.
func (s *Store) removeFile(ctx context.Context, d digest.Digest, mode blob.LinkMode) error {
	path := s.blobPath(d, mode)
	if !s.keys.lock(ctx.Done(), path) {
		return ctx.Err()
	}
	defer s.keys.unlock(path)
	var st unix.Stat_t
	err := unix.Lstat(path, &st)
	if err == nil {
		err = unix.Unlink(path)
	}
	switch {
	case errors.Is(err, unix.ENOENT):
		return s.absent(d.Function(), path)
	case err != nil:
		return classify(err)
	}
	s.space.release(onDisk(st.Size))
	return nil
}
