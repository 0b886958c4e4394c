//go:build linux

// Package image keeps the file systems of container images for actions to run in:
// it reads references, pulls images from registries or from OCI layouts and
// tarballs on disk, and unpacks each layer once, into a directory of a cache that
// is bounded by bytes. It runs nothing and mounts nothing: sandbox.Options.Layers
// takes the directories that it gives out. Its caller is the worker.
//
// An image is known by the digest of its manifest, or of an index that has one for
// this machine. All bytes are verified by it before anyone sees them: manifest and
// configuration by their digests, and each layer as it comes and as it is
// unpacked. Tags are names that change; where they are allowed, one is resolved
// and the digest remembered for a while.
//
// A reference is one of
//
//	docker://HOST/REPOSITORY@sha256:...    of a registry; without HOST, of Docker Hub
//	oci://HOST/REPOSITORY@sha256:...       the same
//	oci:///DIRECTORY@sha256:...            an OCI layout on this machine
//	oci:///FILE.tar@sha256:...             a tarball of one, or of docker save
//
// Layers are foreign bytes. They are unpacked beneath their directory, whatever
// links they have; owners, set-user-ID bits, attributes and devices are left out;
// everything is readable, as it is to the root of the image. What a layer removes
// is marked in the way of overlayfs in user namespaces (user.overlay.*), so that
// no root is needed.
//
// On disk, a layer is DIR/layers/DIFFID-RANDOM/tree, beside an info file. It is
// made under a name with .part and renamed when it is whole; what bears such a name
// at the start is removed. What was written before the machine itself went down
// without a warning is not trusted, since nothing waits for the disk: it is pulled
// again.
package image

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// The classes of errors. Their messages name the image.
var (
	// ErrRefused: the reference makes no sense, or the operator does not allow it.
	ErrRefused = errors.New("image reference refused")
	// ErrUnusable: there is no such image, or not for us, or nothing can run in it.
	// Another try would not help.
	ErrUnusable = errors.New("image can't be used")
	// ErrUnavailable: the registry does not answer, or not in time.
	ErrUnavailable = errors.New("registry is unavailable")
	// ErrUnsupported: the file system of the cache can't hold images. It is New's.
	ErrUnsupported = errors.New("file system can't hold images")
	// ErrFull: there is no room in the cache beside the images that are in use.
	ErrFull = errors.New("no room for the image")
)

// Options are those of New.
type Options struct {
	// Dir is the directory of the cache, which is made if need be. Nobody else
	// uses it. Required.
	Dir string
	// MaxBytes bounds what is kept unpacked. Default: a tenth of the disk, at most
	// 20 GiB.
	MaxBytes int64
	// MaxImageBytes bounds an image, unpacked, and so each of its layers. Default
	// 8 GiB, and at most MaxBytes.
	MaxImageBytes int64
	// MaxEntries bounds the files of a layer, directories and all. Default 1 million.
	MaxEntries int
	// Registries lists those from which images come: HOST, HOST/PREFIX, or * for
	// any. Default: none.
	Registries []string
	// LocalDirs are directories below which OCI layouts and tarballs may be.
	LocalDirs []string
	// Tags allows references without a digest.
	Tags bool
	// TagTTL is how long what a tag was resolved to is taken for granted. Default
	// 5 min.
	TagTTL time.Duration
	// Timeout bounds a pull. Default 10 min.
	Timeout time.Duration
	// DockerConfig is a file of credentials as docker login writes it. It is read
	// when they are needed. Programs that it names are not run. "": none are sent.
	DockerConfig string
	// Control, if set, looks at the addresses that are connected to for a registry
	// that is allowed by * only, as net.Dialer.ControlContext does. It is not asked
	// where the environment names a proxy, which connects then.
	Control func(ctx context.Context, network, address string, conn syscall.RawConn) error
	// Logger gets what is pulled and what goes wrong. Default: discard.
	Logger *slog.Logger
	// Registerer gets the metrics. nil: none.
	Registerer prometheus.Registerer
}

