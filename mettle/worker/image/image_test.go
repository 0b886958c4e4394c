//go:build linux

package image_test

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/compression"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/mettle-build/mettle/mettle/worker/image"
)

func TestOpen_fromWherever(t *testing.T) {
	img := imageOf(t, pack(t, dir("etc/"), file("etc/name", "below")), pack(t, file("etc/name", "above")))
	path := asLayout(t, imageOf(t, pack(t, file("other", ""))), img)
	reg := serve(t)
	ref := reg.push(t, "some/image", img)
	near := image.Options{LocalDirs: []string{t.TempDir(), filepath.Dir(path)}}
	packed := filepath.Join(filepath.Dir(path), "layout.tar")
	tarTree(t, path, packed)
	saved := filepath.Join(filepath.Dir(path), "saved.tar")
	tag, err := name.NewTag("some/image:tag")
	if err != nil {
		t.Fatal(err)
	}
	if err := tarball.WriteToFile(saved, tag, img); err != nil {
		t.Fatal(err)
	}
	id, err := img.ConfigName()
	if err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		ref string
		o   image.Options
	}{
		"registry":               {ref, image.Options{Registries: []string{"x.invalid", reg.host}}},
		"registry, by oci":       {"oci" + ref[len("docker"):], image.Options{Registries: []string{reg.host}}},
		"any registry":           {ref, image.Options{Registries: []string{"*"}}},
		"part of a registry":     {ref, image.Options{Registries: []string{reg.host + "/some"}}},
		"tag":                    {strings.Split(ref, "@")[0] + ":latest", image.Options{Registries: []string{"*"}, Tags: true}},
		"layout":                 {local(t, path, img), near},
		"tarball of a layout":    {local(t, packed, img), near},
		"tarball of docker save": {"oci://" + saved + "@" + id.String(), near},
	} {
		t.Run(name, func(t *testing.T) {
			c := open(t, tc.o)
			got := mustGet(t, c, tc.ref)
			if len(got.Layers) != 2 || read(t, got.Layers[0], "etc/name") != "below" || read(t, got.Layers[1], "etc/name") != "above" {
				t.Errorf("layers %q", got.Layers)
			}
			if want := digestOf(t, img); !strings.Contains(name, "save") && got.Digest != want {
				t.Errorf("digest %s, want %s", got.Digest, want)
			}
		})
	}
}

// tarTree makes a tarball of a directory.
func tarTree(t *testing.T, dir, to string) {
	t.Helper()
	f, err := os.Create(to)
	if err != nil {
		t.Fatal(err)
	}
	w := tar.NewWriter(f)
	if err := errors.Join(w.AddFS(os.DirFS(dir)), w.Close(), f.Close()); err != nil {
		t.Fatal(err)
	}
}

func TestOpen_compressions(t *testing.T) {
	data := pack(t, file("a", "content"))
	for name, opts := range map[string][]tarball.LayerOption{
		"gzip":           nil,
		"zstd":           {tarball.WithCompression(compression.ZStd), tarball.WithMediaType(types.OCILayerZStd)},
		"none":           {tarball.WithCompression(compression.None), tarball.WithMediaType(types.OCIUncompressedLayer)},
		"not as it says": {tarball.WithCompression(compression.ZStd), tarball.WithMediaType(types.DockerLayer)},
	} {
		t.Run(name, func(t *testing.T) {
			img := imageOfLayers(t, layerOf(t, data, opts...))
			path := asLayout(t, img)
			c := open(t, image.Options{LocalDirs: []string{filepath.Dir(path)}})
			if got := mustGet(t, c, local(t, path, img)); read(t, got.Layers[0], "a") != "content" {
				t.Error("wrong content")
			}
		})
	}
}

// An index has an image for each kind of machine.
func TestOpen_index(t *testing.T) {
	mine, other := imageOf(t, pack(t, file("a", "mine"))), imageOf(t, pack(t, file("a", "other")))
	at := func(arch, variant string) v1.Descriptor {
		return v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: arch, Variant: variant}}
	}
	for name, tc := range map[string]struct {
		adds []mutate.IndexAddendum
		bad  string
	}{
		"of several": {[]mutate.IndexAddendum{{Add: other, Descriptor: at("mips", "")}, {Add: mine, Descriptor: at(runtime.GOARCH, "")}, {Add: other, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "windows", Architecture: runtime.GOARCH}}}}, ""},
		"none":       {[]mutate.IndexAddendum{{Add: other, Descriptor: at("mips", "")}}, "linux/mips"},
		"attested":   {[]mutate.IndexAddendum{{Add: mine, Descriptor: at(runtime.GOARCH, "")}, {Add: other, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "unknown", Architecture: "unknown"}}}}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			index := mutate.AppendManifests(empty.Index, tc.adds...)
			path := filepath.Join(t.TempDir(), "layout")
			l, err := layout.Write(path, empty.Index)
			if err != nil {
				t.Fatal(err)
			}
			if err := l.AppendIndex(index); err != nil {
				t.Fatal(err)
			}
			c := open(t, image.Options{LocalDirs: []string{filepath.Dir(path)}})
			got, err := get(t, c, local(t, path, index))
			if tc.bad != "" {
				if !errors.Is(err, image.ErrUnusable) || !strings.Contains(err.Error(), tc.bad) {
					t.Errorf("Open: %v, want %q", err, tc.bad)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if read(t, got.Layers[0], "a") != "mine" || got.Digest != digestOf(t, index) {
				t.Errorf("layers %q of %s", got.Layers, got.Digest)
			}
		})
	}
}

