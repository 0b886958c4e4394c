// Package chunked is a decorator by which a large blob may be kept as a list of
// chunks, which it shares with other blobs: an edited file costs a few chunks, in
// transfer and at rest. See README.md for what is kept where, and why.
//
// A blob comes to be kept in chunks by Splice, and only by it: what is written as
// a whole is kept as a whole. Otherwise nobody sees the difference: such a blob is
// found while all of its chunks are there, and read over them. What Split cuts for
// a client is a copy beside the whole, and goes by itself when nobody uses it.
//
// It knows nothing of gRPC (see elan/rpc), and it keeps nothing in memory. The
// mains put it around the store that they serve.
package chunked

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/chunk"
	"github.com/mettle-build/mettle/elan/digest"
)

const (
	// maxChunks makes for blobs of 180 GiB with the smaller chunks of RepMaxCDC,
	// in lists of at most 36 MiB, which the stores take as an entry.
	maxChunks = 1 << 19
	// tooSmall bounds what a list costs to look after, whatever clients make up: a
	// blob whose chunks have on average less than this part of what the functions
	// make at the least, with the parameters that the API recommends 16 KiB, is
	// made whole.
	tooSmall = 8
	// defaultMaxSplits makes for some 100 MiB of buffers.
	defaultMaxSplits = 8
)

// Options are those of New.
type Options struct {
	// Store and Entries keep what there is: blobs and chunks, lists and other
	// entries. Both are needed, and often one.
	Store   blob.Store
	Entries blob.Entries
	// FastCDC and RepMaxCDC are how blobs are cut. nil: as the API recommends.
	FastCDC   *chunk.FastCDC
	RepMaxCDC *chunk.RepMaxCDC
	// MaxSplits is how many blobs are cut at once; others wait. 0: 8.
	MaxSplits int
	// Logger gets what no caller can be told. nil: nobody.
	Logger *slog.Logger
	// Registerer gets the metrics. nil: nobody.
	Registerer prometheus.Registerer
}

// Store is a blob.Store, and blob.Entries, some of whose blobs are in chunks. All
// methods are safe for concurrent use. It has nothing to close.
type Store struct {
	blob.Store // the one inside

	entries  blob.Entries
	fast     *chunk.FastCDC
	repMax   *chunk.RepMaxCDC
	minBytes int64 // no blob of at most that is kept in chunks
	minChunk int64 // the least average of the chunks that a blob is kept in
	flights  flights
	splits   chan struct{} // has as many values as are under way
	log      *slog.Logger
	metrics  *metrics
}

var (
	_ blob.Store   = (*Store)(nil)
	_ blob.Entries = (*Store)(nil)
	_ blob.Chunker = (*Store)(nil)
)

