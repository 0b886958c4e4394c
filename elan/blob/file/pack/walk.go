package pack

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"sync/atomic"
	"time"

	"github.com/mettle-build/mettle/elan/blob"
)

// Info is what All tells of a record.
type Info struct {
	Key, Value []byte // until the next one
	Mutable    bool
	// Bytes is what the record takes.
	Bytes   int64
	LastUse time.Time
}

// errEnough ends a scan early.
var errEnough = errors.New("enough")

// All yields each record, in the order of the segments, and is no use of them.
// It reads all that there is, once. What comes or goes meanwhile, and what Clean
// moves, may be left out or come twice. An error ends it.
func (s *Store) All(ctx context.Context) iter.Seq2[Info, error] {
	return func(yield func(Info, error) bool) {
		if err := s.waitRebuiltFor(ctx); err != nil {
			yield(Info{}, err)
			return
		}
		err := s.walk(ctx.Done(), func(l location, p *parsed, _ []byte) error {
			use, ok := s.index.at(s.secret.hash(p.Key), l)
			if !ok || p.dead {
				return nil
			}
			i := Info{Key: p.Key, Value: p.Value, Mutable: p.Mutable, Bytes: p.bytes, LastUse: time.Unix(int64(use), 0)}
			if !yield(i, nil) {
				return errEnough
			}
			return nil
		}, nil)
		switch {
		case err == nil, errors.Is(err, errEnough):
		case errors.Is(err, ErrStopped) && ctx.Err() != nil:
			yield(Info{}, ctx.Err())
		case errors.Is(err, ErrStopped):
			yield(Info{}, errClosed)
		default:
			yield(Info{}, err)
		}
	}
}

// walk scans each segment, and calls after, if it is not nil, when it did or
// failed to, with the error, which that may pass over.
func (s *Store) walk(done <-chan struct{}, visit func(location, *parsed, []byte) error, after func(*segment, error) error) error {
	all := s.segs.all()
	for _, id := range slices.Sorted(maps.Keys(all)) {
		err := s.scan(all[id], func(l location, p *parsed, raw []byte) error {
			if stopped(done) {
				return ErrStopped
			}
			return visit(l, p, raw)
		})
		if after != nil && !errors.Is(err, errGone) {
			err = after(all[id], err)
		}
		if err == nil {
			err = s.going(done) // an empty segment too
		}
		if err != nil && !errors.Is(err, errGone) {
			return fmt.Errorf("read segment %d: %w", id, err)
		}
	}
	return nil
}

// Verified is what Verify found.
type Verified struct {
	Records int64
	Bytes   int64
	Damaged int64 // records that were withdrawn
}

// Verify reads every record once and compares its checksum. One that is damaged
// is withdrawn, and Options.Damaged told. Before it goes on, after each MiB or
// so, it calls pace with how many bytes it read; pace waits as long as is good,
// and its error ends Verify. What Clean moves meanwhile may be left out. A segment
// that can't be read is passed over, and the error in the end.
func (s *Store) Verify(done <-chan struct{}, pace func(bytes int64) error) (Verified, error) {
	var v Verified
	if err := s.Count(done); err != nil {
		return v, err
	}
	var live, unpaced int64 // of this segment; since pace was called
	var unread error
	err := s.walk(done, func(l location, p *parsed, _ []byte) error {
		if _, ok := s.index.at(s.secret.hash(p.Key), l); ok && !p.dead {
			v.Records++
			v.Bytes += p.bytes
			live += p.bytes
		}
		if unpaced += p.bytes; unpaced < bufferBytes {
			return nil
		}
		n := unpaced
		unpaced = 0
		return pace(n)
	}, func(seg *segment, err error) error {
		want := seg.live.Load()
		found := live
		live = 0
		switch {
		case errors.Is(err, blob.ErrUnavailable):
			unread = cmp.Or(unread, fmt.Errorf("read segment %d: %w", seg.id, err))
			return nil
		case err != nil || found >= want:
			return err
		}
		n, err := s.verifySlots(done, seg)
		v.Damaged += n
		return err
	})
	return v, cmp.Or(err, unread)
}

// verifySlots reads the records of seg that the index knows, one by one, where
// a scan found fewer: some have come meanwhile, or something is damaged.
func (s *Store) verifySlots(done <-chan struct{}, seg *segment) (damaged int64, err error) {
	type slot struct {
		h hashed
		l location
	}
	for n := range s.index.shard {
		var slots []slot
		sh := &s.index.shard[n]
		sh.mu.RLock()
		for i := range sh.t.length() {
			if l := sh.t.location(i); l.isRecord() && l.segment() == seg.id {
				w := sh.t.slot(i)
				slots = append(slots, slot{h: hashed{a: w[0], b: atomic.LoadUint64(&w[1])}, l: l})
			}
		}
		sh.mu.RUnlock()
		for _, at := range slots {
			if err := s.going(done); err != nil {
				return damaged, err
			}
			ok, err := s.verifySlot(at.h, at.l)
			if err != nil {
				return damaged, err
			}
			if !ok {
				damaged++
			}
		}
	}
	return damaged, nil
}

// verifySlot reports whether the record of h is right, if it still is at l, and
// withdraws it otherwise.
func (s *Store) verifySlot(h hashed, l location) (bool, error) {
	raw := make([]byte, l.bytes())
	err := s.read(l, raw)
	if errors.Is(err, errGone) {
		return true, nil
	}
	if err == nil {
		if p, ok := s.secret.parse(raw); ok && !p.dead {
			if got := s.secret.hash(p.Key); got.a == h.a && got.b>>32 == h.b>>32 {
				return true, nil
			}
		}
	} else if !isEnd(err) {
		return false, err
	}
	return !s.withdraw(h, l, raw), nil
}
