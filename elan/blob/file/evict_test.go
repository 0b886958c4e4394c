package file_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/blobtest"
	"github.com/mettle-build/mettle/elan/blob/file"
	"github.com/mettle-build/mettle/elan/digest"
)

const block = 4096

func put(t testing.TB, s blob.Creator, seed int) (digest.Digest, error) {
	t.Helper()
	return blob.PutBytes(t.Context(), s, digest.SHA256, blobtest.Random(uint64(seed), block))
}

func mustPut(t testing.TB, s blob.Creator, seed int) digest.Digest {
	t.Helper()
	d, err := put(t, s, seed)
	if err != nil {
		t.Fatalf("put %d: %v", seed, err)
	}
	return d
}

func missing(t testing.TB, s blob.Finder, ds ...digest.Digest) int {
	t.Helper()
	m, err := s.FindMissing(t.Context(), ds)
	if err != nil {
		t.Fatal(err)
	}
	return len(m)
}

func TestStore_Adopt_larger_than_store(t *testing.T) {
	s := openQuiet(t, file.Options{MaxBytes: 40 * block})
	f, err := os.Create(filepath.Join(t.TempDir(), "sparse"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	// To hash so much takes a quarter of an hour, with which the test times out.
	if err := f.Truncate(1 << 40); err != nil {
		t.Skip("no sparse files here:", err)
	}
	if _, err := s.Adopt(t.Context(), digest.SHA256, f); !errors.Is(err, blob.ErrTooLarge) {
		t.Errorf("Adopt of 1 TiB into 160 KiB: %v, want ErrTooLarge", err)
	}
}

func TestStore_lifetime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := openQuiet(t, file.Options{MaxBytes: 40 * block, MinLifetime: 4 * time.Hour})
		var ds []digest.Digest
		for i := range 40 {
			ds = append(ds, mustPut(t, s, i))
		}
		if _, err := put(t, s, 100); !errors.Is(err, blob.ErrFull) {
			t.Fatalf("one too many: %v, want ErrFull", err)
		}
		if _, err := blob.PutBytes(t.Context(), s, digest.SHA256, make([]byte, 41*block)); !errors.Is(err, blob.ErrTooLarge) {
			t.Fatalf("larger than the store: %v, want ErrTooLarge", err)
		}
		time.Sleep(3 * time.Hour)
		if _, err := put(t, s, 100); !errors.Is(err, blob.ErrFull) {
			t.Fatalf("all are within their lifetime: %v, want ErrFull", err)
		}
		// The oldest are used again, each in another way.
		if missing(t, s, ds[0]) > 0 {
			t.Error("evicted too early")
		}
		if _, err := blob.ReadAll(t.Context(), s, ds[1], block); err != nil {
			t.Error(err)
		}
		if err := s.Link(t.Context(), ds[2], filepath.Join(t.TempDir(), "f"), blob.LinkRegular); err != nil {
			t.Error(err)
		}
		mustPut(t, s, 3)
		time.Sleep(3 * time.Hour)
		for i := range 36 {
			mustPut(t, s, 200+i)
		}
		if n := missing(t, s, ds[:4]...); n != 0 {
			t.Errorf("%d of 4 that were used are gone", n)
		}
		if n := missing(t, s, ds[4:]...); n != 36 {
			t.Errorf("%d of 36 that were not used are gone, want all", n)
		}
		if _, err := put(t, s, 300); !errors.Is(err, blob.ErrFull) {
			t.Errorf("all are young: %v, want ErrFull", err)
		}
		if s.Used() != 40*block {
			t.Errorf("%d bytes used, want %d", s.Used(), 40*block)
		}
	})
}

