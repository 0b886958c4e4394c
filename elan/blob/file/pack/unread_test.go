package pack_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/file/pack"
)

// unreadable makes the segment at path one that can't be opened, and returns what
// undoes that. What takes its place has a size and can be removed as a file can.
func unreadable(t testing.TB, path string) (undo func()) {
	t.Helper()
	must(t, os.Rename(path, path+".away"))
	must(t, os.Symlink(strings.Repeat("x/", 2000), path))
	return func() {
		t.Helper()
		must(t, os.Remove(path))
		must(t, os.Rename(path+".away", path))
	}
}

// TestStore_Clean_unreadable: a segment that can't be read keeps no other from
// being cleaned, and what is in it is there when it can be read again.
func TestStore_Clean_unreadable(t *testing.T) {
	o := pack.Options{Dir: t.TempDir(), SegmentBytes: 4 << 10}
	s := open(t, o)
	put(t, s, upTo(300)...)
	path, _ := find(t, o.Dir, append(key(7), "value"...))
	for n := range 300 {
		if n != 7 && (n < 30 || n%2 == 0) {
			_, err := s.Delete(t.Context(), key(n))
			must(t, err)
		}
	}
	must(t, s.Close())
	undo := unreadable(t, path)
	s = open(t, o)
	before, _, _ := s.Bytes()
	freed, _, err := s.Clean(t.Context().Done(), 1<<40, 0.97, time.Time{})
	if freed < before/4 || !errors.Is(err, blob.ErrUnavailable) {
		t.Errorf("freed %d of %d bytes, %v; want a quarter at least, and ErrUnavailable", freed, before, err)
	}
	if v, err := s.Get(t.Context(), key(7)); !errors.Is(err, blob.ErrUnavailable) {
		t.Errorf("get: %.20q, %v; want ErrUnavailable", v, err)
	}
	if v, err := s.Verify(t.Context().Done(), noPace); v.Damaged != 0 || v.Records < 100 || !errors.Is(err, blob.ErrUnavailable) {
		t.Errorf("verify: %+v, %v; want the other records, and ErrUnavailable", v, err)
	}
	undo()
	wantValue(t, s, key(7), value(7))
	for n := 31; n < 300; n += 2 {
		wantValue(t, s, key(n), value(n))
	}
}

// TestStore_rebuildUnreadable: a segment that could not be read when the index was
// made anew is not taken for one without records, and the next start has them.
func TestStore_rebuildUnreadable(t *testing.T) {
	o := pack.Options{Dir: t.TempDir(), SegmentBytes: 4 << 10}
	s := open(t, o)
	put(t, s, upTo(300)...)
	path, _ := find(t, o.Dir, append(key(7), "value"...))
	must(t, s.Close())
	undo := unreadable(t, path)
	o.Untrusted = true
	s = open(t, o)
	wantGone(t, s, key(7))
	if _, _, err := s.Clean(t.Context().Done(), 1<<40, 1, time.Time{}); err != nil {
		t.Error(err)
	}
	must(t, s.Close())
	undo()
	o.Untrusted = false
	s = open(t, o)
	for n := range 300 {
		wantValue(t, s, key(n), value(n))
	}
}

// TestStore_Clean_syncsLater: what an attempt moved that could not be made durable
// is so before the next one removes what it was moved from.
func TestStore_Clean_syncsLater(t *testing.T) {
	o := pack.Options{Dir: t.TempDir(), SegmentBytes: 4 << 10}
	s := open(t, o)
	put(t, s, upTo(60)...)
	_, err := s.Delete(t.Context(), key(10))
	must(t, err)
	failed := errors.New("sync failed")
	s.SetSync(func(int) error { return failed })
	if freed, _, err := s.Clean(t.Context().Done(), 1<<20, 0.99, time.Time{}); freed > 0 || err == nil {
		t.Fatalf("freed %d, %v; want nothing, and an error", freed, err)
	}
	segments := len(segmentFiles(t, o.Dir))
	synced := 0
	s.SetSync(func(int) error {
		if synced++; len(segmentFiles(t, o.Dir)) < segments {
			t.Error("a segment was removed before its records were durable elsewhere")
		}
		return nil
	})
	freed, _, err := s.Clean(t.Context().Done(), 1, 0.99, time.Time{})
	must(t, err)
	if synced == 0 || freed == 0 {
		t.Errorf("%d syncs, %d bytes freed", synced, freed)
	}
}

// TestStore_rebuildDiskFull: where there is no room for a second index, the former
// one makes room for it.
func TestStore_rebuildDiskFull(t *testing.T) {
	disk := t.TempDir()
	if err := unix.Mount("tmpfs", disk, "tmpfs", 0, "size=32m"); err != nil {
		t.Skipf("can't mount a small disk: %v", err)
	}
	t.Cleanup(func() { must(t, unix.Unmount(disk, 0)) })
	const records = 20_000
	o := pack.Options{Dir: filepath.Join(disk, "packs"), SegmentBytes: 1 << 20}
	s := open(t, o)
	put(t, s, upTo(records)...)
	must(t, s.Close())
	f, err := os.Create(filepath.Join(disk, "of_somebody_else"))
	must(t, err)
	for err == nil {
		_, err = f.Write(make([]byte, 4096))
	}
	must(t, f.Close())
	o.Untrusted = true
	s = open(t, o)
	<-s.Rebuilt()
	if n := s.Records(); n != records {
		t.Errorf("%d records of %d are there", n, records)
	}
	for n := range records {
		if ok, err := s.Find(t.Context(), key(n)); !ok || err != nil {
			t.Fatalf("find record %d: %v, %v", n, ok, err)
		}
	}
	must(t, s.Close())
}
