// Package blobtest holds what every blob.Store has to do: a suite (Run), the
// benchmarks (Bench), and a store that fails on demand (Faulty). A bug found in
// one store becomes a case here. Only tests import it.
//
//	func TestStore(t *testing.T) {
//		blobtest.Run(t, blobtest.Options{New: func(t testing.TB) blob.Store { ... }})
//	}
//
// Abilities that not all stores have (blob.Entries, blob.Linker, blob.Adopter,
// blob.Auditor, blob.Lister, ...) are found by type assertion, and tested where
// they are.
package blobtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// Options tell Run and Bench of the store.
type Options struct {
	// New returns an empty store of at least 256 MiB. What it needs to end, it
	// leaves to t.Cleanup.
	New func(t testing.TB) blob.Store
	// LargeBytes is the size of the largest blob of Run. 0: 9 MiB and one byte,
	// more than the buffers and messages on any way.
	LargeBytes int
	// FindDigests is how many digests Run asks for in one call. 0: 20,000, as
	// Bazel does. Stores over a slow fake of a server set less.
	FindDigests int
	// Functions are the digest functions that the store takes. nil: all.
	Functions []digest.Function
}

func (o Options) functions() []digest.Function {
	if o.Functions == nil {
		return digest.Functions()
	}
	return o.Functions
}

func (o Options) largeBytes() int {
	if o.LargeBytes == 0 {
		return 9<<20 + 1
	}
	return o.LargeBytes
}

func (o Options) findDigests() int {
	if o.FindDigests == 0 {
		return 20_000
	}
	return o.FindDigests
}

// Run tests the store that o.New makes.
func Run(t *testing.T, o Options) {
	t.Helper()
	cases := []struct {
		name string
		run  func(t *testing.T, o Options)
	}{
		{"round_trip", testRoundTrip},
		{"offsets", testOffsets},
		{"empty_blob", testEmpty},
		{"not_found", testNotFound},
		{"keys", testKeys},
		{"spaces", testSpaces},
		{"find_missing", testFindMissing},
		{"find_many", testFindMany},
		{"zero_digest", testZeroDigest},
		{"receive_refuses", testReceiveRefuses},
		{"writer", testWriter},
		{"create_again", testCreateAgain},
		{"concurrent_create", testConcurrentCreate},
		{"concurrent_readers", testConcurrentReaders},
		{"cancelled", testCancelled},
		{"huge_declared_size", testHugeDeclared},
		{"entries", testEntries},
		{"linker", testLinker},
		{"adopter", testAdopter},
		{"auditor", testAuditor},
		{"lister", testLister},
		{"remover", testRemover},
		{"entry_lister", testEntryLister},
		{"statter", testStatter},
		{"entry_statter", testEntryStatter},
		{"checker", testChecker},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) { c.run(t, o) })
	}
}

// Random returns size bytes that differ for each seed, and are the same in each
// run.
func Random(seed uint64, size int) []byte {
	data := make([]byte, size)
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16), byte(seed >> 24), byte(seed >> 32), 1})
	_, _ = r.Read(data) // never fails
	return data
}

// Put puts data into s through Receive.
func Put(t testing.TB, s blob.Creator, fn digest.Function, data []byte) digest.Digest {
	t.Helper()
	d := digest.Of(fn, data)
	if err := blob.Receive(t.Context(), s, d, bytes.NewReader(data)); err != nil {
		t.Fatalf("receive %s: %v", d, err)
	}
	return d
}

// wantBlob fails the test unless d has these bytes in s, by any way of asking.
func wantBlob(t testing.TB, s blob.Store, d digest.Digest, want []byte) {
	t.Helper()
	missing, err := s.FindMissing(t.Context(), []digest.Digest{d})
	if err != nil || len(missing) > 0 {
		t.Errorf("find %s: missing %v, error %v; want it to be there", d, missing, err)
	}
	got, err := blob.ReadAll(t.Context(), s, d, int64(len(want)))
	if err != nil {
		t.Errorf("read %s: %v", d, err)
	} else if !bytes.Equal(got, want) {
		t.Errorf("read %s: %d other bytes than were written", d, len(got))
	}
}

// wantAbsent fails the test unless s says in every way that d is not there.
func wantAbsent(t testing.TB, s blob.Store, d digest.Digest) {
	t.Helper()
	missing, err := s.FindMissing(t.Context(), []digest.Digest{d})
	if err != nil || len(missing) != 1 || missing[0] != d {
		t.Errorf("find %s: missing %v, error %v; want it to be missing", d, missing, err)
	}
	r, err := s.Open(t.Context(), d, 0)
	if err == nil {
		// A store behind a network may tell only when it is read.
		_, err = io.ReadAll(r)
		err = errors.Join(err, r.Close())
	}
	if !errors.Is(err, blob.ErrNotFound) {
		t.Errorf("open %s: error %v, want one that wraps ErrNotFound", d, err)
	}
}

