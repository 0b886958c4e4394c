//go:build linux

package image_test

import (
	"archive/tar"
	"bytes"
	"crypto/rand"
	"io"
	"log/slog"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"go.uber.org/goleak"

	"github.com/mettle-build/mettle/mettle/worker/image"
	"github.com/mettle-build/mettle/mettle/worker/runner/sandbox"
)

func TestMain(m *testing.M) {
	if what := os.Getenv(pullerEnv); what != "" {
		os.Exit(puller(what))
	}
	if sandbox.IsHelper() {
		os.Exit(sandbox.HelperMain())
	}
	goleak.VerifyTestMain(m)
}

// waitFor waits for something that only another process can tell by its effect.
func waitFor(t *testing.T, ok func() bool) {
	t.Helper()
	for start := time.Now(); !ok(); time.Sleep(time.Millisecond) {
		if time.Since(start) > 20*time.Second {
			t.Fatal("waited for too long")
		}
	}
}

// random is text that does not get shorter by compression.
func random(t testing.TB, n int) string {
	t.Helper()
	b := make([]byte, n)
	if _, err := rand.Read(b); err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// entry is one of a layer: a file, or what Typeflag says.
type entry struct {
	tar.Header
	content string
}

func file(name, content string) entry {
	return entry{tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644}, content}
}

func dir(name string) entry {
	return entry{Header: tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755}}
}

func link(typeflag byte, name, target string) entry {
	return entry{Header: tar.Header{Typeflag: typeflag, Name: name, Linkname: target, Mode: 0o777}}
}

const epoch = 1_000_000_000 // of entries, in seconds

// pack makes a tar.
func pack(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, e := range entries {
		h := e.Header
		if h.Typeflag == tar.TypeReg && h.Size == 0 {
			h.Size = int64(len(e.content))
		}
		if h.ModTime.IsZero() {
			h.ModTime = time.Unix(epoch, 0)
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, e.content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func layerOf(t testing.TB, data []byte, opts ...tarball.LayerOption) v1.Layer {
	t.Helper()
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil }, opts...)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// imageOf makes an image of tars, the lowest first.
func imageOf(t testing.TB, tars ...[]byte) v1.Image {
	t.Helper()
	layers := make([]v1.Layer, len(tars))
	for i, data := range tars {
		layers[i] = layerOf(t, data)
	}
	return imageOfLayers(t, layers...)
}

func imageOfLayers(t testing.TB, layers ...v1.Layer) v1.Image {
	t.Helper()
	img, err := mutate.AppendLayers(empty.Image, layers...)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func digestOf(t testing.TB, img interface{ Digest() (v1.Hash, error) }) string {
	t.Helper()
	h, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return h.String()
}

// asLayout writes images to a layout, and returns where that is.
func asLayout(t testing.TB, imgs ...v1.Image) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "layout")
	l, err := layout.Write(path, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	for _, img := range imgs {
		if err := l.AppendImage(img); err != nil {
			t.Fatal(err)
		}
	}
	return path
}

// local is the reference of an image in a layout.
func local(t testing.TB, path string, img interface{ Digest() (v1.Hash, error) }) string {
	return "oci://" + path + "@" + digestOf(t, img)
}

// served is a registry on this machine.
type served struct {
	*httptest.Server
	host string
}

func serve(t testing.TB) served {
	t.Helper()
	s := httptest.NewServer(registry.New(registry.Logger(slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo))))
	t.Cleanup(s.Close)
	return served{s, strings.TrimPrefix(s.URL, "http://")}
}

// push pushes an image, and returns its reference.
func (s served) push(t testing.TB, repo string, img v1.Image) string {
	t.Helper()
	tag, err := name.NewTag(s.host + "/" + repo + ":latest")
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(tag, img); err != nil {
		t.Fatal(err)
	}
	return "docker://" + s.host + "/" + repo + "@" + digestOf(t, img)
}

func open(t testing.TB, o image.Options) *image.Cache {
	t.Helper()
	if o.Dir == "" {
		o.Dir = filepath.Join(t.TempDir(), "cache")
	}
	c, err := image.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return c
}

// get opens an image that is closed at the end of the test.
func get(t testing.TB, c *image.Cache, ref string) (*image.Image, error) {
	t.Helper()
	r, err := c.Parse(ref)
	if err != nil {
		t.Fatal(err)
	}
	img, err := c.Open(t.Context(), r)
	if err == nil {
		t.Cleanup(img.Close)
	}
	return img, err
}

func mustGet(t testing.TB, c *image.Cache, ref string) *image.Image {
	t.Helper()
	img, err := get(t, c, ref)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func read(t testing.TB, dir, path string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(dir, path))
	if err != nil {
		t.Error(err)
	}
	return string(data)
}
