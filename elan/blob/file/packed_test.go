package file_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
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

// packing are options of a store that packs what mustPut puts.
func packing(o file.Options) file.Options {
	o.MaxPackedBytes = file.DefaultMaxPackedBytes
	return o
}

// noFiles fails the test if there are files of blobs or entries.
func noFiles(t *testing.T, dir string) {
	t.Helper()
	for _, top := range []string{"cas", "ac"} {
		must(t, filepath.WalkDir(filepath.Join(dir, top), func(path string, e os.DirEntry, err error) error {
			if err == nil && !e.IsDir() {
				t.Errorf("there is the file %s", path)
			}
			return err
		}))
	}
}

func wantEntry(t *testing.T, s *file.Store, k blob.EntryKey, want []byte) {
	t.Helper()
	if got, err := s.Entry(t.Context(), k); err != nil || !bytes.Equal(got, want) {
		t.Errorf("entry: %d bytes, %v; want %d", len(got), err, len(want))
	}
}

// TestStore_packs: what is small makes no file, and is there after a restart.
func TestStore_packs(t *testing.T) {
	o := packing(file.Options{Dir: t.TempDir()})
	s := openQuiet(t, o)
	var ds []digest.Digest
	for i := range 100 {
		ds = append(ds, mustPut(t, s, i))
		must(t, s.PutEntry(t.Context(), blob.EntryKey{Instance: "i", Action: ds[i]}, fmt.Append(nil, "value ", i)))
	}
	used := s.Used()
	noFiles(t, o.Dir)
	must(t, s.Close())
	s = openQuiet(t, o)
	for i, d := range ds {
		wantRight(t, s, d)
		wantEntry(t, s, blob.EntryKey{Instance: "i", Action: d}, fmt.Append(nil, "value ", i))
	}
	if n := missing(t, s, ds...); n > 0 {
		t.Errorf("%d missing", n)
	}
	if s.Used() != used {
		t.Errorf("%d bytes used, %d before the restart", s.Used(), used)
	}
	// A store that packs no more has what it packed.
	must(t, s.Close())
	s = openQuiet(t, file.Options{Dir: o.Dir, MaxPackedBytes: -1})
	for i, d := range ds {
		wantRight(t, s, d)
		wantEntry(t, s, blob.EntryKey{Instance: "i", Action: d}, fmt.Append(nil, "value ", i))
	}
	k := blob.EntryKey{Instance: "i", Action: ds[7]}
	must(t, s.PutEntry(t.Context(), k, []byte("in a file")))
	wantEntry(t, s, k, []byte("in a file"))
	must(t, s.Close())
	s = openQuiet(t, o)
	wantEntry(t, s, k, []byte("in a file"))
}

// TestNew_version1: a store of a version that knew no packs is served as it is,
// small blobs being files, and what is put again stays one.
func TestNew_version1(t *testing.T) {
	dir := t.TempDir()
	s := open(t, file.Options{Dir: dir})
	d := mustPut(t, s, 1)
	k := blob.EntryKey{Instance: "i", Action: d}
	must(t, s.PutEntry(t.Context(), k, []byte("old")))
	must(t, s.Close())
	must(t, os.RemoveAll(filepath.Join(dir, "packs")))
	must(t, os.WriteFile(filepath.Join(dir, "VERSION"), []byte("mettle file store 1\n"), 0o600))
	for range 2 {
		s = openQuiet(t, packing(file.Options{Dir: dir}))
		if v, err := os.ReadFile(filepath.Join(dir, "VERSION")); err != nil || string(v) != "mettle file store 2\n" {
			t.Errorf("VERSION is %q, %v", v, err)
		}
		wantRight(t, s, d)
		mustPut(t, s, 1)
		wantEntry(t, s, k, []byte("old"))
		if n := missing(t, s, d); n > 0 {
			t.Error("an old blob is missing")
		}
		if listed := count(t, s); listed != 1 {
			t.Errorf("%d blobs listed, want 1", listed)
		}
		must(t, s.Close())
	}
	s = openQuiet(t, packing(file.Options{Dir: dir}))
	must(t, s.PutEntry(t.Context(), k, []byte("new")))
	must(t, s.Remove(t.Context(), d))
	wantGone(t, s, d)
	mustPut(t, s, 1)
	noFiles(t, dir)
	wantEntry(t, s, k, []byte("new"))
	must(t, s.Close())
	s = openQuiet(t, packing(file.Options{Dir: dir}))
	wantRight(t, s, d)
	wantEntry(t, s, k, []byte("new"))
}

