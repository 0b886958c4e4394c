package chunked_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"slices"
	"testing"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/blobtest"
	"github.com/mettle-build/mettle/elan/blob/chunked"
	"github.com/mettle-build/mettle/elan/blob/mem"
	"github.com/mettle-build/mettle/elan/digest"
)

func TestStore_mem(t *testing.T) {
	blobtest.Run(t, blobtest.Options{New: func(t testing.TB) blob.Store {
		s := openMem(t, mem.Options{})
		c, err := chunked.New(chunked.Options{Store: s, Entries: s})
		if err != nil {
			t.Fatal(err)
		}
		return c
	}})
}

func TestStore_file(t *testing.T) {
	blobtest.Run(t, blobtest.Options{New: func(t testing.TB) blob.Store {
		s := openFile(t, t.TempDir())
		c, err := chunked.NewLocal(s, chunked.Options{Entries: s})
		if err != nil {
			t.Fatal(err)
		}
		return c
	}})
}

func TestSplice_keepsChunks(t *testing.T) {
	f := newFixture(t, mem.Options{})
	data := blobtest.Random(1, 100_000)
	d, ds := cut(t, f, f.fast, data)
	wantMissing(t, f, d)
	if err := f.Splice(t.Context(), d, blob.ChunkList{Chunks: slices.Concat(ds, []digest.Digest{digest.Empty(digest.SHA256)})}); err != nil {
		t.Fatal(err)
	}
	if f.inWhole(t, d) {
		t.Error("the blob is there as a whole too")
	}
	wantBlob(t, f, d, data)
	end := int64(0)
	offsets := []int64{0, 1, d.Size() - 1, d.Size()}
	for _, c := range ds {
		end += c.Size()
		offsets = append(offsets, end-1, end, min(end+1, d.Size()))
	}
	for _, off := range offsets {
		r, err := f.Open(t.Context(), d, off)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(r)
		if err := errors.Join(err, r.Close(), r.Close()); err != nil || !bytes.Equal(got, data[off:]) {
			t.Errorf("from %d: %d bytes, %v; want %d", off, len(got), err, d.Size()-off)
		}
	}
	for _, off := range []int64{-1, d.Size() + 1} {
		if _, err := f.Open(t.Context(), d, off); err == nil || errors.Is(err, blob.ErrNotFound) {
			t.Errorf("from %d: %v, want another error", off, err)
		}
	}
}

// TestSplice_shares: an edited blob takes the chunks that it has alone.
func TestSplice_shares(t *testing.T) {
	f := newFixture(t, mem.Options{})
	data := blobtest.Random(2, 200_000)
	_, ds := f.keep(t, data)
	edit := slices.Concat(data[:100_000], []byte("x"), data[100_000:])
	de, des := f.keep(t, edit)
	fresh := 0
	for _, c := range des {
		if !slices.Contains(ds, c) {
			fresh++
		}
	}
	if fresh == 0 || fresh > 3 {
		t.Errorf("%d of %d chunks are new", fresh, len(des))
	}
	wantBlob(t, f, de, edit)
}