// blobFile is where a blob of a layout is.
func blobFile(path, digest string) string {
	return filepath.Join(path, "blobs", strings.Replace(digest, ":", "/", 1))
}

func change(t *testing.T, path string, f func([]byte) []byte) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, f(data), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestOpen_damaged(t *testing.T) {
	flip := func(b []byte) []byte { b[len(b)/2] ^= 1; return b }
	longer := func(b []byte) []byte { return append(b, 0) }
	shorter := func(b []byte) []byte { return b[:len(b)-20] }
	nothing := func([]byte) []byte { return nil }
	of := map[string]func(t *testing.T, img v1.Image) string{
		"manifest": func(t *testing.T, img v1.Image) string { return digestOf(t, img) },
		"config": func(t *testing.T, img v1.Image) string {
			h, err := img.ConfigName()
			if err != nil {
				t.Fatal(err)
			}
			return h.String()
		},
		"layer": func(t *testing.T, img v1.Image) string {
			layers, err := img.Layers()
			if err != nil {
				t.Fatal(err)
			}
			return digestOf(t, layers[0])
		},
	}
	for what, digest := range of {
		for how, f := range map[string]func([]byte) []byte{"flipped": flip, "longer": longer, "shorter": shorter, "empty": nothing} {
			t.Run(what+" "+how, func(t *testing.T) {
				img := imageOf(t, pack(t, file("a", strings.Repeat("content", 1000))))
				path := asLayout(t, img)
				change(t, blobFile(path, digest(t, img)), f)
				o := image.Options{LocalDirs: []string{filepath.Dir(path)}, Dir: filepath.Join(t.TempDir(), "cache")}
				c := open(t, o)
				if _, err := get(t, c, local(t, path, img)); !errors.Is(err, image.ErrUnusable) || !strings.Contains(err.Error(), digestOf(t, img)) {
					t.Errorf("Open: %v", err)
				}
				wantEmpty(t, filepath.Join(o.Dir, "layers"))
			})
		}
	}
}

func wantEmpty(t *testing.T, dir string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) > 0 {
		t.Errorf("%s: %v, %v", dir, entries, err)
	}
}

// diffID is an image whose configuration says of its layer what is not so.
type otherDiffID struct{ v1.Image }

func (i otherDiffID) RawConfigFile() ([]byte, error) {
	f, err := i.Image.ConfigFile()
	if err != nil {
		return nil, err
	}
	f = f.DeepCopy()
	f.RootFS.DiffIDs[0].Hex = strings.Repeat("0", 64)
	return json.Marshal(f)
}

func (i otherDiffID) ConfigFile() (*v1.ConfigFile, error) { return partial.ConfigFile(i) }
func (i otherDiffID) ConfigName() (v1.Hash, error)        { return partial.ConfigName(i) }
func (i otherDiffID) Digest() (v1.Hash, error)            { return partial.Digest(i) }
func (i otherDiffID) Manifest() (*v1.Manifest, error) {
	m, err := i.Image.Manifest()
	if err != nil {
		return nil, err
	}
	m = m.DeepCopy()
	raw, err := i.RawConfigFile()
	if err != nil {
		return nil, err
	}
	m.Config.Digest, m.Config.Size, err = v1.SHA256(bytes.NewReader(raw))
	return m, err
}

func (i otherDiffID) RawManifest() ([]byte, error) {
	m, err := i.Manifest()
	if err != nil {
		return nil, err
	}
	return json.Marshal(m)
}

