// Package observed is a decorator that counts and times what is asked of a
// store, under a name for each store or tier. elan/blob/open puts one around
// every store that it opens.
//
//	elan_store_calls_total{store,call,outcome}    calls: find, open, read, write, entry, put_entry, delete_entry
//	elan_store_call_seconds{store,call}           how long the same took, but for reads, which take as long as the client
//	elan_store_bytes_total{store,direction}       bytes of blobs and entries: read, written
//	elan_store_found_total{store,result}          blobs asked about by FindMissing: there, missing
//
// A write lasts from Create to Commit; one without a Commit is "abandoned". The
// hits of a tier are its calls of open with outcome ok, the misses those with
// not_found. With debug logs on, each call is one.
//
// In a trace that is recorded, each call is a span, such as "s3 open".
//
// It changes nothing of what the store does, and hides none of its abilities;
// what they do is not counted.
package observed

import (
	"cmp"
	"context"
	"errors"
	"io"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/trace"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/metrics/spans"
)

// Options are those of New. The zero Options are valid.
type Options struct {
	// Logger gets each call, at the level of debugging. nil: nobody does.
	Logger *slog.Logger
	// Registerer takes the metrics. nil: they are counted for nobody.
	Registerer prometheus.Registerer
}

// Observer has the metrics that all stores of a server share. It is safe for
// concurrent use.
type Observer struct {
	log   *slog.Logger
	reg   prometheus.Registerer
	calls *prometheus.CounterVec
	times *prometheus.HistogramVec
	bytes *prometheus.CounterVec
	found *prometheus.CounterVec
}

// New makes an Observer, which Close ends.
func New(o Options) (*Observer, error) {
	ob := &Observer{log: o.Logger, reg: o.Registerer}
	if ob.log == nil {
		ob.log = slog.New(slog.DiscardHandler)
	}
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: "elan", Subsystem: "store", Name: name, Help: help}, labels)
	}
	ob.calls = counter("calls_total", "Calls to a store, by what came of them.", "store", "call", "outcome")
	ob.bytes = counter("bytes_total", "Bytes of blobs and entries read from a store and written to it.", "store", "direction")
	ob.found = counter("found_total", "Blobs that a store was asked about by FindMissing.", "store", "result")
	ob.times = prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Namespace: "elan", Subsystem: "store", Name: "call_seconds", Help: "How long calls to a store took. A write lasts as long as its sender.",
		// From what memory takes, 10 µs, to what a bucket with retries does, 40 s.
		Buckets: prometheus.ExponentialBuckets(10e-6, 4, 12),
	}, []string{"store", "call"})
	if ob.reg == nil {
		return ob, nil
	}
	var err error
	for _, c := range ob.all() {
		err = errors.Join(err, ob.reg.Register(c))
	}
	if err != nil {
		ob.Close()
		return nil, err
	}
	return ob, nil
}

func (ob *Observer) all() []prometheus.Collector {
	return []prometheus.Collector{ob.calls, ob.times, ob.bytes, ob.found}
}

// Close takes the metrics from the registerer. The stores may be used further.
func (ob *Observer) Close() {
	if ob.reg == nil {
		return
	}
	for _, c := range ob.all() {
		ob.reg.Unregister(c)
	}
}

// call is one verb of one store.
type call struct {
	ob          *Observer
	store, name string
	span        string             // its name
	ok, absent  prometheus.Counter // the usual outcomes
	seconds     prometheus.Observer
}

func (ob *Observer) call(store, name string) call {
	return call{
		ob: ob, store: store, name: name, span: store + " " + name,
		ok: ob.calls.WithLabelValues(store, name, "ok"), absent: ob.calls.WithLabelValues(store, name, "not_found"),
		seconds: ob.times.WithLabelValues(store, name),
	}
}

