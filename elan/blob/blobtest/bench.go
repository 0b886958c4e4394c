package blobtest

import (
	"bytes"
	"encoding/binary"
	"io"
	"testing"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// Bench measures the store that o.New makes; name it so that the results read
// BenchmarkStore/file/put_1KiB.
//
//	func BenchmarkStore(b *testing.B) {
//		b.Run("file", func(b *testing.B) { blobtest.Bench(b, options) })
//	}
func Bench(b *testing.B, o Options) {
	for _, c := range []struct {
		name string
		size int
	}{{"1KiB", 1 << 10}, {"4KiB", 4 << 10}, {"64MiB", 64 << 20}} {
		b.Run("put_"+c.name, func(b *testing.B) { benchPut(b, o, c.size) })
		b.Run("get_"+c.name, func(b *testing.B) { benchGet(b, o, c.size) })
	}
	b.Run("put_again_4KiB", func(b *testing.B) {
		s, data := o.New(b), Random(1, 4<<10)
		d := Put(b, s, digest.SHA256, data)
		b.ReportAllocs()
		for b.Loop() {
			if err := blob.ReceiveBytes(b.Context(), s, d, data); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("find_present", func(b *testing.B) { benchFind(b, o, true) })
	b.Run("find_missing", func(b *testing.B) { benchFind(b, o, false) })
	if _, ok := o.New(b).(blob.Entries); ok {
		b.Run("entry_get_1KiB", func(b *testing.B) { benchEntry(b, entriesOf(b, o)) })
	}
}

// benchPut puts blobs that are new each time: up to 1 MiB by ReceiveBytes, as
// batches do, and larger ones by Receive.
func benchPut(b *testing.B, o Options, size int) {
	s, data := o.New(b), Random(1, size)
	b.SetBytes(int64(size))
	b.ReportAllocs()
	n := uint64(0)
	for b.Loop() {
		if size > 1<<20 && n%8 == 7 {
			b.StopTimer()
			s = o.New(b) // stores are of 256 MiB and more
			b.StartTimer()
		}
		n++
		binary.BigEndian.PutUint64(data, n)
		d := digest.Of(digest.SHA256, data)
		var err error
		if size > 1<<20 {
			err = blob.Receive(b.Context(), s, d, bytes.NewReader(data))
		} else {
			err = blob.ReceiveBytes(b.Context(), s, d, data)
		}
		if err != nil {
			b.Fatal(err)
		}
	}
}

func benchGet(b *testing.B, o Options, size int) {
	s := o.New(b)
	d := Put(b, s, digest.SHA256, Random(1, size))
	buf := make([]byte, 1<<20)
	b.SetBytes(int64(size))
	b.ReportAllocs()
	for b.Loop() {
		r, err := s.Open(b.Context(), d, 0)
		if err != nil {
			b.Fatal(err)
		}
		var total int
		for total < size {
			n, err := r.Read(buf)
			if total += n; err != nil && total < size || n == 0 && err == io.EOF {
				b.Fatal(err)
			}
		}
		if err := r.Close(); err != nil {
			b.Fatal(err)
		}
	}
}

// benchFind asks for a thousand blobs at once, and reports the time of one.
func benchFind(b *testing.B, o Options, present bool) {
	s := o.New(b)
	const all = 1000
	ask := make([]digest.Digest, all)
	for i := range ask {
		data := binary.BigEndian.AppendUint64(nil, uint64(i)) //nolint:gosec // not negative
		if ask[i] = digest.Of(digest.SHA256, data); present {
			Put(b, s, digest.SHA256, data)
		}
	}
	b.ReportAllocs()
	for b.Loop() {
		missing, err := s.FindMissing(b.Context(), ask)
		if err != nil || (len(missing) == 0) != present {
			b.Fatalf("%d missing, error %v", len(missing), err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/all, "ns/digest")
}

func benchEntry(b *testing.B, e blob.Entries) {
	k := blob.EntryKey{Instance: "main", Action: digest.Of(digest.SHA256, []byte("action"))}
	putEntry(b, e, k, Random(1, 1<<10))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := e.Entry(b.Context(), k); err != nil {
			b.Fatal(err)
		}
	}
}
