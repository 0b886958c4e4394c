package file_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/blobtest"
	"github.com/mettle-build/mettle/elan/blob/file"
	"github.com/mettle-build/mettle/elan/digest"
)

// metric is the value of elan_file_store_name.
func metric(t testing.TB, reg prometheus.Gatherer, name string) float64 {
	t.Helper()
	families, err := reg.Gather()
	must(t, err)
	for _, f := range families {
		if f.GetName() == "elan_file_store_"+name {
			m := f.GetMetric()[0]
			return m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	t.Fatalf("no metric %s", name)
	return 0
}

// rot changes a byte in the middle of a file as a failing disk does: nothing
// else of the file changes.
func rot(t testing.TB, path string) {
	t.Helper()
	var st unix.Stat_t
	must(t, unix.Lstat(path, &st))
	data, err := os.ReadFile(path)
	must(t, err)
	data[len(data)/2] ^= 1
	must(t, os.Chmod(path, 0o644))
	must(t, os.WriteFile(path, data, 0))
	must(t, os.Chmod(path, fs.FileMode(st.Mode&0o777)))
	must(t, unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{st.Atim, st.Mtim}, 0))
}

// atimes are the recorded last uses of all files of a store.
func atimes(t testing.TB, dir string) map[string]unix.Timespec {
	t.Helper()
	all := map[string]unix.Timespec{}
	for _, top := range []string{"cas", "ac"} {
		must(t, filepath.WalkDir(filepath.Join(dir, top), func(p string, e fs.DirEntry, err error) error {
			if err != nil || e.IsDir() {
				return err
			}
			var st unix.Stat_t
			err = unix.Lstat(p, &st)
			all[p] = st.Atim
			return err
		}))
	}
	return all
}

// TestStore_scrub: a pass finds each damaged file, sets it aside, and leaves the
// others as they were, their last use included.
func TestStore_scrub(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, reg := t.TempDir(), prometheus.NewPedanticRegistry()
		s := openQuiet(t, file.Options{Dir: dir, Registerer: reg})
		var ds []digest.Digest
		for i := range 40 {
			data := blobtest.Random(uint64(i), 1+i*20_000)
			d := digest.Of(digest.Functions()[i%len(digest.Functions())], data)
			if i%5 == 0 {
				d = d.In(digest.SpaceOf("an instance"))
			}
			must(t, blob.Receive(t.Context(), s, d, bytes.NewReader(data)))
			must(t, s.PutEntry(t.Context(), blob.EntryKey{Instance: "i", Action: d.Plain()}, []byte("some value")))
			ds = append(ds, d)
		}
		must(t, s.Link(t.Context(), ds[3], filepath.Join(t.TempDir(), "x"), blob.LinkExecutable))
		bad := blobFile(s, ds[1])
		twin := s.BlobPath(ds[3], blob.LinkExecutable)
		entries, err := filepath.Glob(filepath.Join(dir, "ac", "*", "*", ds[5].Hash()+"*"))
		if err != nil || len(entries) != 1 {
			t.Fatalf("entries %v, %v", entries, err)
		}
		before := atimes(t, dir)
		for _, path := range []string{bad, twin, entries[0]} {
			rot(t, path)
			delete(before, path)
		}
		must(t, os.Chmod(blobFile(s, ds[7]), 0o644)) // changed, though its bytes are right
		must(t, os.WriteFile(filepath.Join(filepath.Dir(bad), "not a blob"), nil, 0o600))
		used := s.Used()

		time.Sleep(time.Hour)
		after := atimes(t, dir)
		for path, atime := range before {
			if after[path] != atime {
				t.Errorf("%s: last use %v, was %v", path, after[path], atime)
			}
		}
		for _, path := range []string{bad, twin, entries[0]} {
			if _, there := after[path]; there {
				t.Errorf("%s is damaged, and still there", path)
			}
		}
		if n, err := os.ReadDir(filepath.Join(dir, "quarantine")); err != nil || len(n) != 3 {
			t.Errorf("%d files in quarantine, error %v; want 3", len(n), err)
		}
		wantGone(t, s, ds[1])
		for i, d := range ds {
			if i != 1 {
				wantRight(t, s, d)
			}
		}
		if _, err := s.Entry(t.Context(), blob.EntryKey{Instance: "i", Action: ds[5].Plain()}); !errors.Is(err, blob.ErrNotFound) {
			t.Errorf("damaged entry: %v, want ErrNotFound", err)
		}
		for name, want := range map[string]float64{
			"scrubbed_files_total": 81, "scrub_corrupt_total": 3, "corrupt_total": 3, "repaired_total": 1, "scrub_failures_total": 0,
		} {
			if got := metric(t, reg, name); got != want {
				t.Errorf("%s is %v, want %v", name, got, want)
			}
		}
		if got := metric(t, reg, "scrub_last_pass_timestamp_seconds"); time.Since(time.Unix(int64(got), 0)) > time.Hour {
			t.Errorf("the last pass was at %v, now it is %v", got, time.Now())
		}
		if freed := used - s.Used(); freed <= 0 {
			t.Errorf("%d bytes were freed", freed)
		}
	})
}

