//go:build linux

package output

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// Where the kernel has no openat2, symlinks on the way are refused, and
// everything else is the same.
func TestRootDir_walk(t *testing.T) {
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "a/b"), 0o750); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "a/b/c"), []byte("C"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, target := range map[string]string{"up": "..", "abs": "/etc", "in": "a", "last": "a/b/c"} {
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	for _, walk := range []bool{false, true} {
		r, err := openRootDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer r.close()
		r.walk = walk
		for _, tc := range []struct {
			rel  string
			want error
		}{
			{"a/b/c", nil},
			{"a", nil},
			{"", nil},
			{"none", unix.ENOENT},
			{"a/b/c/d", unix.ENOTDIR},
			{"up/x", unix.EXDEV},
			{"abs/passwd", unix.EXDEV},
			{"last", unix.ELOOP},
		} {
			fd, _, err := r.open(tc.rel)
			if !errors.Is(err, tc.want) {
				t.Errorf("walk %v: open %q: %v, want %v", walk, tc.rel, err, tc.want)
			}
			if err == nil {
				unix.Close(fd)
			}
		}
		fd, _, err := r.open("in/b/c")
		if walk != errors.Is(err, unix.EXDEV) {
			t.Errorf("walk %v: open in/b/c: %v", walk, err)
		}
		if err == nil {
			unix.Close(fd)
		}
		if target, _, err := r.readlink("last"); err != nil || target != "a/b/c" {
			t.Errorf("walk %v: readlink last: %q, %v", walk, target, err)
		}
		if _, _, err := r.readlink("a"); !errors.Is(err, unix.EINVAL) {
			t.Errorf("walk %v: readlink a: %v, want EINVAL", walk, err)
		}
	}
}
