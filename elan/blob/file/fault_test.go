package file_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/blobtest"
	"github.com/mettle-build/mettle/elan/blob/file"
	"github.com/mettle-build/mettle/elan/digest"
)

func wantRight(t testing.TB, s blob.Opener, d digest.Digest) {
	t.Helper()
	data, err := blob.ReadAll(t.Context(), s, d, 1<<20)
	if got := digest.Of(d.Function(), data); err != nil || got != d.Plain() {
		t.Errorf("read %s: error %v, bytes of %s", d, err, got)
	}
}

func wantGone(t testing.TB, s *file.Store, d digest.Digest) {
	t.Helper()
	if r, err := s.Open(t.Context(), d, 0); !errors.Is(err, blob.ErrNotFound) {
		t.Errorf("open %s: %v, %v; want ErrNotFound", d, r, err)
	}
	if missing(t, s, d) != 1 {
		t.Errorf("find %s: it is there, want it missing", d)
	}
}

// must fails the test if err is not nil.
func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestStore_tampering: without an audit too, wrong bytes are not served, and
// right ones survive that somebody changed what does not matter.
func TestStore_tampering(t *testing.T) {
	write := func(p string, data []byte) error {
		return errors.Join(os.Chmod(p, 0o644), os.WriteFile(p, data, 0), os.Chmod(p, 0o444))
	}
	for _, c := range []struct {
		name   string
		tamper func(p string) error
		stays  bool
	}{
		{"bytes", func(p string) error { return write(p, blobtest.Random(99, block)) }, false},
		{"shorter", func(p string) error { return os.Truncate(p, 10) }, false},
		{"longer", func(p string) error { return os.Truncate(p, block+1) }, false},
		{"folder", func(p string) error { return errors.Join(os.Remove(p), os.Mkdir(p, 0o700)) }, false},
		{"symlink", func(p string) error { return errors.Join(os.Remove(p), os.Symlink("/etc/passwd", p)) }, false},
		{"mode", func(p string) error { return os.Chmod(p, 0o755) }, true},
		{"mtime", func(p string) error { return os.Chtimes(p, time.Now(), time.Now()) }, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			for i, use := range []func(s *file.Store, d digest.Digest) error{
				func(s *file.Store, d digest.Digest) error {
					r, err := s.Open(t.Context(), d, 0)
					if err == nil {
						err = r.Close()
					}
					return err
				},
				func(s *file.Store, d digest.Digest) error {
					m, err := s.FindMissing(t.Context(), []digest.Digest{d})
					if len(m) > 0 {
						err = errors.Join(err, blob.ErrNotFound)
					}
					return err
				},
				func(s *file.Store, d digest.Digest) error {
					return s.Link(t.Context(), d, filepath.Join(t.TempDir(), "f"), blob.LinkRegular)
				},
			} {
				s := openQuiet(t, file.Options{})
				d := mustPut(t, s, 1)
				must(t, c.tamper(blobFile(s, d)))
				err := use(s, d)
				switch {
				case c.stays && err != nil:
					t.Errorf("use %d: %v", i, err)
				case c.stays:
					wantRight(t, s, d)
					must(t, s.Audit(t.Context(), d, blob.LinkRegular, time.Now()))
				case !errors.Is(err, blob.ErrNotFound):
					t.Errorf("use %d: %v, want ErrNotFound", i, err)
				default:
					wantGone(t, s, d)
					if mustPut(t, s, 1); s.Used() != block {
						t.Errorf("%d bytes used, want %d", s.Used(), block)
					}
				}
			}
		})
	}
}

// TestStore_trouble: what can't be looked at is not missing.
func TestStore_trouble(t *testing.T) {
	s := openQuiet(t, file.Options{})
	d := mustPut(t, s, 1)
	k := blob.EntryKey{Action: d}
	must(t, s.PutEntry(t.Context(), k, []byte("v")))
	absent := digest.Of(digest.SHA256, []byte("absent"))
	for _, p := range []string{"cas", "ac"} {
		p = filepath.Join(filepath.Dir(filepath.Dir(filepath.Dir(filepath.Dir(blobFile(s, d))))), p)
		must(t, os.Rename(p, p+"-away"))
		defer func() { must(t, os.Rename(p+"-away", p)) }()
	}
	for name, call := range map[string]func() error{
		"find":         func() error { _, err := s.FindMissing(t.Context(), []digest.Digest{d}); return err },
		"find_absent":  func() error { _, err := s.FindMissing(t.Context(), []digest.Digest{absent}); return err },
		"open":         func() error { _, err := s.Open(t.Context(), d, 0); return err },
		"put":          func() error { _, err := put(t, s, 2); return err },
		"link":         func() error { return s.Link(t.Context(), d, filepath.Join(t.TempDir(), "f"), blob.LinkExecutable) },
		"audit":        func() error { return s.Audit(t.Context(), d, blob.LinkRegular, time.Now()) },
		"entry":        func() error { _, err := s.Entry(t.Context(), k); return err },
		"put_entry":    func() error { return s.PutEntry(t.Context(), k, []byte("v")) },
		"delete_entry": func() error { return s.DeleteEntry(t.Context(), k) },
	} {
		if err := call(); !errors.Is(err, blob.ErrUnavailable) || errors.Is(err, blob.ErrNotFound) {
			t.Errorf("%s: %v, want ErrUnavailable", name, err)
		}
	}
}

