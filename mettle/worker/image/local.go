//go:build linux

package image

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"
)

// localDir is a directory that the operator has set aside for images.
type localDir struct {
	path string
	root *os.Root
}

func openLocalDir(dir string) (*localDir, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(abs)
	return &localDir{abs, root}, err
}

// rel is a path below the directory, "" if it is not.
func (l *localDir) rel(p string) string {
	rel, err := filepath.Rel(l.path, p)
	if err != nil || !filepath.IsLocal(rel) {
		return ""
	}
	return rel
}

// local is the source of an image on this machine.
func (c *Cache) local(ref Reference) (source, error) {
	var err error
	for _, l := range c.locals {
		rel := l.rel(ref.path)
		if rel == "" {
			continue
		}
		var st fs.FileInfo
		if st, err = l.root.Stat(rel); err != nil {
			continue
		}
		if st.IsDir() {
			return &layout{ref: ref, open: func(name string) (io.ReadCloser, error) { return regular(l.root, path.Join(rel, name)) }}, nil
		}
		return c.openTarball(ref, l.root, rel)
	}
	if err == nil {
		err = fs.ErrNotExist
	}
	return nil, fmt.Errorf("%w: %w", ErrUnusable, err)
}

// regular opens a file, and nothing that could keep us waiting.
func regular(root *os.Root, name string) (*os.File, error) {
	f, err := root.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return nil, errors.Join(fmt.Errorf("%s is no file", name), err, f.Close())
	}
	return f, nil
}

// layout is an OCI layout.
type layout struct {
	ref  Reference
	open func(name string) (io.ReadCloser, error)
}

var _ source = (*layout)(nil)

func (l *layout) manifest(ctx context.Context, digest v1.Hash) ([]byte, error) {
	if digest == (v1.Hash{}) {
		var err error
		if digest, err = l.tagged(); err != nil {
			return nil, err
		}
	}
	return readBlob(ctx, l, digest)
}

// refName is the annotation that carries a tag.
const refName = "org.opencontainers.image.ref.name"

// tagged is the one image of the layout with the reference's tag, or the only one.
func (l *layout) tagged() (v1.Hash, error) {
	data, err := l.read("index.json")
	if err != nil {
		return v1.Hash{}, err
	}
	index, err := v1.ParseIndexManifest(bytes.NewReader(data))
	if err != nil {
		return v1.Hash{}, fmt.Errorf("%w: index.json: %w", ErrUnusable, err)
	}
	var found []v1.Hash
	for _, m := range index.Manifests {
		if l.ref.tag == "" || m.Annotations[refName] == l.ref.tag {
			found = append(found, m.Digest)
		}
	}
	if len(found) != 1 {
		return v1.Hash{}, fmt.Errorf("%w: %d images of that name are in the layout", ErrUnusable, len(found))
	}
	return found[0], nil
}

// read reads a short file.
func (l *layout) read(name string) ([]byte, error) {
	rc, err := l.open(name)
	if err != nil {
		return nil, classify(err)
	}
	defer rc.Close() //nolint:errcheck // opened for reading
	data, err := io.ReadAll(io.LimitReader(rc, maxManifest+1))
	if err == nil && len(data) > maxManifest {
		err = fmt.Errorf("%w: %s is over %d bytes", ErrUnusable, name, maxManifest)
	}
	return data, err
}

func (l *layout) blob(_ context.Context, digest v1.Hash) (io.ReadCloser, error) {
	if digest.Algorithm != "sha256" || len(digest.Hex) != 64 {
		return nil, fmt.Errorf("%w: digest %q", ErrUnusable, digest)
	}
	rc, err := l.open(blobName(digest))
	if err != nil {
		return nil, classify(err)
	}
	return rc, nil
}

func blobName(digest v1.Hash) string { return path.Join("blobs", digest.Algorithm, digest.Hex) }

// classify gives errors of files that are not there their class.
func classify(err error) error {
	if errors.Is(err, ErrUnusable) {
		return err
	}
	return fmt.Errorf("%w: %w", ErrUnusable, err)
}

// tarball is a layout in a tarball, or what docker save makes.
type tarball struct {
	layout
	files map[string]span
}

