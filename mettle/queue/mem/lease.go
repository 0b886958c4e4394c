package mem

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/mettle-build/mettle/mettle/queue"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// A waiter is a consumer that waits for a job. All but its pools and the channel
// are guarded by Queue.mu.
type waiter struct {
	pools []*pool
	given *lease
	gone  bool          // it waits no more, though pools may still have it
	ready chan struct{} // of capacity 1, for the one signal that given is set
}

// Lease implements queue.Consumer.
func (q *Queue) Lease(ctx context.Context, pools []string) (queue.Lease, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	q.mu.Lock()
	if q.closed {
		q.mu.Unlock()
		return nil, fmt.Errorf("lease: %w", queue.ErrClosed)
	}
	if p, first := q.next(pools); p != nil {
		l := q.take(p, first)
		q.mu.Unlock()
		return l, nil
	}
	w := &waiter{ready: make(chan struct{}, 1)}
	for _, name := range pools {
		if p := q.pool(name); !slices.Contains(w.pools, p) {
			p.waits(w)
			w.pools = append(w.pools, p)
		}
	}
	q.mu.Unlock()

	select {
	case <-w.ready:
		return w.given, nil
	case <-ctx.Done():
		q.unwait(w)
		return nil, ctx.Err()
	case <-q.done:
		q.unwait(w)
		return nil, fmt.Errorf("lease: %w", queue.ErrClosed)
	}
}

// next is the line of the pools whose turn it is; nil where no job waits. The
// mutex is held.
func (q *Queue) next(pools []string) (*pool, *line) {
	var pool *pool
	var best *line
	for _, name := range pools {
		p := q.pools[name]
		if p == nil {
			continue
		}
		l := p.first()
		if l == nil || best != nil && !l.band.before(best.band) && (best.band.before(l.band) || !l.before(best)) {
			continue
		}
		pool, best = p, l
	}
	return pool, best
}

// take leases the first job of a line of p. The mutex is held.
func (q *Queue) take(p *pool, first *line) *lease {
	j, s := first.jobs[0], first.share
	q.turns++
	p.began(s, q.turns) // first, so that s is not forgotten when it has nothing else
	p.remove(j)
	return q.deliver(j, p, s)
}

// offer gives j to a consumer that waits, or has it wait. The mutex is held;
// the caller sends the signals once it is not.
func (q *Queue) offer(j *job) signals {
	p := q.pool(j.pool)
	s := p.share(j.invocation, &q.turns)
	w := p.waiter()
	if w == nil {
		p.add(j, s)
		return signals{}
	}
	w.gone = true
	for _, other := range w.pools {
		if other != p {
			other.left()
		}
	}
	q.turns++
	p.began(s, q.turns)
	w.given = q.deliver(j, p, s)
	return signals{waiter: w}
}

// deliver begins the next delivery of j, which counts for s. The mutex is held.
func (q *Queue) deliver(j *job, p *pool, s *share) *lease {
	j.attempt++
	l := &lease{q: q, job: j, attempt: j.attempt, pool: p, share: s, cancelled: make(chan struct{})}
	j.lease = l
	q.start(l)
	return l
}

// start makes l the last of all leases to lapse. The mutex is held.
func (q *Queue) start(l *lease) {
	l.expires = time.Now().Add(q.opts.LeaseTime)
	q.leases.add(l)
	if !q.armed {
		q.armed = true
		q.timer.Reset(q.opts.LeaseTime)
	}
}

// unwait makes w wait no more. A job that it was given and will not look at
// has not been delivered: that attempt does not count.
func (q *Queue) unwait(w *waiter) {
	q.mu.Lock()
	var sig signals
	if l := w.given; l == nil {
		w.gone = true
		for _, p := range w.pools {
			p.left()
		}
	} else if j := l.job; l.valid() {
		q.end(l)
		j.attempt--
		if j.cancelled {
			q.drop(j)
			sig = q.tell(j, withdrawn(j))
		} else {
			sig = q.offer(j)
		}
		l.pool.ended(l.share)
	}
	q.mu.Unlock()
	sig.send()
}