func count(t *testing.T, s *file.Store) (n int) {
	t.Helper()
	for _, err := range s.Blobs(t.Context()) {
		must(t, err)
		n++
	}
	return n
}

// TestStore_packedTwin: the file that Link makes of a packed blob can be tampered
// with and go, and the blob stays.
func TestStore_packedTwin(t *testing.T) {
	for _, mode := range []blob.LinkMode{blob.LinkRegular, blob.LinkExecutable} {
		dir := t.TempDir()
		s := openQuiet(t, packing(file.Options{}))
		d := mustPut(t, s, 1)
		before := s.Used()
		link := func(name string) string {
			dst := filepath.Join(dir, fmt.Sprint(name, mode))
			must(t, s.Link(t.Context(), d, dst, mode))
			must(t, s.Audit(t.Context(), d, mode, time.Now()))
			return dst
		}
		first, second := link("first"), link("second")
		a, err := os.Stat(first)
		must(t, err)
		b, err := os.Stat(second)
		must(t, err)
		if !os.SameFile(a, b) || s.Used() != before+block {
			t.Errorf("two links of one inode: %v; %d bytes more, want %d", os.SameFile(a, b), s.Used()-before, block)
		}
		must(t, errors.Join(os.Chmod(first, 0o600), os.WriteFile(first, make([]byte, block), 0)))
		if err := s.Audit(t.Context(), d, mode, time.Now()); !errors.Is(err, blob.ErrCorrupt) {
			t.Errorf("audit: %v, want ErrCorrupt", err)
		}
		wantRight(t, s, d)
		if n := missing(t, s, d); n > 0 {
			t.Error("the blob went with its twin")
		}
		third := link("third")
		if data, err := os.ReadFile(third); err != nil || digest.Of(digest.SHA256, data) != d {
			t.Errorf("linked after the audit: %v, %v", digest.Of(digest.SHA256, data), err)
		}
		// Tampered with and not audited, it is replaced at the next link.
		must(t, errors.Join(os.Chmod(third, 0o600), os.WriteFile(third, make([]byte, block), 0)))
		if data, err := os.ReadFile(link("fourth")); err != nil || digest.Of(digest.SHA256, data) != d {
			t.Errorf("linked without an audit: %v, %v", digest.Of(digest.SHA256, data), err)
		}
		must(t, s.Check(t.Context(), d))
		if n := count(t, s); n != 1 {
			t.Errorf("%d blobs listed, want 1", n)
		}
		must(t, s.Remove(t.Context(), d))
		wantGone(t, s, d)
		if err := s.Link(t.Context(), d, filepath.Join(dir, "gone"), mode); !errors.Is(err, blob.ErrNotFound) {
			t.Errorf("link of what was removed: %v, want ErrNotFound", err)
		}
		if s.Used() > before+100 {
			t.Errorf("%d bytes used, %d before the links", s.Used(), before)
		}
	}
}

// TestStore_packedTooManyLinks: as of a file.
func TestStore_packedTooManyLinks(t *testing.T) {
	s := openQuiet(t, packing(file.Options{}))
	s.SetLinkat(func(from, to string) error {
		var st unix.Stat_t
		if err := unix.Stat(from, &st); err == nil && st.Nlink >= 4 {
			return &os.LinkError{Op: "link", Old: from, New: to, Err: unix.EMLINK}
		}
		return os.Link(from, to)
	})
	d, dir := mustPut(t, s, 1), t.TempDir()
	for i := range 20 {
		for _, mode := range []blob.LinkMode{blob.LinkRegular, blob.LinkExecutable} {
			dst := filepath.Join(dir, fmt.Sprint(i, "-", mode))
			must(t, s.Link(t.Context(), d, dst, mode))
			if data, err := os.ReadFile(dst); err != nil || digest.Of(digest.SHA256, data) != d {
				t.Fatalf("link %d: error %v", i, err)
			}
		}
	}
}

