package file

import (
	"context"
	"encoding/hex"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/file/pack"
)

// readPackedEntry returns the value of k, if it is in the packs: pread64. What
// was damaged reads as absent: the action runs again.
func (s *Store) readPackedEntry(ctx context.Context, k blob.EntryKey) ([]byte, error) {
	if s.packed.store == nil {
		return nil, blob.ErrNotFound
	}
	var buf keyBuffer
	data, err := s.packed.store.Get(ctx, appendEntryKey(buf[:0], k))
	if err != nil {
		return nil, err
	}
	e, ok := parseEntry(data)
	if !ok || e.instance != k.Instance {
		s.log.Error("entry is damaged, and taken as absent", "digest", k.Action.String())
		return nil, blob.ErrNotFound
	}
	return e.value, nil
}

// putPackedEntry makes data, which formatEntry made, the entry k. Readers ask the
// packs first, so that a file of before is outdated from the moment of the Put.
func (s *Store) putPackedEntry(ctx context.Context, k blob.EntryKey, data []byte) error {
	var buf keyBuffer
	r := pack.Record{Key: appendEntryKey(buf[:0], k), Value: data, Mutable: true}
	n := pack.RecordBytes(len(r.Key), len(r.Value))
	if err := s.reserveBytes(ctx, n); err != nil {
		return err
	}
	files := s.packed.entryFiles()
	path := ""
	if files {
		path = s.entryPath(k)
		if !s.keys.lock(ctx.Done(), path) {
			s.space.cancel(n)
			return ctx.Err()
		}
		defer s.keys.unlock(path)
	}
	if _, err := s.packed.store.Put(r); err != nil {
		s.space.cancel(n)
		return s.refuse(err)
	}
	s.space.settleBytes(n)
	s.soil()
	if files {
		return s.removeEntryFile(k.Action.Function(), path)
	}
	return nil
}

// deletePackedEntry removes k from the packs, if it is there.
func (s *Store) deletePackedEntry(ctx context.Context, k blob.EntryKey) error {
	if s.packed.store == nil {
		return nil
	}
	var buf keyBuffer
	_, err := s.packed.store.Delete(ctx, appendEntryKey(buf[:0], k))
	return err
}

// dropOutdated removes the file name of an entry that is in the packs too, which
// happens where the process was killed between the two: what is in the packs is
// what was acknowledged.
func (s *Store) dropOutdated(f folder, name string) bool {
	if s.packed.store == nil {
		return false
	}
	plain := withoutInstance(name)
	action, _, ok := parseBlobName(f.fn, plain)
	if !ok {
		return false
	}
	var buf keyBuffer
	key := appendKey(buf[:0], keyEntry, keySpacedEntry, action)
	instance, err := hex.DecodeString(strings.TrimPrefix(strings.TrimPrefix(name, plain), "-"))
	if err != nil || !s.packed.store.Has(append(key, instance...)) {
		return false
	}
	path := f.path + name
	return s.keys.lock(s.closing, path) && func() bool {
		defer s.keys.unlock(path)
		return unix.Unlink(path) == nil
	}()
}

// entryFiles reports whether there may be files of entries.
func (p *packed) entryFiles() bool { return p.noEntryFiles.Load() != 1 }

// counted takes note of what a walk over all files found.
func (p *packed) counted(blobFiles, entryFiles bool) {
	p.blobFiles.Store(blobFiles)
	if !entryFiles {
		p.noEntryFiles.CompareAndSwap(0, 1) // not if one came meanwhile
	}
}