// giveBack ends l without an end of its job, which goes to another worker
// unless too many attempts have failed. Failure says how this one has; empty:
// it has not. The mutex is held; the caller sends the signals once it is not.
func (q *Queue) giveBack(l *lease, failure string) signals {
	j := l.job
	q.end(l)
	// Last, so that a share that is to have the job again is not forgotten.
	defer l.pool.ended(l.share)
	if j.cancelled {
		q.drop(j)
		return q.tell(j, withdrawn(j))
	}
	j.news = nil
	if failure != "" {
		who := cmp.Or(l.worker, "a worker that had not reported")
		j.failures = append(j.failures, fmt.Sprintf("attempt %d: %s %s", l.attempt-j.fence, who, failure))
	}
	if len(j.failures) >= q.opts.MaxAttempts {
		q.drop(j)
		return q.tell(j, usedUp(j, l))
	}
	sig := q.tell(j, &queuepb.Update{
		Operation: j.msg.GetOperation(),
		Attempt:   l.attempt,
		Worker:    l.worker,
		Stage:     queuepb.Update_REQUEUED,
	})
	sig.waiter = q.offer(j).waiter
	return sig
}

// end ends l, which is valid. The caller sees to its job and its share. The
// mutex is held.
func (q *Queue) end(l *lease) {
	q.leases.remove(l)
	l.job.lease = nil
}

// drop forgets j, which waits nowhere. The mutex is held.
func (q *Queue) drop(j *job) {
	if l := j.lease; l != nil {
		q.end(l)
		l.pool.ended(l.share)
	}
	if j.cancelled {
		q.fences.put(j.msg.GetOperation(), j.attempt)
	}
	delete(q.jobs, j.msg.GetOperation())
	q.bytes -= j.size
}

// pool finds or makes a pool. The names come from the operator's configuration,
// so there are few. The mutex is held.
func (q *Queue) pool(name string) *pool {
	p := q.pools[name]
	if p == nil {
		p = newPool()
		q.pools[name] = p
	}
	return p
}

// A lease implements queue.Lease.
type lease struct {
	q         *Queue
	job       *job
	attempt   uint32
	cancelled chan struct{} // closed by Queue.Cancel
	pool      *pool
	share     *share // what it counts for

	// The rest is guarded by Queue.mu.
	worker     string // who has it, as far as its updates have told
	expires    time.Time
	prev, next *lease
}

// Job implements queue.Lease.
func (l *lease) Job() *queuepb.Job { return l.job.msg }

// Attempt implements queue.Lease.
func (l *lease) Attempt() uint32 { return l.attempt }

// Cancelled implements queue.Lease.
func (l *lease) Cancelled() <-chan struct{} { return l.cancelled }

// Extend implements queue.Lease.
func (l *lease) Extend(ctx context.Context) error {
	return l.do(ctx, "extend", func() signals {
		l.q.leases.remove(l)
		l.q.start(l)
		return signals{}
	})
}

// Ack implements queue.Lease.
func (l *lease) Ack(ctx context.Context) error {
	return l.do(ctx, "acknowledge", func() signals {
		l.q.drop(l.job)
		return signals{}
	})
}

// Release implements queue.Lease.
func (l *lease) Release(ctx context.Context) error {
	return l.do(ctx, "release", func() signals {
		return l.q.giveBack(l, "")
	})
}

// Reject implements queue.Lease.
func (l *lease) Reject(ctx context.Context, reason string) error {
	return l.do(ctx, "reject", func() signals {
		return l.q.giveBack(l, "could not run it: "+reason)
	})
}

// do runs f under the mutex, if the lease is still good, and sends its signals.
func (l *lease) do(ctx context.Context, what string, f func() signals) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	l.q.mu.Lock()
	var sig signals
	var err error
	switch {
	case l.q.closed:
		err = queue.ErrClosed
	case !l.valid():
		err = queue.ErrLeaseLost
	default:
		sig = f()
	}
	l.q.mu.Unlock()
	sig.send()
	if err != nil {
		return fmt.Errorf("%s lease of %s, attempt %d: %w", what, l.job.msg.GetOperation(), l.attempt, err)
	}
	return nil
}

// valid reports whether l has neither lapsed nor ended. The mutex is held.
func (l *lease) valid() bool { return l.job.lease == l }

// leaseList is a list of leases, linked through them.
type leaseList struct {
	first, last *lease
	n           int
}

func (ll *leaseList) add(l *lease) {
	l.prev, l.next = ll.last, nil
	if ll.last == nil {
		ll.first = l
	} else {
		ll.last.next = l
	}
	ll.last = l
	ll.n++
}

func (ll *leaseList) remove(l *lease) {
	if l.prev == nil {
		ll.first = l.next
	} else {
		l.prev.next = l.next
	}
	if l.next == nil {
		ll.last = l.prev
	} else {
		l.next.prev = l.prev
	}
	l.prev, l.next = nil, nil
	ll.n--
}
