package pubsub

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	pb "cloud.google.com/go/pubsub/v2/apiv1/pubsubpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/mettle-build/mettle/mettle/queue"
)

// A source is one subscription of jobs, as this process reads it. Its fields are
// guarded by Queue.mu.
type source struct {
	subscription string
	waiters      []*waiter // the one that has waited the longest is first
	asked        int       // how many messages the pulls under way may bring
	held         []*lease  // for which nobody waited when they came
}

// A waiter is a consumer that waits.
type waiter struct {
	subscriptions []string
	polling       bool        // it wants pulls to wait for it; guarded by Queue.mu
	answer        chan answer // of capacity 1, for the one answer
}

type answer struct {
	lease *lease
	err   error
}

const (
	// pollTime bounds a pull that waits. The broker ends most of them earlier.
	pollTime = 90 * time.Second
	// maxPull bounds the messages of one pull.
	maxPull = 100
	// pullTries is how many times in a row a pull fails before the consumers
	// that wait hear of it.
	pullTries = 5
)

// holdTime is how long a job for which nobody waits any more is kept for the
// next consumer here, before it is handed back.
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
	var subscriptions []string
	for _, band := range q.opts.bands() {
		for _, pool := range pools {
			subscriptions = append(subscriptions, q.jobSubscription(pool, band))
		}
	}
	w := q.wait(subscriptions)
	if len(subscriptions) > 1 {
		for _, name := range subscriptions {
			asked := make(chan struct{})
			if !q.start(func(ctx context.Context) {
				defer close(asked)
				q.ask(ctx, name)
			}) {
				break
			}
			select {
			case a := <-w.answer:
				return a.lease, a.err
			case <-asked:
			case <-ctx.Done():
				return nil, q.leave(w, ctx.Err())
			case <-q.done:
				return nil, q.leave(w, queue.ErrClosed)
			}
		}
	}
	q.poll(w)
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
func (q *Queue) wait(subscriptions []string) *waiter {
	w := &waiter{subscriptions: subscriptions, answer: make(chan answer, 1)}
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, name := range subscriptions {
		s := q.sources[name]
		if s == nil {
			s = &source{subscription: name}
			q.sources[name] = s
		}
		for len(s.held) > 0 {
			l := s.held[0]
			s.held = s.held[1:]
			if l.valid() && !l.gone {
				w.answer <- answer{lease: l}
				return w
			} // else it comes again, and is dropped then if it was withdrawn
		}
	}
	for _, name := range subscriptions {
		q.sources[name].waiters = append(q.sources[name].waiters, w)
	}
	return w
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
	for _, name := range w.subscriptions {
		s := q.sources[name]
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

// poll sees to it that pulls wait for w and all others.
func (q *Queue) poll(w *waiter) {
	var begin []func()
	q.mu.Lock()
	w.polling = true
	for _, name := range w.subscriptions {
		s := q.sources[name]
		if n := s.demand(); n > 0 {
			s.asked += n
			begin = append(begin, func() { q.start(func(ctx context.Context) { q.pullFor(ctx, s, n) }) })
		}
	}
	q.mu.Unlock()
	for _, f := range begin {
		f()
	}
}

// demand is how many messages are to be asked for. The mutex is held.
func (s *source) demand() int {
	n := 0
	for _, w := range s.waiters {
		if w.polling {
			n++
		}
	}
	return min(n-s.asked, maxPull)
}

// pullFor pulls, n messages at first, for as long as consumers wait that no
// other pull is for.
func (q *Queue) pullFor(ctx context.Context, s *source, n int) {
	for failed := 0; ; {
		messages, err := q.pull(ctx, s.subscription, n, pollTime)
		for _, m := range messages {
			q.deliver(s, m)
		}
		switch {
		case err == nil:
			failed = 0
		case ctx.Err() != nil:
			return
		case !isTransient(status.Code(err)) || failed >= pullTries:
			q.fail(ctx, s, n, err)
			return
		default:
			failed++
			if !backOff(ctx, failed) {
				return
			}
		}
		q.mu.Lock()
		s.asked -= n
		n = s.demand()
		s.asked += max(n, 0)
		q.mu.Unlock()
		if n <= 0 {
			return
		}
	}
}

// fail tells those who wait that pulling does not work.
func (q *Queue) fail(ctx context.Context, s *source, n int, err error) {
	err = q.classify(ctx, target{"pull", s.subscription, "pubsub.subscriptions.consume"}, err)
	q.mu.Lock()
	defer q.mu.Unlock()
	s.asked -= n
	for _, w := range slices.Clone(s.waiters) {
		if w.polling {
			q.forget(w)
			w.answer <- answer{err: err}
		}
	}
}

// ask takes a message that is there already.
func (q *Queue) ask(ctx context.Context, name string) {
	messages, err := q.pull(ctx, name, 1, 0)
	if err != nil {
		return // the pulls that wait tell of it
	}
	q.mu.Lock()
	s := q.sources[name]
	q.mu.Unlock()
	for _, m := range messages {
		q.deliver(s, m)
	}
}

// pull makes one call, which waits for a message for up to the given time. It
// is not cut off when consumers leave: a message that is on its way then would
// have to lapse.
func (q *Queue) pull(ctx context.Context, name string, n int, wait time.Duration) ([]*pb.ReceivedMessage, error) {
	timeout := wait
	if wait == 0 {
		timeout = q.opts.CallTimeout / 3
	}
	try, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	res, err := q.subs.Pull(try, &pb.PullRequest{
		Subscription: name, MaxMessages: int32(n), //nolint:gosec // small
		ReturnImmediately: wait == 0, //nolint:staticcheck // the one way to ask one band after the other
	})
	if status.Code(err) == codes.DeadlineExceeded && wait > 0 {
		return nil, nil
	}
	return res.GetReceivedMessages(), err
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
