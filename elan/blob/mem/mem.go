// Package mem is a blob.Store, with the entries of an ActionCache, in this
// process's memory: for tests, and for small fast tiers in front of others. It
// is bounded, and evicts what was used least recently once it is out of its
// lifetime. Everything is gone with the process.
//
// It does not verify (blob.Receive does) and starts no goroutine. Packages'
// tests and elan/blob/open (for mem:// URLs) make it.
package mem

import (
	"bytes"
	"container/list"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// The defaults of Options.
const (
	DefaultMaxBytes = 1 << 30
	// DefaultMinLifetime is what Bazel 7 and later assume.
	DefaultMinLifetime = 3 * time.Hour
	// overhead is what an item takes beside its bytes: digest, list element
	// and map cell.
	overhead = 256
)

// Options configure a Store. The zero Options are valid.
type Options struct {
	// MaxBytes bounds blobs and entries together, with 256 bytes for each on
	// top of its own. 0: DefaultMaxBytes.
	MaxBytes int64
	// MinLifetime is for how long a blob or an entry stays, at least, after its
	// last use. 0: DefaultMinLifetime.
	MinLifetime time.Duration
	// Containers makes it a blob.ContainerStore.
	Containers bool
	// Registerer takes the metrics. nil: there are none.
	Registerer prometheus.Registerer
}

// Store is blobs and entries in memory. All methods are safe for concurrent use.
type Store struct {
	max         int64
	minLifetime time.Duration
	containers  bool
	metrics     *metrics

	mu    sync.Mutex            // guards what follows
	used  int64                 // bytes of all items, and of the blobs being written
	items map[any]*list.Element // of *item, by digest.Digest or blob.EntryKey
	lru   *list.List            // of *item, the last used one in front
	// What was refused last for lack of room, and when.
	full   error
	fullAt time.Time
}

// item is one blob or entry. Its data is never changed.
type item struct {
	key  any
	data []byte
	used time.Time
}

func (i *item) cost() int64 { return int64(len(i.data)) + overhead }

var (
	_ blob.Store   = (*Store)(nil)
	_ blob.Entries = (*Store)(nil)
	_ blob.Fuller  = (*Store)(nil)
	_ io.Closer    = (*Store)(nil)

	_ blob.ContainerStore = (*Store)(nil)
)

// New makes an empty Store. Where there is a Registerer, Close takes the metrics
// back.
func New(o Options) (*Store, error) {
	if o.MaxBytes < 0 || o.MinLifetime < 0 {
		return nil, fmt.Errorf("memory store: %d bytes and a lifetime of %v: both must not be negative", o.MaxBytes, o.MinLifetime)
	}
	if o.MaxBytes == 0 {
		o.MaxBytes = DefaultMaxBytes
	}
	if o.MinLifetime == 0 {
		o.MinLifetime = DefaultMinLifetime
	}
	s := &Store{max: o.MaxBytes, minLifetime: o.MinLifetime, containers: o.Containers, items: make(map[any]*list.Element), lru: list.New()}
	var err error
	if s.metrics, err = newMetrics(o.Registerer, s); err != nil {
		return nil, fmt.Errorf("memory store: %w", err)
	}
	return s, nil
}

// Close takes the metrics back. It frees nothing that the collection of garbage
// does not, and the Store may be used on. Closing again does nothing.
func (s *Store) Close() error {
	s.metrics.unregister()
	return nil
}

// Full implements blob.Fuller.
func (s *Store) Full() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.full == nil || time.Since(s.fullAt) > blob.FullFor {
		return nil
	}
	return s.full
}

// FindMissing implements blob.Finder.
func (s *Store) FindMissing(ctx context.Context, ds []digest.Digest) ([]digest.Digest, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("find blobs: %w", err)
	}
	var missing []digest.Digest
	seen := make(map[digest.Digest]struct{})
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, d := range ds {
		if d.IsZero() {
			return nil, fmt.Errorf("find blobs: %w: a digest is absent", digest.ErrInvalid)
		}
		if _, ok := s.use(d); ok || d.IsEmpty() {
			continue
		}
		if _, again := seen[d]; !again {
			seen[d] = struct{}{}
			missing = append(missing, d)
		}
	}
	return missing, nil
}

