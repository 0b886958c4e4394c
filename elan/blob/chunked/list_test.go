package chunked_test

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/blobtest"
	"github.com/mettle-build/mettle/elan/blob/chunked"
	"github.com/mettle-build/mettle/elan/blob/file"
	"github.com/mettle-build/mettle/elan/blob/mem"
	"github.com/mettle-build/mettle/elan/digest"
)

func aroundFile(t testing.TB, s *file.Store) *chunked.Local {
	t.Helper()
	o := chunked.Options{Entries: s}
	o.FastCDC, o.RepMaxCDC = smallFunctions(t)
	c, err := chunked.NewLocal(s, o)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// TestRestart: what is kept in chunks is there after a restart.
func TestRestart(t *testing.T) {
	dir := t.TempDir()
	data := blobtest.Random(40, 100_000)
	var d digest.Digest
	t.Run("before", func(t *testing.T) {
		c := aroundFile(t, openFile(t, dir))
		fast, _ := smallFunctions(t)
		var ds []digest.Digest
		d, ds = cut(t, c, fast, data)
		if err := c.Splice(t.Context(), d, blob.ChunkList{Chunks: ds}); err != nil {
			t.Fatal(err)
		}
	})
	s := openFile(t, dir)
	if missing, err := s.FindMissing(t.Context(), []digest.Digest{d}); err != nil || len(missing) != 1 {
		t.Errorf("the whole: missing %v, %v; want it to be", missing, err)
	}
	wantBlob(t, aroundFile(t, s), d, data)
}

// TestLink: an input that is kept in chunks becomes a file, once for all.
func TestLink(t *testing.T) {
	s := openFile(t, t.TempDir())
	c := aroundFile(t, s)
	data := blobtest.Random(41, 200_000)
	fast, _ := smallFunctions(t)
	d, ds := cut(t, c, fast, data)
	if err := c.Splice(t.Context(), d, blob.ChunkList{Chunks: ds}); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			path := filepath.Join(dir, string('a'+rune(i)))
			if err := c.Link(t.Context(), d, path, blob.LinkMode(i%2)); err != nil { //nolint:gosec // 0 or 1
				t.Error(err)
			}
			if got, err := os.ReadFile(path); err != nil || digest.Of(digest.SHA256, got) != d {
				t.Errorf("%s: %d bytes, %v", path, len(got), err)
			}
		})
	}
	wg.Wait()
	if err := c.Audit(t.Context(), d, blob.LinkRegular, time.Now()); err != nil {
		t.Error(err)
	}
	wantBlob(t, s, d, data) // a whole by now
	if err := s.Remove(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	wantBlob(t, c, d, data)
	if err := s.Remove(t.Context(), ds[0]); err != nil {
		t.Fatal(err)
	}
	if err := c.Link(t.Context(), d, filepath.Join(dir, "gone"), blob.LinkRegular); !errors.Is(err, blob.ErrNotFound) {
		t.Errorf("without a chunk: %v, want ErrNotFound", err)
	}
}

// TestLifetimes: to ask for a blob starts the lifetimes of its chunks and its list
// anew.
func TestLifetimes(t *testing.T) {
	for name, touch := range map[string]func(t *testing.T, f *fixture, d digest.Digest){
		"find": func(t *testing.T, f *fixture, d digest.Digest) {
			if missing, err := f.FindMissing(t.Context(), []digest.Digest{d}); err != nil || len(missing) > 0 {
				t.Errorf("missing %v, %v", missing, err)
			}
		},
		"open": func(t *testing.T, f *fixture, d digest.Digest) {
			r, err := f.Open(t.Context(), d, d.Size())
			if err != nil {
				t.Fatal(err)
			}
			if err := r.Close(); err != nil {
				t.Error(err)
			}
		},
		"split": func(t *testing.T, f *fixture, d digest.Digest) {
			if _, err := f.Split(t.Context(), d, blob.ChunkFastCDC2020); err != nil {
				t.Error(err)
			}
		},
		"nothing": func(*testing.T, *fixture, digest.Digest) {},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFixture(t, mem.Options{MaxBytes: 1 << 20, MinLifetime: time.Hour})
				data := blobtest.Random(42, 200_000)
				d, _ := f.keep(t, data)
				time.Sleep(50 * time.Minute)
				touch(t, f, d)
				time.Sleep(50 * time.Minute)
				for i := range 100 { // all that the store can hold
					fill := blobtest.Random(uint64(1000+i), 50_000)
					if err := blob.ReceiveBytes(t.Context(), f, digest.Of(digest.SHA256, fill), fill); err != nil {
						if !errors.Is(err, blob.ErrFull) {
							t.Fatal(err)
						}
						break
					}
				}
				if name == "nothing" {
					wantMissing(t, f, d)
				} else {
					wantBlob(t, f, d, data)
				}
			})
		})
	}
}

