package blobtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

func testLinker(t *testing.T, o Options) {
	s := o.New(t)
	l, ok := blob.As[blob.Linker](s)
	if !ok {
		t.Skip("the store does not link")
	}
	data := Random(20, 30_000)
	d := Put(t, s, digest.SHA256, data)
	dir := t.TempDir()
	for _, c := range []struct {
		name string
		mode blob.LinkMode
		perm fs.FileMode
	}{{"regular", blob.LinkRegular, 0o444}, {"executable", blob.LinkExecutable, 0o555}} {
		t.Run(c.name, func(t *testing.T) {
			for i, want := range []struct {
				d    digest.Digest
				data []byte
			}{{d, data}, {d, data}, {digest.Empty(digest.SHA256), nil}} {
				dst := filepath.Join(dir, fmt.Sprint(c.name, i))
				if err := l.Link(t.Context(), want.d, dst, c.mode); err != nil {
					t.Fatal(err)
				}
				wantFile(t, dst, want.data, c.perm)
			}
			dst := filepath.Join(dir, c.name+"0")
			if err := l.Link(t.Context(), d, dst, c.mode); !errors.Is(err, fs.ErrExist) {
				t.Errorf("link to a name that is taken: %v, want ErrExist", err)
			}
			err := l.Link(t.Context(), d, filepath.Join(dir, "no", "such", "folder"), c.mode)
			if err == nil || errors.Is(err, blob.ErrNotFound) {
				t.Errorf("link into a folder that is not there: %v, want an error, and not the blob's", err)
			}
			absent := filepath.Join(dir, "absent")
			err = l.Link(t.Context(), digest.Of(digest.SHA256, []byte("absent")), absent, c.mode)
			if !errors.Is(err, blob.ErrNotFound) {
				t.Errorf("link of an absent blob: %v, want ErrNotFound", err)
			}
			if _, err := os.Lstat(absent); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("link of an absent blob left something: %v", err)
			}
			if err := l.Link(cancelledContext(t), d, absent, c.mode); !errors.Is(err, context.Canceled) {
				t.Errorf("cancelled: %v", err)
			}
		})
	}
	t.Run("concurrent", func(t *testing.T) { testConcurrentLinks(t, s, l) })
	// Removing links, and their folder, leaves the blob.
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	wantBlob(t, s, d, data)
}

// testConcurrentLinks: the first links as executable, at once.
func testConcurrentLinks(t *testing.T, s blob.Store, l blob.Linker) {
	data, dir := Random(21, 100_000), t.TempDir()
	d := Put(t, s, digest.SHA256, data)
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			dst := filepath.Join(dir, fmt.Sprint(i))
			mode, perm := blob.LinkRegular, fs.FileMode(0o444)
			if i%2 == 0 {
				mode, perm = blob.LinkExecutable, 0o555
			}
			if err := l.Link(t.Context(), d, dst, mode); err != nil {
				t.Error(err)
				return
			}
			wantFile(t, dst, data, perm)
		})
	}
	wg.Wait()
}

func wantFile(t testing.TB, path string, data []byte, perm fs.FileMode) {
	t.Helper()
	st, err := os.Lstat(path)
	if err != nil {
		t.Error(err)
		return
	}
	if st.Mode() != perm {
		t.Errorf("mode of %s is %v, want %v", path, st.Mode(), perm)
	}
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, data) {
		t.Errorf("read %s: %d bytes, error %v; want the %d bytes of the blob", path, len(got), err, len(data))
	}
}

