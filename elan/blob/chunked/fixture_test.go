package chunked_test

import (
	"bytes"
	"context"
	"errors"
	"sync/atomic"
	"testing"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/blobtest"
	"github.com/mettle-build/mettle/elan/blob/chunked"
	"github.com/mettle-build/mettle/elan/blob/file"
	"github.com/mettle-build/mettle/elan/blob/mem"
	"github.com/mettle-build/mettle/elan/chunk"
	"github.com/mettle-build/mettle/elan/digest"
)

func openMem(t testing.TB, o mem.Options) *mem.Store {
	t.Helper()
	s, err := mem.New(o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func openFile(t testing.TB, dir string) *file.Store {
	t.Helper()
	s, err := file.New(file.Options{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return s
}

// The functions of what follows make small chunks, so that blobs can be small:
// of over keptBytes they are kept in chunks.
const keptBytes = 2*minRepMax - 1

const minRepMax = 2 << 10

func smallFunctions(t testing.TB) (*chunk.FastCDC, *chunk.RepMaxCDC) {
	t.Helper()
	fast, err := chunk.NewFastCDC(4<<10, 0)
	if err != nil {
		t.Fatal(err)
	}
	repMax, err := chunk.NewRepMaxCDC(minRepMax, 8*minRepMax)
	if err != nil {
		t.Fatal(err)
	}
	return fast, repMax
}

// fixture is a Store of small chunks over one that counts, and fails on demand.
type fixture struct {
	*chunked.Store
	fast   *chunk.FastCDC
	repMax *chunk.RepMaxCDC
	mem    *mem.Store
	fault  atomic.Pointer[blobtest.Fault] // of the store inside; nil: none
	finds  atomic.Int64                   // calls of the store inside
}

func newFixture(t testing.TB, o mem.Options) *fixture {
	t.Helper()
	f := &fixture{mem: openMem(t, o)}
	f.fast, f.repMax = smallFunctions(t)
	fault := func(op blobtest.Op, d digest.Digest) error {
		if p := f.fault.Load(); p != nil {
			return (*p)(op, d)
		}
		return nil
	}
	var err error
	f.Store, err = chunked.New(chunked.Options{
		Store:   counting{Store: blobtest.Faulty{Store: f.mem, Fault: fault}, finds: &f.finds},
		Entries: entries{blobtest.FaultyEntries{Entries: f.mem, Fault: fault}, f.mem, f.mem},
		FastCDC: f.fast, RepMaxCDC: f.repMax,
	})
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// entries are entries that fail on demand, and can be surveyed.
type entries struct {
	blobtest.FaultyEntries
	blob.EntryLister
	blob.EntryStatter
}

// counting counts the calls of FindMissing.
type counting struct {
	blob.Store
	finds *atomic.Int64
}

func (c counting) FindMissing(ctx context.Context, ds []digest.Digest) ([]digest.Digest, error) {
	c.finds.Add(1)
	return c.Store.FindMissing(ctx, ds)
}

func (c counting) Unwrap() blob.Store { return c.Store }

// fail makes the store inside fail where the fault says so; nil ends it.
func (f *fixture) fail(fault blobtest.Fault) {
	if fault == nil {
		f.fault.Store(nil)
		return
	}
	f.fault.Store(&fault)
}

// cut puts the chunks of data into s, and returns them, with the digest of data.
func cut(t testing.TB, s blob.Store, fn chunk.Function, data []byte) (digest.Digest, []digest.Digest) {
	t.Helper()
	var ds []digest.Digest
	for c := range chunk.Chunks(fn, data) {
		ds = append(ds, blobtest.Put(t, s, digest.SHA256, c))
	}
	return digest.Of(digest.SHA256, data), ds
}

// keep splices data, which is large enough to be kept in chunks.
func (f *fixture) keep(t testing.TB, data []byte) (digest.Digest, []digest.Digest) {
	t.Helper()
	d, ds := cut(t, f.mem, f.fast, data)
	if err := f.Splice(t.Context(), d, blob.ChunkList{Function: blob.ChunkFastCDC2020, Chunks: ds}); err != nil {
		t.Fatal(err)
	}
	return d, ds
}

func wantBlob(t testing.TB, s blob.Store, d digest.Digest, want []byte) {
	t.Helper()
	if missing, err := s.FindMissing(t.Context(), []digest.Digest{d}); err != nil || len(missing) > 0 {
		t.Errorf("%s: missing %v, %v; want it to be there", d, missing, err)
	}
	if got, err := blob.ReadAll(t.Context(), s, d, int64(len(want))); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%s: %d bytes, %v; want the %d that it has", d, len(got), err, len(want))
	}
}

func wantMissing(t testing.TB, s blob.Store, d digest.Digest) {
	t.Helper()
	if missing, err := s.FindMissing(t.Context(), []digest.Digest{d}); err != nil || len(missing) != 1 || missing[0] != d {
		t.Errorf("%s: missing %v, %v; want it to be missing", d, missing, err)
	}
	if _, err := s.Open(t.Context(), d, 0); !errors.Is(err, blob.ErrNotFound) {
		t.Errorf("open %s: %v, want ErrNotFound", d, err)
	}
}

// inWhole reports whether the store inside has d as a whole.
func (f *fixture) inWhole(t testing.TB, d digest.Digest) bool {
	t.Helper()
	missing, err := f.mem.FindMissing(t.Context(), []digest.Digest{d})
	if err != nil {
		t.Fatal(err)
	}
	return len(missing) == 0
}