// TestStore_scrubPace: the rate is kept to, the position survives a restart, and
// the next pass waits for its time.
func TestStore_scrubPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const blobs, size, rate = 60, 100 << 10, 100 << 10 // with its file's cost a blob takes 1.16 s
		dir := t.TempDir()
		o := file.Options{Dir: dir, ScrubBytesPerSecond: rate, ScrubEvery: 24 * time.Hour}
		s := openQuiet(t, o)
		for i := range blobs {
			_, err := blob.PutBytes(t.Context(), s, digest.SHA256, blobtest.Random(uint64(i), size))
			must(t, err)
		}
		must(t, s.Close())
		var files, bytes float64
		for range 3 {
			reg := prometheus.NewRegistry()
			o.Registerer = reg
			s := openQuiet(t, o)
			time.Sleep(time.Minute + 30*time.Second) // a minute passes before it begins
			synctest.Wait()
			n := metric(t, reg, "scrubbed_files_total")
			if n > 26 {
				t.Errorf("%v files in 30 s, want at most 26", n)
			}
			closed := time.Now()
			files, bytes = files+n, bytes+metric(t, reg, "scrubbed_bytes_total")
			must(t, s.Close())
			if took := time.Since(closed); took != 0 {
				t.Errorf("Close took %v", took)
			}
		}
		// A file that was half read at a restart is read again.
		if files != blobs || bytes < blobs*size || bytes > (blobs+3)*(size+2) {
			t.Errorf("%v files with %v bytes in three runs, want each of %d once", files, bytes, blobs)
		}
		reg := prometheus.NewRegistry()
		o.Registerer = reg
		openQuiet(t, o)
		synctest.Wait()
		if metric(t, reg, "scrub_last_pass_timestamp_seconds") == 0 {
			t.Error("the last pass is forgotten")
		}
		time.Sleep(12 * time.Hour)
		if n := metric(t, reg, "scrubbed_files_total"); n != 0 {
			t.Errorf("%v files before the next pass is due", n)
		}
		time.Sleep(13 * time.Hour)
		if n := metric(t, reg, "scrubbed_files_total"); n != blobs {
			t.Errorf("%v files in the next pass, want %d", n, blobs)
		}
	})
}

func TestStore_scrubOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		reg := prometheus.NewRegistry()
		s := openQuiet(t, file.Options{Registerer: reg, ScrubBytesPerSecond: -1})
		rot(t, blobFile(s, mustPut(t, s, 1)))
		time.Sleep(2 * time.Hour)
		if n := metric(t, reg, "scrubbed_files_total"); n != 0 {
			t.Errorf("%v files scrubbed", n)
		}
	})
}

// TestStore_scrubState: whatever is in the file of the state, all is looked at.
func TestStore_scrubState(t *testing.T) {
	for name, state := range map[string]string{
		"garbage":         "\x00\x00\x00",
		"absent_folder":   `{"begun":"1999-12-31T00:00:00Z","after":"cas/md5/00/x"}`,
		"outside":         `{"begun":"1999-12-31T00:00:00Z","after":"../../etc/passwd"}`,
		"no_slash":        `{"begun":"1999-12-31T00:00:00Z","after":"cas"}`,
		"from_the_future": `{"begun":"2999-01-01T00:00:00Z","ended":"2999-01-02T00:00:00Z"}`,
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				dir := t.TempDir()
				s := open(t, file.Options{Dir: dir})
				mustPut(t, s, 1)
				must(t, s.Close())
				must(t, os.WriteFile(filepath.Join(dir, "scrub"), []byte(state), 0o600))
				reg := prometheus.NewRegistry()
				openQuiet(t, file.Options{Dir: dir, Registerer: reg})
				time.Sleep(2 * time.Minute)
				if n := metric(t, reg, "scrubbed_files_total"); n != 1 {
					t.Errorf("%v files scrubbed, want 1", n)
				}
			})
		})
	}
}