// begin begins the span of a call of one blob or entry. It is costly to say which,
// where nobody is told.
func (c *call) begin(ctx context.Context, d digest.Digest) (context.Context, trace.Span) {
	ctx, span := spans.Start(ctx, c.span)
	if span.IsRecording() {
		spans.Text(span, spans.KeyDigest, d.String())
	}
	return ctx, span
}

// end ends a span. That a blob is not there is an answer.
func end(s trace.Span, err error) {
	if !s.IsRecording() {
		return
	}
	spans.Text(s, spans.KeyOutcome, outcome(err))
	if errors.Is(err, blob.ErrNotFound) {
		err = nil
	}
	spans.End(s, err)
}

// count counts a call's outcome.
func (c *call) count(outcome string) {
	switch outcome {
	case "ok":
		c.ok.Inc()
	case "not_found":
		c.absent.Inc()
	default:
		c.ob.calls.WithLabelValues(c.store, c.name, outcome).Inc()
	}
}

// done counts, times and logs a call of one blob or entry.
func (c *call) done(ctx context.Context, d digest.Digest, start time.Time, err error) {
	c.finish(ctx, start, err, slog.Any("digest", d))
}

func (c *call) finish(ctx context.Context, start time.Time, err error, what slog.Attr) {
	took := time.Since(start)
	c.count(outcome(err))
	c.seconds.Observe(took.Seconds())
	if c.ob.log.Enabled(ctx, slog.LevelDebug) {
		c.ob.log.LogAttrs(ctx, slog.LevelDebug, "store was called", slog.String("store", c.store), slog.String("call", c.name),
			what, slog.Duration("duration", took), slog.Any("error", err))
	}
}

// errAbandoned: a write without a Commit.
var errAbandoned = errors.New("abandoned")

// outcome is the class of an error, as a label.
func outcome(err error) string {
	if err == nil {
		return "ok"
	}
	for _, row := range [...]struct {
		class   error
		outcome string
	}{
		{blob.ErrNotFound, "not_found"},
		{context.Canceled, "cancelled"},
		{context.DeadlineExceeded, "cancelled"},
		{blob.ErrCorrupt, "corrupt"},
		{blob.ErrTooLarge, "too_large"},
		{blob.ErrFull, "full"},
		{blob.ErrUnavailable, "unavailable"},
	} {
		if errors.Is(err, row.class) {
			return row.outcome
		}
	}
	return "error"
}

// Store is a store that is observed. It is safe for concurrent use.
type Store struct {
	blob.Store
	find, open, read, write call
	bytesRead, bytesWritten prometheus.Counter
	there, missing          prometheus.Counter
}

var _ blob.Store = (*Store)(nil)

// Store observes s under a name, of which there are few in a server.
func (ob *Observer) Store(name string, s blob.Store) *Store {
	o := &Store{
		Store: s,
		find:  ob.call(name, "find"), open: ob.call(name, "open"), write: ob.call(name, "write"),
		read:      call{ob: ob, store: name, name: "read", ok: ob.calls.WithLabelValues(name, "read", "ok"), absent: ob.calls.WithLabelValues(name, "read", "not_found")},
		bytesRead: ob.bytes.WithLabelValues(name, "read"), bytesWritten: ob.bytes.WithLabelValues(name, "written"),
		there: ob.found.WithLabelValues(name, "there"), missing: ob.found.WithLabelValues(name, "missing"),
	}
	return o
}

// Unwrap returns the store inside.
func (s *Store) Unwrap() blob.Store { return s.Store }

// FindMissing implements blob.Finder.
func (s *Store) FindMissing(ctx context.Context, ds []digest.Digest) ([]digest.Digest, error) {
	start := time.Now()
	inside, span := spans.Start(ctx, s.find.span)
	spans.Int(span, spans.KeyDigests, int64(len(ds)))
	missing, err := s.Store.FindMissing(inside, ds)
	end(span, err)
	s.find.finish(ctx, start, err, slog.Int("digests", len(ds)))
	if err == nil {
		s.missing.Add(float64(len(missing)))
		s.there.Add(float64(len(ds) - len(missing)))
	}
	return missing, err //nolint:wrapcheck // the store's own
}