func TestStore_tooManyLinks(t *testing.T) {
	s := openQuiet(t, file.Options{})
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
			must(t, s.Audit(t.Context(), d, mode, time.Now()))
			if data, err := os.ReadFile(dst); err != nil || digest.Of(digest.SHA256, data) != d {
				t.Fatalf("link %d: error %v", i, err)
			}
		}
	}
	if s.Used() != 2*block {
		t.Errorf("%d bytes used, want %d", s.Used(), 2*block)
	}
}

// The limit of the file system itself, where that is ext4's: 65,000.
func TestStore_tooManyLinks_for_ext4(t *testing.T) {
	if testing.Short() {
		t.Skip("it makes 65,100 links")
	}
	s := openQuiet(t, file.Options{})
	d, dir := mustPut(t, s, 1), t.TempDir()
	inodes := map[uint64]int{}
	for i := range 65_100 {
		dst := filepath.Join(dir, fmt.Sprint(i))
		must(t, s.Link(t.Context(), d, dst, blob.LinkRegular))
		if i%1000 == 0 || i > 64_990 {
			var st unix.Stat_t
			must(t, unix.Lstat(dst, &st))
			inodes[st.Ino]++
		}
	}
	data, err := os.ReadFile(filepath.Join(dir, "65099"))
	if err != nil || digest.Of(digest.SHA256, data) != d {
		t.Errorf("the last link: %v", err)
	}
	var fs unix.Statfs_t
	must(t, unix.Statfs(dir, &fs))
	if fs.Type == unix.EXT4_SUPER_MAGIC && len(inodes) != 2 {
		t.Errorf("the links are of %d inodes, want 2 on ext4", len(inodes))
	}
}

// TestStore_otherFileSystem: where no link can be made, a copy is.
func TestStore_otherFileSystem(t *testing.T) {
	other := t.TempDir()
	if err := unix.Mount("tmpfs", other, "tmpfs", 0, "size=4m"); err != nil {
		t.Skipf("can't mount another file system: %v", err)
	}
	t.Cleanup(func() { must(t, unix.Unmount(other, 0)) })
	s := openQuiet(t, file.Options{})
	d := mustPut(t, s, 1)
	dst := filepath.Join(other, "f")
	must(t, s.Link(t.Context(), d, dst, blob.LinkExecutable))
	st, err := os.Stat(dst)
	if data, err2 := os.ReadFile(dst); err != nil || err2 != nil || digest.Of(digest.SHA256, data) != d || st.Mode() != 0o555 {
		t.Errorf("copy: %v, %v, mode %v", err, err2, st.Mode())
	}
	data := blobtest.Random(7, 3*block)
	path := filepath.Join(other, "output")
	must(t, os.WriteFile(path, data, 0o600))
	must(t, adoptPath(t.Context(), s, path))
	must(t, os.WriteFile(path, []byte("still writable, as it was copied"), 0o600))
	wantRight(t, s, digest.Of(digest.SHA256, data))
}

func TestStore_linksKeepOneInode(t *testing.T) {
	s, dir := open(t, file.Options{}), t.TempDir()
	data := blobtest.Random(8, 3*block)
	path := filepath.Join(dir, "output")
	must(t, os.WriteFile(path, data, 0o755))
	before, err := os.Stat(path)
	must(t, err)
	must(t, adoptPath(t.Context(), s, path))
	d := digest.Of(digest.SHA256, data)
	linked := filepath.Join(dir, "input")
	must(t, s.Link(t.Context(), d, linked, blob.LinkRegular))
	after, err := os.Stat(linked)
	must(t, err)
	if !os.SameFile(before, after) {
		t.Error("the bytes were copied")
	}
	if want := time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC); !after.ModTime().Equal(want) || after.Mode() != 0o444 {
		t.Errorf("modified %v with mode %v, want %v and 0444", after.ModTime(), after.Mode(), want)
	}
}