func testAdopter(t *testing.T, o Options) {
	s := o.New(t)
	a, ok := blob.As[blob.Adopter](s)
	if !ok {
		t.Skip("the store does not adopt")
	}
	dir := t.TempDir()
	adopt := func(t *testing.T, name string, fn digest.Function, data []byte) {
		t.Helper()
		path := filepath.Join(dir, name)
		if _, err := os.Stat(path); err != nil {
			if err := os.WriteFile(path, data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close() //nolint:errcheck // opened for reading
		d, err := a.Adopt(t.Context(), fn, f)
		if want := digest.Of(fn, data); err != nil || d != want {
			t.Fatalf("adopt: %s, %v; want %s", d, err, want)
		}
		wantBlob(t, s, d, data)
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		wantBlob(t, s, d, data)
	}
	for _, fn := range o.functions() {
		adopt(t, "of_"+fn.String(), fn, Random(30, 20_000))
	}
	adopt(t, "empty", digest.SHA256, nil)
	adopt(t, "large", digest.SHA256, Random(31, 1<<20))
	adopt(t, "again", digest.SHA256, Random(31, 1<<20))

	t.Run("two_names", func(t *testing.T) {
		// The other name stays writable, so that its inode must not be the store's.
		data, other := Random(32, 5000), filepath.Join(dir, "other")
		if err := os.WriteFile(other, data, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Link(other, filepath.Join(dir, "two")); err != nil {
			t.Fatal(err)
		}
		adopt(t, "two", digest.SHA256, data)
		if err := os.WriteFile(other, []byte("changed"), 0o600); err != nil {
			t.Fatal(err)
		}
		wantBlob(t, s, digest.Of(digest.SHA256, data), data)
	})
	t.Run("not_a_file", func(t *testing.T) {
		f, err := os.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close() //nolint:errcheck // opened for reading
		if d, err := a.Adopt(t.Context(), digest.SHA256, f); err == nil {
			t.Errorf("adopted a folder as %s", d)
		}
	})
}

func testAuditor(t *testing.T, o Options) {
	if _, ok := blob.As[blob.Auditor](o.New(t)); !ok {
		t.Skip("the store does not audit")
	}
	data := Random(40, 10_000)
	for _, c := range []struct {
		name   string
		tamper func(path string) error
	}{
		{"mode", func(p string) error { return os.Chmod(p, 0o644) }},
		{"bytes", func(p string) error {
			return errors.Join(os.Chmod(p, 0o644), os.WriteFile(p, Random(41, len(data)), 0), os.Chmod(p, 0o444))
		}},
		{"shorter", func(p string) error { return errors.Join(os.Chmod(p, 0o644), os.Truncate(p, 1)) }},
	} {
		for _, mode := range []blob.LinkMode{blob.LinkRegular, blob.LinkExecutable} {
			t.Run(fmt.Sprint(c.name, "/", mode), func(t *testing.T) {
				s := o.New(t)
				a, _ := blob.As[blob.Auditor](s)
				l, _ := blob.As[blob.Linker](s)
				d, dst := Put(t, s, digest.SHA256, data), filepath.Join(t.TempDir(), "f")
				linked := time.Now()
				if err := l.Link(t.Context(), d, dst, mode); err != nil {
					t.Fatal(err)
				}
				if err := a.Audit(t.Context(), d, mode, linked); err != nil {
					t.Fatalf("nothing was changed: %v", err)
				}
				if err := c.tamper(dst); err != nil {
					t.Fatal(err)
				}
				if err := a.Audit(t.Context(), d, mode, linked); !errors.Is(err, blob.ErrCorrupt) {
					t.Errorf("audit: %v, want ErrCorrupt", err)
				}
				// Put again, it is there and right, in both modes.
				Put(t, s, digest.SHA256, data)
				wantBlob(t, s, d, data)
				again := filepath.Join(t.TempDir(), "f")
				if err := l.Link(t.Context(), d, again, mode); err != nil {
					t.Fatal(err)
				}
				perm := fs.FileMode(0o444)
				if mode == blob.LinkExecutable {
					perm = 0o555
				}
				wantFile(t, again, data, perm)
				// Who linked it before is told still, who linked it now is not.
				if err := a.Audit(t.Context(), d, mode, linked); !errors.Is(err, blob.ErrCorrupt) {
					t.Errorf("audit of the first link, after a second: %v, want ErrCorrupt", err)
				}
				if err := a.Audit(t.Context(), d, mode, time.Now()); err != nil {
					t.Errorf("audit of the second link: %v", err)
				}
			})
		}
	}
}
