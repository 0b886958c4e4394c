package chunked_test

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/blobtest"
	"github.com/mettle-build/mettle/elan/blob/chunked"
	"github.com/mettle-build/mettle/elan/blob/mem"
	"github.com/mettle-build/mettle/elan/chunk"
	"github.com/mettle-build/mettle/elan/digest"
)

// wantChunks fails the test unless the chunks of l are data, cut as the function
// does.
func wantChunks(t testing.TB, s blob.Store, l blob.ChunkList, fn chunk.Function, data []byte) {
	t.Helper()
	var got, want []digest.Digest
	for c := range chunk.Chunks(fn, data) {
		want = append(want, digest.Of(digest.SHA256, c))
	}
	if !slices.Equal(l.Chunks, want) {
		t.Errorf("%d chunks, want the %d that the function makes", len(l.Chunks), len(want))
	}
	var all []byte
	for _, c := range l.Chunks {
		part, err := blob.ReadAll(t.Context(), s, c, c.Size())
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, part...)
		got = append(got, c)
	}
	if !bytes.Equal(all, data) {
		t.Errorf("%d chunks are other bytes", len(got))
	}
}

// onlyOpen fails where a blob is opened.
func onlyOpen(op blobtest.Op, _ digest.Digest) error {
	if op == blobtest.OpOpen {
		return errors.New("it was not to be read")
	}
	return nil
}