// Open implements blob.Opener.
func (s *Store) Open(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	start := time.Now()
	inside, span := s.open.begin(ctx, d)
	r, err := s.Store.Open(inside, d, offset)
	end(span, err)
	s.open.done(ctx, d, start, err)
	if err != nil {
		return nil, err //nolint:wrapcheck // the store's own
	}
	return &reader{ReadCloser: r, s: s}, nil
}

type reader struct {
	io.ReadCloser
	s      *Store
	n      int64
	err    error // of the last Read, unless it was the end
	closed bool
}

func (r *reader) Read(p []byte) (int, error) {
	n, err := r.ReadCloser.Read(p)
	r.n += int64(n)
	if err != nil && !errors.Is(err, io.EOF) && !r.closed {
		r.err = err
	}
	return n, err //nolint:wrapcheck // the store's own
}

func (r *reader) Close() error {
	if !r.closed {
		r.closed = true
		r.s.bytesRead.Add(float64(r.n))
		r.s.read.count(outcome(r.err))
	}
	return r.ReadCloser.Close() //nolint:wrapcheck // the store's own
}

// Create implements blob.Creator.
func (s *Store) Create(ctx context.Context, d digest.Digest) (blob.Writer, error) {
	start := time.Now()
	inside, span := s.write.begin(ctx, d)
	w, err := s.Store.Create(inside, d)
	if err != nil {
		end(span, err)
		s.write.done(ctx, d, start, err)
		return nil, err //nolint:wrapcheck // the store's own
	}
	o := &writer{Writer: w, s: s, span: span}
	// The log of a writer that is closed needs the context of its beginning.
	o.finish = func(err error) { s.write.done(ctx, d, start, err) }
	if at, ok := w.(io.ReaderAt); ok {
		return readableWriter{o, at}, nil
	}
	return o, nil
}

// readableWriter is a writer that shows what was written to it.
type readableWriter struct {
	*writer
	io.ReaderAt
}

var _ blob.PiecesWriter = (*writer)(nil)

type writer struct {
	blob.Writer
	s        *Store
	span     trace.Span // ends when it is finished
	finish   func(err error)
	n        int64
	err      error // of a Write
	finished bool
}

func (w *writer) Write(p []byte) (int, error) {
	n, err := w.Writer.Write(p)
	w.n += int64(n)
	if err != nil {
		w.err = err
	}
	return n, err //nolint:wrapcheck // the store's own
}

// WritePieces implements blob.PiecesWriter, whether the store's Writer does or not.
func (w *writer) WritePieces(pieces [][]byte) (int, error) {
	inner, ok := w.Writer.(blob.PiecesWriter)
	if !ok {
		total := 0
		for _, p := range pieces {
			n, err := w.Write(p)
			if total += n; err != nil {
				return total, err
			}
		}
		return total, nil
	}
	n, err := inner.WritePieces(pieces)
	w.n += int64(n)
	if err != nil {
		w.err = err
	}
	return n, err //nolint:wrapcheck // the store's own
}

func (w *writer) Commit() error {
	err := w.Writer.Commit()
	if !w.finished {
		w.finished = true
		w.s.bytesWritten.Add(float64(w.n))
		w.finish(err)
		spans.Int(w.span, spans.KeyBytes, w.n)
		end(w.span, err)
	}
	return err //nolint:wrapcheck // the store's own
}

func (w *writer) Close() error {
	if !w.finished {
		w.finished = true
		w.s.bytesWritten.Add(float64(w.n))
		end(w.span, cmp.Or(w.err, errAbandoned))
		if w.err != nil {
			w.finish(w.err)
		} else {
			w.s.write.count("abandoned")
		}
	}
	return w.Writer.Close() //nolint:wrapcheck // the store's own
}
