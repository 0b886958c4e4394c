//go:build linux

package image

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"sync/atomic"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"
)

// A source is where an image comes from. What it returns is not trusted. Errors
// have a class of this package, or are the machine's.
type source interface {
	// manifest returns the manifest of that digest, or if it is zero the one that
	// the reference names, which may be of many platforms.
	manifest(ctx context.Context, digest v1.Hash) ([]byte, error)
	// blob opens what has that digest. The caller closes it.
	blob(ctx context.Context, digest v1.Hash) (io.ReadCloser, error)
}

// maxLayers is how many the sandbox takes.
const maxLayers = 256

// maxManifest bounds manifests and configurations, as registries do: to 4 MiB.
const maxManifest = 4 << 20

// maxIndexes is how deep indexes may be nested: nobody nests them at all.
const maxIndexes = 3

func (c *Cache) source(ref Reference) (source, error) {
	if ref.path != "" {
		return c.local(ref)
	}
	return c.registry(ref)
}

// resolve gives a reference a digest.
func (c *Cache) resolve(ctx context.Context, ref Reference) (Reference, error) {
	if ref.digest != (v1.Hash{}) {
		return ref, nil
	}
	if err := c.refusal(ref); err != nil {
		return ref, err
	}
	h, fresh := c.tagged(ref)
	if !fresh {
		if err := c.share(ctx, "tag "+ref.String(), func(ctx context.Context) error { return c.lookUp(ctx, ref) }); err != nil {
			return ref, err
		}
		if h, _ = c.tagged(ref); h == (v1.Hash{}) {
			return ref, fmt.Errorf("%w: too many tags are resolved at once", ErrUnavailable)
		}
	}
	ref.tag, ref.digest = "", h
	return ref, nil
}

// lookUp finds out what a tag stands for.
func (c *Cache) lookUp(ctx context.Context, ref Reference) error {
	src, err := c.source(ref)
	if err != nil {
		return err
	}
	raw, err := src.manifest(ctx, v1.Hash{})
	if errors.Is(err, ErrUnusable) {
		c.refuse(ref, err)
	}
	if err != nil {
		return err
	}
	h, _, err := v1.SHA256(bytes.NewReader(raw))
	if err == nil {
		c.tag(ref, h)
	}
	return err
}

// record is the one of an image whose digest is known.
func (c *Cache) record(ctx context.Context, ref Reference) (*record, error) {
	for {
		if r := c.known(ref.digest); r != nil {
			return r, nil
		}
		if err := c.refusal(ref); err != nil {
			return nil, err
		}
		// By the whole reference: another repository may have what this one lacks.
		if err := c.share(ctx, "image "+ref.String(), func(ctx context.Context) error { return c.learn(ctx, ref) }); err != nil {
			return nil, err
		}
	}
}

// learn reads the manifest and configuration of an image.
func (c *Cache) learn(ctx context.Context, ref Reference) error {
	src, err := c.source(ref)
	var r *record
	if err == nil {
		r, err = inspect(ctx, src, ref.digest)
	}
	if err == nil {
		err = c.checkSizes(r)
	}
	if errors.Is(err, ErrUnusable) {
		c.refuse(ref, err)
	}
	if err != nil {
		return err
	}
	return c.remember(ref.digest, r)
}

// checkSizes refuses early what would be refused late.
func (c *Cache) checkSizes(r *record) error {
	left := c.o.MaxImageBytes
	for _, l := range r.Layers {
		if l.Size > left {
			return fmt.Errorf("%w: its layers have more than %d bytes even before they are unpacked, which is the most that is allowed", ErrUnusable, c.o.MaxImageBytes)
		}
		left -= l.Size
	}
	return nil
}

