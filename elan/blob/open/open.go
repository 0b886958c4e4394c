// Package open turns a storage URL into a store. It is the only package that
// imports every store, and only mains import it.
//
//	file:///var/cache/elan   blobs in a local directory (see elan/blob/file)
//	mem://                   blobs in memory, gone with the process (see elan/blob/mem)
package open

import (
	"fmt"
	"io"
	"log/slog"
	"net/url"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/file"
	"github.com/mettle-build/mettle/elan/blob/mem"
)

// Options are what a URL does not say. The zero Options are valid.
type Options struct {
	// MaxBytes bounds the blobs and entries of the store. 0 is as much as there
	// is room for, less MinFreeBytes on a disk.
	MaxBytes int64
	// MinFreeBytes is the room on a disk that is left to others. 0 is a
	// twentieth of it, and at most 2 GiB.
	MinFreeBytes int64
	// MinLifetime is how long a blob stays at least after its last use.
	MinLifetime time.Duration
	Logger      *slog.Logger
	Registerer  prometheus.Registerer
}

// Storage is what a server needs of a store: blobs, and the entries of an
// ActionCache. Close it after the last call has returned.
type Storage interface {
	blob.Store
	blob.Entries
	io.Closer
}

// Open opens the store that a URL names.
func Open(storage string, o Options) (Storage, error) {
	u, err := url.Parse(storage)
	if err != nil {
		return nil, fmt.Errorf("storage URL %q: %w", storage, err)
	}
	switch u.Scheme {
	case "file":
		if u.Host != "" || u.Path == "" {
			return nil, fmt.Errorf("storage URL %q: want three slashes and an absolute path, as in file:///var/cache/elan", storage)
		}
		return Dir(u.Path, o)
	case "mem":
		if u.Host != "" || u.Path != "" {
			return nil, fmt.Errorf("storage URL %q: want just mem://", storage)
		}
		return openMem(o)
	default:
		return nil, fmt.Errorf("storage URL %q: scheme %q is unknown, want file:///DIRECTORY or mem://", storage, u.Scheme)
	}
}

// Dir opens the store of a local directory, which it creates if need be.
func Dir(dir string, o Options) (Storage, error) {
	s, err := file.New(file.Options{
		Dir:          dir,
		MaxBytes:     o.MaxBytes,
		MinFreeBytes: o.MinFreeBytes,
		MinLifetime:  o.MinLifetime,
		Logger:       o.Logger,
		Registerer:   o.Registerer,
	})
	if err != nil {
		return nil, err // it names the directory
	}
	return s, nil
}

// memory adds to a mem.Store that it can be closed, which frees nothing that
// the end of the process does not.
type memory struct{ *mem.Store }

// Close implements io.Closer.
func (memory) Close() error { return nil }

func openMem(o Options) (Storage, error) {
	s, err := mem.New(mem.Options{MaxBytes: o.MaxBytes, MinLifetime: o.MinLifetime})
	if err != nil {
		return nil, fmt.Errorf("open store in memory: %w", err)
	}
	return memory{s}, nil
}