// TestReserved: nobody reaches the lists through the entries.
func TestReserved(t *testing.T) {
	f := newFixture(t, mem.Options{})
	data := blobtest.Random(43, 50_000)
	d, _ := f.keep(t, data)
	n := 0
	for e, err := range f.mem.EntryInfos(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		n++
		if v, err := f.Entry(t.Context(), e.Key); !errors.Is(err, blob.ErrNotFound) {
			t.Errorf("entry %q: %d bytes, %v; want ErrNotFound", e.Key.Instance, len(v), err)
		}
		if err := f.PutEntry(t.Context(), e.Key, []byte("forged")); !errors.Is(err, blob.ErrMalformed) {
			t.Errorf("put entry %q: %v, want ErrMalformed", e.Key.Instance, err)
		}
		if err := f.DeleteEntry(t.Context(), e.Key); err != nil {
			t.Errorf("delete entry %q: %v", e.Key.Instance, err)
		}
		if _, err := f.StatEntry(t.Context(), e.Key); !errors.Is(err, blob.ErrNotFound) {
			t.Errorf("stat entry %q: %v, want ErrNotFound", e.Key.Instance, err)
		}
	}
	if n != 1 {
		t.Errorf("%d lists, want 1", n)
	}
	for e, err := range f.EntryInfos(t.Context()) {
		t.Errorf("entry %q is listed, %v", e.Key.Instance, err)
	}
	wantBlob(t, f, d, data)
}

// TestDamaged: a list that makes no sense reads as absent, and what it belongs to
// can be put again.
func TestDamaged(t *testing.T) {
	data := blobtest.Random(44, 50_000)
	for name, damage := range map[string]func(v []byte) []byte{
		"empty":         func([]byte) []byte { return nil },
		"cut":           func(v []byte) []byte { return v[:len(v)-1] },
		"longer":        func(v []byte) []byte { return append(v, 0) },
		"later_version": func(v []byte) []byte { v[0] = 2; return v },
		"function":      func(v []byte) []byte { v[1] = 77; return v },
		"count":         func(v []byte) []byte { return append(v[:2], 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01) },
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t, mem.Options{})
			d, ds := f.keep(t, data)
			for e, err := range f.mem.EntryInfos(t.Context()) {
				var v []byte
				if err == nil {
					v, err = f.mem.Entry(t.Context(), e.Key)
				}
				if err == nil {
					err = f.mem.PutEntry(t.Context(), e.Key, damage(v))
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			wantMissing(t, f, d)
			if err := f.Splice(t.Context(), d, blob.ChunkList{Chunks: ds}); err != nil {
				t.Fatal(err)
			}
			wantBlob(t, f, d, data)
		})
	}
}

// TestSurvey: those who look after the store see what is kept in chunks.
func TestSurvey(t *testing.T) {
	f := newFixture(t, mem.Options{})
	data := blobtest.Random(45, 50_000)
	d, ds := f.keep(t, data)
	whole := blobtest.Put(t, f, digest.SHA256, blobtest.Random(46, 50_000))
	if _, err := f.Split(t.Context(), whole, blob.ChunkFastCDC2020); err != nil {
		t.Fatal(err)
	}
	seen := map[digest.Digest]int{}
	stored := map[digest.Digest]int64{}
	for info, err := range f.Blobs(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		seen[info.Digest]++
		stored[info.Digest] = info.StoredBytes
	}
	for _, b := range slices.Concat(ds, []digest.Digest{d, whole}) {
		if seen[b] != 1 {
			t.Errorf("%s is listed %d times", b, seen[b])
		}
	}
	if stored[d] <= 0 || stored[d] > 100*int64(len(ds)) {
		t.Errorf("a list of %d chunks takes %d bytes", len(ds), stored[d])
	}
	if info, err := f.Stat(t.Context(), d); err != nil || info.Digest != d || info.StoredBytes != stored[d] {
		t.Errorf("stat: %+v, %v", info, err)
	}
	if err := f.Check(t.Context(), d); err != nil {
		t.Errorf("check: %v", err)
	}
	if err := f.mem.Remove(t.Context(), ds[1]); err != nil {
		t.Fatal(err)
	}
	if err := f.Check(t.Context(), d); !errors.Is(err, blob.ErrNotFound) {
		t.Errorf("check without a chunk: %v, want ErrNotFound", err)
	}
	for _, b := range []digest.Digest{d, whole} {
		if err := f.Remove(t.Context(), b); err != nil {
			t.Errorf("remove: %v", err)
		}
		if err := f.Remove(t.Context(), b); !errors.Is(err, blob.ErrNotFound) {
			t.Errorf("remove again: %v, want ErrNotFound", err)
		}
		if _, err := f.Stat(t.Context(), b); !errors.Is(err, blob.ErrNotFound) {
			t.Errorf("stat of what is gone: %v", err)
		}
	}
	for e, err := range f.mem.EntryInfos(t.Context()) {
		t.Errorf("list %q is left, %v", e.Key.Instance, err)
	}
}

func TestNew_options(t *testing.T) {
	s := openMem(t, mem.Options{})
	for _, o := range []chunked.Options{{}, {Store: s}, {Entries: s}, {Store: s, Entries: s, MaxSplits: -1}} {
		if _, err := chunked.New(o); err == nil {
			t.Errorf("%+v: no error", o)
		}
	}
	if _, err := chunked.NewLocal(nil, chunked.Options{Entries: s}); err == nil {
		t.Error("no store: no error")
	}
	c, err := chunked.New(chunked.Options{Store: s, Entries: s})
	if err != nil {
		t.Fatal(err)
	}
	want := blob.ChunkParams{FastCDCAverageBytes: 512 << 10, RepMaxCDCMinimumBytes: 256 << 10, RepMaxCDCHorizonBytes: 2 << 20, MaxChunks: 1 << 19}
	if got := c.ChunkParams(); got != want {
		t.Errorf("%+v, want what the API recommends, %+v", got, want)
	}
}