func TestOpen_unusable(t *testing.T) {
	large := pack(t, file("zeros", strings.Repeat("\x00", 4<<20)))
	for name, tc := range map[string]struct {
		img v1.Image
		o   image.Options
		bad string
	}{
		"hostile layer":           {img: imageOf(t, pack(t, link(tar.TypeLink, "a", "not/there"))), bad: `"a"`},
		"no tar":                  {img: imageOf(t, []byte(strings.Repeat("what is this? ", 100))), bad: "damaged"},
		"large file":              {img: imageOf(t, large), o: image.Options{MaxImageBytes: 1 << 20}, bad: "over 1048576 bytes"},
		"bomb":                    {img: imageOf(t, append(pack(t, file("a", "a")), make([]byte, 4<<20)...)), o: image.Options{MaxImageBytes: 1 << 20}, bad: "larger"},
		"large, but in many":      {img: imageOf(t, pack(t, file("a", strings.Repeat("a", 600<<10))), pack(t, file("b", strings.Repeat("a", 600<<10)))), o: image.Options{MaxImageBytes: 1 << 20}, bad: "at most"},
		"many files":              {img: imageOf(t, pack(t, file("a", ""), file("b", ""), file("c", ""))), o: image.Options{MaxEntries: 2}, bad: "entries"},
		"another diff ID":         {img: otherDiffID{imageOf(t, pack(t, file("a", "a")))}, bad: "damaged"},
		"nothing in it":           {img: imageOf(t, pack(t)), bad: "empty"},
		"no layers":               {img: imageOf(t), bad: "0 layers"},
		"of another kind machine": {img: arch(t, "mips"), bad: "linux/mips"},
		"too many layers":         {img: manyLayers(t, 257), bad: "257 layers"},
	} {
		t.Run(name, func(t *testing.T) {
			path := asLayout(t, tc.img)
			tc.o.LocalDirs, tc.o.Dir = []string{filepath.Dir(path)}, filepath.Join(t.TempDir(), "cache")
			c := open(t, tc.o)
			for range 2 {
				if _, err := get(t, c, local(t, path, tc.img)); !errors.Is(err, image.ErrUnusable) || !strings.Contains(err.Error(), tc.bad) {
					t.Errorf("Open: %v, want %q", err, tc.bad)
				}
			}
		})
	}
}

func arch(t *testing.T, name string) v1.Image {
	t.Helper()
	img := imageOf(t, pack(t, file("a", "a")))
	f, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	f = f.DeepCopy()
	f.OS, f.Architecture = "linux", name
	if img, err = mutate.ConfigFile(img, f); err != nil {
		t.Fatal(err)
	}
	return img
}

func manyLayers(t *testing.T, n int) v1.Image {
	t.Helper()
	tars := make([][]byte, n)
	for i := range tars {
		tars[i] = pack(t, file("a", ""))
	}
	return imageOf(t, tars...)
}

// A layer that is there twice counts where it is on top.
func TestOpen_sameLayerTwice(t *testing.T) {
	a, b := pack(t, file("a", "a"), file("x", "of a")), pack(t, file("b", "b"), file("x", "of b"))
	img := imageOf(t, a, b, a, pack(t))
	path := asLayout(t, img)
	got := mustGet(t, open(t, image.Options{LocalDirs: []string{filepath.Dir(path)}}), local(t, path, img))
	if len(got.Layers) != 2 || read(t, got.Layers[0], "x") != "of b" || read(t, got.Layers[1], "x") != "of a" {
		t.Errorf("layers %q", got.Layers)
	}
}

// BenchmarkOpen_cold pulls and unpacks a layer of 100 MB in 1000 files, a third of
// which can be compressed away.
func BenchmarkOpen_cold(b *testing.B) {
	text := random(b, 70_000) + strings.Repeat("x", 30_000)
	var entries []entry
	for i := range 1000 {
		entries = append(entries, file(fmt.Sprintf("d%d/f%d", i/50, i), text[i:]+text[:i]))
	}
	data := pack(b, entries...)
	for name, opts := range map[string][]tarball.LayerOption{
		"gzip": nil,
		"zstd": {tarball.WithCompression(compression.ZStd), tarball.WithMediaType(types.OCILayerZStd)},
		"none": {tarball.WithCompression(compression.None), tarball.WithMediaType(types.OCIUncompressedLayer)},
	} {
		b.Run(name, func(b *testing.B) {
			img := imageOfLayers(b, layerOf(b, data, opts...))
			path := asLayout(b, img)
			b.SetBytes(int64(len(data)))
			for i := 0; b.Loop(); i++ {
				c, err := image.New(image.Options{Dir: filepath.Join(b.TempDir(), fmt.Sprint(i)), LocalDirs: []string{filepath.Dir(path)}})
				if err != nil {
					b.Fatal(err)
				}
				mustGet(b, c, local(b, path, img)).Close()
				b.StopTimer()
				if err := c.Close(); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
		})
	}
}