// TestStore_entryGrows: an entry may change between a record and a file.
func TestStore_entryGrows(t *testing.T) {
	o := packing(file.Options{Dir: t.TempDir()})
	s := openQuiet(t, o)
	k := blob.EntryKey{Action: digest.Of(digest.SHA256, []byte("action"))}
	small, large := []byte("small"), blobtest.Random(1, 200<<10)
	for i, value := range [][]byte{small, large, small, large, large, small} {
		must(t, s.PutEntry(t.Context(), k, value))
		wantEntry(t, s, k, value)
		if i%2 == 0 {
			must(t, s.Crash())
			s = openQuiet(t, o)
			wantEntry(t, s, k, value)
		}
		n := 0
		for info, err := range s.EntryInfos(t.Context()) {
			if n++; err != nil || info.Key != k || info.Bytes != int64(len(value)) {
				t.Errorf("listed %+v, %v", info, err)
			}
		}
		if n != 1 {
			t.Errorf("%d entries listed, want 1", n)
		}
	}
	must(t, s.DeleteEntry(t.Context(), k))
	must(t, s.DeleteEntry(t.Context(), k))
	if v, err := s.Entry(t.Context(), k); !errors.Is(err, blob.ErrNotFound) {
		t.Errorf("deleted: %q, %v", v, err)
	}
	noFiles(t, o.Dir)
}

// TestStore_entryNeverGone: an entry that is replaced, large by small and small by
// large, is there all the time.
func TestStore_entryNeverGone(t *testing.T) {
	s := open(t, packing(file.Options{Dir: t.TempDir()}))
	k := blob.EntryKey{Action: digest.Of(digest.SHA256, []byte("action"))}
	must(t, s.PutEntry(t.Context(), k, nil))
	var readers sync.WaitGroup
	done := make(chan struct{})
	for range 3 {
		readers.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				if _, err := s.Entry(t.Context(), k); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for i := range 1000 {
		must(t, s.PutEntry(t.Context(), k, make([]byte, 100+i%2*(100<<10))))
	}
	close(done)
	readers.Wait()
}

// TestStore_packedLifetime: small blobs are evicted by last use, not within their
// lifetime, and the bound holds.
func TestStore_packedLifetime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const maxBytes = 16 << 20
		s := openQuiet(t, packing(file.Options{MaxBytes: maxBytes, MinLifetime: 4 * time.Hour}))
		var ds []digest.Digest
		full := func() {
			t.Helper()
			for i := len(ds); ; i++ {
				d, err := put(t, s, i)
				if errors.Is(err, blob.ErrFull) {
					return
				}
				must(t, err)
				ds = append(ds, d)
			}
		}
		full()
		if n := len(ds); n < 3600 || n > 4096 {
			t.Fatalf("%d blobs of 4 KiB fill 16 MiB", n)
		}
		if n := missing(t, s, ds...); n > 0 {
			t.Fatalf("%d are missing", n)
		}
		time.Sleep(3 * time.Hour)
		if _, err := put(t, s, 1<<20); !errors.Is(err, blob.ErrFull) {
			t.Fatalf("all are within their lifetime: %v, want ErrFull", err)
		}
		keep := ds[:1000]
		if n := missing(t, s, keep...); n > 0 {
			t.Fatalf("%d are missing", n)
		}
		time.Sleep(3 * time.Hour)
		for i := range 2000 {
			mustPut(t, s, 2<<20+i)
		}
		if n := missing(t, s, keep...); n > 0 {
			t.Errorf("%d of the %d that were used are gone", n, len(keep))
		}
		if n := missing(t, s, ds[1000:]...); n < 1500 {
			t.Errorf("only %d of those that were not used are gone", n)
		}
		for _, d := range keep[:50] {
			wantRight(t, s, d)
		}
		if s.Used() > maxBytes {
			t.Errorf("%d bytes used of %d", s.Used(), maxBytes)
		}
		must(t, s.Close())
		var onDisk int64
		must(t, filepath.WalkDir(s.Dir()+"/packs", func(_ string, e os.DirEntry, err error) error {
			if err == nil && !e.IsDir() {
				info, err := e.Info()
				onDisk += info.Size()
				return err
			}
			return err
		}))
		if diff := onDisk - s.Used(); diff < -100 || diff > 100 { // there is the secret too
			t.Errorf("%d bytes used, and the packs have %d", s.Used(), onDisk)
		}
	})
}