// TestStore_leastRecentlyUsed: what was used longest ago goes first, whenever
// it was written, also for what an earlier process left; entries and blobs alike.
func TestStore_leastRecentlyUsed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		s := open(t, file.Options{Dir: dir, MaxBytes: 40 * block, MinLifetime: time.Hour})
		var ds []digest.Digest
		for i := range 35 {
			ds = append(ds, mustPut(t, s, i))
			time.Sleep(time.Hour)
		}
		k := blob.EntryKey{Action: ds[0]}
		if err := s.PutEntry(t.Context(), k, []byte("v")); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Hour)
		for i := 9; i >= 0; i-- {
			if missing(t, s, ds[i]) > 0 {
				t.Fatalf("blob %d is gone, and there was room", i)
			}
			time.Sleep(time.Hour)
		}
		if err := s.Crash(); err != nil {
			t.Fatal(err)
		}
		s = openQuiet(t, file.Options{Dir: dir, MaxBytes: 40 * block, MinLifetime: time.Hour})
		for i := range 10 {
			mustPut(t, s, 100+i)
			time.Sleep(time.Minute) // eviction in the background
		}
		if n := missing(t, s, ds[:10]...); n > 0 {
			t.Errorf("%d of 10 used last are gone", n)
		}
		if n := missing(t, s, ds[25:]...); n > 0 {
			t.Errorf("%d of the 10 written last are gone", n)
		}
		if n := missing(t, s, ds[10:16]...); n != 6 {
			t.Errorf("%d of the 6 used longest ago are gone", n)
		}
		if _, err := s.Entry(t.Context(), k); err != nil {
			t.Errorf("entry younger than what was evicted: %v", err)
		}
		time.Sleep(3 * time.Hour)
		for i := range 60 {
			mustPut(t, s, 200+i)
			time.Sleep(time.Hour)
		}
		if _, err := s.Entry(t.Context(), k); !errors.Is(err, blob.ErrNotFound) {
			t.Errorf("an entry that nobody asked for: %v, want ErrNotFound", err)
		}
	})
}

// TestStore_contract drives a small store at random: whatever happens, what was
// used within the lifetime is there, and the bound holds.
func TestStore_contract(t *testing.T) {
	rounds := 6
	if testing.Short() {
		rounds = 1
	}
	synctest.Test(t, func(t *testing.T) {
		for range rounds {
			// Without the Deadline method of t, which may not be called in a
			// bubble; where rapid measures the bubble's time, and so ends after
			// a few runs.
			rapid.Check(struct{ rapid.TB }{t}, func(rt *rapid.T) { runContract(t, rt) })
		}
	})
}

func runContract(t *testing.T, rt *rapid.T) {
	const lifetime, maxBytes = time.Hour, 12 * block
	s, err := file.New(file.Options{Dir: t.TempDir(), MaxBytes: maxBytes, MinLifetime: lifetime})
	if err != nil {
		rt.Fatal(err)
	}
	defer s.Close()
	<-s.Counted()
	lastUse := make(map[digest.Digest]time.Time)
	blobs := rapid.IntRange(0, 19)
	pick := func(rt *rapid.T) (digest.Digest, []byte) {
		n := blobs.Draw(rt, "blob")
		data := blobtest.Random(uint64(n), 1+n%3*block)
		return digest.Of(digest.SHA256, data), data
	}
	rt.Repeat(map[string]func(*rapid.T){
		"put": func(rt *rapid.T) {
			d, data := pick(rt)
			err := blob.ReceiveBytes(t.Context(), s, d, data)
			if err == nil {
				lastUse[d] = time.Now()
			} else if !errors.Is(err, blob.ErrFull) {
				rt.Fatal(err)
			}
		},
		"find": func(rt *rapid.T) {
			d, _ := pick(rt)
			m, err := s.FindMissing(t.Context(), []digest.Digest{d})
			if err != nil {
				rt.Fatal(err)
			}
			if len(m) == 0 {
				lastUse[d] = time.Now()
			}
		},
		"read": func(rt *rapid.T) {
			d, _ := pick(rt)
			if _, err := blob.ReadAll(t.Context(), s, d, 1<<20); err == nil {
				lastUse[d] = time.Now()
			}
		},
		"wait": func(rt *rapid.T) {
			time.Sleep(time.Duration(rapid.IntRange(1, 90).Draw(rt, "minutes")) * time.Minute)
		},
		"": func(rt *rapid.T) {
			for d, used := range lastUse {
				if _, err := os.Stat(blobFile(s, d)); err != nil && time.Since(used) <= lifetime {
					rt.Fatalf("blob %s, used %v ago: %v", d, time.Since(used), err)
				}
			}
			if s.Used() > maxBytes {
				rt.Fatalf("%d bytes used of %d", s.Used(), maxBytes)
			}
		},
	})
}

