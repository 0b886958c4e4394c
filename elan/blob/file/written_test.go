package file_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/file"
	"github.com/mettle-build/mettle/elan/digest"
)

// leases reports whether a file system says that somebody has a file open for writing.
func leases(t *testing.T, dir string) bool {
	t.Helper()
	path := filepath.Join(dir, "probe")
	w, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	r, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	_, err = unix.FcntlInt(r.Fd(), unix.F_SETLEASE, unix.F_RDLCK)
	return errors.Is(err, unix.EAGAIN)
}

// Somebody who has an adopted file open, or mapped, can't change the blob, and what he
// writes before is in the blob or not, but the blob has its digest.
func TestStore_Adopt_writtenElsewhere(t *testing.T) {
	dir := t.TempDir()
	if !leases(t, dir) {
		t.Skip("this file system has no leases")
	}
	s, err := file.New(file.Options{Dir: filepath.Join(dir, "store")})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	const size = 100_000
	for name, hold := range map[string]func(w *os.File) (write func(), release func()){
		"open": func(w *os.File) (func(), func()) {
			return func() {
				if _, err := w.WriteAt([]byte("changed"), 50_000); err != nil {
					t.Error(err)
				}
			}, func() { w.Close() }
		},
		"mapped": func(w *os.File) (func(), func()) {
			m, err := unix.Mmap(int(w.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
			if err != nil {
				t.Fatal(err)
			}
			w.Close()
			return func() { copy(m[50_000:], "changed") }, func() { _ = unix.Munmap(m) }
		},
	} {
		t.Run(name, func(t *testing.T) {
			data := bytes.Repeat([]byte(name[:4]), size/4)
			path := filepath.Join(dir, name)
			if err := os.WriteFile(path, data, 0o644); err != nil { //nolint:gosec // as actions do
				t.Fatal(err)
			}
			w, err := os.OpenFile(path, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			write, release := hold(w)
			defer release()
			for range 2 { // the second time, the blob is there
				f, err := os.Open(path)
				if err != nil {
					t.Fatal(err)
				}
				d, err := s.Adopt(t.Context(), digest.SHA256, f)
				f.Close()
				if err != nil || d != digest.Of(digest.SHA256, data) {
					t.Fatalf("adopted as %s, %v", d, err)
				}
			}
			write()
			got, err := blob.ReadAll(t.Context(), s, digest.Of(digest.SHA256, data), size)
			if err != nil || !bytes.Equal(got, data) {
				t.Errorf("the blob was changed, %v", err)
			}
		})
	}
	// Nobody has this one, and so it is taken over.
	path := filepath.Join(dir, "free")
	if err := os.WriteFile(path, bytes.Repeat([]byte("f"), size), 0o644); err != nil { //nolint:gosec // as above
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := s.Adopt(t.Context(), digest.SHA256, f); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil || st.Nlink != 2 {
		t.Errorf("%d links, %v, want 2: it was copied", st.Nlink, err)
	}
	// The lease is over: it can be opened for writing, as far as its mode allows.
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	again, err := os.OpenFile(path, os.O_RDWR|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatalf("after it was adopted: %v", err)
	}
	again.Close()
}
