package file_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/blobtest"
	"github.com/mettle-build/mettle/elan/blob/file"
	"github.com/mettle-build/mettle/elan/digest"
)

// TestStore_packedCrashOfTheMachine: what of the segments did not reach the disk
// is missing, all else is there, and no byte is wrong.
func TestStore_packedCrashOfTheMachine(t *testing.T) {
	o := packing(file.Options{Dir: t.TempDir(), MaxBytes: 32 << 20})
	o.SetBootID("boot")
	s := openQuiet(t, o)
	const all = 500
	for boot := range 3 {
		var ds []digest.Digest
		for i := range all {
			ds = append(ds, mustPut(t, s, boot*all+i))
			must(t, s.PutEntry(t.Context(), blob.EntryKey{Action: ds[i]}, fmt.Append(nil, i)))
		}
		must(t, s.Crash())
		segs, err := filepath.Glob(o.Dir + "/packs/*.seg")
		must(t, err)
		f, err := os.OpenFile(segs[len(segs)-1], os.O_WRONLY, 0)
		must(t, err)
		_, err = f.WriteAt(make([]byte, 4*block), 5*block)
		must(t, errors.Join(err, f.Close()))
		index, err := filepath.Glob(o.Dir + "/packs/index/*")
		must(t, err)
		for i, path := range index {
			switch i % 3 {
			case 0:
				must(t, os.Truncate(path, 0))
			case 1:
				f, err := os.OpenFile(path, os.O_WRONLY, 0)
				must(t, err)
				_, err = f.WriteAt(make([]byte, 2048), 512)
				must(t, errors.Join(err, f.Close()))
			}
		}
		o.SetBootID(fmt.Sprint("boot after ", boot))
		s = open(t, o)
		gone := missing(t, s, ds...) // waits until the index is there
		if gone == 0 || gone > 8 {
			t.Errorf("%d of %d blobs are missing, want those of 16 KiB", gone, all)
		}
		for i, d := range ds {
			data, err := blob.ReadAll(t.Context(), s, d, block)
			if err == nil && digest.Of(digest.SHA256, data) != d || err != nil && !errors.Is(err, blob.ErrNotFound) {
				t.Fatalf("blob %d: %v", i, err)
			}
			if v, err := s.Entry(t.Context(), blob.EntryKey{Action: d}); err == nil && string(v) != fmt.Sprint(i) {
				t.Fatalf("entry %d: %q", i, v)
			}
		}
		waitRecovered(t, s)
	}
}

// TestStore_packsDiskFull: the kernel's word counts, loses nothing, and passes.
func TestStore_packsDiskFull(t *testing.T) {
	disk := t.TempDir()
	if err := unix.Mount("tmpfs", disk, "tmpfs", 0, "size=16m"); err != nil {
		t.Skipf("can't mount a small disk: %v", err)
	}
	t.Cleanup(func() { must(t, unix.Unmount(disk, 0)) })
	s := open(t, packing(file.Options{Dir: filepath.Join(disk, "store"), MinFreeBytes: -1}))
	var ds []digest.Digest
	for i := range 1000 {
		ds = append(ds, mustPut(t, s, i))
	}
	other := filepath.Join(disk, "of_somebody_else")
	f, err := os.Create(other)
	must(t, err)
	for err == nil {
		_, err = f.Write(make([]byte, block))
	}
	must(t, f.Close())
	refused := 0
	for i := range 400 {
		d, err := put(t, s, 5000+i)
		if err == nil {
			ds = append(ds, d)
		} else if refused++; !errors.Is(err, blob.ErrFull) {
			t.Fatalf("put: %v, want ErrFull", err)
		}
	}
	if err := s.PutEntry(t.Context(), blob.EntryKey{Action: ds[0]}, make([]byte, 16<<10)); refused == 0 || !errors.Is(err, blob.ErrFull) {
		t.Errorf("%d refused; put entry: %v, want ErrFull", refused, err)
	}
	if n := missing(t, s, ds...); n > 0 {
		t.Errorf("%d blobs are gone", n)
	}
	for _, d := range ds {
		wantRight(t, s, d)
	}
	must(t, os.Remove(other))
	for i := range 400 {
		mustPut(t, s, 5000+i)
	}
}

// TestStore_packsDiskFullOfOthers: what is out of its lifetime makes room on a
// disk on which there is none to move anything, and what is not stays.
func TestStore_packsDiskFullOfOthers(t *testing.T) {
	disk := t.TempDir()
	if err := unix.Mount("tmpfs", disk, "tmpfs", 0, "size=32m"); err != nil {
		t.Skipf("can't mount a small disk: %v", err)
	}
	t.Cleanup(func() { must(t, unix.Unmount(disk, 0)) })
	synctest.Test(t, func(t *testing.T) {
		s := open(t, packing(file.Options{Dir: filepath.Join(disk, "store"), MinFreeBytes: 4 << 20, MinLifetime: time.Hour}))
		var ds []digest.Digest
		for i := range 3000 {
			ds = append(ds, mustPut(t, s, i))
		}
		time.Sleep(10 * time.Hour)
		young := ds[2000:2100]
		if n := missing(t, s, young...); n > 0 {
			t.Errorf("%d are missing", n)
		}
		f, err := os.Create(filepath.Join(disk, "of_somebody_else"))
		must(t, err)
		for err == nil {
			_, err = f.Write(make([]byte, block))
		}
		must(t, f.Close())
		time.Sleep(10 * time.Minute)
		if n := missing(t, s, young...); n > 0 {
			t.Errorf("%d of those used lately are gone", n)
		}
		var st unix.Statfs_t
		if err := unix.Statfs(disk, &st); err != nil || int64(st.Bavail)*st.Bsize < 4<<20 {
			t.Errorf("%d bytes are free, error %v", int64(st.Bavail)*st.Bsize, err)
		}
		for _, d := range young {
			wantRight(t, s, d)
		}
		mustPut(t, s, 5000)
	})
}

// TestStore_packedDamage: a record that the disk damaged is missing, by whatever
// it is found, is kept for a look, and can be put again.
func TestStore_packedDamage(t *testing.T) {
	for _, how := range []string{"read", "check", "scrub"} {
		t.Run(how, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				dir := t.TempDir()
				s := openQuiet(t, packing(file.Options{Dir: dir}))
				d, other := mustPut(t, s, 1), mustPut(t, s, 2)
				segs, err := filepath.Glob(dir + "/packs/*.seg")
				must(t, err)
				data, err := os.ReadFile(segs[0])
				must(t, err)
				data[bytes.Index(data, blobtest.Random(1, block))+100] ^= 1
				must(t, os.WriteFile(segs[0], data, 0o600))
				switch how {
				case "read":
					if _, err := blob.ReadAll(t.Context(), s, d, block); !errors.Is(err, blob.ErrNotFound) {
						t.Errorf("read: %v, want ErrNotFound", err)
					}
				case "check":
					if err := s.Check(t.Context(), d); !errors.Is(err, blob.ErrCorrupt) {
						t.Errorf("check: %v, want ErrCorrupt", err)
					}
				case "scrub":
					time.Sleep(2 * time.Minute)
				}
				wantGone(t, s, d)
				wantRight(t, s, other)
				must(t, s.Check(t.Context(), other))
				if kept, err := os.ReadDir(dir + "/quarantine"); err != nil || len(kept) != 1 {
					t.Errorf("%d files in the quarantine, %v; want 1", len(kept), err)
				}
				mustPut(t, s, 1)
				wantRight(t, s, d)
			})
		})
	}
}
