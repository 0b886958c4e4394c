package bucket

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/recent"
)

const (
	// touchWorkers make the touches of buckets that take them one by one. Where
	// they go in batches there is one, so that the batches get full.
	touchWorkers = 8
	// touchLinger is how long a batch waits for others to join it.
	touchLinger = 100 * time.Millisecond
	// touchQueue bounds the uses that wait to be written: those of one large
	// FindMissing.
	touchQueue = 20_000
	// maxRecent bounds the names that are remembered, in 6 MiB. One that is
	// forgotten too early costs a request.
	maxRecent = 1 << 18
	// touchGrace is how long Close waits for them.
	touchGrace = 5 * time.Second
)

// touches writes uses to the bucket, behind the callers' backs. None of them is
// owed to anybody: a blob whose use was not written is found to be close to its
// end in time, see Store.usable. So what does not fit into the queue is dropped,
// and what fails waits for the next use.
type touches struct {
	s      *Store
	recent *recent.Set // the names whose last use is written, or queued
	queue  chan Object
	ending chan struct{} // closed by close
	cancel context.CancelFunc
	done   sync.WaitGroup
}

func newTouches(ctx context.Context, s *Store) *touches {
	t := &touches{
		s:      s,
		recent: recent.New(maxRecent, s.o.TouchEvery/2),
		queue:  make(chan Object, touchQueue),
		ending: make(chan struct{}),
	}
	// Touches outlive the call that made the store, and end with close.
	ctx, t.cancel = context.WithCancel(context.WithoutCancel(ctx))
	workers := touchWorkers
	if s.driver.BatchSize > 1 {
		workers = 1
	}
	for range workers {
		t.done.Go(func() { t.run(ctx) })
	}
	return t
}

// close writes what is queued, for touchGrace at most.
func (t *touches) close() {
	close(t.ending)
	grace := time.AfterFunc(touchGrace, t.cancel)
	t.done.Wait()
	grace.Stop()
	t.cancel()
}

// fresh says that the use of an object was written lately.
func (t *touches) fresh(name string) { t.recent.Claim([]byte(name)) }

// forget says that nothing is known of an object any more.
func (t *touches) forget(name string) { t.recent.Forget([]byte(name)) }

// seen looks after an object that is being read: where its last use is not
// known, or long ago, it is queued.
func (t *touches) seen(o Object) {
	if !o.Used.IsZero() && time.Since(o.Used) < t.s.o.TouchEvery {
		t.fresh(o.Name)
		return
	}
	t.add(o)
}

// add queues an object, unless it was lately.
func (t *touches) add(o Object) {
	if !t.recent.Claim([]byte(o.Name)) {
		return
	}
	select {
	case t.queue <- o:
	default:
		t.s.metrics.dropped.Inc()
		t.forget(o.Name)
	}
}

func (t *touches) run(ctx context.Context) {
	for {
		select {
		case o := <-t.queue:
			t.write(ctx, t.gather(o))
			continue
		case <-t.ending:
		}
		// What is queued before the end is written still.
		select {
		case o := <-t.queue:
			t.write(ctx, t.gather(o))
		default:
			return
		}
	}
}

// gather takes what fits into a request with first.
func (t *touches) gather(first Object) []Object {
	os := []Object{first}
	if t.s.driver.BatchSize > 1 {
		linger := time.NewTimer(touchLinger)
		defer linger.Stop()
		select {
		case <-linger.C:
		case <-t.ending:
		}
	}
	for len(os) < t.s.driver.BatchSize {
		select {
		case o := <-t.queue:
			os = append(os, o)
		default:
			return os
		}
	}
	return os
}

// write touches those of os, at most BatchSize, that need it.
func (t *touches) write(ctx context.Context, os []Object) {
	stale, err := t.stale(ctx, os)
	if err == nil && len(stale) > 0 {
		err = t.s.try(ctx, "touch", func(ctx context.Context) error {
			var failed error
			again := stale[:0]
			for i, err := range t.s.driver.Touch(ctx, stale) {
				switch {
				case err == nil, errors.Is(err, ErrChanged):
				case errors.Is(err, blob.ErrNotFound):
					t.forget(stale[i].Name)
				default:
					again = append(again, stale[i])
					if failed == nil || !transient(err) {
						failed = err
					}
				}
			}
			stale = again
			return failed
		})
	}
	if err != nil {
		for _, o := range os {
			t.forget(o.Name) // so that the next use tries again
		}
		t.s.log.Warn("uses of objects could not be written, their next uses will be", "objects", len(os), "error", err)
	}
}

// stale returns those of os that are there and were not used for TouchEvery,
// after asking for those of which it is not known.
func (t *touches) stale(ctx context.Context, os []Object) ([]Object, error) {
	var stale []Object
	var names []string
	for _, o := range os {
		if o.Used.IsZero() {
			names = append(names, o.Name)
		} else {
			stale = append(stale, o)
		}
	}
	if len(names) == 0 {
		return stale, nil
	}
	stats, err := t.s.stat(ctx, names)
	for _, st := range stats {
		if st.Exists && time.Since(st.Used) >= t.s.o.TouchEvery {
			stale = append(stale, st.Object)
		}
	}
	return stale, err
}
