package open

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/mettle-build/mettle/mettle/queue"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

const (
	// firstAnswer bounds the wait for the broker's first sign of life, after
	// which the process goes on without.
	firstAnswer = 5 * time.Second
	// firstRetry and lastRetry are the waits between tries to reach a broker
	// that is away, which double, with jitter.
	firstRetry, lastRetry = 100 * time.Millisecond, 2 * time.Second
	// patience is how long a call waits for a broker that has not been reached
	// yet, about as long as brokers try calls again by themselves.
	patience = 5 * time.Second
)

// Open connects to the broker. One that does not answer is no error: it is said
// to Options.Logger, Ready tells of it, and what is called meanwhile waits for a
// moment and then fails with queue.ErrUnavailable. Where the broker refuses, the
// error wraps queue.ErrRefused. The context bounds no more than Open itself. The
// caller closes the broker.
func (u *URL) Open(ctx context.Context, o Options) (queue.Broker, error) {
	o = o.withDefaults()
	connect := func(ctx context.Context) (queue.Broker, error) { return u.open(ctx, o) }
	b, err := connect(ctx)
	switch {
	case err == nil:
		if b, err = u.greet(ctx, b, o.Logger); err != nil {
			return nil, err
		}
		return gauge(b, o.Registerer)
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case errors.Is(err, queue.ErrRefused) || !errors.Is(err, queue.ErrUnavailable):
		return nil, fmt.Errorf("queue %s: %w", u, err)
	}
	o.Logger.WarnContext(ctx, "waiting for the broker", "queue", u.text, "error", err)
	return gauge(newWaiting(ctx, u.text, o.Logger, connect, err), o.Registerer)
}

// greet asks a broker that is open for its first sign of life: some connect only
// when they are called.
func (u *URL) greet(ctx context.Context, b queue.Broker, log *slog.Logger) (queue.Broker, error) {
	greeting, cancel := context.WithTimeout(ctx, firstAnswer)
	defer cancel()
	err := b.Ready(greeting)
	switch {
	case ctx.Err() != nil:
		return nil, errors.Join(ctx.Err(), b.Close())
	case errors.Is(err, queue.ErrRefused):
		return nil, errors.Join(fmt.Errorf("queue %s: %w", u, err), b.Close())
	case err != nil:
		log.WarnContext(ctx, "waiting for the broker", "queue", u.text, "error", err)
	}
	return b, nil
}

// waiting is a broker that has yet to be reached, and then that broker.
type waiting struct {
	name    string
	log     *slog.Logger
	connect func(ctx context.Context) (queue.Broker, error)

	stop  context.CancelFunc // ends the goroutine that connects
	ended chan struct{}      // closed when it has ended
	done  chan struct{}      // closed by Close
	once  sync.Once          // for Close

	up    chan struct{} // closed when inner is there
	inner queue.Broker  // read after up

	mu   sync.Mutex // guards last
	last error      // why the broker could not be reached, most lately
}

var _ queue.Broker = (*waiting)(nil)

// newWaiting starts the goroutine that connects, which Close ends.
func newWaiting(ctx context.Context, name string, log *slog.Logger, connect func(context.Context) (queue.Broker, error), why error) *waiting {
	b := &waiting{
		name: name, log: log, connect: connect, last: why,
		ended: make(chan struct{}), done: make(chan struct{}), up: make(chan struct{}),
	}
	life, stop := context.WithCancel(context.WithoutCancel(ctx))
	b.stop = stop
	go func() {
		defer close(b.ended)
		b.reach(life)
	}()
	return b
}

// reach connects, again and again.
func (b *waiting) reach(ctx context.Context) {
	for wait := firstRetry; ; wait = min(2*wait, lastRetry) {
		t := time.NewTimer(wait/2 + rand.N(wait/2)) //nolint:gosec // jitter
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return
		}
		inner, err := b.connect(ctx)
		if err == nil {
			b.log.InfoContext(ctx, "the broker answers", "queue", b.name)
			b.inner = inner
			close(b.up)
			return
		}
		if ctx.Err() != nil {
			return
		}
		b.mu.Lock()
		news := b.last.Error() != err.Error()
		b.last = err
		b.mu.Unlock()
		if news {
			b.log.WarnContext(ctx, "waiting for the broker", "queue", b.name, "error", err)
		}
	}
}