// use returns the data of key, and starts its lifetime anew. The caller holds mu.
func (s *Store) use(key any) ([]byte, bool) {
	e, ok := s.items[key]
	if !ok {
		return nil, false
	}
	s.lru.MoveToFront(e)
	it := e.Value.(*item)
	it.used = time.Now()
	return it.data, true
}

// Open implements blob.Opener. The reader has ReadAt too.
func (s *Store) Open(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	if err := checkCall(ctx, d); err != nil {
		return nil, fmt.Errorf("open blob %s: %w", d, err)
	}
	if offset < 0 || offset > s.limit(d) {
		return nil, fmt.Errorf("open blob %s: offset %d is outside of it", d, offset)
	}
	s.mu.Lock()
	data, ok := s.use(d)
	s.mu.Unlock()
	if !ok && !d.IsEmpty() {
		return nil, fmt.Errorf("open blob %s: %w", d, blob.ErrNotFound)
	}
	return &reader{cancelled: ctx.Err, data: data, off: offset}, nil
}

func checkCall(ctx context.Context, d digest.Digest) error {
	if d.IsZero() {
		return fmt.Errorf("%w: the digest is absent", digest.ErrInvalid)
	}
	return ctx.Err()
}

type reader struct {
	cancelled func() error // the Err of the context that bounds the reading
	data      []byte
	off       int64
}

func (r *reader) Read(p []byte) (int, error) {
	n, err := r.ReadAt(p, r.off)
	r.off += int64(n)
	if n > 0 && errors.Is(err, io.EOF) {
		err = nil
	}
	return n, err
}

