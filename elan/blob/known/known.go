// Package known is a decorator that remembers which blobs a store has, so that
// clients who ask about the same ten thousand blobs in each build make no
// request to a bucket.
//
// # What may be remembered
//
// Only that a blob is there, never that it is not, and only from two sources:
// the store's own answer to FindMissing, and a Commit that returned nil. To have
// opened a blob proves less: a bucket serves reads until the last day.
//
// An answer is remembered for Options.Window, from the moment at which its
// question was asked. Whoever is told by memory that a blob is there counts its
// lifetime from that moment on, while the store counts from the question. So
// the store has to keep what is used for Window longer than what is promised,
// and then "it is there" is true for all of the promised time; elan/blob/open
// opens stores so. After Window the store is asked again, which begins the
// lifetime anew there.
//
// A blob that is removed, checked and found corrupt, or not found when it is
// read, is forgotten at once, by answers too that are still on their way. Blobs
// removed behind the store's back (by a person in the bucket, by another server)
// are believed in until the window ends.
//
// # What it costs
//
// 24 bytes a digest, in a table that does not grow; see elan/blob/recent. It is
// gone with the process, and nothing is lost with it. Before stores that answer
// from memory or the local disk it gains nothing.
package known

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/recent"
	"github.com/mettle-build/mettle/elan/digest"
)

// The defaults of Options.
const (
	// DefaultWindow is an eighth of the minimal lifetime that Bazel 7 assumes.
	DefaultWindow = 3 * time.Hour / 8
	// DefaultMaxDigests is for some twenty builds of 50,000 blobs, in 24 MiB.
	DefaultMaxDigests = 1 << 20
)

// Options are those of New. Store alone is required.
type Options struct {
	// Store is asked about what is not known. It keeps what is used for Window
	// longer than anybody is promised.
	Store blob.Store
	// Window is for how long an answer is remembered. 0: DefaultWindow.
	Window time.Duration
	// MaxDigests bounds what is remembered. 0: DefaultMaxDigests.
	MaxDigests int
	// Registerer takes the metrics. nil: there are none.
	Registerer prometheus.Registerer
}

// Store is a store with a memory of what is in it. It is safe for concurrent
// use, and starts no goroutines.
type Store struct {
	blob.Store
	there *recent.Set

	// mu guards asked: the digests that the store is being asked about, each
	// with the call that asks.
	mu    sync.Mutex
	asked map[digest.Digest]*call

	byMemory, byStore prometheus.Counter
	unregister        func()
}

// call is a question on its way.
type call struct{ done chan struct{} } // closed when it is answered, or failed

// Closer is what New returns: a store, and the end of its metrics.
type Closer interface {
	blob.Store
	// Close takes the metrics from the registerer, and never fails. It does not
	// close the store inside.
	io.Closer
}

var _ Closer = (*Store)(nil)

// Close implements io.Closer.
func (s *Store) Close() error {
	s.unregister()
	return nil
}

// Unwrap returns the store inside.
func (s *Store) Unwrap() blob.Store { return s.Store }

// New returns a *Store, or one that is a blob.Remover and a blob.Checker
// besides, where the store inside has these abilities: it has to know what they
// find.
func New(o Options) (Closer, error) {
	switch {
	case o.Store == nil:
		return nil, errors.New("known: Options need a Store")
	case o.Window < 0 || o.MaxDigests < 0:
		return nil, fmt.Errorf("known: a window of %v and %d digests: both must not be negative", o.Window, o.MaxDigests)
	}
	if o.Window == 0 {
		o.Window = DefaultWindow
	}
	if o.MaxDigests == 0 {
		o.MaxDigests = DefaultMaxDigests
	}
	s := &Store{Store: o.Store, there: recent.New(o.MaxDigests, o.Window), asked: make(map[digest.Digest]*call)}
	answered := prometheus.NewCounterVec(prometheus.CounterOpts{
		Namespace: "elan", Subsystem: "known", Name: "answers_total",
		Help: "Blobs asked about, by who answered: the memory of what is there, or the store.",
	}, []string{"by"})
	s.byMemory, s.byStore = answered.WithLabelValues("memory"), answered.WithLabelValues("store")
	s.unregister = func() {}
	if o.Registerer != nil {
		if err := o.Registerer.Register(answered); err != nil {
			return nil, fmt.Errorf("known: %w", err)
		}
		s.unregister = func() { o.Registerer.Unregister(answered) }
	}
	r, removes := blob.As[blob.Remover](o.Store)
	c, checks := blob.As[blob.Checker](o.Store)
	switch {
	case removes && checks:
		return looking{s, remover{r, s}, checker{c, s}}, nil
	case removes:
		return removing{s, remover{r, s}}, nil
	case checks:
		return checking{s, checker{c, s}}, nil
	}
	return s, nil
}

func (s *Store) has(d digest.Digest) bool {
	var buf [recent.NameBytes]byte
	return d.IsEmpty() || s.there.Has(recent.AppendName(buf[:0], d))
}

func (s *Store) learn(d digest.Digest, at recent.Stamp) {
	var buf [recent.NameBytes]byte
	s.there.Add(recent.AppendName(buf[:0], d), at)
}

// heed forgets d where err says that it is not there, or not sound.
func (s *Store) heed(d digest.Digest, err error) {
	if errors.Is(err, blob.ErrNotFound) || errors.Is(err, blob.ErrCorrupt) {
		s.forget(d)
	}
}

func (s *Store) forget(d digest.Digest) {
	var buf [recent.NameBytes]byte
	s.there.Forget(recent.AppendName(buf[:0], d))
}

// Open implements blob.Opener.
func (s *Store) Open(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	r, err := s.Store.Open(ctx, d, offset)
	if err != nil {
		s.heed(d, err)
		return nil, err //nolint:wrapcheck // the store's own
	}
	return &reader{ReadCloser: r, s: s, d: d}, nil
}

// reader heeds what is found only when a blob is read.
type reader struct {
	io.ReadCloser
	s *Store
	d digest.Digest
}

func (r *reader) Read(p []byte) (int, error) {
	n, err := r.ReadCloser.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		r.s.heed(r.d, err)
	}
	return n, err
}

// Create implements blob.Creator.
func (s *Store) Create(ctx context.Context, d digest.Digest) (blob.Writer, error) {
	w, err := s.Store.Create(ctx, d)
	if err != nil {
		return nil, err //nolint:wrapcheck // the store's own
	}
	return &writer{Writer: w, s: s, d: d}, nil
}

type writer struct {
	blob.Writer
	s *Store
	d digest.Digest
}

func (w *writer) Commit() error {
	at := w.s.there.Now()
	err := w.Writer.Commit()
	if err == nil {
		w.s.learn(w.d, at)
	}
	return err
}

// The forms of a Store whose inside has more abilities.
type (
	looking struct {
		*Store
		remover
		checker
	}
	removing struct {
		*Store
		remover
	}
	checking struct {
		*Store
		checker
	}
)

type remover struct {
	inside blob.Remover
	s      *Store
}

// Remove implements blob.Remover.
func (r remover) Remove(ctx context.Context, d digest.Digest) error {
	err := r.inside.Remove(ctx, d)
	r.s.forget(d) // also after an error: who knows how far it came
	return err
}

type checker struct {
	inside blob.Checker
	s      *Store
}

// Check implements blob.Checker.
func (c checker) Check(ctx context.Context, d digest.Digest) error {
	err := c.inside.Check(ctx, d)
	c.s.heed(d, err)
	return err
}