// TestStore_scrubManyNames: a folder of more names than are held at once.
func TestStore_scrubManyNames(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, reg := t.TempDir(), prometheus.NewRegistry()
		openQuiet(t, file.Options{Dir: dir, Registerer: reg})
		const n = 10_000
		for i := range n { // entries that are damaged: the shortest files to make
			d, err := digest.New(digest.SHA256, fmt.Sprintf("ab%062x", i*7919%n), 1)
			must(t, err)
			must(t, os.WriteFile(filepath.Join(dir, "ac", "sha256", "ab", d.Hash()+"-1"), nil, 0o444))
		}
		time.Sleep(5 * time.Minute)
		if got := metric(t, reg, "scrub_corrupt_total"); got != n {
			t.Errorf("%v files found, want %d", got, n)
		}
		// They do not fill the disk.
		if kept, err := os.ReadDir(filepath.Join(dir, "quarantine")); err != nil || len(kept) != 64 {
			t.Errorf("%d files in quarantine, error %v; want 64", len(kept), err)
		}
		if left, err := os.ReadDir(filepath.Join(dir, "ac", "sha256", "ab")); err != nil || len(left) != 0 {
			t.Errorf("%d files left, error %v", len(left), err)
		}
	})
}

// cached is how many pages of a file are in the page cache.
func cached(t testing.TB, path string) uint64 {
	t.Helper()
	f, err := os.Open(path)
	must(t, err)
	defer f.Close()
	var st unix.Cachestat_t
	if err := unix.Cachestat(uint(f.Fd()), &unix.CachestatRange{}, &st, 0); err != nil {
		t.Skipf("the kernel does not tell what is cached: %v", err)
	}
	return st.Cache
}

// TestStore_Check_quiet: reading all of a file changes neither its last use nor
// what of it is in memory.
func TestStore_Check_quiet(t *testing.T) {
	dir := t.TempDir()
	var fsType unix.Statfs_t
	if err := unix.Statfs(dir, &fsType); err != nil || fsType.Type == unix.TMPFS_MAGIC {
		t.Skip("a tmpfs is nothing but cache")
	}
	s := openQuiet(t, file.Options{Dir: dir})
	data := blobtest.Random(1, 3<<20+5)
	d, err := blob.PutBytes(t.Context(), s, digest.SHA256, data)
	must(t, err)
	path := blobFile(s, d)
	before := atimes(t, dir)[path]
	hot := cached(t, path)
	must(t, s.Check(t.Context(), d))
	if got := cached(t, path); got != hot || hot < 3<<20/4096 {
		t.Errorf("%d pages of a cached file are cached, %d were", got, hot)
	}
	f, err := os.Open(path)
	must(t, err)
	defer f.Close()
	must(t, f.Sync())
	must(t, unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED))
	if got := cached(t, path); got != 0 {
		t.Skipf("%d pages can't be driven out of the cache here", got)
	}
	must(t, s.Check(t.Context(), d))
	if got := cached(t, path); got != 0 {
		t.Errorf("%d pages are cached of a file that was not", got)
	}
	if got := atimes(t, dir)[path]; got != before {
		t.Errorf("last use %v, was %v", got, before)
	}
}

func TestStore_Check(t *testing.T) {
	for _, c := range []struct {
		name string
		do   func(t *testing.T, s *file.Store, d digest.Digest)
		want error
	}{
		{"whole", func(*testing.T, *file.Store, digest.Digest) {}, nil},
		{"rotten", func(t *testing.T, s *file.Store, d digest.Digest) { rot(t, blobFile(s, d)) }, blob.ErrCorrupt},
		{"shorter", func(t *testing.T, s *file.Store, d digest.Digest) { must(t, os.Truncate(blobFile(s, d), 7)) }, blob.ErrCorrupt},
		{"absent", func(t *testing.T, s *file.Store, d digest.Digest) { must(t, os.Remove(blobFile(s, d))) }, blob.ErrNotFound},
		{"a_pipe", func(t *testing.T, s *file.Store, d digest.Digest) {
			must(t, os.Remove(blobFile(s, d)))
			must(t, unix.Mkfifo(blobFile(s, d), 0o444))
		}, blob.ErrCorrupt},
		{"rotten_twin", func(t *testing.T, s *file.Store, d digest.Digest) {
			must(t, s.Link(t.Context(), d, filepath.Join(t.TempDir(), "x"), blob.LinkExecutable))
			rot(t, s.BlobPath(d, blob.LinkExecutable))
		}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := openQuiet(t, file.Options{})
			d := mustPut(t, s, 1)
			c.do(t, s, d)
			err := s.Check(t.Context(), d)
			if !errors.Is(err, c.want) || c.want == nil && err != nil {
				t.Errorf("check: %v, want %v", err, c.want)
			}
			if c.want != nil {
				wantGone(t, s, d)
				return
			}
			wantRight(t, s, d)
			if twin := s.BlobPath(d, blob.LinkExecutable); strings.Contains(c.name, "twin") {
				if _, err := os.Stat(twin); !errors.Is(err, fs.ErrNotExist) {
					t.Errorf("the rotten twin: %v, want it gone", err)
				}
			}
		})
	}
}
