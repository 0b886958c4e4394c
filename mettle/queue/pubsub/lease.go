package pubsub

import (
	"context"
	"fmt"
	"time"

	pb "cloud.google.com/go/pubsub/v2/apiv1/pubsubpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/mettle-build/mettle/mettle/queue"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// A lease implements queue.Lease: one delivery of one message.
type lease struct {
	q            *Queue
	subscription string
	message      string // its id
	pool, band   string // attributes
	publication  string
	published    time.Time
	job          *queuepb.Job
	attempt      uint32 // base + past.delivered + count
	base         uint32
	past         history
	count        uint32 // deliveries of this message, with this one
	uncounted    bool   // the broker does not count them
	cancelled    chan struct{}

	// The rest is guarded by Queue.mu.
	ackID  string    // of the newest delivery of the message
	until  time.Time // when it lapses, with the monotonic clock's reading
	over   bool      // acknowledged, handed back, or taken by another delivery
	gone   bool      // cancelled is closed
	worker string    // who has it, as far as its updates have told
}

var _ queue.Lease = (*lease)(nil)

// Job implements queue.Lease.
func (l *lease) Job() *queuepb.Job { return l.job }

// Attempt implements queue.Lease.
func (l *lease) Attempt() uint32 { return l.attempt }

// Cancelled implements queue.Lease.
func (l *lease) Cancelled() <-chan struct{} { return l.cancelled }

// cancel tells the worker. The mutex is held.
func (l *lease) cancel() {
	if !l.gone {
		l.gone = true
		close(l.cancelled)
	}
}

// valid reports whether the lease has neither ended nor lapsed by both clocks:
// the monotonic one stands still while the machine sleeps, and the one on the
// wall may be set. The mutex is held.
func (l *lease) valid() bool {
	now := time.Now()
	return !l.over && now.Before(l.until) && now.Round(0).Before(l.until.Round(0))
}

// Extend implements queue.Lease.
func (l *lease) Extend(ctx context.Context) error {
	if err := l.check(ctx); err != nil {
		return l.explain("extend", err)
	}
	start := time.Now() // the broker starts later, so it ends later too
	if err := l.q.modify(ctx, l.subscription, []string{l.current()}, l.q.opts.LeaseTime); err != nil {
		return l.explain("extend", err)
	}
	l.q.mu.Lock()
	defer l.q.mu.Unlock()
	if !l.over {
		l.until = start.Add(l.q.opts.LeaseTime)
	}
	return nil
}

// Ack implements queue.Lease. Where it fails and the message comes to this
// process again, it needs nothing but to be acknowledged then.
func (l *lease) Ack(ctx context.Context) error {
	if err := l.check(ctx); err != nil {
		return l.explain("acknowledge", err)
	}
	l.q.mu.Lock()
	l.q.ended.put(l.message, struct{}{})
	l.q.mu.Unlock()
	if err := l.q.acknowledge(ctx, l.subscription, l.current()); err != nil {
		return l.explain("acknowledge", err)
	}
	l.end()
	l.q.mu.Lock()
	l.q.delivered.remove(l.message)
	l.q.mu.Unlock()
	return nil
}

// check fails if the lease is gone.
func (l *lease) check(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	l.q.mu.Lock()
	defer l.q.mu.Unlock()
	switch {
	case l.q.closed:
		return queue.ErrClosed
	case !l.valid():
		if !l.over {
			l.over = true
			l.q.metrics.lost.Inc()
		}
		return queue.ErrLeaseLost
	}
	return nil
}

// current is the id by which the newest delivery ends.
func (l *lease) current() string {
	l.q.mu.Lock()
	defer l.q.mu.Unlock()
	return l.ackID
}

// end forgets the lease.
func (l *lease) end() {
	l.q.mu.Lock()
	defer l.q.mu.Unlock()
	l.over = true
	if l.q.leases[l.message] == l {
		delete(l.q.leases, l.message)
	}
}

func (l *lease) explain(verb string, err error) error {
	return fmt.Errorf("%s lease of %s, attempt %d: %w", verb, l.job.GetOperation(), l.attempt, err)
}

// modify has messages delivered again after d, or at once if that is 0.
func (q *Queue) modify(ctx context.Context, subscription string, ackIDs []string, d time.Duration) error {
	return q.callLease(ctx, target{"change the lease", subscription, "pubsub.subscriptions.consume"}, func(ctx context.Context) error {
		return q.subs.ModifyAckDeadline(ctx, &pb.ModifyAckDeadlineRequest{
			Subscription: subscription, AckIds: ackIDs, AckDeadlineSeconds: int32(d / time.Second), //nolint:gosec // up to 600
		})
	})
}

// callLease is call, where the broker may know that the delivery is over. It
// only tells so if somebody has enabled exactly-once delivery.
func (q *Queue) callLease(ctx context.Context, t target, f func(ctx context.Context) error) error {
	lost := false
	err := q.call(ctx, t, func(ctx context.Context) error {
		err := f(ctx)
		lost = status.Code(err) == codes.FailedPrecondition
		return err
	})
	if lost {
		return fmt.Errorf("%w: %w", queue.ErrLeaseLost, err)
	}
	return err
}