// inspect goes from a digest to the layers of the image for this machine.
func inspect(ctx context.Context, src source, digest v1.Hash) (*record, error) {
	if s, ok := src.(*tarball); ok {
		if r, err := s.saved(digest); r != nil || err != nil {
			return r, err
		}
	}
	for range maxIndexes {
		raw, err := src.manifest(ctx, digest)
		if err != nil {
			return nil, err
		}
		if err := verify(raw, digest); err != nil {
			return nil, fmt.Errorf("manifest: %w", err)
		}
		var kind struct {
			SchemaVersion int             `json:"schemaVersion"`
			Manifests     json.RawMessage `json:"manifests"`
		}
		if err := json.Unmarshal(raw, &kind); err != nil || kind.SchemaVersion != 2 {
			return nil, fmt.Errorf("%w: its manifest is not of schema version 2", ErrUnusable)
		}
		if kind.Manifests == nil {
			return ofManifest(ctx, src, raw)
		}
		index, err := v1.ParseIndexManifest(bytes.NewReader(raw))
		if err != nil {
			return nil, fmt.Errorf("%w: index: %w", ErrUnusable, err)
		}
		if digest, err = forHost(index); err != nil {
			return nil, err
		}
	}
	return nil, fmt.Errorf("%w: an index in an index in an index", ErrUnusable)
}

// verify checks data that is short against its digest.
func verify(data []byte, want v1.Hash) error {
	got, _, err := v1.SHA256(bytes.NewReader(data))
	if err == nil && got != want {
		err = fmt.Errorf("%w: it is damaged: its digest is %s, not %s", ErrUnusable, got, want)
	}
	return err
}

// forHost chooses the manifest for this machine.
func forHost(index *v1.IndexManifest) (v1.Hash, error) {
	best, rank := v1.Hash{}, 0
	var has []string
	for _, m := range index.Manifests {
		p := m.Platform
		if p == nil {
			p = &v1.Platform{OS: "linux", Architecture: runtime.GOARCH}
		}
		if len(has) < 20 {
			has = append(has, p.String())
		}
		if p.OS == "linux" && p.Architecture == runtime.GOARCH {
			if r := variantRank(p.Architecture, p.Variant); r > rank {
				best, rank = m.Digest, r
			}
		}
	}
	if rank == 0 {
		return best, fmt.Errorf("%w: it is for %v, and this machine is linux/%s", ErrUnusable, has, runtime.GOARCH)
	}
	return best, nil
}

// variantRank is higher for what is more surely of use here, 0 for none.
func variantRank(arch, variant string) int {
	switch arch + "/" + variant {
	case "amd64/v2", "amd64/v3", "amd64/v4", "arm64/v9":
		return 1 // not every machine can run that
	case "amd64/v1", "arm64/v8", "arm/v7":
		return 3
	}
	return 2
}

// ofManifest reads the layers of one manifest.
func ofManifest(ctx context.Context, src source, raw []byte) (*record, error) {
	m, err := v1.ParseManifest(bytes.NewReader(raw))
	if err != nil {
		return nil, fmt.Errorf("%w: manifest: %w", ErrUnusable, err)
	}
	r := &record{}
	for _, l := range m.Layers {
		r.Layers = append(r.Layers, descriptor{Blob: l.Digest, Size: l.Size})
	}
	config, err := readBlob(ctx, src, m.Config.Digest)
	if err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	return r, r.configure(config)
}

// readBlob reads and verifies a short blob.
func readBlob(ctx context.Context, src source, digest v1.Hash) ([]byte, error) {
	rc, err := src.blob(ctx, digest)
	if err != nil {
		return nil, err
	}
	defer rc.Close() //nolint:errcheck // opened for reading
	data, err := io.ReadAll(io.LimitReader(rc, maxManifest+1))
	switch {
	case err != nil:
		return nil, unavailable(err)
	case len(data) > maxManifest:
		return nil, fmt.Errorf("%w: it is over %d bytes", ErrUnusable, maxManifest)
	}
	return data, verify(data, digest)
}

// configure takes what is needed of a configuration.
func (r *record) configure(config []byte) error {
	f, err := v1.ParseConfigFile(bytes.NewReader(config))
	switch {
	case err != nil:
		return fmt.Errorf("%w: configuration: %w", ErrUnusable, err)
	case f.OS != "" && f.OS != "linux", f.Architecture != "" && f.Architecture != runtime.GOARCH:
		return fmt.Errorf("%w: it is for %s/%s, and this machine is linux/%s", ErrUnusable, f.OS, f.Architecture, runtime.GOARCH)
	case len(f.RootFS.DiffIDs) != len(r.Layers):
		return fmt.Errorf("%w: its manifest has %d layers, its configuration %d", ErrUnusable, len(r.Layers), len(f.RootFS.DiffIDs))
	}
	for i := range r.Layers {
		d := &r.Layers[i]
		d.DiffID = f.RootFS.DiffIDs[i]
		if d.Blob == (v1.Hash{}) {
			d.Blob, d.Saved = d.DiffID, true
		}
	}
	if err := r.check(); err != nil {
		return err
	}
	r.Layers = topmost(r.Layers)
	return nil
}

