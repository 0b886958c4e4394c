package tiered

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

const (
	// batchBytes and batchBlobs bound what is fetched together: a message's bytes,
	// and few enough blobs that one batch is put into the tiers while the next travels.
	batchBytes = 4 << 20
	batchBlobs = 1024
	// fetchesAtOnce is how many batches and large blobs of one Fetch are under way
	// at a time. Those of all are bounded by Options.MaxFillBytes and MaxFills.
	fetchesAtOnce = 8
	// fillsAtOnce is how many blobs of a batch are put into the tiers at a time.
	fillsAtOnce = 8
)

// Fetch implements blob.Fetcher: small blobs come in batches, large ones stream, and
// what another call is fetching is waited for.
func (l local) Fetch(ctx context.Context, ds []digest.Digest) (missing []digest.Digest, err error) {
	if l.t == nil {
		return l.s.authority.FindMissing(ctx, ds) //nolint:wrapcheck // the store's own
	}
	absent, err := l.t.Store.FindMissing(ctx, ds)
	if err != nil {
		if ctx.Err() == nil {
			l.s.log.Warn("a tier failed, and nothing is fetched into it", "tier", l.t.Name, "error", err)
			return nil, nil
		}
		return nil, err //nolint:wrapcheck // the store's own
	}
	if len(absent) == 0 {
		return nil, nil
	}
	var mu sync.Mutex // guards missing
	note := func(d digest.Digest, err error) error {
		if !errors.Is(err, blob.ErrNotFound) {
			return fmt.Errorf("fetch blob %s: %w", d, err)
		}
		mu.Lock()
		defer mu.Unlock()
		missing = append(missing, d)
		return nil
	}
	batches, large := l.s.split(slices.DeleteFunc(absent, func(d digest.Digest) bool { return !l.t.takes(d) }))
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(fetchesAtOnce)
	for _, batch := range batches {
		group.Go(func() error { return l.s.fetchBatch(ctx, batch, note) })
	}
	for _, d := range large {
		if d.Size() <= WholeBytes {
			continue // there is no memory for it: it is read without being kept
		}
		group.Go(func() error { return l.s.fetchLarge(ctx, l.t, d, note) })
	}
	err = group.Wait()
	return missing, err //nolint:wrapcheck // it says of what
}

// split divides ds into batches, and what is too large for one.
func (s *Store) split(ds []digest.Digest) (batches [][]digest.Digest, large []digest.Digest) {
	limit := min(batchBytes, s.maxFillBytes)
	begin, sum := 0, int64(0)
	small := make([]digest.Digest, 0, len(ds))
	for _, d := range ds {
		if d.Size() > min(WholeBytes, limit) {
			large = append(large, d)
			continue
		}
		if sum += d.Size(); sum > limit || len(small)-begin == batchBlobs {
			batches = append(batches, small[begin:])
			begin, sum = len(small), d.Size()
		}
		small = append(small, d)
	}
	if begin < len(small) {
		batches = append(batches, small[begin:])
	}
	return batches, large
}

// fetchLarge fetches one large blob into t. Where there is no room for its flight,
// it is left to whoever reads it.
func (s *Store) fetchLarge(ctx context.Context, t *Tier, d digest.Digest, note func(digest.Digest, error) error) error {
	f := s.joinLarge(ctx, t, d)
	if f == nil {
		return nil
	}
	defer s.leave(f)
	select {
	case <-f.done:
	case <-ctx.Done():
		return ctx.Err() //nolint:wrapcheck // as it is
	}
	switch {
	case errors.Is(f.err, errNotKept):
		return nil
	case f.err != nil:
		return note(d, f.err)
	}
	s.hit(s.name, d)
	return nil
}

// fetchBatch fetches small blobs into the upper tiers. It waits for memory with
// nothing in its hands, so that no two of them wait for each other.
func (s *Store) fetchBatch(ctx context.Context, ds []digest.Digest, note func(digest.Digest, error) error) error {
	total := int64(0)
	for _, d := range ds {
		total += d.Size()
	}
	if err := s.memory.Acquire(ctx, total); err != nil {
		return err //nolint:wrapcheck // the context's own
	}
	flights := s.joinBatch(ctx, ds)
	for i, f := range flights {
		select {
		case <-f.over:
		case <-ctx.Done():
			for _, f := range flights[i:] {
				s.leave(f)
			}
			return ctx.Err() //nolint:wrapcheck // as it is
		}
		if err := s.fetched(f, note); err != nil {
			for _, f := range flights[i:] {
				s.leave(f)
			}
			return err
		}
		s.leave(f)
	}
	return nil
}

