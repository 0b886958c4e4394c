// Package open turns a storage URL into a store. It is the only package that
// imports every store, and only mains import it.
//
//	file:///var/cache/elan   blobs in a local directory (see elan/blob/file)
//	mem://                   blobs in memory, gone with the process (see elan/blob/mem)
//	gs://BUCKET/PREFIX       blobs in Google Cloud Storage (see elan/blob/gcs)
//	s3://BUCKET/PREFIX       blobs in Amazon S3 and the like (see elan/blob/s3)
package open

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/url"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/bucket"
	"github.com/mettle-build/mettle/elan/blob/file"
	"github.com/mettle-build/mettle/elan/blob/gcs"
	"github.com/mettle-build/mettle/elan/blob/mem"
	"github.com/mettle-build/mettle/elan/blob/s3"
)

// Options are what a URL does not say. The zero Options are valid.
type Options struct {
	// MaxBytes bounds the blobs and entries of the store. 0 is as much as there
	// is room for, less MinFreeBytes on a disk. A bucket has no bound.
	MaxBytes int64
	// MinFreeBytes is the room on a disk that is left to others. 0 is a
	// twentieth of it, and at most 2 GiB.
	MinFreeBytes int64
	// MinLifetime is how long a blob stays at least after its last use.
	MinLifetime time.Duration
	// ScrubRate is how many bytes a second of a directory are read in the
	// background to find damage. 0: none.
	ScrubRate  int64
	Logger     *slog.Logger
	Registerer prometheus.Registerer
}

// Storage is what a server needs of a store: blobs, and the entries of an
// ActionCache. Close it after the last call has returned.
type Storage interface {
	blob.Store
	blob.Entries
	io.Closer
}

// Open opens the store that a URL names. The context bounds the opening only.
func Open(ctx context.Context, storage string, o Options) (Storage, error) {
	u, err := url.Parse(storage)
	if err != nil {
		return nil, fmt.Errorf("storage URL %q: %w", storage, err)
	}
	switch u.Scheme {
	case "file":
		if u.Host != "" || u.Path == "" {
			return nil, fmt.Errorf("storage URL %q: want three slashes and an absolute path, as in file:///var/cache/elan", storage)
		}
		return openDir(u.Path, o)
	case "mem":
		if u.Host != "" || u.Path != "" {
			return nil, fmt.Errorf("storage URL %q: want just mem://", storage)
		}
		return openMem(o)
	case "gs", "s3":
		s, err := openBucket(ctx, u, o)
		if err != nil {
			return nil, fmt.Errorf("storage URL %q: %w", storage, err)
		}
		return s, nil
	default:
		return nil, fmt.Errorf("storage URL %q: scheme %q is unknown, want file:///DIRECTORY, mem://, gs://BUCKET or s3://BUCKET", storage, u.Scheme)
	}
}

// openBucket opens a store in an object storage. What the URL says goes before
// what o says.
func openBucket(ctx context.Context, u *url.URL, o Options) (*bucket.Store, error) {
	complete := func(b *bucket.Options) {
		if b.MinLifetime == 0 {
			b.MinLifetime = o.MinLifetime
		}
		b.Logger, b.Registerer = o.Logger, o.Registerer
	}
	if u.Scheme == "s3" {
		so, err := s3.ParseURL(u)
		if err != nil {
			return nil, err
		}
		complete(&so.Options)
		return s3.New(ctx, so)
	}
	gso, err := gcs.ParseURL(u)
	if err != nil {
		return nil, err
	}
	complete(&gso.Options)
	return gcs.New(ctx, gso)
}

// openDir opens the store of a local directory, which it creates if need be.
func openDir(dir string, o Options) (Storage, error) {
	s, err := file.New(file.Options{
		Dir:          dir,
		MaxBytes:     o.MaxBytes,
		MinFreeBytes: o.MinFreeBytes,
		MinLifetime:  o.MinLifetime,
		// 0 is the default there.
		ScrubBytesPerSecond: cmp.Or(o.ScrubRate, -1),
		Logger:              o.Logger,
		Registerer:          o.Registerer,
	})
	if err != nil {
		return nil, err // it names the directory
	}
	return s, nil
}

func openMem(o Options) (Storage, error) {
	s, err := mem.New(mem.Options{MaxBytes: o.MaxBytes, MinLifetime: o.MinLifetime, Registerer: o.Registerer})
	if err != nil {
		return nil, fmt.Errorf("open store in memory: %w", err)
	}
	return s, nil
}