func TestSplice_refuses(t *testing.T) {
	f := newFixture(t, mem.Options{})
	data := blobtest.Random(3, 50_000)
	d, ds := cut(t, f, f.fast, data)
	swapped := slices.Clone(ds)
	swapped[0], swapped[1] = swapped[1], swapped[0]
	absent := digest.Of(digest.SHA256, data[:ds[0].Size()-1])
	lastByte := blobtest.Put(t, f, digest.SHA256, data[ds[0].Size()-1:ds[0].Size()])
	other := blobtest.Put(t, f, digest.SHA1, data[:ds[0].Size()])
	petabyte, err := digest.New(digest.SHA256, d.Hash(), 1<<62)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name   string
		d      digest.Digest
		chunks []digest.Digest
		want   error
	}{
		{"other_order", d, swapped, blob.ErrCorrupt},
		{"one_less", d, ds[1:], blob.ErrCorrupt},
		{"one_more", d, slices.Concat(ds, ds[:1]), blob.ErrCorrupt},
		{"none", d, nil, blob.ErrCorrupt},
		{"chunk_missing", d, slices.Concat([]digest.Digest{absent, lastByte}, ds[1:]), blob.ErrNotFound},
		{"other_function", d, slices.Concat([]digest.Digest{other}, ds[1:]), digest.ErrInvalid},
		{"other_space", d, slices.Concat([]digest.Digest{ds[0].In(digest.SpaceOf("x"))}, ds[1:]), digest.ErrInvalid},
		{"zero_chunk", d, slices.Concat([]digest.Digest{{}}, ds), digest.ErrInvalid},
		{"zero_blob", digest.Digest{}, ds, digest.ErrInvalid},
		{"too_many", d, slices.Repeat([]digest.Digest{lastByte}, 1<<19+1), blob.ErrTooLarge},
		{"petabytes", petabyte, ds, blob.ErrCorrupt},
		{"overflow", d, []digest.Digest{petabyte, petabyte, petabyte, petabyte}, blob.ErrCorrupt},
		{"itself", petabyte, []digest.Digest{petabyte}, blob.ErrNotFound},
	} {
		t.Run(c.name, func(t *testing.T) {
			if err := f.Splice(t.Context(), c.d, blob.ChunkList{Chunks: c.chunks}); !errors.Is(err, c.want) {
				t.Errorf("%v, want %v", err, c.want)
			}
			if !c.d.IsZero() {
				wantMissing(t, f, c.d)
			}
		})
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if err := f.Splice(gone, d, blob.ChunkList{Chunks: ds}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	wantMissing(t, f, d)
}

// TestSplice_whole: what is small, and what is in crumbs, is copied.
func TestSplice_whole(t *testing.T) {
	f := newFixture(t, mem.Options{})
	small := blobtest.Random(4, keptBytes)
	crumbs := blobtest.Random(5, 20_000)
	for name, data := range map[string][]byte{"small": small, "crumbs": crumbs} {
		var ds []digest.Digest
		for part := range slices.Chunk(data, 50) {
			ds = append(ds, blobtest.Put(t, f, digest.SHA256, part))
		}
		d := digest.Of(digest.SHA256, data)
		wrong := slices.Clone(ds)
		wrong[0], wrong[1] = wrong[1], wrong[0]
		if err := f.Splice(t.Context(), d, blob.ChunkList{Chunks: wrong}); !errors.Is(err, blob.ErrCorrupt) {
			t.Errorf("%s, in another order: %v, want ErrCorrupt", name, err)
		}
		wantMissing(t, f, d)
		if err := f.Splice(t.Context(), d, blob.ChunkList{Chunks: ds}); err != nil {
			t.Fatal(err)
		}
		if !f.inWhole(t, d) {
			t.Errorf("%s: it is not there as a whole", name)
		}
		wantBlob(t, f, d, data)
	}
}

// TestSplice_present reads nothing, and does not ask for what the chunks are.
func TestSplice_present(t *testing.T) {
	f := newFixture(t, mem.Options{})
	data := blobtest.Random(6, 50_000)
	kept, ds := f.keep(t, data)
	whole := blobtest.Put(t, f, digest.SHA256, blobtest.Random(7, 50_000))
	f.fail(func(op blobtest.Op, _ digest.Digest) error {
		if op == blobtest.OpOpen || op == blobtest.OpPutEntry {
			return errors.New("this was not to be called")
		}
		return nil
	})
	for _, d := range []digest.Digest{kept, whole, digest.Empty(digest.SHA256)} {
		l := blob.ChunkList{Chunks: ds}
		if d.IsEmpty() {
			l.Chunks = nil
		}
		if err := f.Splice(t.Context(), d, l); err != nil {
			t.Errorf("%s is there: %v", d, err)
		}
	}
}

// TestSplice_nested: a chunk may be a blob that is kept in chunks. What is kept
// refers to whole blobs.
func TestSplice_nested(t *testing.T) {
	f := newFixture(t, mem.Options{})
	first, second := blobtest.Random(8, 60_000), blobtest.Random(9, 60_000)
	d1, ds1 := f.keep(t, first)
	d2 := blobtest.Put(t, f, digest.SHA256, second)
	both := slices.Concat(first, second, first)
	d := digest.Of(digest.SHA256, both)
	if err := f.Splice(t.Context(), d, blob.ChunkList{Chunks: []digest.Digest{d1, d2, d1}}); err != nil {
		t.Fatal(err)
	}
	if err := f.Remove(t.Context(), d1); err != nil {
		t.Fatal(err)
	}
	wantMissing(t, f, d1)
	wantBlob(t, f, d, both)
	if err := f.mem.Remove(t.Context(), ds1[0]); err != nil {
		t.Fatal(err)
	}
	wantMissing(t, f, d)
}

// TestMissingChunk: without one of its chunks a blob is missing, by every way of
// asking, and with it it is there again.
func TestMissingChunk(t *testing.T) {
	f := newFixture(t, mem.Options{})
	data, other := blobtest.Random(10, 80_000), blobtest.Random(11, 80_000)
	d, ds := f.keep(t, data)
	od, _ := f.keep(t, other)
	for _, i := range []int{0, len(ds) / 2, len(ds) - 1} {
		if err := f.mem.Remove(t.Context(), ds[i]); err != nil {
			t.Fatal(err)
		}
		wantMissing(t, f, d)
		for _, fn := range []blob.ChunkFunction{blob.ChunkUnknown, blob.ChunkFastCDC2020, blob.ChunkRepMaxCDC} {
			if l, err := f.Split(t.Context(), d, fn); !errors.Is(err, blob.ErrNotFound) {
				t.Errorf("split: %d chunks, %v; want ErrNotFound", len(l.Chunks), err)
			}
		}
		wantBlob(t, f, od, other)
		off := 0
		for _, c := range ds[:i] {
			off += int(c.Size())
		}
		blobtest.Put(t, f, digest.SHA256, data[off:off+int(ds[i].Size())])
		wantBlob(t, f, d, data)
	}
}

// TestFindMissing_batched: however many blobs are asked for, and kept in chunks,
// the store inside is asked twice.
func TestFindMissing_batched(t *testing.T) {
	f := newFixture(t, mem.Options{})
	var ask, want []digest.Digest
	for i := range 30 {
		kept, _ := f.keep(t, blobtest.Random(uint64(100+i), 30_000+i))
		absent := digest.Of(digest.SHA256, blobtest.Random(uint64(200+i), 30_000))
		small := digest.Of(digest.SHA256, []byte{byte(i)})
		ask, want = append(ask, kept, absent, small, kept), append(want, absent, small)
	}
	f.finds.Store(0)
	got, err := f.FindMissing(t.Context(), ask)
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%d missing, %v; want the %d that are, in their order", len(got), err, len(want))
	}
	if n := f.finds.Load(); n != 2 {
		t.Errorf("the store inside was asked %d times, want twice", n)
	}
}

