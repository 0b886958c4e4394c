package tiered

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/recent"
	"github.com/mettle-build/mettle/elan/digest"
)

const (
	// touchBatch is how many uses go into one FindMissing.
	touchBatch = 1000
	// touchLinger is how long a batch waits for others to join it.
	touchLinger = 100 * time.Millisecond
	// touchQueue bounds the uses that wait to be passed on.
	touchQueue = 20_000
	// touchTimeout bounds a FindMissing, and the restoring of one blob.
	touchTimeout = time.Minute
	// touchGrace is how long Close waits for what is queued.
	touchGrace = 5 * time.Second
)

// touches tells the authority of the uses of blobs that upper tiers serve, so
// that they live on where it counts, behind the callers' backs. A blob that the
// authority turns out to have no more is put back there from the copy that was
// read: its reader may count on it.
type touches struct {
	s      *Store
	recent *recent.Set // what the authority was told of
	queue  chan digest.Digest
	ending chan struct{} // closed by close
	cancel context.CancelFunc
	done   sync.WaitGroup
}

func newTouches(ctx context.Context, s *Store, r *recent.Set) *touches {
	t := &touches{s: s, recent: r, queue: make(chan digest.Digest, touchQueue), ending: make(chan struct{})}
	// Touches outlive the call that made the store, and end with close.
	ctx, t.cancel = context.WithCancel(context.WithoutCancel(ctx))
	t.done.Go(func() { t.run(ctx) })
	return t
}

// close passes on what is queued, for touchGrace at most.
func (t *touches) close() {
	close(t.ending)
	grace := time.AfterFunc(touchGrace, t.cancel)
	t.done.Wait()
	grace.Stop()
	t.cancel()
}

// told says that the authority was told of a use by the use itself.
func (t *touches) told(d digest.Digest) {
	var buf [recent.NameBytes]byte
	t.recent.Claim(recent.AppendName(buf[:0], d))
}

func (t *touches) forget(d digest.Digest) {
	var buf [recent.NameBytes]byte
	t.recent.Forget(recent.AppendName(buf[:0], d))
}

// add queues a use, unless there was one lately.
func (t *touches) add(d digest.Digest) {
	var buf [recent.NameBytes]byte
	if !t.recent.Claim(recent.AppendName(buf[:0], d)) {
		return
	}
	select {
	case t.queue <- d:
	default:
		t.s.metrics.touches.WithLabelValues("dropped").Inc()
		t.forget(d)
	}
}

func (t *touches) run(ctx context.Context) {
	for {
		select {
		case d := <-t.queue:
			t.tell(ctx, t.gather(d))
			continue
		case <-t.ending:
		}
		// What is queued before the end is passed on still.
		select {
		case d := <-t.queue:
			t.tell(ctx, t.gather(d))
		default:
			return
		}
	}
}

// gather takes what fits into a call with first.
func (t *touches) gather(first digest.Digest) []digest.Digest {
	linger := time.NewTimer(touchLinger)
	defer linger.Stop()
	select {
	case <-linger.C:
	case <-t.ending:
	}
	ds := []digest.Digest{first}
	for len(ds) < touchBatch {
		select {
		case d := <-t.queue:
			ds = append(ds, d)
		default:
			return ds
		}
	}
	return ds
}

// tell asks the authority for ds, which is a use.
func (t *touches) tell(ctx context.Context, ds []digest.Digest) {
	call, cancel := context.WithTimeout(ctx, touchTimeout)
	missing, err := t.s.authority.FindMissing(call, ds)
	cancel()
	if err != nil {
		for _, d := range ds {
			t.forget(d) // so that the next use tries again
		}
		t.s.metrics.touches.WithLabelValues("failed").Add(float64(len(ds)))
		t.s.log.Warn("uses of blobs could not be passed on, their next uses will be", "tier", t.s.name, "blobs", len(ds), "error", err)
		return
	}
	t.s.metrics.touches.WithLabelValues("ok").Add(float64(len(ds) - len(missing)))
	for _, d := range missing {
		if err := t.restore(ctx, d); err != nil {
			t.forget(d)
			t.s.metrics.touches.WithLabelValues("failed").Inc()
			t.s.log.Warn("a blob that was read is not in the last tier, and could not be put there", "tier", t.s.name, "digest", d, "error", err)
			continue
		}
		t.s.metrics.touches.WithLabelValues("restored").Inc()
	}
}

// restore puts a blob into the authority from an upper tier. It is verified on
// the way.
func (t *touches) restore(ctx context.Context, d digest.Digest) error {
	ctx, cancel := context.WithTimeout(ctx, touchTimeout)
	defer cancel()
	var all error
	for i := range t.s.uppers {
		tier := &t.s.uppers[i]
		r, err := tier.Store.Open(ctx, d, 0)
		if err == nil {
			err = errors.Join(blob.Receive(ctx, t.s.authority, d, r), r.Close())
		}
		if err == nil {
			return nil
		}
		if errors.Is(err, blob.ErrCorrupt) {
			t.s.drop(ctx, tier, d, err)
		}
		all = errors.Join(all, err)
	}
	return all
}
