package pack_test

import (
	"encoding/binary"
	"testing"
	"time"

	"github.com/mettle-build/mettle/elan/blob/file/pack"
)

const benchRecords = 200_000

func benchKey(key []byte, n int) {
	binary.LittleEndian.PutUint64(key, uint64(n)*0x9e3779b97f4a7c15) //nolint:gosec // not negative
}

func benchStore(b *testing.B, records, size int) *pack.Store {
	b.Helper()
	s, err := pack.New(pack.Options{Dir: b.TempDir(), TouchEvery: time.Hour})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := s.Close(); err != nil {
			b.Error(err)
		}
	})
	key, value := make([]byte, 40), make([]byte, size)
	for i := range records {
		benchKey(key, i)
		if _, err := s.Put(pack.Record{Key: key, Value: value}); err != nil {
			b.Fatal(err)
		}
	}
	return s
}

func BenchmarkStore(b *testing.B) {
	key := make([]byte, 40)
	for _, size := range []int{1 << 10, 4 << 10, 16 << 10} {
		value := make([]byte, size)
		b.Run("put_"+byteSize(size), func(b *testing.B) {
			s, n := benchStore(b, 0, 0), 0
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for b.Loop() {
				n++
				benchKey(key, n)
				if _, err := s.Put(pack.Record{Key: key, Value: value}); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run("put_100_of_"+byteSize(size), func(b *testing.B) {
			s, n := benchStore(b, 0, 0), 0
			records := make([]pack.Record, 100)
			for i := range records {
				records[i] = pack.Record{Key: make([]byte, 40), Value: value}
			}
			b.SetBytes(int64(size) * 100)
			for b.Loop() {
				for i := range records {
					n++
					benchKey(records[i].Key, n)
				}
				if _, err := s.Put(records...); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run("get_"+byteSize(size), func(b *testing.B) {
			const records = 10_000
			s, n := benchStore(b, records, size), 0
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for b.Loop() {
				n++
				benchKey(key, n%records)
				if _, err := s.Get(b.Context(), key); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	s := benchStore(b, benchRecords, 8)
	for name, from := range map[string]int{"find_present": 0, "find_absent": benchRecords} {
		b.Run(name, func(b *testing.B) {
			n := 0
			b.ReportAllocs()
			for b.Loop() {
				n = (n + 1) % benchRecords
				benchKey(key, from+n)
				if ok, err := s.Find(b.Context(), key); err != nil || ok != (from == 0) {
					b.Fatal(ok, err)
				}
			}
		})
	}
}

func byteSize(n int) string {
	return map[int]string{1 << 10: "1KiB", 4 << 10: "4KiB", 16 << 10: "16KiB"}[n]
}