// span is where a file is in the tarball.
type span struct{ offset, size int64 }

// maxMembers bounds the files of a tarball, which are blobs.
const maxMembers = 1 << 14

// openTarball finds out where everything is in a tarball. Nothing of it is kept
// open.
func (c *Cache) openTarball(ref Reference, root *os.Root, rel string) (*tarball, error) {
	f, err := regular(root, rel)
	if err != nil {
		return nil, classify(err)
	}
	defer f.Close() //nolint:errcheck // opened for reading
	t := &tarball{files: make(map[string]span)}
	t.ref = ref
	t.open = func(name string) (io.ReadCloser, error) {
		s, ok := t.files[name]
		if !ok {
			return nil, fmt.Errorf("%s: %w in the tarball", name, fs.ErrNotExist)
		}
		f, err := regular(root, rel)
		if err != nil {
			return nil, err
		}
		return section{io.NewSectionReader(f, s.offset, s.size), f}, nil
	}
	for tr := tar.NewReader(f); ; {
		h, err := tr.Next()
		switch {
		case errors.Is(err, io.EOF):
			return t, t.locate()
		case err != nil:
			return nil, fmt.Errorf("%w: %s is neither a layout nor a tarball: %w", ErrUnusable, ref.path, err)
		case len(t.files) == maxMembers:
			return nil, fmt.Errorf("%w: there are over %d files in the tarball", ErrUnusable, maxMembers)
		}
		if h.Typeflag != tar.TypeReg {
			continue
		}
		offset, err := f.Seek(0, io.SeekCurrent)
		if err != nil {
			return nil, err
		}
		t.files[path.Clean(h.Name)] = span{offset, h.Size}
	}
}

type section struct {
	io.Reader
	io.Closer
}

// saved is the image whose configuration has that digest: what docker images calls
// its ID. Nil: the tarball has no such image.
func (t *tarball) saved(digest v1.Hash) (*record, error) {
	if _, ok := t.files[savedName]; !ok {
		return nil, nil //nolint:nilnil // as said
	}
	images, err := t.savedImages()
	if err != nil {
		return nil, err
	}
	for _, img := range images {
		if verify(img.config, digest) == nil {
			r := &record{Layers: make([]descriptor, len(img.Layers))}
			return r, r.configure(img.config)
		}
	}
	return nil, nil //nolint:nilnil // as said
}

// savedName lists what docker save has saved.
const savedName = "manifest.json"

// maxSavedConfigs bounds the configurations of all images in a tarball, which are
// some kilobytes each.
const maxSavedConfigs = 8 * maxManifest

type savedImage struct {
	Config string
	Layers []string
	config []byte
}

func (t *tarball) savedImages() ([]savedImage, error) {
	data, err := t.read(savedName)
	if err != nil {
		return nil, err
	}
	var images []savedImage
	if err := json.Unmarshal(data, &images); err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrUnusable, savedName, err)
	}
	left := maxSavedConfigs
	for i := range images {
		if images[i].config, err = t.read(path.Clean(images[i].Config)); err != nil {
			return nil, err
		}
		// A list of four megabytes could name the same large file very often.
		if left -= len(images[i].config); left < 0 || i >= maxMembers {
			return nil, fmt.Errorf("%w: the images of %s have configurations of more than %d bytes", ErrUnusable, savedName, maxSavedConfigs)
		}
	}
	return images, nil
}

// locate gives the layers that docker save has saved the names of their diff IDs,
// which they would have in a layout if they are not compressed.
func (t *tarball) locate() error {
	if _, ok := t.files[savedName]; !ok {
		return nil
	}
	images, err := t.savedImages()
	for _, img := range images {
		config, err := v1.ParseConfigFile(bytes.NewReader(img.config))
		if err != nil || len(config.RootFS.DiffIDs) != len(img.Layers) {
			return fmt.Errorf("%w: %s and %s don't fit together: %w", ErrUnusable, savedName, img.Config, err)
		}
		for i, diff := range config.RootFS.DiffIDs {
			name := blobName(diff)
			if _, ok := t.files[name]; ok {
				continue
			}
			if s, ok := t.files[path.Clean(img.Layers[i])]; ok {
				t.files[name] = s
			}
		}
	}
	return err
}