// TestStore_packedContract drives a store of small and large blobs and twins at
// random: what was used within the lifetime is there, and the bound holds.
func TestStore_packedContract(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rapid.Check(struct{ rapid.TB }{t}, func(rt *rapid.T) {
			const lifetime, maxBytes = time.Hour, 8 << 20
			o := packing(file.Options{Dir: t.TempDir(), MaxBytes: maxBytes, MinLifetime: lifetime})
			s, err := file.New(o)
			must(t, err)
			defer func() { must(t, s.Close()) }()
			<-s.Counted()
			lastUse := map[digest.Digest]time.Time{}
			seed := uint64(0)
			rt.Repeat(map[string]func(*rapid.T){
				"put": func(rt *rapid.T) {
					for range rapid.IntRange(1, 300).Draw(rt, "blobs") {
						seed++
						size := 1 + int(seed*7919%12_000)
						if seed%50 == 0 {
							size *= 10
						}
						d, err := blob.PutBytes(t.Context(), s, digest.SHA256, blobtest.Random(seed, size))
						if err == nil {
							lastUse[d] = time.Now()
						} else if !errors.Is(err, blob.ErrFull) {
							rt.Fatal(err)
						}
					}
				},
				"use": func(rt *rapid.T) {
					n, how := rapid.IntRange(1, 100).Draw(rt, "blobs"), rapid.IntRange(0, 2).Draw(rt, "how")
					for d := range lastUse {
						if n--; n < 0 {
							break
						}
						err := useSomehow(t, s, d, how)
						switch {
						case err == nil:
							lastUse[d] = time.Now()
						case errors.Is(err, blob.ErrNotFound) && time.Since(lastUse[d]) > lifetime:
							delete(lastUse, d)
						case !errors.Is(err, blob.ErrFull): // no room for a twin
							rt.Fatalf("blob %s, used %v ago: %v", d, time.Since(lastUse[d]), err)
						}
					}
				},
				"restart": func(*rapid.T) {
					must(t, s.Crash())
					s, err = file.New(o)
					must(t, err)
					<-s.Counted()
				},
				"wait": func(rt *rapid.T) {
					time.Sleep(time.Duration(rapid.IntRange(1, 90).Draw(rt, "minutes")) * time.Minute)
				},
				"": func(rt *rapid.T) {
					if s.Used() > maxBytes {
						rt.Fatalf("%d bytes used of %d", s.Used(), maxBytes)
					}
				},
			})
		})
	})
}

func useSomehow(t *testing.T, s *file.Store, d digest.Digest, how int) error {
	t.Helper()
	switch how {
	case 0:
		m, err := s.FindMissing(t.Context(), []digest.Digest{d})
		if len(m) > 0 {
			return blob.ErrNotFound
		}
		return err
	case 1:
		data, err := blob.ReadAll(t.Context(), s, d, d.Size())
		if err == nil && digest.Of(digest.SHA256, data) != d {
			t.Errorf("%s has other bytes", d)
		}
		return err
	}
	dst := filepath.Join(t.TempDir(), "f")
	err := s.Link(t.Context(), d, dst, blob.LinkRegular)
	if err == nil {
		err = os.Remove(dst)
	}
	return err
}