// New puts a Store around another.
func New(o Options) (*Store, error) {
	if o.Store == nil || o.Entries == nil || o.MaxSplits < 0 {
		return nil, errors.New("chunked: Options need a Store and Entries, and no negative MaxSplits")
	}
	if o.MaxSplits == 0 {
		o.MaxSplits = defaultMaxSplits
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	s := &Store{
		Store: o.Store, entries: o.Entries, fast: o.FastCDC, repMax: o.RepMaxCDC,
		splits: make(chan struct{}, o.MaxSplits), log: o.Logger,
	}
	var err error
	if s.fast == nil {
		if s.fast, err = chunk.NewFastCDC(chunk.DefaultFastCDCAverage, 0); err != nil {
			return nil, fmt.Errorf("chunked: %w", err)
		}
	}
	if s.repMax == nil {
		if s.repMax, err = chunk.NewRepMaxCDC(chunk.DefaultRepMaxCDCMinimum, chunk.DefaultRepMaxCDCHorizon); err != nil {
			return nil, fmt.Errorf("chunked: %w", err)
		}
	}
	s.minBytes = int64(min(s.fast.MaxBytes(), s.repMax.MaxBytes()))
	s.minChunk = int64(max(1, min(s.fast.MinBytes(), s.repMax.MinBytes())/tooSmall))
	if s.metrics, err = newMetrics(o.Registerer); err != nil {
		return nil, fmt.Errorf("chunked: %w", err)
	}
	return s, nil
}

// Unwrap returns the store inside.
func (s *Store) Unwrap() blob.Store { return s.Store }

// ChunkParams implements blob.Chunker.
func (s *Store) ChunkParams() blob.ChunkParams {
	return blob.ChunkParams{
		FastCDCAverageBytes: s.fast.AverageBytes(), FastCDCSeed: s.fast.Seed(),
		RepMaxCDCMinimumBytes: s.repMax.MinBytes(), RepMaxCDCHorizonBytes: s.repMax.HorizonBytes(),
		MaxChunks: maxChunks,
	}
}

// mayBeKept reports whether d is large enough to be kept in chunks. Of smaller
// blobs no list is looked for, so that they cost nothing here.
func (s *Store) mayBeKept(d digest.Digest) bool { return d.Size() > s.minBytes }

// FindMissing implements blob.Finder. The store inside is asked once for the
// blobs, and where large ones are missing, once for the chunks of those that are
// kept in chunks; and so on for each findChunks chunks.
func (s *Store) FindMissing(ctx context.Context, ds []digest.Digest) ([]digest.Digest, error) {
	missing, err := s.Store.FindMissing(ctx, ds)
	if err != nil || !slices.ContainsFunc(missing, s.mayBeKept) {
		return missing, err //nolint:wrapcheck // the store's own words
	}
	there, err := s.keptOf(ctx, missing)
	if err != nil || len(there) == 0 {
		return missing, err
	}
	return slices.DeleteFunc(missing, func(d digest.Digest) bool { return there[d] }), nil
}

// Open implements blob.Opener.
func (s *Store) Open(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	r, err := s.Store.Open(ctx, d, offset)
	if err == nil || !errors.Is(err, blob.ErrNotFound) || !s.mayBeKept(d) {
		return r, err //nolint:wrapcheck // the store's own words
	}
	if offset < 0 || offset > d.Size() {
		return nil, fmt.Errorf("open blob %s: offset %d is outside of it", d, offset)
	}
	l, lerr := s.kept(ctx, d)
	if lerr != nil {
		if errors.Is(lerr, blob.ErrNotFound) {
			return nil, err //nolint:wrapcheck // as above
		}
		return nil, lerr
	}
	// It starts the lifetimes of all chunks anew, and tells now what is missing.
	if missing, err := s.Store.FindMissing(ctx, l.Chunks); err != nil || len(missing) > 0 {
		if err == nil {
			err = fmt.Errorf("open blob %s: %w: chunk %s, and so it, is not there", d, blob.ErrNotFound, missing[0])
		}
		return nil, err
	}
	return newReader(ctx, s.Store, l.Chunks, offset)
}

// Entry implements blob.Entries.
func (s *Store) Entry(ctx context.Context, k blob.EntryKey) ([]byte, error) {
	if isReserved(k) {
		return nil, fmt.Errorf("entry %s: %w", k.Action, blob.ErrNotFound)
	}
	return s.entries.Entry(ctx, k) //nolint:wrapcheck // the store's own words
}

// PutEntry implements blob.Entries.
func (s *Store) PutEntry(ctx context.Context, k blob.EntryKey, value []byte) error {
	if isReserved(k) {
		return fmt.Errorf("put entry %s: %w: the instance's name %q is reserved", k.Action, blob.ErrMalformed, k.Instance)
	}
	return s.entries.PutEntry(ctx, k, value) //nolint:wrapcheck // the store's own words
}

// DeleteEntry implements blob.Entries.
func (s *Store) DeleteEntry(ctx context.Context, k blob.EntryKey) error {
	if isReserved(k) {
		return nil // there is none
	}
	return s.entries.DeleteEntry(ctx, k) //nolint:wrapcheck // the store's own words
}

// isReserved keeps others from the lists: who could write one could give a blob
// other bytes.
func isReserved(k blob.EntryKey) bool { return strings.HasPrefix(k.Instance, reserved) }