// layer has one layer unpacked and returns it, pinned.
func (c *Cache) layer(ctx context.Context, ref Reference, d descriptor) (*layer, error) {
	// Shared with other repositories of the registry, but not with other registries:
	// what one of them sends, or never sends, is not to become the other's trouble.
	from := ref.path + ref.repo.RegistryStr()
	for {
		var mine atomic.Bool
		err := c.share(ctx, fmt.Sprint("layer ", d.DiffID, d.Blob, from), func(ctx context.Context) error {
			mine.Store(true)
			return c.pull(ctx, ref, d)
		})
		if err != nil && !mine.Load() && ctx.Err() == nil && from != ref.String() {
			from = ref.String() // we may get what others don't
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("layer %s: %w", d.Blob, err)
		}
		if l := c.pin(d.DiffID); l != nil {
			return l, nil
		}
		// It was evicted at once: others need the room.
	}
}

// pull pulls and unpacks a layer.
func (c *Cache) pull(ctx context.Context, ref Reference, d descriptor) error {
	if l := c.pin(d.DiffID); l != nil {
		c.unpin([]*layer{l})
		return nil // by a pull that ended just now
	}
	start := time.Now()
	got, err := c.unpackNew(ctx, ref, d)
	if errors.Is(err, errThere) {
		return nil
	}
	if err != nil {
		c.metrics.layers.WithLabelValues("failed").Inc()
		return machineOrImage(err)
	}
	c.metrics.layers.WithLabelValues("pulled").Inc()
	c.metrics.bytes.Add(float64(d.Size))
	c.o.Logger.Info("a layer of a container image was pulled", "image", ref.String(), "diff_id", d.DiffID.String(),
		"compressed_bytes", d.Size, "bytes", got.Bytes, "entries", got.Entries, "seconds", time.Since(start).Seconds())
	return nil
}

// unpackNew unpacks a layer beside the others, and makes it one of them.
func (c *Cache) unpackNew(ctx context.Context, ref Reference, d descriptor) (_ info, err error) {
	src, err := c.source(ref)
	if err != nil {
		return info{}, err
	}
	rc, err := src.blob(ctx, d.Blob)
	if err != nil {
		return info{}, err
	}
	defer rc.Close() //nolint:errcheck // opened for reading
	part, err := c.newPart(d.DiffID)
	if err != nil {
		return info{}, err
	}
	reserved := int64(0)
	defer func() {
		if err != nil {
			_ = os.RemoveAll(part) // else at the next start
			c.release(reserved)
		}
	}()
	got, err := unpackBlob(ctx, rc, d, unpackOptions{
		dir: part + "/" + treeName, white: c.white, maxBytes: c.o.MaxImageBytes, maxEntries: c.o.MaxEntries,
		reserve: func(n int64) error {
			if reserved+n > c.o.MaxImageBytes {
				return fmt.Errorf("%w: it has over %d bytes on the disk", ErrUnusable, c.o.MaxImageBytes)
			}
			err := c.reserve(n)
			if err == nil {
				reserved += n
			}
			return err
		},
	})
	if err != nil {
		return info{}, err
	}
	i := info{DiffID: d.DiffID, Bytes: reserved, Entries: got, Form: formVersion}
	if err := c.keep(part, i); err != nil {
		_ = os.RemoveAll(part[:len(part)-len(partSuffix)])
		return i, err
	}
	return i, nil
}

// machineOrImage gives errors of the file system, which have no class yet, one if
// it is the image that is at fault.
func machineOrImage(err error) error {
	for _, class := range []error{ErrUnusable, ErrUnavailable, ErrFull, ErrRefused} {
		if errors.Is(err, class) {
			return err
		}
	}
	for _, e := range []error{
		unix.ENAMETOOLONG, unix.ELOOP, unix.ENOTDIR, unix.EISDIR, unix.EEXIST, unix.EINVAL, unix.ENOENT, unix.EPERM, unix.EMLINK, unix.EILSEQ,
	} {
		if errors.Is(err, e) {
			return fmt.Errorf("%w: %w", ErrUnusable, err)
		}
	}
	return err
}