// away says why there is no broker yet.
func (b *waiting) away() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if errors.Is(b.last, queue.ErrUnavailable) {
		return b.last
	}
	return fmt.Errorf("%w: %w", queue.ErrUnavailable, b.last)
}

// await waits for the broker until ctx is done.
func (b *waiting) await(ctx context.Context) (queue.Broker, error) {
	select {
	case <-b.up: // in any case
		return b.inner, nil
	default:
	}
	select {
	case <-b.up:
		return b.inner, nil
	case <-b.done:
		return nil, queue.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// call makes a call that is not to wait for long.
func (b *waiting) call(ctx context.Context, f func(queue.Broker) error) error {
	waitCtx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	inner, err := b.await(waitCtx)
	switch {
	case err == nil:
		return f(inner)
	case ctx.Err() == nil && waitCtx.Err() != nil:
		return b.away()
	}
	return err
}

// Publish implements queue.Publisher.
func (b *waiting) Publish(ctx context.Context, job *queuepb.Job) error {
	return b.call(ctx, func(q queue.Broker) error { return q.Publish(ctx, job) })
}

// Cancel implements queue.Publisher.
func (b *waiting) Cancel(ctx context.Context, operation string) error {
	return b.call(ctx, func(q queue.Broker) error { return q.Cancel(ctx, operation) })
}

// SendUpdate implements queue.Sender.
func (b *waiting) SendUpdate(ctx context.Context, replyTo string, u *queuepb.Update) error {
	return b.call(ctx, func(q queue.Broker) error { return q.SendUpdate(ctx, replyTo, u) })
}

// Notify implements queue.Notifier.
func (b *waiting) Notify(ctx context.Context, n *queuepb.Notice) error {
	return b.call(ctx, func(q queue.Broker) error { return q.Notify(ctx, n) })
}

// Lease implements queue.Consumer.
func (b *waiting) Lease(ctx context.Context, pools []string) (queue.Lease, error) {
	inner, err := b.await(ctx)
	if err != nil {
		return nil, err
	}
	return inner.Lease(ctx, pools)
}

// ReceiveUpdates implements queue.Receiver.
func (b *waiting) ReceiveUpdates(ctx context.Context, id string, handle func(*queuepb.Update)) error {
	return b.listen(ctx, func(q queue.Broker) error { return q.ReceiveUpdates(ctx, id, handle) })
}

// ListenNotices implements queue.Listener.
func (b *waiting) ListenNotices(ctx context.Context, id string, handle func(*queuepb.Notice)) error {
	return b.listen(ctx, func(q queue.Broker) error { return q.ListenNotices(ctx, id, handle) })
}

// listen makes a call that ends with ctx, without an error then.
func (b *waiting) listen(ctx context.Context, f func(queue.Broker) error) error {
	inner, err := b.await(ctx)
	switch {
	case err == nil:
		return f(inner)
	case ctx.Err() != nil:
		return nil
	}
	return err
}

// Ready implements queue.Broker. It does not wait.
func (b *waiting) Ready(ctx context.Context) error {
	select {
	case <-b.up:
		return b.inner.Ready(ctx)
	case <-b.done:
		return queue.ErrClosed
	default:
		return b.away()
	}
}

// Connected reports whether the broker was reached, and the connection to it is
// there, if it has any. It does not wait.
func (b *waiting) Connected() bool {
	select {
	case <-b.up:
		c, ok := b.inner.(connectable)
		return !ok || c.Connected()
	default:
		return false
	}
}

// Close implements queue.Broker.
func (b *waiting) Close() error {
	b.once.Do(func() {
		close(b.done)
		b.stop()
	})
	<-b.ended
	select {
	case <-b.up:
		return b.inner.Close()
	default:
		return nil
	}
}
