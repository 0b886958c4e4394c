// Package compressed is a decorator that keeps blobs as zstd in a store: for
// buckets, where bytes cost money and time, and for memory, which holds more
// then. Clients see no difference, but that a blob that is kept as zstd goes to
// those who take it so without being compressed again, and one that comes so is
// kept as it came.
//
// The store inside is a blob.ContainerStore: under the name of each blob is a
// container, with the blob as zstd where that pays and as it is where it does
// not. README.md in this folder has the format, and what is measured.
//
// It is not for elan/blob/file, whose files are linked into input roots as they
// are. elan/blob/open puts it around stores whose URL says compress=zstd.
package compressed

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/compress"
	"github.com/mettle-build/mettle/elan/digest"
)

// The defaults of Options.
const (
	// DefaultMinBytes is from which size on blobs are compressed. Below it a
	// frame's header eats up what is gained, and a bucket bills by the request.
	DefaultMinBytes = 512
	// DefaultMinSaving: an eighth has to be saved for the decompressing, on each
	// read, to be worthwhile.
	DefaultMinSaving = 8
	// DefaultMaxReaders makes for at most 1.2 GiB, with windows as large as they
	// may be, and for 200 MiB with those of our own frames.
	DefaultMaxReaders = 128

	// sampleBytes of a blob's beginning are compressed to see whether it pays.
	sampleBytes = 64 << 10
	// maxAsCame bounds the compressed blob that is kept as it came: it is in
	// memory until it is verified. What is larger is compressed anew.
	maxAsCame = 4 << 20
)

// Options are those of New. Store alone is required.
type Options struct {
	// Store keeps the containers. One of its decorators or itself is a
	// blob.ContainerStore.
	Store blob.Store
	// MinBytes is the size of the smallest blob that is compressed. 0:
	// DefaultMinBytes.
	MinBytes int64
	// MinSaving is the part of a blob, one in so many bytes, that has to be
	// saved. 0: DefaultMinSaving.
	MinSaving int64
	// MaxReaders bounds the blobs of over a MiB that are decompressed at once;
	// others wait. 0: DefaultMaxReaders.
	MaxReaders int
	// Registerer takes the metrics. nil: there are none.
	Registerer prometheus.Registerer
}

// Store is a store of containers, seen as one of blobs. It is safe for
// concurrent use, and starts no goroutines.
type Store struct {
	blob.Store
	codec     *compress.Codec
	minBytes  int64
	minSaving int64
	readers   chan struct{} // has a value for each decoder with a window
	metrics   *metrics
}

var (
	_ blob.Store              = (*Store)(nil)
	_ blob.Checker            = (*Store)(nil)
	_ blob.CompressedOpener   = (*Store)(nil)
	_ blob.CompressedReceiver = (*Store)(nil)
	_ io.Closer               = (*Store)(nil)
)

// New makes a Store.
func New(o Options) (*Store, error) {
	if o.Store == nil || o.MinBytes < 0 || o.MinSaving < 0 || o.MaxReaders < 0 {
		return nil, errors.New("compressed: Options need a Store, and no negative bounds")
	}
	if c, ok := blob.As[blob.ContainerStore](o.Store); !ok || !c.KeepsContainers() {
		return nil, fmt.Errorf("compressed: %w: the store keeps no containers", errors.ErrUnsupported)
	}
	s := &Store{Store: o.Store, minBytes: o.MinBytes, minSaving: o.MinSaving}
	if s.minBytes == 0 {
		s.minBytes = DefaultMinBytes
	}
	if s.minSaving == 0 {
		s.minSaving = DefaultMinSaving
	}
	if o.MaxReaders == 0 {
		o.MaxReaders = DefaultMaxReaders
	}
	s.readers = make(chan struct{}, o.MaxReaders)
	var err error
	if s.codec, err = compress.New(); err == nil {
		s.metrics, err = newMetrics(o.Registerer)
	}
	if err != nil {
		return nil, fmt.Errorf("compressed: %w", err)
	}
	return s, nil
}

// Unwrap returns the store inside. Its containers have the blobs' digests, so
// that it lists, tells of and removes them as its own.
func (s *Store) Unwrap() blob.Store { return s.Store }

// Close takes the metrics from the registerer, and never fails. It does not
// close the store inside.
func (s *Store) Close() error {
	s.metrics.unregister()
	return nil
}

// pays reports whether it is worthwhile to keep n bytes as packed ones.
func (s *Store) pays(n, packed int64) bool { return packed <= n-n/s.minSaving }

// Check implements blob.Checker.
func (s *Store) Check(ctx context.Context, d digest.Digest) error {
	err := s.check(ctx, d)
	if errors.Is(err, blob.ErrCorrupt) {
		if r, ok := blob.As[blob.Remover](s.Store); ok {
			if e := r.Remove(ctx, d); e != nil && !errors.Is(e, blob.ErrNotFound) {
				err = errors.Join(err, e)
			}
		}
	}
	if err != nil {
		return fmt.Errorf("check blob %s: %w", d, err)
	}
	return nil
}

func (s *Store) check(ctx context.Context, d digest.Digest) error {
	r, err := s.Open(ctx, d, 0)
	if err != nil {
		return err
	}
	defer r.Close() //nolint:errcheck // opened for reading
	_, err = io.Copy(io.Discard, digest.NewVerifier(r, d))
	return err //nolint:wrapcheck // the caller does
}
