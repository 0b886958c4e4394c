// Package tiered is a decorator that makes one store of several: small fast
// ones in front (memory, a local disk), and at the end the authority (a bucket,
// another server), which alone decides what is there. README.md in this folder
// tells what happens to a blob on its way up and down, and what a crash, a lost
// tier and a corrupt copy do.
//
// It does not keep entries: those of the ActionCache change, so that they are
// the authority's alone, and are asked for there. It does not choose stores;
// elan/blob/open does, for several --storage URLs, and makes the last one the
// authority.
package tiered

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/semaphore"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/recent"
	"github.com/mettle-build/mettle/elan/digest"
)

const (
	// WholeBytes is up to which size a blob is fetched into memory as a whole,
	// and verified before the first byte is served. Most blobs are smaller.
	WholeBytes = 1 << 20
	// DefaultMaxFillBytes is for 64 such blobs of the largest size at once, or
	// thousands of usual ones.
	DefaultMaxFillBytes = 64 << 20
	// DefaultMaxFills is for larger blobs, each with copyBytes of memory.
	DefaultMaxFills = 64
	// DefaultTouchEvery is an eighth of the minimal lifetime that Bazel 7 assumes.
	DefaultTouchEvery = 3 * time.Hour / 8

	// copyBytes is how much of a larger blob is held in memory on its way.
	copyBytes = 256 << 10
	// maxTouched bounds the digests whose last use is remembered, in 12 MiB. One
	// that is forgotten too early costs a question.
	maxTouched = 1 << 19
	// fillTimeout bounds the putting of a small blob into an upper tier, which
	// nobody waits for.
	fillTimeout = time.Minute
)

// Tier is one of the stores.
type Tier struct {
	// Name is the tier's in metrics and logs.
	Name string
	// Store has the blobs. It is not closed by the Store around it.
	Store blob.Store
	// MaxBlobBytes is the size of the largest blob that is kept here. 0: any.
	// The authority takes all.
	MaxBlobBytes int64
	// Trusted is for a store whose bytes can't change, which is memory. What is
	// read from others is verified.
	Trusted bool
}

func (t *Tier) takes(d digest.Digest) bool { return t.MaxBlobBytes == 0 || d.Size() <= t.MaxBlobBytes }

// Options are those of New. At least two tiers are required.
type Options struct {
	// Tiers are in the order in which they are asked. The last is the authority.
	// It keeps what is used for TouchEvery longer than anybody is promised.
	Tiers []Tier
	// TouchEvery is how often, at most, the authority is told of the uses of a
	// blob that upper tiers serve. 0: DefaultTouchEvery.
	TouchEvery time.Duration
	// MaxFillBytes bounds the memory of small blobs being fetched. Where it is
	// used up, blobs are read without being kept. 0: DefaultMaxFillBytes.
	MaxFillBytes int64
	// MaxFills bounds the larger blobs being fetched, likewise. 0:
	// DefaultMaxFills.
	MaxFills int
	// Logger is told of corrupt copies, and of uses that could not be passed on.
	// nil: nobody is.
	Logger *slog.Logger
	// Registerer takes the metrics. nil: there are none.
	Registerer prometheus.Registerer
}

