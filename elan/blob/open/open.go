// Package open turns storage URLs into a store. It is the only package that
// imports every store and decorator, and only mains import it.
//
//	file:///var/cache/elan   blobs in a local directory (see elan/blob/file)
//	mem://                   blobs in memory, gone with the process (see elan/blob/mem)
//	gs://BUCKET/PREFIX       blobs in Google Cloud Storage (see elan/blob/gcs)
//	s3://BUCKET/PREFIX       blobs in Amazon S3 and the like (see elan/blob/s3)
//
// Several URLs are tiers (see elan/blob/tiered): the last is the authority, which
// has everything, and those before it keep copies of what is used. Each URL may
// have options, as in mem://?max_size=1GB&max_blob_size=256KiB:
//
//	max_size        how much it holds              file, mem
//	min_free        what it leaves to others       file
//	min_lifetime    instead of Options.MinLifetime all, if it is the last
//	max_blob_size   larger blobs are not copied    all but the last; 1MiB for mem
//	compress        zstd: kept compressed          all but file (see elan/blob/compressed)
//
// beside those of the buckets, which are in their packages' comments.
//
// Every store is observed (elan/blob/observed), under the name of its scheme,
// and a bucket has a memory of what is in it (elan/blob/known).
package open

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/compressed"
	"github.com/mettle-build/mettle/elan/blob/file"
	"github.com/mettle-build/mettle/elan/blob/known"
	"github.com/mettle-build/mettle/elan/blob/observed"
	"github.com/mettle-build/mettle/elan/blob/tiered"
	"github.com/mettle-build/mettle/elan/digest"
)

const (
	// defaultMinLifetime is that of all stores.
	defaultMinLifetime = 3 * time.Hour
	// slackPart is the part of the minimal lifetime for which a store keeps blobs
	// longer than it is promised, where uses are passed on with a delay: half of
	// it by what elan/blob/known remembers, and half by elan/blob/tiered.
	slackPart = 4
	// upperLifetime is for how long the copies in a tier above another stay at
	// least: hardly, so that what is used now pushes out what was.
	upperLifetime = time.Minute
)

// Options are what a URL does not say. The zero Options are valid.
type Options struct {
	// MaxBytes bounds the blobs and entries of the store. 0 is as much as there
	// is room for, less MinFreeBytes on a disk. A bucket has no bound. With
	// several stores it has to be 0: their URLs tell.
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

// ErrInUse is what Open's error wraps where another process has a directory open.
var ErrInUse = file.ErrInUse

// Storage is what a server needs of a store: blobs, and the entries of an
// ActionCache. Other abilities are found by blob.As. Close it after the last call
// has returned.
type Storage interface {
	blob.Store
	blob.Entries
	io.Closer
}

// storage is the parts of a Storage.
type storage struct {
	blob.Store
	blob.Entries
	closers []func() error // in the order in which they are called
}

// Unwrap returns the blobs.
func (s *storage) Unwrap() blob.Store { return s.Store }

// ReadWhole implements blob.WholeReader where the store does.
func (s *storage) ReadWhole(ctx context.Context, d digest.Digest, data []byte) error {
	w, ok := s.Store.(blob.WholeReader)
	if !ok {
		return errors.ErrUnsupported
	}
	return w.ReadWhole(ctx, d, data) //nolint:wrapcheck // the store's own
}

// WriteWhole implements blob.WholeWriter where the store does.
func (s *storage) WriteWhole(ctx context.Context, d digest.Digest, data []byte) error {
	w, ok := s.Store.(blob.WholeWriter)
	if !ok {
		return errors.ErrUnsupported
	}
	return w.WriteWhole(ctx, d, data) //nolint:wrapcheck // the store's own
}

// Close implements io.Closer.
func (s *storage) Close() error {
	var err error
	for _, c := range s.closers {
		err = errors.Join(err, c())
	}
	s.closers = nil
	return err
}

// Open opens the store that a URL names, or the tiers that several do. The
// context bounds the opening only.
func Open(ctx context.Context, o Options, urls ...string) (Storage, error) {
	specs, err := parseAll(urls, o)
	if err != nil {
		return nil, err
	}
	s := &storage{}
	if err := s.open(ctx, specs, o); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// open opens what the specs say, and leaves to Close what it opened.
func (s *storage) open(ctx context.Context, specs []*spec, o Options) error {
	ob, err := observed.New(observed.Options{Logger: o.Logger, Registerer: o.Registerer})
	if err != nil {
		return fmt.Errorf("open storage: %w", err)
	}
	s.onClose(func() error { ob.Close(); return nil })
	tiers := make([]tiered.Tier, len(specs))
	for i, sp := range specs {
		base, err := sp.open(ctx)
		if err != nil {
			return err
		}
		s.onClose(base.Close)
		s.Entries = ob.Entries(sp.name, base) // the last one's stay
		tiers[i] = tiered.Tier{Name: sp.name, MaxBlobBytes: sp.maxBlobBytes, Trusted: sp.scheme() == "mem"}
		if tiers[i].Store, err = s.decorate(sp, ob.Store(sp.name, base), i == len(specs)-1); err != nil {
			return fmt.Errorf("storage URL %q: %w", sp.given, err)
		}
	}
	last := specs[len(specs)-1]
	if len(tiers) == 1 {
		s.Store = tiers[0].Store
		return nil
	}
	t, err := tiered.New(ctx, tiered.Options{
		Tiers: tiers, TouchEvery: last.promised / slackPart / 2, Logger: o.Logger, Registerer: o.Registerer,
	})
	if err != nil {
		return fmt.Errorf("open storage: %w", err)
	}
	s.onClose(t.Close)
	s.Store = t
	return nil
}

// decorate puts around a store what its URL says, and around a bucket that is
// the last a memory of what it has.
func (s *storage) decorate(sp *spec, store blob.Store, last bool) (blob.Store, error) {
	if last && sp.isBucket() {
		k, err := known.New(known.Options{Store: store, Window: sp.promised / slackPart / 2, Registerer: sp.o.Registerer})
		if err != nil {
			return nil, err
		}
		s.onClose(k.Close)
		store = k
	}
	if sp.compressed {
		c, err := compressed.New(compressed.Options{Store: store, Registerer: sp.o.Registerer})
		if err != nil {
			return nil, err
		}
		s.onClose(c.Close)
		store = c
	}
	return store, nil
}

// onClose has Close call c before what it calls already.
func (s *storage) onClose(c func() error) { s.closers = append([]func() error{c}, s.closers...) }
