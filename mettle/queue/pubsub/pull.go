package pubsub

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/mettle-build/mettle/mettle/queue"
)

// A source is one subscription of jobs, as this process reads it. Its fields are
// guarded by Queue.mu, but for the first, which do not change.
type source struct {
	subscription string
	pool, band   string

	waiters []*waiter // the one that has waited the longest is first
	pulls   int       // how many of them wait
	asked   int       // how many messages they may bring
	empty   time.Time // since when pulls wait and bring nothing; zero: unknown
	held    []*lease  // for which nobody waited when they came
}

// A station is where the consumers of the same pools wait. Its fields are
// guarded by Queue.mu, but for the first.
type station struct {
	sources []*source // in the order in which they are looked into
	fresh   []*waiter // for whom nobody has looked yet
	rounds  int       // how many look
}

// A waiter is a consumer that waits. Its fields are guarded by Queue.mu.
type waiter struct {
	station *station
	polling bool        // it wants pulls to wait for it
	left    bool        // it waits no more
	answer  chan answer // of capacity 1, for the one answer
}

type answer struct {
	lease *lease
	err   error
}

// holdTime is how long a job for which nobody waits any more is kept for the
// next consumer here, before it is put back.
func (o Options) holdTime() time.Duration { return min(o.LeaseTime/4, 2*time.Second) }

// Lease implements queue.Consumer. The first one begins to hear of
// cancellations. Where there are several bands and pools, all pools' urgent jobs
// are asked for first, and then the next band; while there is none, all
// are waited for together.
func (q *Queue) Lease(ctx context.Context, pools []string) (queue.Lease, error) {
	l, err := q.lease(ctx, pools)
	if err != nil {
		return nil, fmt.Errorf("lease: %w", err)
	}
	return l, nil
}

func (q *Queue) lease(ctx context.Context, pools []string) (*lease, error) {
	switch {
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case q.isClosed():
		return nil, queue.ErrClosed
	case len(pools) == 0:
		return nil, errors.New("of no pool")
	}
	if err := q.listen(ctx); err != nil {
		return nil, err
	}
	w := q.wait(pools)
	select {
	case a := <-w.answer:
		return a.lease, a.err
	case <-ctx.Done():
		return nil, q.leave(w, ctx.Err())
	case <-q.done:
		return nil, q.leave(w, queue.ErrClosed)
	}
}

// wait begins to wait. What is held already is the answer at once.
func (q *Queue) wait(pools []string) *waiter {
	q.mu.Lock()
	st := q.station(pools)
	w := &waiter{station: st, answer: make(chan answer, 1)}
	if l := st.takeHeld(); l != nil {
		w.answer <- answer{lease: l}
		q.mu.Unlock()
		return w
	}
	for _, s := range st.sources {
		s.waiters = append(s.waiters, w)
	}
	begin := q.askFor(st, w)
	q.mu.Unlock()
	for _, f := range begin {
		q.start(f)
	}
	return w
}

// station finds or makes the station of some pools. There are as many as the
// process's configuration names. The mutex is held.
func (q *Queue) station(pools []string) *station {
	key := strings.Join(pools, "\n")
	st := q.stations[key]
	if st == nil {
		st = &station{}
		for _, band := range q.opts.bands() {
			for _, pool := range pools {
				st.sources = append(st.sources, q.source(pool, band))
			}
		}
		q.stations[key] = st
	}
	return st
}

// source finds or makes a source. The mutex is held.
func (q *Queue) source(pool, band string) *source {
	name := q.jobSubscription(pool, band)
	s := q.sources[name]
	if s == nil {
		s = &source{subscription: name, pool: pool, band: band}
		q.sources[name] = s
	}
	return s
}

// takeHeld takes a job that is held, if it is still good for anything; else it
// comes again, and is dropped then if it was withdrawn. The mutex is held.
func (st *station) takeHeld() *lease {
	for _, s := range st.sources {
		for len(s.held) > 0 {
			l := s.held[0]
			s.held = s.held[1:]
			if l.valid() && !l.gone {
				return l
			}
		}
	}
	return nil
}

// give hands l to the first who waits, or holds it. The mutex is held.
func (q *Queue) give(s *source, l *lease) {
	if len(s.waiters) > 0 {
		w := s.waiters[0]
		q.forget(w)
		w.answer <- answer{lease: l} // never blocks: who waits has no answer yet
		return
	}
	q.metrics.surplus.Inc()
	s.held = append(s.held, l)
	q.tasks.Go(func() { q.hold(s, l) }) // deliver runs in a task itself, so that Close still waits
}

// hold waits for somebody to take l, and hands it back if nobody does.
func (q *Queue) hold(s *source, l *lease) {
	t := time.NewTimer(q.opts.holdTime())
	defer t.Stop()
	select {
	case <-t.C:
	case <-q.done:
		return // Close hands it back
	}
	q.mu.Lock()
	i := slices.Index(s.held, l)
	if i >= 0 {
		s.held = slices.Delete(s.held, i, i+1)
		l.over = true
		delete(q.leases, l.message)
	}
	q.mu.Unlock()
	if i < 0 {
		return
	}
	q.start(func(ctx context.Context) { q.putBack(ctx, l) })
}

// forget makes w wait no more. The mutex is held.
func (q *Queue) forget(w *waiter) {
	w.left = true
	for _, s := range w.station.sources {
		if i := slices.Index(s.waiters, w); i >= 0 {
			s.waiters = slices.Delete(s.waiters, i, i+1)
		}
	}
}

// leave makes w wait no more because of err. What it was given at the same
// moment is for the next.
func (q *Queue) leave(w *waiter, err error) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.forget(w)
	select {
	case a := <-w.answer:
		if a.lease == nil {
			break
		}
		s := q.sources[a.lease.subscription]
		if q.closed {
			s.held = append(s.held, a.lease)
			break
		}
		q.give(s, a.lease)
	default:
	}
	return err
}

// putAllBack returns what is held to the broker.
func (q *Queue) putAllBack(ctx context.Context) {
	var held []*lease
	q.mu.Lock()
	for _, s := range q.sources {
		held = append(held, s.held...)
		s.held = nil
	}
	q.mu.Unlock()
	var g sync.WaitGroup
	limit := make(chan struct{}, maxPutting)
	for _, l := range held {
		limit <- struct{}{}
		g.Go(func() {
			defer func() { <-limit }()
			q.putBack(ctx, l)
		})
	}
	g.Wait()
}

// maxPutting bounds the jobs that are put back at a time.
const maxPutting = 16