// TestTrouble: what can't be asked is an error, and not missing.
func TestTrouble(t *testing.T) {
	f := newFixture(t, mem.Options{})
	data := blobtest.Random(12, 50_000)
	d, ds := f.keep(t, data)
	broken := errors.New("broken")
	for _, c := range []struct {
		name string
		op   blobtest.Op
		of   digest.Digest
	}{{"list", blobtest.OpEntry, d}, {"chunk", blobtest.OpFind, ds[1]}} {
		t.Run(c.name, func(t *testing.T) {
			f.fail(func(op blobtest.Op, d digest.Digest) error {
				if op == c.op && (d.IsZero() || d == c.of) {
					return broken
				}
				return nil
			})
			defer f.fail(nil)
			if missing, err := f.FindMissing(t.Context(), []digest.Digest{d}); !errors.Is(err, broken) {
				t.Errorf("find: missing %v, %v", missing, err)
			}
			if _, err := f.Open(t.Context(), d, 0); !errors.Is(err, broken) || errors.Is(err, blob.ErrNotFound) {
				t.Errorf("open: %v", err)
			}
			if _, err := f.Split(t.Context(), d, blob.ChunkUnknown); !errors.Is(err, broken) || errors.Is(err, blob.ErrNotFound) {
				t.Errorf("split: %v", err)
			}
			if err := f.Splice(t.Context(), d, blob.ChunkList{Chunks: ds}); !errors.Is(err, broken) {
				t.Errorf("splice: %v", err)
			}
		})
	}
	for _, op := range []blobtest.Op{blobtest.OpOpen, blobtest.OpRead} {
		t.Run("later_chunk_"+string(op), func(t *testing.T) {
			r, err := f.Open(t.Context(), d, 0)
			if err != nil {
				t.Fatal(err)
			}
			f.fail(func(o blobtest.Op, c digest.Digest) error {
				if o == op && c == ds[2] {
					return broken
				}
				return nil
			})
			defer f.fail(nil)
			got, err := io.ReadAll(r)
			if want := ds[0].Size() + ds[1].Size(); !errors.Is(err, broken) || int64(len(got)) != want || !bytes.Equal(got, data[:want]) {
				t.Errorf("%d bytes, %v; want %d and the store's error", len(got), err, want)
			}
			if err := r.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestRead_leaves: a reader that is closed early, or whose context ends, leaves
// nothing behind (goleak looks).
func TestRead_leaves(t *testing.T) {
	f := newFixture(t, mem.Options{})
	data := blobtest.Random(13, 100_000)
	d, ds := f.keep(t, data)
	for _, n := range []int64{0, 10, ds[0].Size(), ds[0].Size() + 1, d.Size() / 2} {
		ctx, cancel := context.WithCancel(t.Context())
		for _, end := range []func(){func() {}, cancel} {
			r, err := f.Open(ctx, d, 0)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.CopyN(io.Discard, r, n); err != nil {
				t.Error(err)
			}
			end()
			if err := errors.Join(r.Close(), r.Close()); err != nil {
				t.Error(err)
			}
			if _, err := r.Read(make([]byte, 1)); err == nil {
				t.Error("read after close: no error")
			}
		}
		cancel()
	}
	ctx, cancel := context.WithCancel(t.Context())
	r, err := f.Open(ctx, d, 0)
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if _, err := io.ReadAll(r); !errors.Is(err, context.Canceled) {
		t.Errorf("read: %v, want Canceled", err)
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
}