func TestNew_refuses(t *testing.T) {
	foreign, newer := t.TempDir(), t.TempDir()
	must(t, os.WriteFile(filepath.Join(foreign, "thesis.tex"), nil, 0o600))
	must(t, os.WriteFile(filepath.Join(newer, "VERSION"), []byte("mettle file store 3\n"), 0o600))
	taken := t.TempDir()
	open(t, file.Options{Dir: taken})
	for name, c := range map[string]struct {
		o    file.Options
		want string
	}{
		"no_directory":      {file.Options{}, "no directory"},
		"negative_size":     {file.Options{Dir: taken, MaxBytes: -1}, "negative"},
		"negative_lifetime": {file.Options{Dir: taken, MinLifetime: -1}, "negative"},
		"foreign_files":     {file.Options{Dir: foreign}, "thesis.tex"},
		"newer_format":      {file.Options{Dir: newer}, "file store 3"},
		"in_use":            {file.Options{Dir: taken}, fmt.Sprintf("in use by process %d", os.Getpid())},
	} {
		if s, err := file.New(c.o); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, %v; want an error that has %q", name, s, err, c.want)
		}
	}
}

func TestStore_afterClose(t *testing.T) {
	s := openQuiet(t, file.Options{})
	d := mustPut(t, s, 1)
	must(t, errors.Join(s.Close(), s.Close()))
	if _, err := s.FindMissing(t.Context(), []digest.Digest{d}); !errors.Is(err, blob.ErrUnavailable) {
		t.Errorf("find: %v, want ErrUnavailable", err)
	}
	if _, err := put(t, s, 2); !errors.Is(err, blob.ErrUnavailable) {
		t.Errorf("put: %v, want ErrUnavailable", err)
	}
}

// TestStore_evictedWhileRead: who has a blob open reads it to its end.
func TestStore_evictedWhileRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := openQuiet(t, file.Options{MaxBytes: 10 * block, MinLifetime: time.Hour})
		d := mustPut(t, s, 1)
		r, err := s.Open(t.Context(), d, 1)
		must(t, err)
		defer r.Close()
		time.Sleep(2 * time.Hour)
		for i := range 10 {
			mustPut(t, s, 10+i)
		}
		wantGone(t, s, d)
		data, err := io.ReadAll(r)
		if diff := cmp.Diff(blobtest.Random(1, block)[1:], data); err != nil || diff != "" {
			t.Errorf("error %v, -want +got:\n%s", err, diff)
		}
	})
}

func TestStore_readerAt(t *testing.T) {
	s := openQuiet(t, file.Options{})
	data := blobtest.Random(1, 10_000)
	d, err := blob.PutBytes(t.Context(), s, digest.SHA256, data)
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	r, err := s.Open(ctx, d, 5000)
	must(t, err)
	at := r.(*file.Reader)
	buf := make([]byte, 100)
	if n, err := at.ReadAt(buf, 200); n != 100 || err != nil || !bytes.Equal(buf, data[200:300]) {
		t.Errorf("ReadAt: %d, %v", n, err)
	}
	if n, err := at.ReadAt(buf, 9990); n != 10 || !errors.Is(err, io.EOF) {
		t.Errorf("ReadAt over the end: %d, %v; want 10, EOF", n, err)
	}
	cancel()
	if _, err := r.Read(buf); !errors.Is(err, context.Canceled) {
		t.Errorf("read after cancel: %v", err)
	}
	must(t, errors.Join(r.Close(), r.Close()))
}

func TestStore_metrics(t *testing.T) {
	reg := prometheus.NewPedanticRegistry()
	s := openQuiet(t, file.Options{Registerer: reg})
	mustPut(t, s, 1)
	families, err := reg.Gather()
	must(t, err)
	problems, err := promlint.NewWithMetricFamilies(families).Lint()
	if err != nil || len(problems) > 0 {
		t.Errorf("promlint: %v, %v", problems, err)
	}
	for _, f := range families {
		if f.GetName() == "elan_file_store_used_bytes" && f.GetMetric()[0].GetGauge().GetValue() != block {
			t.Errorf("used: %v, want %d", f, block)
		}
	}
	must(t, s.Close())
	if left, err := reg.Gather(); err != nil || len(left) > 0 {
		t.Errorf("%d metrics left after Close, %v", len(left), err)
	}
}