func testRoundTrip(t *testing.T, o Options) {
	s := o.New(t)
	for i, fn := range o.functions() {
		for _, size := range []int{1, 100, 4095, 4096, 4097, 256 << 10, 1<<20 + 7, o.largeBytes()} {
			if size > 1<<20+7 && i > 0 {
				continue // once is enough for the large one
			}
			t.Run(fmt.Sprintf("%s/%d", fn, size), func(t *testing.T) {
				data := Random(uint64(size), size)
				d := digest.Of(fn, data)
				wantAbsent(t, s, d)
				Put(t, s, fn, data)
				wantBlob(t, s, d, data)
			})
		}
	}
}

func testOffsets(t *testing.T, o Options) {
	s := o.New(t)
	data := Random(1, 300<<10)
	d := Put(t, s, digest.SHA256, data)
	for _, off := range []int64{0, 1, 4096, d.Size() - 1, d.Size()} {
		r, err := s.Open(t.Context(), d, off)
		if err != nil {
			t.Errorf("open at %d: %v", off, err)
			continue
		}
		got, err := io.ReadAll(r)
		if err != nil || !bytes.Equal(got, data[off:]) {
			t.Errorf("read from %d: %d bytes, error %v; want the last %d bytes", off, len(got), err, d.Size()-off)
		}
		if n, err := r.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
			t.Errorf("read at the end: %d, %v; want 0, EOF", n, err)
		}
		if err := errors.Join(r.Close(), r.Close()); err != nil {
			t.Errorf("close twice: %v", err)
		}
	}
	for _, off := range []int64{-1, d.Size() + 1} {
		if r, err := s.Open(t.Context(), d, off); err == nil {
			_, err = io.ReadAll(r)
			_ = r.Close()
			if err == nil {
				t.Errorf("open at %d of %d bytes: no error", off, d.Size())
			}
		} else if errors.Is(err, blob.ErrNotFound) {
			t.Errorf("open at %d: %v, but the blob is there", off, err)
		}
	}
}

func testEmpty(t *testing.T, o Options) {
	s := o.New(t)
	for _, fn := range o.functions() {
		wantBlob(t, s, digest.Empty(fn), nil)
		if err := blob.ReceiveBytes(t.Context(), s, digest.Empty(fn), nil); err != nil {
			t.Errorf("put the empty blob of %s: %v", fn, err)
		}
		wantBlob(t, s, digest.Empty(fn), nil)
		if err := blob.Receive(t.Context(), s, digest.Empty(fn), bytes.NewReader([]byte("x"))); !errors.Is(err, blob.ErrCorrupt) {
			t.Errorf("put a byte as the empty blob: %v, want ErrCorrupt", err)
		}
	}
}

func testNotFound(t *testing.T, o Options) {
	s := o.New(t)
	d := digest.Of(digest.SHA256, []byte("nobody put this"))
	wantAbsent(t, s, d)
	for _, off := range []int64{1, d.Size()} {
		r, err := s.Open(t.Context(), d, off)
		if err == nil {
			_, err = io.ReadAll(r)
			_ = r.Close()
		}
		if !errors.Is(err, blob.ErrNotFound) {
			t.Errorf("open at %d: %v, want ErrNotFound", off, err)
		}
	}
	if _, err := blob.ReadAll(t.Context(), s, d, 100); !errors.Is(err, blob.ErrNotFound) {
		t.Errorf("ReadAll: %v, want ErrNotFound", err)
	}
}

// testKeys: neither the hash alone nor the bytes alone are a blob's name.
func testKeys(t *testing.T, o Options) {
	s := o.New(t)
	data := Random(2, 1000)
	for i, fn := range o.functions() {
		for _, other := range o.functions()[i:] {
			wantAbsent(t, s, digest.Of(other, data))
		}
		d := Put(t, s, fn, data)
		wantBlob(t, s, d, data)
		for _, size := range []int64{1, d.Size() - 1, d.Size() + 1, d.Size() * 10} {
			same, err := digest.New(fn, d.Hash(), size)
			if err != nil {
				t.Fatal(err)
			}
			wantAbsent(t, s, same)
		}
	}
}

func testZeroDigest(t *testing.T, o Options) {
	s := o.New(t)
	if _, err := s.FindMissing(t.Context(), []digest.Digest{{}}); err == nil {
		t.Error("FindMissing of the zero digest: no error")
	}
	if _, err := s.Open(t.Context(), digest.Digest{}, 0); err == nil {
		t.Error("Open of the zero digest: no error")
	}
	if _, err := s.Create(t.Context(), digest.Digest{}); err == nil {
		t.Error("Create of the zero digest: no error")
	}
}

// cancelledContext returns a context that is cancelled.
func cancelledContext(t testing.TB) context.Context {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	return ctx
}
