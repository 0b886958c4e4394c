//go:build linux

package image_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/mettle-build/mettle/mettle/worker/image"
)

// tree lists what is in a directory: names, types, modes, contents, and marks.
func tree(t testing.TB, root string) map[string]string {
	t.Helper()
	got := map[string]string{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == root {
			return err
		}
		st, err := d.Info()
		if err != nil {
			return err
		}
		rel, what := strings.TrimPrefix(path, root+"/"), st.Mode().String()
		switch {
		case st.Mode().IsRegular():
			what += " " + read(t, root, rel)
		case st.Mode()&fs.ModeSymlink != 0:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			what = "-> " + target
		case st.Mode()&fs.ModeCharDevice != 0:
			what = fmt.Sprint("device ", st.Sys().(*syscall.Stat_t).Rdev)
		}
		if st.Mode()&fs.ModeSymlink == 0 {
			if buf := make([]byte, 8); true {
				if n, err := unix.Lgetxattr(path, "user.overlay.opaque", buf); err == nil {
					what += " opaque " + string(buf[:n])
				}
			}
		}
		got[rel] = what
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func mode(e entry, m int64) entry {
	e.Mode = m
	return e
}

func TestUnpack(t *testing.T) {
	long := strings.Repeat("a", 300)
	for name, tc := range map[string]struct {
		entries []entry
		want    map[string]string
		bad     string // in the error, which is of the image
	}{
		"modes": {
			[]entry{mode(dir("d"), 0o700), mode(file("d/x"+"", "x"), 0o4711), mode(file("d/y", "y"), 0o400), mode(dir("t"), 0o1777), mode(file("d/z", "z"), 0)},
			map[string]string{"d": "drwxr-xr-x", "d/x": "-rwxr-xr-x x", "d/y": "-r--r--r-- y", "d/z": "-r--r--r-- z", "t": "drwxr-xr-x"},
			"",
		},
		"parents that are not in it": {[]entry{file("a/b/c", "c")}, map[string]string{"a": "drwxr-xr-x", "a/b": "drwxr-xr-x", "a/b/c": "-rw-r--r-- c"}, ""},
		"names as they come": {
			[]entry{file("./a", "a"), file("/b", "b"), file("../../c", "c"), file("x/../../d", "d"), dir("./"), dir("..")},
			map[string]string{"a": "-rw-r--r-- a", "b": "-rw-r--r-- b", "c": "-rw-r--r-- c", "d": "-rw-r--r-- d"},
			"",
		},
		"devices and pipes": {
			[]entry{link(tar.TypeChar, "c", ""), link(tar.TypeBlock, "b", ""), link(tar.TypeFifo, "f", ""), file("a", "a")},
			map[string]string{"a": "-rw-r--r-- a"},
			"",
		},
		"the last one counts": {
			[]entry{file("a", "1"), file("a", "2"), dir("b"), file("b/c", "c"), file("b", "b"), link(tar.TypeSymlink, "c", "x"), dir("c"), file("c/d", "d"), dir("c")},
			map[string]string{"a": "-rw-r--r-- 2", "b": "-rw-r--r-- b", "c": "drwxr-xr-x", "c/d": "-rw-r--r-- d"},
			"",
		},
		"links": {
			[]entry{dir("d"), file("d/a", "a"), link(tar.TypeLink, "b", "d/a"), link(tar.TypeLink, "b", "./d/a"), link(tar.TypeSymlink, "s", "/d"), link(tar.TypeLink, "e", "s/a"), link(tar.TypeLink, "l", "s"), file("s/f", "f")},
			map[string]string{"d": "drwxr-xr-x", "d/a": "-rw-r--r-- a", "d/f": "-rw-r--r-- f", "b": "-rw-r--r-- a", "e": "-rw-r--r-- a", "s": "-> /d", "l": "-> /d"},
			"",
		},
		"whiteouts": {
			[]entry{dir("d"), file("d/.wh.gone", ""), file(".wh.dir", ""), dir("dir"), dir("old"), file("old/x", "x"), file(".wh.old", ""), file("stays", "s"), file(".wh.stays", ""), file("e/.wh..wh..opq", ""), file(".wh..wh.plnk", ""), file(".wh.x", ""), file("x", "x")},
			map[string]string{
				"d": "drwxr-xr-x", "d/gone": "device 0", "dir": "drwxr-xr-x opaque y", "old": "drwxr-xr-x opaque y", "old/x": "-rw-r--r-- x",
				"stays": "-rw-r--r-- s", "e": "drwxr-xr-x opaque y", "x": "-rw-r--r-- x",
			},
			"",
		},
		"whiteouts in what hides all": {
			[]entry{file("a/.wh..wh..opq", ""), file("a/.wh.x", ""), file("b/.wh.x", ""), file("b/y", "y"), file("b/.wh..wh..opq", ""), file("c/.wh.x", ""), file(".wh.c", "")},
			map[string]string{"a": "drwxr-xr-x opaque y", "b": "drwxr-xr-x opaque y", "b/y": "-rw-r--r-- y", "c": "drwxr-xr-x opaque y"},
			"",
		},
		"through a symlink out":           {[]entry{link(tar.TypeSymlink, "s", "/etc"), file("s/x", "x")}, nil, "s"},
		"through a relative symlink out":  {[]entry{link(tar.TypeSymlink, "s", "../../../../etc"), file("s/x", "x")}, nil, "s"},
		"through a symlink to /proc":      {[]entry{link(tar.TypeSymlink, "s", "/proc/self/cwd"), file("s/x", "x")}, nil, "s"},
		"hard link to the host":           {[]entry{link(tar.TypeLink, "p", "/etc/passwd")}, nil, "not in this layer"},
		"hard link through a symlink out": {[]entry{link(tar.TypeSymlink, "s", "/etc"), link(tar.TypeLink, "p", "s/passwd")}, nil, "not in this layer"},
		"hard link to a directory":        {[]entry{dir("d"), link(tar.TypeLink, "p", "d")}, nil, "no file"},
		"hard link to a whiteout":         {[]entry{file(".wh.w", ""), link(tar.TypeLink, "p", "w")}, nil, "no file"},
		"below a file":                    {[]entry{file("a", "a"), file("a/b", "b")}, nil, "not a directory"},
		"symlinks in a circle":            {[]entry{link(tar.TypeSymlink, "a", "b"), link(tar.TypeSymlink, "b", "a"), file("a/x", "x")}, nil, "symbolic links"},
		"whiteout of nothing":             {[]entry{file(".wh.", "")}, nil, "whiteout of nothing"},
		"whiteout of a parent":            {[]entry{file("d/.wh...", "")}, nil, "whiteout of nothing"},
		"long name":                       {[]entry{file(long, "")}, nil, "too long"},
		"long path":                       {[]entry{file(strings.Repeat("a/", 3000)+"x", "")}, nil, "too long"},
		"long symlink":                    {[]entry{link(tar.TypeSymlink, "a", strings.Repeat(long, 20))}, nil, "symlink"},
		"too many bytes":                  {[]entry{file("a", strings.Repeat("x", 1<<19)), file("b", strings.Repeat("x", 1<<19))}, nil, "bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			base := t.TempDir()
			root := filepath.Join(base, "d", "root")
			if err := os.MkdirAll(root, 0o755); err != nil {
				t.Fatal(err)
			}
			_, reserved, err := image.Unpack(bytes.NewReader(pack(t, tc.entries...)), root, 1<<20-1, 50)
			if tc.bad != "" {
				if !errors.Is(err, image.ErrUnusable) || !strings.Contains(err.Error(), tc.bad) {
					t.Errorf("error %v, want one with %q", err, tc.bad)
				}
			} else if err != nil {
				t.Fatal(err)
			}
			if tc.want != nil {
				if diff := cmp.Diff(tc.want, tree(t, root)); diff != "" {
					t.Error(diff)
				}
				if reserved < int64(len(tc.want))*4096 {
					t.Errorf("%d bytes reserved", reserved)
				}
			}
			for rel := range tree(t, base) {
				if rel != "d" && !strings.HasPrefix(rel, "d/root") {
					t.Errorf("%s is outside", rel)
				}
			}
		})
	}
}

func TestUnpack_times(t *testing.T) {
	root := t.TempDir()
	if _, _, err := image.Unpack(bytes.NewReader(pack(t, dir("d"), file("d/f", "f"), link(tar.TypeSymlink, "d/l", "f"), file("d/g", "g"))), root, 1<<20, 10); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"d", "d/f", "d/l", "d/g"} {
		st, err := os.Lstat(filepath.Join(root, name))
		if err != nil || st.ModTime().Unix() != epoch {
			t.Errorf("%s is of %v, %v", name, st.ModTime(), err)
		}
	}
}

