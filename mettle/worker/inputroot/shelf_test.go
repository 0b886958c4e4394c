//go:build linux

package inputroot_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/mettle/worker/inputroot"
)

func newShelf(t testing.TB, dir string) *inputroot.Shelf {
	t.Helper()
	s, err := inputroot.NewShelf(dir, inputroot.Owner{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func mkdir(t testing.TB, path string) {
	t.Helper()
	if err := os.Mkdir(path, 0o755); err != nil { //nolint:gosec // as input roots are
		t.Fatal(err)
	}
}

// removeAway has the shelf remove a root, and leave nothing in its place.
func removeAway(s *inputroot.Shelf, dir string) error { return errors.Join(s.Remove(dir), s.Vacate()) }

// inode tells directories apart.
func inode(t testing.TB, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

func TestShelf_keepsOnlyWhatIsLikeNew(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(dir string) error
		kept   bool
	}{
		"nothing":     {func(string) error { return nil }, true},
		"file":        {func(d string) error { return os.WriteFile(d+"/x", nil, 0o600) }, true},
		"symlink":     {func(d string) error { return os.Symlink("/etc", d+"/x") }, true},
		"fifo":        {func(d string) error { return unix.Mkfifo(d+"/x", 0o600) }, true},
		"mode":        {func(d string) error { return os.Chmod(d, 0o700) }, false}, //nolint:gosec // what actions do
		"sticky":      {func(d string) error { return os.Chmod(d, 0o755|fs.ModeSticky) }, false},
		"unreadable":  {func(d string) error { return os.Chmod(d, 0) }, false},
		"read-only":   {func(d string) error { return errors.Join(os.WriteFile(d+"/x", nil, 0o600), os.Chmod(d, 0o500)) }, false}, //nolint:gosec // likewise
		"attribute":   {func(d string) error { return unix.Setxattr(d, "user.x", []byte("y"), 0) }, false},
		"default ACL": {setDefaultACL, false},
		"flag":        {setNoDump, false},
		"large": {func(d string) (err error) {
			for i := range 2000 {
				err = errors.Join(err, os.WriteFile(fmt.Sprintf("%s/some-long-name-%d", d, i), nil, 0o600))
			}
			return err
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			base := t.TempDir()
			s := newShelf(t, filepath.Join(base, "shelf"))
			f := newFixture(t, fileStore(t), inputroot.Options{})
			first := filepath.Join(base, "first")
			if _, err := f.builder.Build(t.Context(), inputroot.Request{Dir: first, Digest: digest.Empty(digest.SHA256), Shelf: s}); err != nil {
				t.Fatal(err)
			}
			before := inode(t, first)
			if err := tc.change(first); errors.Is(err, unix.ENOTSUP) || errors.Is(err, unix.ENOTTY) {
				t.Skip(err)
			} else if err != nil {
				t.Fatal(err)
			}
			st, err := os.Stat(first)
			if err != nil {
				t.Fatal(err)
			}
			if name == "large" && st.Size() <= 4096 {
				t.Skip("directories don't grow here")
			}
			if err := removeAway(s, first); err != nil {
				t.Fatalf("Remove: %v", err)
			}
			if _, err := os.Lstat(first); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("after Remove: %v", err)
			}
			if got := len(list(t, filepath.Join(base, "shelf"))) == 1; got != tc.kept {
				t.Errorf("kept: %v, want %v", got, tc.kept)
			}
			if _, err := f.builder.Build(t.Context(), inputroot.Request{Dir: f.dir, Digest: digest.Empty(digest.SHA256), Shelf: s}); err != nil {
				t.Fatal(err)
			}
			if tc.kept && inode(t, f.dir) != before {
				t.Error("the new root is another directory")
			}
			if left := list(t, filepath.Join(base, "shelf")); len(left) != 0 {
				t.Errorf("the shelf has %q", left)
			}
			if got := list(t, f.dir); len(got) != 0 {
				t.Errorf("the new root has %q", got)
			}
			if st, err := os.Stat(f.dir); err != nil || st.Mode() != 0o755|fs.ModeDir {
				t.Errorf("the new root has mode %v", st.Mode())
			}
		})
	}
}

func setDefaultACL(dir string) error {
	// Version 2; user::rwx, group::rwx, other::rwx.
	acl := []byte{2, 0, 0, 0, 1, 0, 7, 0, 255, 255, 255, 255, 4, 0, 7, 0, 255, 255, 255, 255, 32, 0, 7, 0, 255, 255, 255, 255}
	return unix.Setxattr(dir, "system.posix_acl_default", acl, 0)
}

func setNoDump(dir string) error {
	fd, err := unix.Open(dir, unix.O_RDONLY, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	flags, err := unix.IoctlGetInt(fd, unix.FS_IOC_GETFLAGS)
	if err != nil {
		return err
	}
	return unix.IoctlSetPointerInt(fd, unix.FS_IOC_SETFLAGS, flags|0x40 /* nodump */)
}

// What one action has left in its directories is in none of the next one's.
func TestShelf_reuse(t *testing.T) {
	base := t.TempDir()
	s := newShelf(t, filepath.Join(base, "shelf"))
	f := newFixture(t, fileStore(t), inputroot.Options{Policy: inputroot.Link})
	leaf := f.putMessage(t, &repb.Directory{Files: []*repb.FileNode{{Name: "leaf", Digest: f.put(t, "L")}}})
	d, err := digest.FromProto(digest.SHA256, f.putMessage(t, &repb.Directory{Directories: []*repb.DirectoryNode{{Name: "a", Digest: leaf}, {Name: "b", Digest: leaf}}}))
	if err != nil {
		t.Fatal(err)
	}
	var first []string
	for range 5 {
		if _, err := f.builder.Build(t.Context(), inputroot.Request{Dir: f.dir, Digest: d, Shelf: s, Directories: []string{"o/p"}}); err != nil {
			t.Fatal(err)
		}
		got := list(t, f.dir)
		if first == nil {
			first = got
		}
		if fmt.Sprint(got) != fmt.Sprint(first) || len(got) != 6 {
			t.Errorf("input root %q, want %q", got, first)
		}
		if err := os.WriteFile(filepath.Join(f.dir, "o/p/output"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := removeAway(s, f.dir); err != nil {
			t.Fatal(err)
		}
		if kept := list(t, filepath.Join(base, "shelf")); len(kept) != 5 {
			t.Errorf("the shelf has %q, want 5 empty directories", kept)
		}
	}
}

// Directories that a command has made are not kept beyond what input roots need.
func TestShelf_keepsNoMoreThanIsTaken(t *testing.T) {
	base := t.TempDir()
	s := newShelf(t, filepath.Join(base, "shelf"))
	f := newFixture(t, fileStore(t), inputroot.Options{})
	for i, dirs := range [][]string{{"a", "b", "c/d"}, nil, nil} {
		req := inputroot.Request{Dir: filepath.Join(base, "root"), Digest: digest.Empty(digest.SHA256), Shelf: s, Directories: dirs}
		if _, err := f.builder.Build(t.Context(), req); err != nil {
			t.Fatal(err)
		}
		for j := range 10 {
			mkdir(t, filepath.Join(req.Dir, fmt.Sprint("made", j)))
		}
		if err := removeAway(s, req.Dir); err != nil {
			t.Fatal(err)
		}
		// The root, and the four that the first one had; others forget them slowly.
		if got, want := len(list(t, filepath.Join(base, "shelf"))), 5-i; got != want {
			t.Errorf("after input root %d the shelf has %d directories, want %d", i, got, want)
		}
	}
}

// An empty root stays where it is, if it is like a new one, until somebody wants the
// place.
func TestShelf_leavesTheRootInItsPlace(t *testing.T) {
	base := t.TempDir()
	s := newShelf(t, filepath.Join(base, "shelf"))
	f := newFixture(t, fileStore(t), inputroot.Options{})
	build := func(dirs ...string) uint64 {
		t.Helper()
		req := inputroot.Request{Dir: f.dir, Digest: digest.Empty(digest.SHA256), Shelf: s, Directories: dirs}
		if _, err := f.builder.Build(t.Context(), req); err != nil {
			t.Fatal(err)
		}
		if got := list(t, f.dir); len(got) != len(dirs) {
			t.Errorf("the root has %q, want %q", got, dirs)
		}
		return inode(t, f.dir)
	}
	remove := func() {
		t.Helper()
		if err := s.Remove(f.dir); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadDir(f.dir); len(got) != 0 || err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("after Remove: %v, %v", got, err)
		}
	}
	first := build("d")
	mkdir(t, filepath.Join(f.dir, "made"))
	remove()
	if got := build(); got != first {
		t.Error("the root is another directory than the last one")
	}
	// One that is not like new goes.
	if err := os.Chmod(f.dir, 0o700); err != nil { //nolint:gosec // what actions do
		t.Fatal(err)
	}
	remove()
	if _, err := os.Lstat(f.dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after Remove of a root with another mode: %v", err)
	}
	build()
	remove()
	// Somebody has cleaned up, or put something there.
	if err := os.Remove(f.dir); err != nil {
		t.Fatal(err)
	}
	build()
	remove()
	mkdir(t, filepath.Join(f.dir, "foreign")) // by the worker's own user, which this shelf expects
	build()
	remove()
	if err := s.Vacate(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(f.dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after Vacate: %v", err)
	}
	mkdir(t, f.dir) // not the shelf's
	if err := s.Vacate(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(f.dir); err != nil {
		t.Errorf("Vacate took what is not its own: %v", err)
	}
}

// Deeper than descriptors and paths go.
func TestShelf_Remove_deep(t *testing.T) {
	base := t.TempDir()
	s := newShelf(t, filepath.Join(base, "shelf"))
	root := filepath.Join(base, "root")
	mkdir(t, root)
	fd, err := unix.Open(root, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 5000 {
		mode := uint32(0o755)
		if i%100 == 50 {
			mode = 0o300
		}
		if err := unix.Mkdirat(fd, "directory", mode); err != nil {
			t.Fatal(err)
		}
		next, err := unix.Openat(fd, "directory", unix.O_PATH|unix.O_DIRECTORY, 0)
		if err != nil {
			t.Fatal(err)
		}
		unix.Close(fd)
		fd = next
	}
	unix.Close(fd)
	if err := removeAway(s, root); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(root); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after Remove: %v", err)
	}
	for _, l := range list(t, filepath.Join(base, "shelf")) {
		if filepath.Dir(l) != "." {
			t.Fatalf("something is in a directory of the shelf: %s", l)
		}
	}
}

func TestShelf_Remove_nothing(t *testing.T) {
	base := t.TempDir()
	s := newShelf(t, filepath.Join(base, "shelf"))
	if err := removeAway(s, filepath.Join(base, "none")); err != nil {
		t.Errorf("Remove: %v", err)
	}
	// A symlink in its place is removed, not followed.
	target := filepath.Join(base, "target")
	mkdir(t, filepath.Join(base, "target"))
	if err := os.Symlink(target, filepath.Join(base, "link")); err != nil {
		t.Fatal(err)
	}
	if err := removeAway(s, filepath.Join(base, "link")); err != nil {
		t.Errorf("Remove: %v", err)
	}
	if _, err := os.Lstat(target); err != nil {
		t.Errorf("the target of a symlink: %v", err)
	}
	if _, err := os.Lstat(filepath.Join(base, "link")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the symlink: %v", err)
	}
}