func TestSplit_whole(t *testing.T) {
	f := newFixture(t, mem.Options{})
	data := blobtest.Random(20, 150_000)
	d := blobtest.Put(t, f, digest.SHA256, data)
	for _, c := range []struct {
		prefer, want blob.ChunkFunction
		cut          chunk.Function
	}{
		{blob.ChunkUnknown, blob.ChunkFastCDC2020, f.fast},
		{blob.ChunkFastCDC2020, blob.ChunkFastCDC2020, f.fast},
		{blob.ChunkRepMaxCDC, blob.ChunkRepMaxCDC, f.repMax},
		{99, blob.ChunkFastCDC2020, f.fast},
	} {
		l, err := f.Split(t.Context(), d, c.prefer)
		if err != nil || l.Function != c.want {
			t.Fatalf("split for %d: function %d, %v", c.prefer, l.Function, err)
		}
		wantChunks(t, f, l, c.cut, data)
		// What was cut is known.
		f.fail(onlyOpen)
		again, err := f.Split(t.Context(), d, c.prefer)
		f.fail(nil)
		if err != nil || !slices.Equal(again.Chunks, l.Chunks) || again.Function != l.Function {
			t.Errorf("split again: %d chunks, %v", len(again.Chunks), err)
		}
	}
	if !f.inWhole(t, d) {
		t.Error("the whole is gone")
	}
	// A list alone does not make a blob.
	if err := f.mem.Remove(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	wantMissing(t, f, d)
	if _, err := f.Split(t.Context(), d, blob.ChunkFastCDC2020); !errors.Is(err, blob.ErrNotFound) {
		t.Errorf("split of what is gone: %v, want ErrNotFound", err)
	}
}

// TestSplit_again: chunks that were evicted are cut again.
func TestSplit_again(t *testing.T) {
	f := newFixture(t, mem.Options{})
	data := blobtest.Random(21, 100_000)
	d := blobtest.Put(t, f, digest.SHA256, data)
	l, err := f.Split(t.Context(), d, blob.ChunkFastCDC2020)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.mem.Remove(t.Context(), l.Chunks[3]); err != nil {
		t.Fatal(err)
	}
	if l, err = f.Split(t.Context(), d, blob.ChunkFastCDC2020); err != nil {
		t.Fatal(err)
	}
	wantChunks(t, f, l, f.fast, data)
}

func TestSplit_single(t *testing.T) {
	f := newFixture(t, mem.Options{})
	for _, c := range []struct {
		size   int
		prefer blob.ChunkFunction
	}{
		{1, blob.ChunkFastCDC2020}, {16 << 10, blob.ChunkFastCDC2020}, {16 << 10, blob.ChunkUnknown}, {keptBytes, blob.ChunkRepMaxCDC},
	} {
		d := blobtest.Put(t, f, digest.SHA256, blobtest.Random(uint64(c.size), c.size))
		f.fail(onlyOpen)
		l, err := f.Split(t.Context(), d, c.prefer)
		f.fail(nil)
		if err != nil || !slices.Equal(l.Chunks, []digest.Digest{d}) {
			t.Errorf("%d bytes: %d chunks, %v; want the blob itself", c.size, len(l.Chunks), err)
		}
	}
	if l, err := f.Split(t.Context(), digest.Empty(digest.SHA256), blob.ChunkUnknown); err != nil || len(l.Chunks) > 0 {
		t.Errorf("the empty blob: %d chunks, %v; want none", len(l.Chunks), err)
	}
	for _, size := range []int{100, 100_000} {
		if _, err := f.Split(t.Context(), digest.Of(digest.SHA256, make([]byte, size)), blob.ChunkUnknown); !errors.Is(err, blob.ErrNotFound) {
			t.Errorf("%d bytes that are not there: %v, want ErrNotFound", size, err)
		}
	}
	if _, err := f.Split(t.Context(), digest.Digest{}, blob.ChunkUnknown); !errors.Is(err, digest.ErrInvalid) {
		t.Errorf("the zero digest: %v", err)
	}
	huge, err := digest.New(digest.SHA256, digest.Of(digest.SHA256, nil).Hash(), 1<<60)
	if err == nil {
		_, err = f.Split(t.Context(), huge, blob.ChunkUnknown)
	}
	if !errors.Is(err, blob.ErrNotFound) {
		t.Errorf("an exabyte: %v, want ErrNotFound", err)
	}
}

// TestSplit_kept gives a client the chunks in which a blob is kept, if they are
// small enough for it: Bazel refuses larger ones than its function makes.
func TestSplit_kept(t *testing.T) {
	f := newFixture(t, mem.Options{})
	data := blobtest.Random(22, 100_000)
	d, ds := f.keep(t, data)
	f.fail(onlyOpen)
	l, err := f.Split(t.Context(), d, blob.ChunkFastCDC2020)
	f.fail(nil)
	if err != nil || l.Function != blob.ChunkFastCDC2020 || !slices.Equal(l.Chunks, ds) {
		t.Errorf("%d chunks, function %d, %v", len(l.Chunks), l.Function, err)
	}
	l, err = f.Split(t.Context(), d, blob.ChunkRepMaxCDC)
	if err != nil || l.Function != blob.ChunkRepMaxCDC {
		t.Fatalf("function %d, %v", l.Function, err)
	}
	wantChunks(t, f, l, f.repMax, data)

	// Somebody's own chunks, one too large for both.
	other := blobtest.Random(23, 100_000)
	own := []digest.Digest{blobtest.Put(t, f, digest.SHA256, other[:60_000]), blobtest.Put(t, f, digest.SHA256, other[60_000:])}
	od := digest.Of(digest.SHA256, other)
	if err := f.Splice(t.Context(), od, blob.ChunkList{Function: blob.ChunkFastCDC2020, Chunks: own}); err != nil {
		t.Fatal(err)
	}
	if l, err = f.Split(t.Context(), od, blob.ChunkUnknown); err != nil {
		t.Fatal(err)
	}
	wantChunks(t, f, l, f.fast, other)
	if f.inWhole(t, od) {
		t.Error("it was made whole")
	}
}

// TestSplit_corrupt: a copy that has gone bad is not split into good chunks of
// another blob.
func TestSplit_corrupt(t *testing.T) {
	f := newFixture(t, mem.Options{})
	data := blobtest.Random(24, 100_000)
	d := digest.Of(digest.SHA256, data)
	w, err := f.mem.Create(t.Context(), d) // which verifies nothing
	if err != nil {
		t.Fatal(err)
	}
	bad := bytes.Clone(data)
	bad[50_000] ^= 1
	_, err = w.Write(bad)
	if err := errors.Join(err, w.Commit(), w.Close()); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := f.Split(t.Context(), d, blob.ChunkFastCDC2020); !errors.Is(err, blob.ErrCorrupt) {
			t.Errorf("%v, want ErrCorrupt", err)
		}
	}
}

// TestSplit_full passes on that there is no room, and does not remember chunks
// that are not there.
func TestSplit_full(t *testing.T) {
	f := newFixture(t, mem.Options{})
	data := blobtest.Random(25, 100_000)
	d := blobtest.Put(t, f, digest.SHA256, data)
	for _, op := range []blobtest.Op{blobtest.OpCreate, blobtest.OpWrite, blobtest.OpCommit, blobtest.OpPutEntry} {
		f.fail(func(o blobtest.Op, _ digest.Digest) error {
			if o == op {
				return blob.ErrFull
			}
			return nil
		})
		if _, err := f.Split(t.Context(), d, blob.ChunkFastCDC2020); !errors.Is(err, blob.ErrFull) {
			t.Errorf("%s: %v, want ErrFull", op, err)
		}
		f.fail(nil)
	}
	if err := f.mem.Remove(t.Context(), d); err != nil { // its chunks are there by now
		t.Fatal(err)
	}
	f.fail(func(o blobtest.Op, _ digest.Digest) error {
		if o == blobtest.OpPutEntry {
			return blob.ErrFull
		}
		return nil
	})
	_, ds := cut(t, f.mem, f.fast, data)
	if err := f.Splice(t.Context(), d, blob.ChunkList{Chunks: ds}); !errors.Is(err, blob.ErrFull) {
		t.Errorf("splice: %v, want ErrFull", err)
	}
	f.fail(nil)
	wantMissing(t, f, d)
}