// fetched looks at a flight that is over.
func (s *Store) fetched(f *flight, note func(digest.Digest, error) error) error {
	if f.err != nil {
		return note(f.d, f.err)
	}
	s.hit(f.from, f.d)
	return nil
}

// joinBatch has part in the flights of small blobs, for all of which there is
// memory, and begins those that there are not yet, together.
func (s *Store) joinBatch(ctx context.Context, ds []digest.Digest) []*flight {
	flights := make([]*flight, len(ds))
	t := &together{}
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, d := range ds {
		if f, ok := s.flights[d]; ok {
			f.readers++
			s.metrics.joined.Inc()
			s.memory.Release(d.Size()) // it has its own
			flights[i] = f
			continue
		}
		f := newFlight(d, sync.OnceFunc(t.leave))
		s.flights[d] = f
		flights[i], t.flights = f, append(t.flights, f)
	}
	if t.left = len(t.flights); t.left == 0 {
		return flights
	}
	own, cancel := context.WithCancel(context.WithoutCancel(ctx))
	t.cancel = cancel
	s.running.Go(func() {
		defer cancel()
		s.fetchTogether(own, t.flights)
	})
	return flights
}

// together is flights of one batch, which ends early when all of them are to.
type together struct {
	flights []*flight
	cancel  context.CancelFunc

	mu   sync.Mutex // guards left
	left int        // flights that are wanted
}

// leave is called once for each flight: when nobody wants it, or it is over.
func (t *together) leave() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.left--; t.left == 0 {
		t.cancel()
	}
}

// fetchTogether is the flight of several small blobs.
func (s *Store) fetchTogether(ctx context.Context, flights []*flight) {
	var fills errgroup.Group
	fills.SetLimit(fillsAtOnce)
	flights = s.notAbove(ctx, flights, &fills)
	ds := make([]digest.Digest, len(flights))
	for i, f := range flights {
		ds[i] = f.d
	}
	if len(ds) == 0 {
		_ = fills.Wait() // nil
		return
	}
	var mu sync.Mutex // guards came
	came := make([]bool, len(flights))
	err := blob.ReadBatch(ctx, s.authority, ds, func(i int, data []byte, err error) {
		mu.Lock()
		again := came[i]
		came[i] = true
		mu.Unlock()
		if again {
			return
		}
		f := flights[i]
		f.from, f.data, f.err = s.name, data, err
		if err == nil {
			f.data, f.err = verified(f.d, data)
		}
		s.land(f)
		fills.Go(func() error {
			defer s.finish(f)
			if f.err == nil {
				s.fillTiers(ctx, f, len(s.uppers))
			}
			return nil
		})
	})
	for i, f := range flights {
		if came[i] {
			continue
		}
		if f.err = err; err == nil {
			f.err = fmt.Errorf("%w: the store %s said nothing of it", blob.ErrUnavailable, s.name)
		}
		if ctx.Err() != nil {
			f.err = errClosing // or nobody is there to see it
		}
		s.land(f)
		s.finish(f)
	}
	_ = fills.Wait() // nil
}

// notAbove are those of flights whose blobs are in no upper tier. The others, which
// another flight has put there a moment ago or a lower tier has, go by themselves.
func (s *Store) notAbove(ctx context.Context, flights []*flight, fills *errgroup.Group) []*flight {
	above := map[digest.Digest]bool{}
	for i := range s.uppers {
		t := &s.uppers[i]
		var ds []digest.Digest
		for _, f := range flights {
			if t.takes(f.d) && !above[f.d] {
				ds = append(ds, f.d)
			}
		}
		absent, err := t.Store.FindMissing(ctx, ds)
		if err != nil {
			continue // it is passed over
		}
		for _, d := range ds {
			above[d] = true
		}
		for _, d := range absent {
			above[d] = false
		}
	}
	return slices.DeleteFunc(slices.Clone(flights), func(f *flight) bool {
		if above[f.d] {
			fills.Go(func() error { s.fetch(ctx, f); return nil })
		}
		return above[f.d]
	})
}

// fillTiers puts a blob into the upper tiers above the one that had it.
func (s *Store) fillTiers(ctx context.Context, f *flight, at int) {
	fill, cancel := context.WithTimeout(ctx, fillTimeout)
	defer cancel()
	for i := range at {
		t := &s.uppers[i]
		if !t.takes(f.d) || s.isGrounded(f) {
			continue
		}
		err := blob.WriteBytes(fill, t.Store, f.d, f.data)
		s.metrics.fill(t.Name, err)
		if err != nil {
			s.log.Debug("a blob was not put into a tier", "tier", t.Name, "digest", f.d, "error", err)
		}
	}
}