func blobFile(s *file.Store, d digest.Digest) string { return s.BlobPath(d, blob.LinkRegular) }

// TestStore_diskFull: the kernel's word counts, and leaves nothing behind.
func TestStore_diskFull(t *testing.T) {
	disk := t.TempDir()
	if err := unix.Mount("tmpfs", disk, "tmpfs", 0, "size=4m"); err != nil {
		t.Skipf("can't mount a small disk: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(disk, 0); err != nil {
			t.Error(err)
		}
	})
	dir := filepath.Join(disk, "store")
	s := open(t, file.Options{Dir: dir, MinFreeBytes: -1})
	first := mustPut(t, s, 1)
	other := filepath.Join(disk, "of_somebody_else")
	f, err := os.Create(other)
	if err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = f.Write(make([]byte, block))
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := put(t, s, 2); !errors.Is(err, blob.ErrFull) {
		t.Errorf("put: %v, want ErrFull", err)
	}
	if err := s.PutEntry(t.Context(), blob.EntryKey{Action: first}, make([]byte, block)); !errors.Is(err, blob.ErrFull) {
		t.Errorf("put entry: %v, want ErrFull", err)
	}
	if left, err := os.ReadDir(filepath.Join(dir, "tmp")); err != nil || len(left) > 0 {
		t.Errorf("%d files left in tmp, error %v", len(left), err)
	}
	if missing(t, s, first) > 0 {
		t.Error("a blob is gone")
	}
	if err := os.Remove(other); err != nil {
		t.Fatal(err)
	}
	mustPut(t, s, 3)
}

// TestStore_minFree: without a bound of its own, the store leaves the disk the
// space that it was told to, evicting for it what may go.
func TestStore_minFree(t *testing.T) {
	disk := t.TempDir()
	if err := unix.Mount("tmpfs", disk, "tmpfs", 0, "size=4m"); err != nil {
		t.Skipf("can't mount a small disk: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(disk, 0); err != nil {
			t.Error(err)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		s := openQuiet(t, file.Options{Dir: filepath.Join(disk, "store"), MinFreeBytes: 2 << 20, MinLifetime: time.Hour})
		var n int
		var err error
		for n = 0; err == nil && n < 10_000; n++ {
			_, err = put(t, s, n)
		}
		if !errors.Is(err, blob.ErrFull) || n < 100 || n > 512 {
			t.Fatalf("after %d blobs: %v, want ErrFull with half of the disk used", n, err)
		}
		var st unix.Statfs_t
		if err := unix.Statfs(disk, &st); err != nil || int64(st.Bavail)*st.Bsize < 2<<20 {
			t.Errorf("%d bytes free, error %v", int64(st.Bavail)*st.Bsize, err)
		}
		time.Sleep(2 * time.Hour)
		for i := range 400 {
			mustPut(t, s, 20_000+i)
		}
	})
}

// TestStore_hugeClaim: a size that could never fit evicts nothing, however old.
func TestStore_hugeClaim(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, maxBytes := range []int64{0, 20 * block} {
			s := openQuiet(t, file.Options{MaxBytes: maxBytes, MinLifetime: time.Hour})
			d := mustPut(t, s, 1)
			time.Sleep(24 * time.Hour)
			for _, size := range []int64{1 << 50, 1<<63 - 1} {
				huge, err := digest.New(digest.SHA256, d.Hash(), size)
				must(t, err)
				if w, err := s.Create(t.Context(), huge); !errors.Is(err, blob.ErrTooLarge) {
					t.Errorf("bound %d, size %d: %v, %v; want ErrTooLarge", maxBytes, size, w, err)
				}
			}
			if missing(t, s, d) > 0 {
				t.Errorf("bound %d: a blob was evicted", maxBytes)
			}
		}
	})
}