func (o Options) withDefaults() (Options, error) {
	if o.Dir == "" {
		return o, errors.New("image: Options need Dir")
	}
	if o.MaxBytes == 0 {
		if err := os.MkdirAll(o.Dir, 0o700); err != nil {
			return o, fmt.Errorf("image cache: %w", err)
		}
		var st unix.Statfs_t
		if err := unix.Statfs(o.Dir, &st); err != nil {
			return o, fmt.Errorf("image cache: %w", &os.PathError{Op: "statfs", Path: o.Dir, Err: err})
		}
		o.MaxBytes = min(20<<30, int64(st.Blocks)*st.Bsize/10) //nolint:gosec // no disk is that large
	}
	o.MaxImageBytes = min(cmp.Or(o.MaxImageBytes, 8<<30), o.MaxBytes)
	o.MaxEntries = cmp.Or(o.MaxEntries, 1_000_000)
	o.TagTTL = cmp.Or(o.TagTTL, 5*time.Minute)
	o.Timeout = cmp.Or(o.Timeout, 10*time.Minute)
	if o.MaxBytes < 0 || o.MaxImageBytes < 0 || o.MaxEntries < 0 || o.TagTTL < 0 || o.Timeout < 0 {
		return o, errors.New("image: a negative bound")
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return o, nil
}

// Cache is safe for concurrent use.
type Cache struct {
	o       Options
	metrics *cacheMetrics
	lock    *os.File // of Dir
	locals  []*localDir
	white   whiteouts
	free    *transport // to registries
	guarded *transport // to those that are not listed

	mu      sync.Mutex // guards the rest
	layers  map[v1.Hash]*layer
	used    int64 // bytes of layers, those on their way among them
	records map[v1.Hash]*record
	refused map[Reference]refusal
	tags    map[Reference]tagged
	pullers map[Reference]*remote.Puller // by repository
	flights map[string]*flight
	running sync.WaitGroup // flights
	closed  bool
}

// pullsAtOnce is how many layers of an image are pulled and unpacked at once: enough
// for a network, few for a machine that also runs actions. There is no bound for all
// images together, or a registry that sends nothing could keep others waiting.
const pullsAtOnce = 4

// New opens the cache. What is in its directory from before is used again.
func New(o Options) (*Cache, error) {
	o, err := o.withDefaults()
	if err != nil {
		return nil, err
	}
	c := &Cache{
		o:      o,
		layers: make(map[v1.Hash]*layer), records: make(map[v1.Hash]*record), refused: make(map[Reference]refusal),
		tags: make(map[Reference]tagged), pullers: make(map[Reference]*remote.Puller), flights: make(map[string]*flight),
	}
	c.free, c.guarded = transports(o.Control)
	if c.metrics, err = newMetrics(o.Registerer, c.usedBytes); err != nil {
		return nil, err
	}
	for _, dir := range o.LocalDirs {
		l, err := openLocalDir(dir)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("directory of images: %w", err), c.closeLocals())
		}
		c.locals = append(c.locals, l)
	}
	if err := c.open(); err != nil {
		return nil, errors.Join(fmt.Errorf("image cache %s: %w", o.Dir, err), c.closeLocals())
	}
	return c, nil
}

func (c *Cache) closeLocals() error {
	var err error
	for _, l := range c.locals {
		err = errors.Join(err, l.root.Close())
	}
	return err
}

// Image is an image that is unpacked. It stays until Close.
type Image struct {
	// Digest is that of the reference, or what its tag stands for.
	Digest string
	// Layers are the directories of its layers, the lowest first.
	Layers []string

	c    *Cache
	pins []*layer
	once sync.Once
}

// Close lets go of the image, which may be removed from then on.
func (i *Image) Close() {
	i.once.Do(func() { i.c.unpin(i.pins) })
}

// Open has the image pulled, unless it is there, and returns it. The error wraps
// one of the classes above, or says that the machine itself has failed, with its
// disk say. When ctx is done, Open returns; a pull that nobody waits for ends.
func (c *Cache) Open(ctx context.Context, ref Reference) (*Image, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, c.o.Timeout, fmt.Errorf("%w: it took longer than %v", ErrUnavailable, c.o.Timeout))
	defer cancel()
	img, err := c.openImage(ctx, ref)
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		return nil, fmt.Errorf("image %s: %w", ref, err)
	}
	return img, nil
}

func (c *Cache) openImage(ctx context.Context, ref Reference) (*Image, error) {
	ref, err := c.resolve(ctx, ref)
	if err != nil {
		return nil, err
	}
	rec, err := c.record(ctx, ref)
	if err != nil {
		return nil, err
	}
	pins := make([]*layer, len(rec.Layers))
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(pullsAtOnce)
	for i, d := range rec.Layers {
		if pins[i] = c.pin(d.DiffID); pins[i] != nil {
			continue
		}
		group.Go(func() (err error) {
			pins[i], err = c.layer(groupCtx, ref, d)
			return err
		})
	}
	err = group.Wait()
	img := &Image{Digest: ref.digest.String(), c: c}
	total := int64(0)
	for _, l := range pins {
		if l == nil {
			continue
		}
		img.pins = append(img.pins, l)
		total += l.bytes
		if l.entries > 0 {
			img.Layers = append(img.Layers, l.tree())
		}
	}
	if err == nil && total > c.o.MaxImageBytes {
		err = fmt.Errorf("%w: it has %d bytes, at most %d are allowed", ErrUnusable, total, c.o.MaxImageBytes)
	}
	if err != nil {
		img.Close()
		return nil, err
	}
	if len(img.Layers) == 0 {
		img.Close()
		return nil, fmt.Errorf("%w: it is empty", ErrUnusable)
	}
	return img, nil
}

// Close ends all pulls and closes the cache. Images that are open are closed
// before.
func (c *Cache) Close() error {
	c.mu.Lock()
	c.closed = true
	for _, f := range c.flights {
		f.cancel()
	}
	c.mu.Unlock()
	c.running.Wait()
	c.free.CloseIdleConnections()
	c.guarded.CloseIdleConnections()
	err := c.settle()
	return errors.Join(err, c.closeLocals(), c.metrics.close(), c.lock.Close())
}

func (c *Cache) usedBytes() float64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return float64(c.used)
}

func (c *Cache) layersDir() string { return filepath.Join(c.o.Dir, "layers") }
func (c *Cache) imagesDir() string { return filepath.Join(c.o.Dir, "images") }