func (o *Options) complete() error {
	if len(o.Tiers) < 2 {
		return errors.New("tiered: it takes two tiers and more")
	}
	names := map[string]bool{}
	for _, t := range o.Tiers {
		if t.Store == nil || t.Name == "" || names[t.Name] || t.MaxBlobBytes < 0 {
			return fmt.Errorf("tiered: tier %q needs a Store, a name of its own, and a bound that is not negative", t.Name)
		}
		names[t.Name] = true
	}
	if o.TouchEvery < 0 || o.MaxFillBytes < 0 || o.MaxFills < 0 {
		return errors.New("tiered: TouchEvery, MaxFillBytes and MaxFills may not be negative")
	}
	if o.TouchEvery == 0 {
		o.TouchEvery = DefaultTouchEvery
	}
	if o.MaxFillBytes == 0 {
		o.MaxFillBytes = DefaultMaxFillBytes
	}
	if o.MaxFills == 0 {
		o.MaxFills = DefaultMaxFills
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return nil
}

// Store is the tiers as one. It is safe for concurrent use.
type Store struct {
	uppers    []Tier
	authority blob.Store
	name      string // of the authority
	log       *slog.Logger
	metrics   *metrics
	touches   *touches
	memory    *semaphore.Weighted // bytes of small blobs being fetched
	fills     *semaphore.Weighted // larger blobs being fetched

	maxFillBytes int64

	// mu guards flights, the blobs that are being fetched, and what each says
	// that it guards.
	mu      sync.Mutex
	flights map[digest.Digest]*flight
	// trees are the roots of the trees that are being fetched. Who does closes the
	// channel. Guarded by mu.
	trees map[digest.Digest]chan struct{}

	running sync.WaitGroup // the flights
	closed  sync.Once
}

// Closer is what New returns: a store, and the end of its goroutines.
type Closer interface {
	blob.Store
	// Close tells the authority of the last uses, for some seconds at most. Calls
	// that are under way should have ended.
	io.Closer
}

var (
	_ Closer                = (*Store)(nil)
	_ blob.CompressedOpener = (*Store)(nil)
)

// New makes a *Store, or one with more abilities where tiers have them: it is a
// blob.Linker, blob.Adopter and blob.Auditor with the first tier that is all of
// these, and a blob.Remover with an authority that is one. It starts
// goroutines, which Close ends. The context bounds nothing but gives its values.
func New(ctx context.Context, o Options) (Closer, error) {
	if err := o.complete(); err != nil {
		return nil, err
	}
	last := len(o.Tiers) - 1
	s := &Store{
		uppers: o.Tiers[:last:last], authority: o.Tiers[last].Store, name: o.Tiers[last].Name,
		log:     o.Logger,
		memory:  semaphore.NewWeighted(o.MaxFillBytes),
		fills:   semaphore.NewWeighted(int64(o.MaxFills)),
		flights: make(map[digest.Digest]*flight), trees: make(map[digest.Digest]chan struct{}), maxFillBytes: o.MaxFillBytes,
	}
	var err error
	if s.metrics, err = newMetrics(o.Registerer); err != nil {
		return nil, fmt.Errorf("tiered: %w", err)
	}
	for _, t := range s.uppers {
		s.metrics.corrupt.WithLabelValues(t.Name) // from 0, so that an increase shows the first one
	}
	s.touches = newTouches(ctx, s, recent.New(maxTouched, o.TouchEvery))
	return s.withAbilities(), nil
}

// withAbilities is s in the form that has what its tiers have.
func (s *Store) withAbilities() Closer {
	l, local := s.local()
	inside, removes := blob.As[blob.Remover](s.authority)
	r := remover{s: s, authority: inside}
	switch {
	case local && removes:
		return localRemoving{s, l, r}
	case local:
		return localStore{s, l}
	case removes:
		return removing{s, r}
	}
	return s
}

// The forms of a Store.
type (
	localStore struct {
		*Store
		local
	}
	removing struct {
		*Store
		remover
	}
	localRemoving struct {
		*Store
		local
		remover
	}
)

// Unwrap returns the authority: to list it, and to look into it, is to do so
// with the tiers.
func (s *Store) Unwrap() blob.Store { return s.authority }

// Close implements io.Closer. It does not close the tiers. Closing again does
// nothing.
func (s *Store) Close() error {
	s.closed.Do(func() {
		s.mu.Lock()
		for _, f := range s.flights {
			f.cancel()
		}
		s.mu.Unlock()
		s.running.Wait()
		s.touches.close()
		s.metrics.unregister()
	})
	return nil
}

// FindMissing implements blob.Finder: it is the authority that knows.
func (s *Store) FindMissing(ctx context.Context, ds []digest.Digest) ([]digest.Digest, error) {
	return s.authority.FindMissing(ctx, ds) //nolint:wrapcheck // the store's own
}

// OpenCompressed implements blob.CompressedOpener: the upper tiers come first,
// which may be of any kind, and are to get what is read.
func (s *Store) OpenCompressed(_ context.Context, d digest.Digest) (io.ReadCloser, error) {
	return nil, fmt.Errorf("open blob %s: %w", d, blob.ErrNotCompressed)
}

// drop takes a corrupt copy out of an upper tier, so that the next reader finds
// a sound one below.
func (s *Store) drop(ctx context.Context, t *Tier, d digest.Digest, why error) {
	s.metrics.corrupt.WithLabelValues(t.Name).Inc()
	r, ok := blob.As[blob.Remover](t.Store)
	if !ok {
		s.log.Error("a tier has a corrupt copy, and can't remove it", "tier", t.Name, "digest", d, "error", why)
		return
	}
	if err := r.Remove(ctx, d); err != nil && !errors.Is(err, blob.ErrNotFound) {
		s.log.Error("a tier has a corrupt copy, and removing it failed", "tier", t.Name, "digest", d, "error", errors.Join(why, err))
		return
	}
	s.log.Warn("a corrupt copy was removed from a tier", "tier", t.Name, "digest", d, "error", why)
}

// remover removes from all tiers.
type remover struct {
	s         *Store
	authority blob.Remover
}

// Remove implements blob.Remover. The blob leaves the authority first, so that
// what is fetched again meanwhile does not come from there.
func (r remover) Remove(ctx context.Context, d digest.Digest) error {
	err := r.authority.Remove(ctx, d)
	r.s.ground(d)
	r.s.touches.forget(d)
	for i := range r.s.uppers {
		t := &r.s.uppers[i]
		upper, ok := blob.As[blob.Remover](t.Store)
		if !ok {
			continue
		}
		switch e := upper.Remove(ctx, d); {
		case e == nil && errors.Is(err, blob.ErrNotFound):
			err = nil // it was somewhere
		case e != nil && !errors.Is(e, blob.ErrNotFound):
			err = errors.Join(err, fmt.Errorf("tier %s: %w", t.Name, e))
		}
	}
	return err
}