// ReadAt counts from the blob's first byte.
func (r *reader) ReadAt(p []byte, off int64) (int, error) {
	if err := r.cancelled(); err != nil {
		return 0, err
	}
	if off >= int64(len(r.data)) {
		return 0, io.EOF
	}
	n := copy(p, r.data[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (r *reader) Close() error { return nil }

// Create implements blob.Creator. The blob's size counts from now on; its
// memory is taken as the bytes come.
func (s *Store) Create(ctx context.Context, d digest.Digest) (blob.Writer, error) {
	if err := checkCall(ctx, d); err != nil {
		return nil, fmt.Errorf("create blob %s: %w", d, err)
	}
	w := &writer{s: s, ctxErr: ctx.Err, d: d}
	if d.IsEmpty() {
		return w, nil
	}
	if d.Size() > s.max-overhead { // first, so that the sum below can't overflow
		return nil, fmt.Errorf("create blob %s: %w: the store holds %d bytes", d, blob.ErrTooLarge, s.max)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, there := s.use(d); there {
		w.there = true
		return w, nil
	}
	need := d.Size() + overhead
	if s.containers {
		need = overhead // and its bytes as they come
	}
	if err := s.reserve(need); err != nil {
		return nil, fmt.Errorf("create blob %s: %w", d, err)
	}
	w.reserved = need
	return w, nil
}

// KeepsContainers implements blob.ContainerStore.
func (s *Store) KeepsContainers() bool { return s.containers }

// limit is how many bytes are kept under d at most.
func (s *Store) limit(d digest.Digest) int64 {
	if s.containers && !d.IsEmpty() {
		return blob.MaxContainer(d.Size())
	}
	return d.Size()
}

// reserve counts n bytes, evicting what is out of its lifetime if there is no
// room. The caller holds mu.
func (s *Store) reserve(n int64) error {
	if n > s.max {
		return fmt.Errorf("%w: the store holds %d bytes", blob.ErrTooLarge, s.max)
	}
	now := time.Now()
	for s.used+n > s.max {
		e := s.lru.Back()
		if e == nil || now.Sub(e.Value.(*item).used) <= s.minLifetime {
			s.metrics.refused.Inc()
			s.full = fmt.Errorf("%w: %d of %d bytes used, and nothing is older than the minimal lifetime of %v", blob.ErrFull, s.used, s.max, s.minLifetime)
			s.fullAt = now
			return s.full
		}
		s.metrics.evict(e.Value.(*item), now)
		s.remove(e)
	}
	s.used += n
	return nil
}

// remove forgets an item. The caller holds mu.
func (s *Store) remove(e *list.Element) {
	it := s.lru.Remove(e).(*item)
	delete(s.items, it.key)
	s.used -= it.cost()
}

// add puts in an item whose cost is counted already. The caller holds mu.
func (s *Store) add(it *item) {
	it.used = time.Now()
	s.items[it.key] = s.lru.PushFront(it)
}

// writer collects one blob.
type writer struct {
	s        *Store
	ctxErr   func() error // of the context that bounds the writing
	d        digest.Digest
	there    bool  // the blob is in the store already, its bytes are counted only
	n        int64 // bytes written
	data     []byte
	reserved int64 // counted in s.used for this writer
	closed   bool
}

// firstBytes bounds what is allocated on the word of a digest alone.
const firstBytes = 1 << 20

func (w *writer) Write(p []byte) (int, error) {
	if err := w.ctxErr(); err != nil {
		return 0, err
	}
	if w.closed {
		return 0, errors.New("write to a closed blob")
	}
	had, limit := w.n, w.s.limit(w.d)
	w.n += int64(len(p))
	switch {
	case w.n < 0 || w.n > limit:
		w.n = limit + 1 // so that it can't be committed any more
		return 0, fmt.Errorf("%w: more than the %d bytes of %s", blob.ErrCorrupt, w.d.Size(), w.d)
	case w.there:
		return len(p), nil
	case w.s.containers:
		if err := w.reserve(int64(len(p))); err != nil {
			w.n = limit + 1
			return 0, err
		}
	}
	if w.n > int64(cap(w.data)) {
		first := min(w.d.Size(), firstBytes)
		if w.s.containers {
			first = 0 // it is for being small
		}
		grown := make([]byte, had, min(limit, max(w.n, 2*had, first)))
		copy(grown, w.data)
		w.data = grown
	}
	w.data = append(w.data, p...)
	return len(p), nil
}

// reserve counts n bytes more.
func (w *writer) reserve(n int64) error {
	w.s.mu.Lock()
	defer w.s.mu.Unlock()
	if err := w.s.reserve(n); err != nil {
		return err
	}
	w.reserved += n
	return nil
}

func (w *writer) Commit() error {
	if err := w.ctxErr(); err != nil {
		return err
	}
	if w.closed {
		return errors.New("commit of a closed blob")
	}
	if w.n != w.d.Size() && !w.s.containers || w.n > w.s.limit(w.d) {
		return fmt.Errorf("%w: %d bytes of %s were written", blob.ErrCorrupt, w.n, w.d)
	}
	if w.d.IsEmpty() {
		return nil
	}
	if w.s.containers {
		w.data = bytes.Clone(w.data) // without the room that was left to grow
	}
	w.s.mu.Lock()
	defer w.s.mu.Unlock()
	switch _, there := w.s.use(w.d); {
	case there:
		return nil // Close takes the reservation back
	case w.there:
		return fmt.Errorf("%w: %s was evicted while it was written again", blob.ErrUnavailable, w.d)
	}
	w.s.add(&item{key: w.d, data: w.data})
	w.reserved = 0
	return nil
}

func (w *writer) Close() error {
	w.closed, w.data = true, nil
	w.s.mu.Lock()
	defer w.s.mu.Unlock()
	w.s.used -= w.reserved
	w.reserved = 0
	return nil
}

// Entry implements blob.Entries.
func (s *Store) Entry(ctx context.Context, k blob.EntryKey) ([]byte, error) {
	if err := checkCall(ctx, k.Action); err != nil {
		return nil, fmt.Errorf("entry %s: %w", k.Action, err)
	}
	s.mu.Lock()
	data, ok := s.use(k)
	s.mu.Unlock()
	if !ok {
		return nil, fmt.Errorf("entry %s: %w", k.Action, blob.ErrNotFound)
	}
	return append([]byte(nil), data...), nil
}

// PutEntry implements blob.Entries.
func (s *Store) PutEntry(ctx context.Context, k blob.EntryKey, value []byte) error {
	if err := checkCall(ctx, k.Action); err != nil {
		return fmt.Errorf("put entry %s: %w", k.Action, err)
	}
	it := &item{key: k, data: append([]byte(nil), value...)}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.reserve(it.cost()); err != nil {
		return fmt.Errorf("put entry %s: %w", k.Action, err)
	}
	if old, ok := s.items[k]; ok {
		s.remove(old)
	}
	s.add(it)
	return nil
}

// DeleteEntry implements blob.Entries.
func (s *Store) DeleteEntry(ctx context.Context, k blob.EntryKey) error {
	if err := checkCall(ctx, k.Action); err != nil {
		return fmt.Errorf("delete entry %s: %w", k.Action, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if e, ok := s.items[k]; ok {
		s.remove(e)
	}
	return nil
}