func TestUnpack_tooManyEntries(t *testing.T) {
	for name, entries := range map[string][]entry{
		"entries":           {file("a", ""), file("b", ""), file("c", ""), file("d", "")},
		"parents":           {file("a/b/c/d", "")},
		"the same one":      {file("a", ""), file("a", ""), file("a", ""), file("a", "")},
		"whiteouts":         {file(".wh.a", ""), file(".wh.b", ""), file(".wh.c", ""), file(".wh.d", "")},
		"parents of others": {file("a/x", ""), file("b/x", "")},
	} {
		t.Run(name, func(t *testing.T) {
			if _, _, err := image.Unpack(bytes.NewReader(pack(t, entries...)), t.TempDir(), 1<<20, 3); !errors.Is(err, image.ErrUnusable) || !strings.Contains(err.Error(), "entries") {
				t.Errorf("error %v", err)
			}
		})
	}
}

// FuzzUnpack: whatever a layer is, it stays beneath its directory, and is neither a
// device nor gives anybody rights.
func FuzzUnpack(f *testing.F) {
	f.Add(pack(f, dir("a"), file("a/b", "b"), link(tar.TypeSymlink, "s", "../.."), file("s/x", "x")))
	f.Add(pack(f, link(tar.TypeSymlink, "s", "/"), file("s/../../x", "x"), link(tar.TypeLink, "l", "s/x"), file(".wh.s", ""), dir("s"), file("s/.wh..wh..opq", "")))
	f.Add(pack(f, mode(file("x", "x"), 0o7777), link(tar.TypeChar, "c", ""), file("a/b/c/d", "d"), file("a", "a")))
	f.Fuzz(func(t *testing.T, data []byte) {
		base := t.TempDir()
		root := filepath.Join(base, "root")
		if err := os.Mkdir(root, 0o755); err != nil {
			t.Fatal(err)
		}
		_, _, err := image.Unpack(bytes.NewReader(data), root, 1<<20, 100)
		if entries, e := os.ReadDir(base); e != nil || len(entries) != 1 {
			t.Fatalf("beside the root: %v, %v", entries, e)
		}
		e := filepath.WalkDir(root, func(path string, d fs.DirEntry, e error) error {
			if e != nil {
				return e
			}
			st, e := d.Info()
			if e != nil {
				return e
			}
			if st.Mode()&(fs.ModeSetuid|fs.ModeSetgid) != 0 || st.Mode().Perm()&0o022 != 0 && st.Mode()&fs.ModeSymlink == 0 && st.Mode()&fs.ModeDevice == 0 {
				t.Errorf("%s: %v", path, st.Mode())
			}
			if st.Mode()&fs.ModeDevice != 0 && st.Sys().(*syscall.Stat_t).Rdev != 0 || st.Mode()&(fs.ModeNamedPipe|fs.ModeSocket) != 0 {
				t.Errorf("%s: %v", path, st.Mode())
			}
			return nil
		})
		if e != nil {
			t.Error(e)
		}
		_ = err // either way
	})
}
