//go:build linux

package output_test

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/mettle-build/mettle/elan/blob/file"
	"github.com/mettle-build/mettle/mettle/worker/output"
)

// inStore reports whether the file at path is one of the store's own.
func inStore(t *testing.T, store, path string) bool {
	t.Helper()
	want, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	found := false
	if err := filepath.WalkDir(store, func(_ string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		info, err := e.Info()
		found = found || err == nil && os.SameFile(want, info)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return found
}

// bytesRead is how many bytes this process has read by system calls.
func bytesRead(t *testing.T) (n int64) {
	t.Helper()
	data, err := os.ReadFile("/proc/self/io")
	if err != nil {
		t.Skipf("this machine does not say what a process reads: %v", err)
	}
	if _, err := fmt.Sscanf(string(data), "rchar: %d", &n); err != nil {
		t.Fatalf("%q: %v", data, err)
	}
	return n
}

// A large output becomes the store's without a copy, and is read once, for its
// digest.
func TestCollector_Collect_takesFilesOver(t *testing.T) {
	dir := t.TempDir()
	store, err := file.New(file.Options{Dir: filepath.Join(dir, "store")})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	f := newFixture(t, store, output.Options{})
	const size = 40 << 20
	path := filepath.Join(f.root, "big")
	if err := os.WriteFile(path, bytes.Repeat([]byte("0123456789abcdef"), size/16), 0o644); err != nil { //nolint:gosec // as actions do
		t.Fatal(err)
	}
	before := bytesRead(t)
	f.mustCollect(t, &repb.Command{OutputPaths: []string{"big"}})
	if n := bytesRead(t) - before; n < size || n > size+size/4 {
		t.Errorf("%d bytes were read, of a file of %d", n, size)
	}
	if !inStore(t, filepath.Join(dir, "store"), path) {
		t.Error("it was copied")
	}
}

// An output that has another name is not taken over: what is written by that name,
// later, does not change what the store has.
func TestCollector_Collect_otherNames(t *testing.T) {
	large := strings.Repeat("as it was ", 10_000)
	for name, link := range map[string]func(root, path string) error{
		"another output":       func(root, path string) error { return os.Link(path, filepath.Join(root, "two")) },
		"beside the outputs":   func(root, path string) error { return os.Link(path, filepath.Join(root, "kept")) },
		"outside of the root":  func(root, path string) error { return os.Link(path, filepath.Join(filepath.Dir(root), "kept")) },
		"below another output": func(root, path string) error { return os.Link(path, filepath.Join(root, "dir", "kept")) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			store, err := file.New(file.Options{Dir: filepath.Join(dir, "store")})
			if err != nil {
				t.Fatal(err)
			}
			defer store.Close()
			f := newFixture(t, store, output.Options{})
			f.write(t, map[string]string{"one": large, "dir/x": "X"})
			path := filepath.Join(f.root, "one")
			if err := link(f.root, path); err != nil {
				t.Fatal(err)
			}
			got := f.mustCollect(t, &repb.Command{OutputPaths: []string{"one", "two", "dir"}})
			if inStore(t, filepath.Join(dir, "store"), path) {
				t.Error("the store has the file itself")
			}
			if err := os.Chmod(path, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, []byte("changed"), 0o600); err != nil {
				t.Fatal(err)
			}
			for _, o := range got.Result.OutputFiles {
				if string(f.read(t, o.Digest)) != large {
					t.Errorf("%s is another", o.Path)
				}
			}
		})
	}
}
