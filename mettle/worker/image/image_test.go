//go:build linux

package image_test

import (
	"archive/tar"
	"errors"
	"path/filepath"
	"testing"

	"github.com/google/go-containerregistry/pkg/compression"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/mettle-build/mettle/mettle/worker/image"
)

func TestOpen_fromWherever(t *testing.T) {
	img := imageOf(t, pack(t, dir("etc/"), file("etc/name", "below")), pack(t, file("etc/name", "above")))
	path := asLayout(t, img)
	reg := serve(t)
	ref := reg.push(t, "some/image", img)
	for name, tc := range map[string]struct {
		ref string
		o   image.Options
	}{
		"registry": {ref, image.Options{Registries: []string{reg.host}}},
		"any registry, as oci": {
			"oci" + ref[len("docker"):], image.Options{Registries: []string{"*"}},
		},
		"layout": {local(t, path, img), image.Options{LocalDirs: []string{filepath.Dir(path)}}},
	} {
		t.Run(name, func(t *testing.T) {
			c := open(t, tc.o)
			got := mustGet(t, c, tc.ref)
			if len(got.Layers) != 2 || read(t, got.Layers[0], "etc/name") != "below" || read(t, got.Layers[1], "etc/name") != "above" {
				t.Errorf("layers %q", got.Layers)
			}
			if got.Digest != digestOf(t, img) {
				t.Errorf("digest %s", got.Digest)
			}
		})
	}
}

func TestOpen_compressions(t *testing.T) {
	data := pack(t, file("a", "content"))
	for name, opts := range map[string][]tarball.LayerOption{
		"gzip": nil,
		"zstd": {tarball.WithCompression(compression.ZStd), tarball.WithMediaType(types.OCILayerZStd)},
		"none": {tarball.WithCompression(compression.None), tarball.WithMediaType(types.OCIUncompressedLayer)},
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

func TestOpen_unusable(t *testing.T) {
	img := imageOf(t, pack(t, link(tar.TypeLink, "a", "not/there")))
	path := asLayout(t, img)
	c := open(t, image.Options{LocalDirs: []string{filepath.Dir(path)}})
	if _, err := get(t, c, local(t, path, img)); !errors.Is(err, image.ErrUnusable) {
		t.Errorf("Open: %v", err)
	}
}