// TestSplit_once: of many who want the same, one reads.
func TestSplit_once(t *testing.T) {
	f := newFixture(t, mem.Options{})
	data := blobtest.Random(26, 200_000)
	d := blobtest.Put(t, f, digest.SHA256, data)
	var opens atomic.Int64
	f.fail(func(op blobtest.Op, o digest.Digest) error {
		if op == blobtest.OpOpen && o == d {
			opens.Add(1)
		}
		return nil
	})
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			if l, err := f.Split(t.Context(), d, blob.ChunkRepMaxCDC); err != nil || len(l.Chunks) < 50 {
				t.Errorf("%d chunks, %v", len(l.Chunks), err)
			}
		})
	}
	wg.Wait()
	if n := opens.Load(); n != 1 {
		t.Errorf("it was read %d times, want once", n)
	}
}

// TestSplit_waiterLeaves: who waits for another's cut may give up.
func TestSplit_waiterLeaves(t *testing.T) {
	f := newFixture(t, mem.Options{})
	d := blobtest.Put(t, f, digest.SHA256, blobtest.Random(27, 100_000))
	reading, goOn := make(chan struct{}), make(chan struct{})
	var once sync.Once
	f.fail(func(op blobtest.Op, o digest.Digest) error {
		if op == blobtest.OpOpen && o == d {
			once.Do(func() { close(reading) })
			<-goOn
		}
		return nil
	})
	first := make(chan error, 1)
	go func() {
		_, err := f.Split(t.Context(), d, blob.ChunkFastCDC2020)
		first <- err
	}()
	<-reading
	ctx, cancel := context.WithCancel(t.Context())
	second := make(chan error, 1)
	go func() {
		_, err := f.Split(ctx, d, blob.ChunkFastCDC2020)
		second <- err
	}()
	cancel()
	if err := <-second; !errors.Is(err, context.Canceled) {
		t.Errorf("the second: %v, want Canceled", err)
	}
	close(goOn)
	if err := <-first; err != nil {
		t.Errorf("the first: %v", err)
	}
}

func TestSpaces(t *testing.T) {
	f := newFixture(t, mem.Options{})
	data := blobtest.Random(28, 100_000)
	space := digest.SpaceOf("one")
	d := digest.Of(digest.SHA256, data).In(space)
	if err := blob.Receive(t.Context(), f, d, bytes.NewReader(data)); err != nil {
		t.Fatal(err)
	}
	l, err := f.Split(t.Context(), d, blob.ChunkFastCDC2020)
	if err != nil {
		t.Fatal(err)
	}
	var plain []digest.Digest
	for _, c := range l.Chunks {
		if c.Space() != space {
			t.Fatalf("chunk %s is not in the space of its blob", c)
		}
		plain = append(plain, c.Plain())
	}
	if missing, err := f.FindMissing(t.Context(), plain); err != nil || len(missing) != len(plain) {
		t.Errorf("%d of %d chunks are missing elsewhere, %v", len(missing), len(plain), err)
	}
	// Kept in one space, it is missing in others that have the same chunks.
	if err := f.mem.Remove(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	if err := f.Splice(t.Context(), d, l); err != nil {
		t.Fatal(err)
	}
	wantBlob(t, f, d, data)
	cut(t, f.mem, f.fast, data)
	wantMissing(t, f, d.Plain())
}

func TestMetrics(t *testing.T) {
	reg := prometheus.NewPedanticRegistry()
	s := openMem(t, mem.Options{})
	c, err := chunked.New(chunked.Options{Store: s, Entries: s, Registerer: reg})
	if err != nil {
		t.Fatal(err)
	}
	d := blobtest.Put(t, c, digest.SHA256, []byte("a"))
	for range 2 {
		if _, err := c.Split(t.Context(), d, blob.ChunkUnknown); err != nil {
			t.Fatal(err)
		}
	}
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, f := range families {
		for _, m := range f.Metric {
			if f.GetName() == "elan_chunks_splits_total" {
				got[m.Label[0].GetValue()] = m.Counter.GetValue()
			}
		}
	}
	if diff := cmp.Diff(map[string]float64{"cut": 0, "failed": 0, "known": 2}, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if problems, err := promlint.NewWithMetricFamilies(families).Lint(); err != nil || len(problems) > 0 {
		t.Errorf("%v, %v", problems, err)
	}
}
