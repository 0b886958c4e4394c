package e2e_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// origin is where a workspace's external files are. It serves the remote
// downloader and nobody else, so that Bazel can't help itself.
type origin struct {
	*httptest.Server
	mu     sync.Mutex // guards counts
	counts map[string]int
}

func newOrigin(t *testing.T, files map[string][]byte) *origin {
	t.Helper()
	o := &origin{counts: map[string]int{}}
	o.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		o.mu.Lock()
		o.counts[r.URL.Path]++
		o.mu.Unlock()
		data, ok := files[r.URL.Path]
		switch {
		case !strings.HasPrefix(r.UserAgent(), "mettle"):
			http.Error(w, "not you, "+r.UserAgent(), http.StatusForbidden)
		case !ok:
			http.NotFound(w, r)
		default:
			_, _ = w.Write(data)
		}
	}))
	t.Cleanup(o.Close)
	return o
}

func (o *origin) count(path string) int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.counts[path]
}

// archive is a tar.gz of the files.
func archive(t *testing.T, files ...[2]string) []byte {
	t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	w := tar.NewWriter(z)
	for _, f := range files {
		if err := w.WriteHeader(&tar.Header{Name: f[0], Mode: 0o644, Size: int64(len(f[1]))}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(f[1])); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// TestBazel_downloadsRemotely has Elan fetch what a workspace refers to.
func TestBazel_downloadsRemotely(t *testing.T) {
	lib := archive(t,
		[2]string{"lib-1.0/WORKSPACE", ""},
		[2]string{"lib-1.0/BUILD", `exports_files(["words.txt"])`},
		[2]string{"lib-1.0/words.txt", "words from afar\n"})
	note := []byte("a note\n")
	o := newOrigin(t, map[string][]byte{"/lib.tar.gz": lib, "/note.txt": note})
	storage := "file://" + t.TempDir()
	s := startElan(t, storage, "--asset_allow_private=127.0.0.1/32")

	workspace := fmt.Sprintf(`
load("@bazel_tools//tools/build_defs/repo:http.bzl", "http_archive", "http_file")
http_archive(name = "lib", urls = ["%[1]s/mirror/lib.tar.gz", "%[1]s/lib.tar.gz"], strip_prefix = "lib-1.0", sha256 = "%[2]x")
http_file(name = "note", urls = ["%[1]s/note.txt"], sha256 = "%[3]x")
`, o.URL, sha256.Sum256(lib), sha256.Sum256(note))
	// download builds something of both in a fresh output base.
	download := func(b *bazel, workspace string) (string, int) {
		plain, err := os.ReadFile(filepath.Join(b.Workspace, "WORKSPACE"))
		if err != nil {
			t.Fatal(err)
		}
		b.Write("WORKSPACE", string(plain)+workspace)
		b.Write("far/BUILD", `genrule(name = "both", srcs = ["@lib//:words.txt", "@note//file"], outs = ["both.txt"], cmd = "cat $(SRCS) > $@")`)
		return b.Run("build", append(b.local(), "--spawn_strategy=local", "--genrule_strategy=local", "--repository_cache=",
			"--remote_cache=grpc://"+s.Addr(), "--experimental_remote_downloader=grpc://"+s.Addr(), "//far:both")...)
	}
	first := newBazel(t)
	if out, code := download(first, workspace); code != 0 {
		t.Fatalf("exit status %d\n%s", code, out)
	}
	got, err := os.ReadFile(filepath.Join(first.bin(), "far", "both.txt"))
	if want := "words from afar\na note\n"; err != nil || string(got) != want {
		t.Errorf("%q, %v; want %q", got, err, want)
	}
	for path, want := range map[string]int{"/mirror/lib.tar.gz": 1, "/lib.tar.gz": 1, "/note.txt": 1} {
		if n := o.count(path); n != want {
			t.Errorf("%d requests for %s, want %d", n, path, want)
		}
	}

	t.Run("after a restart, without the origin", func(t *testing.T) {
		s.Kill()
		s.Start()
		o.Close()
		if out, code := download(newBazel(t), workspace); code != 0 {
			t.Fatalf("exit status %d\n%s", code, out)
		}
	})
	// Without a checksum, this Bazel took a failure within the response for an empty
	// file.
	t.Run("a file that is not there", func(t *testing.T) {
		// Bazel takes nothing without a checksum that isn't encrypted.
		wrong := strings.ReplaceAll(workspace, o.URL+"/note.txt", strings.Replace(o.URL, "http:", "https:", 1)+"/note.txt")
		wrong = strings.ReplaceAll(wrong, fmt.Sprintf(`, sha256 = "%x"`, sha256.Sum256(note)), "")
		out, code := download(newBazel(t), wrong)
		if code == 0 || !strings.Contains(out, "fetch from https://") {
			t.Errorf("exit status %d, want a failure that says what was tried\n%s", code, out)
		}
	})
}
