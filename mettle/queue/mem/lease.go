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

// A waiter is a consumer that waits for a job.
type waiter struct {
	pools []string
	given *lease        // guarded by Queue.mu
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
	if j := q.next(pools); j != nil {
		l := q.take(j)
		q.mu.Unlock()
		return l, nil
	}
	w := &waiter{pools: pools, ready: make(chan struct{}, 1)}
	for _, name := range pools {
		p := q.pool(name)
		p.idle = append(p.idle, w)
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

// next takes the first of the jobs that wait in pools out of its heap. It
// returns nil where there is none. The mutex is held.
func (q *Queue) next(pools []string) *job {
	var best *job
	for _, name := range pools {
		if p := q.pools[name]; p != nil && len(p.waiting) > 0 && (best == nil || p.waiting[0].before(best)) {
			best = p.waiting[0]
		}
	}
	if best != nil {
		q.pool(best.msg.GetPool()).waiting.remove(0)
	}
	return best
}

// offer gives j to a consumer that waits, or has it wait. The mutex is held;
// the caller sends the signals once it is not.
func (q *Queue) offer(j *job) signals {
	p := q.pool(j.msg.GetPool())
	if len(p.idle) == 0 {
		p.waiting.push(j)
		return signals{}
	}
	w := p.idle[len(p.idle)-1]
	q.forget(w)
	w.given = q.take(j)
	return signals{waiter: w}
}

// take begins the next delivery of j. The mutex is held.
func (q *Queue) take(j *job) *lease {
	j.attempt++
	l := &lease{q: q, job: j, attempt: j.attempt, cancelled: make(chan struct{})}
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

// forget makes w wait no more. The mutex is held.
func (q *Queue) forget(w *waiter) {
	for _, name := range w.pools {
		p := q.pools[name]
		for i, idle := range slices.Backward(p.idle) {
			if idle == w {
				p.idle = slices.Delete(p.idle, i, i+1)
				break
			}
		}
	}
}

// unwait makes w wait no more. A job that it was given and will not look at
// has not been delivered: that attempt does not count.
func (q *Queue) unwait(w *waiter) {
	q.mu.Lock()
	var sig signals
	if l := w.given; l == nil {
		q.forget(w)
	} else if j := l.job; l.valid() {
		q.leases.remove(l)
		j.lease = nil
		j.attempt--
		if j.cancelled {
			q.drop(j)
		} else {
			sig = q.offer(j)
		}
	}
	q.mu.Unlock()
	sig.send()
}

// giveBack ends l without an end of its job, which goes to another worker
// unless too many attempts have failed. Failure says how this one has; empty:
// it has not. The mutex is held; the caller sends the signals once it is not.
func (q *Queue) giveBack(l *lease, failure string) signals {
	j := l.job
	q.leases.remove(l)
	j.lease = nil
	if j.cancelled {
		q.drop(j)
		return signals{}
	}
	j.executing = nil
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

// drop forgets j, which is in no heap. The mutex is held.
func (q *Queue) drop(j *job) {
	if j.lease != nil {
		q.leases.remove(j.lease)
		j.lease = nil
	}
	delete(q.jobs, j.msg.GetOperation())
	q.bytes -= j.size
}

// pool finds or makes a pool. The names come from the operator's configuration,
// so there are few. The mutex is held.
func (q *Queue) pool(name string) *pool {
	p := q.pools[name]
	if p == nil {
		p = &pool{}
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
