package tiered

import (
	"context"
	"fmt"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

var errClosing = fmt.Errorf("%w: it is being closed", blob.ErrUnavailable)

// flight is one blob being fetched, for all who ask for it meanwhile. It runs in
// a goroutine of its own, so that no reader holds up another, and ends early
// only when all have left.
type flight struct {
	d      digest.Digest
	cancel context.CancelFunc // of the fetching
	done   chan struct{}      // closed when err and what is below it are set
	err    error
	from   string        // the tier that had it
	data   []byte        // of a small blob, verified
	part   *part         // of a large one, set from the beginning
	over   chan struct{} // closed when it is finished: the blob is in the tiers, if they took it

	// Guarded by Store.mu.
	readers  int
	landed   bool // nothing is fetched any more, and the readers may go
	finished bool // the goroutine is over
	grounded bool // the blob was removed: upper tiers don't get it
}

// join has part in the flight of a small blob, beginning it if need be; leave is
// called once for it. nil: there is no memory for another one.
func (s *Store) join(ctx context.Context, d digest.Digest) *flight {
	s.mu.Lock()
	defer s.mu.Unlock()
	if f, ok := s.flights[d]; ok {
		f.readers++
		s.metrics.joined.Inc()
		return f
	}
	if !s.memory.TryAcquire(d.Size()) {
		return nil
	}
	f, own := s.begin(ctx, d)
	s.running.Go(func() { s.fetch(own, f) })
	return f
}

// begin makes a flight with one reader. The context that it returns is the
// flight's: it has the values of the first reader's, and not its end. The caller
// holds mu.
func (s *Store) begin(ctx context.Context, d digest.Digest) (*flight, context.Context) {
	own, cancel := context.WithCancel(context.WithoutCancel(ctx))
	f := newFlight(d, cancel)
	s.flights[d] = f
	return f, own
}

func newFlight(d digest.Digest, cancel context.CancelFunc) *flight {
	return &flight{d: d, cancel: cancel, done: make(chan struct{}), over: make(chan struct{}), readers: 1}
}

// leave ends a reader's part in a flight.
func (s *Store) leave(f *flight) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f.readers--
	if f.readers > 0 {
		return
	}
	if !f.landed {
		// Nobody waits for it. Whoever comes now begins anew.
		f.cancel()
		s.remove(f)
	}
	s.settle(f)
}

// remove takes a flight from those that can be joined. The caller holds mu.
func (s *Store) remove(f *flight) {
	if s.flights[f.d] == f {
		delete(s.flights, f.d)
	}
}

// settle gives back what a flight holds that nobody uses. The caller holds mu.
func (s *Store) settle(f *flight) {
	switch {
	case !f.finished || f.readers > 0:
	case f.part != nil:
		s.fills.Release(1)
	default:
		f.data = nil
		s.memory.Release(f.d.Size())
	}
}

// land lets the readers go on: the blob is here, or the error is.
func (s *Store) land(f *flight) {
	s.mu.Lock()
	f.landed = true
	if f.err != nil {
		s.remove(f) // whoever comes now asks again
	}
	s.mu.Unlock()
	close(f.done)
}

// finish ends the goroutine of a flight.
func (s *Store) finish(f *flight) {
	f.cancel()
	s.mu.Lock()
	defer s.mu.Unlock()
	f.finished = true
	close(f.over)
	s.remove(f)
	s.settle(f)
}

// ground keeps a flight from filling upper tiers with a blob that was removed.
func (s *Store) ground(d digest.Digest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if f, ok := s.flights[d]; ok {
		f.grounded = true
		s.remove(f)
	}
}

func (s *Store) isGrounded(f *flight) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return f.grounded
}

// fetch is the flight of a small blob.
func (s *Store) fetch(ctx context.Context, f *flight) {
	defer s.finish(f)
	at := s.find(ctx, f)
	if ctx.Err() != nil && f.err != nil {
		f.err = errClosing // or nobody is there to see it
	}
	s.land(f)
	if f.err != nil {
		return
	}
	// The readers have it; newcomers join until it is in the tiers.
	s.fillTiers(ctx, f, at)
}

// find reads a small blob, and returns the number of the tier that has it.
func (s *Store) find(ctx context.Context, f *flight) int {
	for i := range s.uppers {
		t := &s.uppers[i]
		if !t.takes(f.d) {
			continue
		}
		data, err := read(ctx, t.Store, f.d, t.Trusted)
		if err == nil {
			f.data, f.from = data, t.Name
			return i
		}
		if f.err = ctx.Err(); f.err != nil {
			return 0
		}
		s.passedOver(ctx, t, f.d, err)
	}
	f.from = s.name
	f.data, f.err = read(ctx, s.authority, f.d, false)
	return len(s.uppers)
}

// read reads a small blob, verified unless its store is trusted.
func read(ctx context.Context, o blob.Opener, d digest.Digest, trusted bool) ([]byte, error) {
	data, err := blob.ReadAll(ctx, o, d, WholeBytes)
	if err != nil || trusted {
		return data, err //nolint:wrapcheck // it says what was read
	}
	return verified(d, data)
}

// verified is data if it is d.
func verified(d digest.Digest, data []byte) ([]byte, error) {
	if got := digest.Of(d.Function(), data); got != d.Plain() {
		return nil, fmt.Errorf("%w: the bytes have digest %s", blob.ErrCorrupt, got)
	}
	return data, nil
}
