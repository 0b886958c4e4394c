package nats

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	natsgo "github.com/nats-io/nats.go"

	"github.com/mettle-build/mettle/mettle/queue"
)

// An arrival is a job as the broker sent it, before it has been looked at.
type arrival struct {
	msg  *natsgo.Msg
	meta *natsgo.MsgMetadata
}

// An outcome is what a call of Lease waits for.
type outcome struct {
	arrival
	err error
}

// A waiter is a call of Lease that waits for a message with a job.
type waiter struct {
	got chan outcome // has room for the one that comes
}

// pull waits for a message with a job.
func (q *Queue) pull(ctx context.Context, pools []string) (arrival, error) {
	if err := q.awaitConnection(ctx); err != nil {
		return arrival{}, err
	}
	in, err := q.intakeOf(ctx, pools)
	if err != nil {
		return arrival{}, err
	}
	w := in.join()
	select {
	case o := <-w.got:
		return o.arrival, o.err
	case <-ctx.Done():
		err = ctx.Err()
	case <-q.done:
		err = queue.ErrClosed
	}
	if !in.leave(w) {
		if o := <-w.got; o.err == nil {
			in.handBack(o.arrival)
		}
	}
	return arrival{}, err
}

// awaitConnection waits for the connection to come back, for as long as
// Options.Timeout.
func (q *Queue) awaitConnection(ctx context.Context) error {
	reconnected := q.reconnection()
	if q.nc.IsConnected() {
		return nil
	}
	timer := time.NewTimer(q.opts.Timeout)
	defer timer.Stop()
	select {
	case <-reconnected:
		return nil
	case <-timer.C:
		return fmt.Errorf("%w: not connected", queue.ErrUnavailable)
	case <-ctx.Done():
		return ctx.Err()
	case <-q.done:
		return queue.ErrClosed
	}
}

// reconnection is closed with the next new connection.
func (q *Queue) reconnection() <-chan struct{} {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.reconnected
}

// maxIntakes bounds Queue.intakes: a worker has one.
const maxIntakes = 256

// intakeOf finds or starts the intake of a list of pools. It ends with the Queue.
func (q *Queue) intakeOf(ctx context.Context, pools []string) (*intake, error) {
	key := strings.Join(pools, "\x00")
	q.mu.Lock()
	in, n := q.intakes[key], len(q.intakes)
	q.mu.Unlock()
	if in != nil {
		return in, nil
	}
	if n >= maxIntakes {
		return nil, fmt.Errorf("more than %d different lists of pools are asked for", maxIntakes)
	}
	in = newIntake(q, slices.Clone(pools))
	sub, err := q.nc.ChanSubscribe(in.inbox+".*", in.msgs)
	if err != nil {
		return nil, fmt.Errorf("subscribe to jobs: %w", q.classify(err))
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if other := q.intakes[key]; other != nil || q.closed {
		_ = sub.Unsubscribe() // nobody has asked there for anything
		if other == nil {
			return nil, queue.ErrClosed
		}
		return other, nil
	}
	q.intakes[key] = in
	// It outlives the call that starts it.
	ctx = context.WithoutCancel(ctx)
	q.running.Go(func() { in.run(ctx) })
	return in, nil
}

// join enters a call of Lease among those that wait.
func (in *intake) join() *waiter {
	w := &waiter{got: make(chan outcome, 1)}
	in.mu.Lock()
	in.waiters = append(in.waiters, w)
	in.mu.Unlock()
	select {
	case in.wake <- struct{}{}:
	default: // it is to be woken already
	}
	return w
}

// leave ends the wait of a call, and reports whether it has got nothing yet.
func (in *intake) leave(w *waiter) bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	i := slices.Index(in.waiters, w)
	if i < 0 {
		return false
	}
	in.waiters = slices.Delete(in.waiters, i, i+1)
	return true
}

// first takes the call that has waited longest, or nil.
func (in *intake) first() *waiter {
	in.mu.Lock()
	defer in.mu.Unlock()
	if len(in.waiters) == 0 {
		return nil
	}
	w := in.waiters[0]
	in.waiters = slices.Delete(in.waiters, 0, 1)
	return w
}

func (in *intake) waiting() int {
	in.mu.Lock()
	defer in.mu.Unlock()
	return len(in.waiters)
}

// fail ends the wait of all calls.
func (in *intake) fail(err error) {
	for w := in.first(); w != nil; w = in.first() {
		w.got <- outcome{err: err}
	}
}

// handBack returns a job that nobody has looked at.
func (in *intake) handBack(a arrival) {
	in.q.metrics.surplus.Inc()
	in.q.reject(a.msg, 0)
}
