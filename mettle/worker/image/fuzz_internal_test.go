//go:build linux

package image

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

func sum(t testing.TB, data []byte) v1.Hash {
	t.Helper()
	h, _, err := v1.SHA256(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// FuzzLayout: whatever a registry or a layout has for an index, a manifest and a
// configuration, it is an image whose layers are known, or unusable.
func FuzzLayout(f *testing.F) {
	const layer = `{"mediaType":"m","size":5,"digest":"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}`
	const diff = `"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"`
	f.Add([]byte(`{"schemaVersion":2,"manifests":[{"digest":"MANIFEST","size":1,"annotations":{"org.opencontainers.image.ref.name":"t"}}]}`),
		[]byte(`{"schemaVersion":2,"config":{"digest":"CONFIG"},"layers":[`+layer+`]}`), []byte(`{"os":"linux","rootfs":{"type":"layers","diff_ids":[`+diff+`]}}`))
	f.Add([]byte(`{"manifests":[{"digest":"MANIFEST"},{"digest":"sha256:"}]}`), []byte(`{"schemaVersion":2,"manifests":[{"digest":"CONFIG","platform":{"os":"linux"}}]}`), []byte(`{}`))
	f.Add([]byte(`null`), []byte(`{"schemaVersion":2,"layers":[null],"config":null}`), []byte(`{"rootfs":null}`))
	f.Fuzz(func(t *testing.T, index, manifest, config []byte) {
		manifest = bytes.ReplaceAll(manifest, []byte("CONFIG"), []byte(sum(t, config).String()))
		h := sum(t, manifest)
		index = bytes.ReplaceAll(index, []byte("MANIFEST"), []byte(h.String()))
		files := map[string][]byte{"index.json": index, blobName(h): manifest, blobName(sum(t, config)): config}
		l := &layout{ref: Reference{tag: "t"}, open: func(name string) (io.ReadCloser, error) {
			data, ok := files[name]
			if !ok {
				return nil, fs.ErrNotExist
			}
			return io.NopCloser(bytes.NewReader(data)), nil
		}}
		if _, err := l.tagged(); err != nil && !errors.Is(err, ErrUnusable) {
			t.Errorf("index: %v", err)
		}
		r, err := inspect(t.Context(), l, h)
		if err != nil {
			if !errors.Is(err, ErrUnusable) {
				t.Errorf("%v says not whose fault it is", err)
			}
			return
		}
		if err := r.check(); err != nil {
			t.Errorf("%+v: %v", r, err)
		}
	})
}

// FuzzTarball: whatever a tarball is, what is found in it lies within it.
func FuzzTarball(f *testing.F) {
	config := `{"os":"linux","rootfs":{"type":"layers","diff_ids":["sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"]}}`
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, file := range [][2]string{{"manifest.json", `[{"Config":"c.json","Layers":["l.tar"]}]`}, {"c.json", config}, {"l.tar", "layer"}, {"../x", "x"}} {
		if err := w.WriteHeader(&tar.Header{Name: file[0], Size: int64(len(file[1])), Mode: 0o644, Typeflag: tar.TypeReg}); err != nil {
			f.Fatal(err)
		}
		if _, err := io.WriteString(w, file[1]); err != nil {
			f.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		f.Fatal(err)
	}
	f.Add(b.Bytes())
	f.Add(b.Bytes()[:1024])
	f.Add([]byte("no tarball"))
	root, err := os.OpenRoot(f.TempDir())
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { root.Close() })
	id := sum(f, []byte(config))
	f.Fuzz(func(t *testing.T, data []byte) {
		if err := root.WriteFile("x.tar", data, 0o600); err != nil {
			t.Fatal(err)
		}
		tb, err := (&Cache{}).openTarball(Reference{path: "/x.tar"}, root, "x.tar")
		if err != nil {
			if !errors.Is(err, ErrUnusable) {
				t.Errorf("%v says not whose fault it is", err)
			}
			return
		}
		for name, s := range tb.files {
			got, err := tb.read(name)
			if err == nil && (s.offset < 0 || int64(len(got)) > s.size || s.offset+int64(len(got)) > int64(len(data))) {
				t.Errorf("%q is %d bytes of %+v", name, len(got), s)
			}
		}
		if r, err := tb.saved(id); err != nil && !errors.Is(err, ErrUnusable) || r != nil && err == nil && r.check() != nil {
			t.Errorf("%+v, %v", r, err)
		}
	})
}

// FuzzRestore: what an earlier process has left is used, or as if it were not there.
func FuzzRestore(f *testing.F) {
	h := v1.Hash{Algorithm: "sha256", Hex: strings.Repeat("a", 64)}
	good, err := json.Marshal(record{Layers: []descriptor{{DiffID: h, Blob: h, Size: 5}}})
	if err != nil {
		f.Fatal(err)
	}
	of, err := json.Marshal(info{DiffID: h, Bytes: 5, Form: formVersion})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(of)
	f.Add([]byte(`{"Layers":[{}]}`))
	f.Add([]byte(`{"DiffID":"sha256:../../x","Form":1}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		c := &Cache{o: Options{Dir: t.TempDir()}, records: map[v1.Hash]*record{}}
		if err := os.MkdirAll(c.imagesDir(), 0o700); err != nil {
			t.Fatal(err)
		}
		for _, path := range []string{c.recordFile(h), filepath.Join(c.o.Dir, infoName)} {
			if err := os.WriteFile(path, data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		c.readRecords()
		for _, r := range c.records {
			for _, l := range r.Layers {
				if len(l.DiffID.Hex) != 64 || strings.Contains(l.Blob.Hex, "/") || l.Size < 0 {
					t.Errorf("layer %+v", l)
				}
			}
		}
		if l := readLayer(c.o.Dir); l != nil && (l.bytes < 0 || strings.Contains(l.diff.Hex, "/")) {
			t.Errorf("layer %+v", l)
		}
	})
}

// FuzzCredentials: a file of credentials is read or refused, and what is in it is
// nobody's business.
func FuzzCredentials(f *testing.F) {
	f.Add(`{"auths":{"https://example.com/v1":{"auth":"dXNlcjpzM2NyM3Q="}}}`)
	f.Add(`{"auths":{"example.com":{"auth":"s3cr3t"}}}`)
	f.Add(`{"auths":{"example.com":{"username":"u","password":"s3cr3t"}}}`)
	f.Add(`{"auths":["s3cr3t"]}`)
	file := filepath.Join(f.TempDir(), "config.json")
	f.Fuzz(func(t *testing.T, text string) {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		cfg, err := credentials{file, "example.com"}.Authorization()
		if (cfg == nil) == (err == nil) {
			t.Errorf("%v with %v", cfg, err)
		}
		if err != nil && err.Error() != fmt.Sprintf("credentials in %s are not in the form of docker login", file) &&
			err.Error() != fmt.Sprintf("credentials for example.com in %s are not in the form of docker login", file) {
			t.Errorf("%v tells of what is in the file", err)
		}
	})
}

// TestTarball_manyConfigs: a list names the same large file as often as it likes.
func TestTarball_manyConfigs(t *testing.T) {
	root, err := os.OpenRoot(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	list := "[" + strings.Repeat(`{"Config":"c"},`, 40) + `{"Config":"c"}]`
	for name, text := range map[string]string{"manifest.json": list, "c": strings.Repeat(" ", 1<<20)} {
		if err := w.WriteHeader(&tar.Header{Name: name, Size: int64(len(text)), Mode: 0o644, Typeflag: tar.TypeReg}); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, text); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(w.Close(), root.WriteFile("x.tar", b.Bytes(), 0o600)); err != nil {
		t.Fatal(err)
	}
	if _, err := (&Cache{}).openTarball(Reference{path: "/x.tar"}, root, "x.tar"); !errors.Is(err, ErrUnusable) || !strings.Contains(err.Error(), "configurations") {
		t.Errorf("error %v, want one on the configurations", err)
	}
}
