// Package mem is the broker inside one process: what `mettle dual` uses, and
// what the tests of everything around queues use. It keeps every promise of
// package queue, and loses its jobs with the process: a client's WaitExecution
// brings them back, since operation names describe themselves.
//
// A published job goes straight to a waiting consumer of its pool, the one that
// has waited the shortest, whose caches are the warmest. Where none waits, it
// waits in its pool's heap, by priority and then in the order of publishing. It
// costs no goroutine: one timer serves all leases, because the lease that was
// taken or extended first is the first to lapse.
//
// A job that is published again by another API server stays the same job, and
// from then on reports to both. A mailbox holds, for each operation, only the
// newest update that its API server has not fetched.
//
// It does not survive a restart, does not reach other processes, and does not
// share workers fairly between invocations.
package mem

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/mettle-build/mettle/mettle/queue"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// Options are the settings of a Queue. The zero Options are valid.
type Options struct {
	// LeaseTime is how long a worker may be silent before its job goes to
	// another. Default 30 s.
	LeaseTime time.Duration
	// MaxAttempts is how many deliveries of a job may fail. Default 3.
	MaxAttempts int
	// MaxJobs bounds the jobs that wait or run. Default 262,144.
	MaxJobs int
	// MaxBytes bounds what those jobs take together, in bytes. Default 1 GiB.
	MaxBytes int64
	// MaxUpdates bounds the updates that one API server has yet to fetch. Past
	// it, news of progress is dropped and a result is refused with an error
	// that wraps queue.ErrUnavailable. Default 65,536.
	MaxUpdates int
	// Logger is told of lapsed leases. Default: none.
	Logger *slog.Logger
}

func (o Options) withDefaults() Options {
	if o.LeaseTime == 0 {
		o.LeaseTime = 30 * time.Second
	}
	if o.MaxAttempts == 0 {
		o.MaxAttempts = 3
	}
	if o.MaxJobs == 0 {
		o.MaxJobs = 1 << 18
	}
	if o.MaxBytes == 0 {
		o.MaxBytes = 1 << 30
	}
	if o.MaxUpdates == 0 {
		o.MaxUpdates = 1 << 16
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return o
}

func (o Options) validate() error {
	if o.LeaseTime < 0 || o.MaxAttempts < 0 || o.MaxJobs < 0 || o.MaxBytes < 0 || o.MaxUpdates < 0 {
		return errors.New("memory queue: a negative limit")
	}
	return nil
}

// Queue is a broker in memory. It is safe for concurrent use.
type Queue struct {
	opts  Options
	log   *slog.Logger
	timer *time.Timer   // fires when the oldest lease may have lapsed
	done  chan struct{} // closed by Close
	swept chan struct{} // closed when the goroutine has ended

	// mu guards everything below. Nothing is sent while it is held.
	mu     sync.Mutex
	closed bool
	jobs   map[string]*job // by operation, waiting and leased
	bytes  int64           // the sum of the jobs' sizes
	seq    uint64          // counts publications
	pools  map[string]*pool
	leases leaseList // the first to lapse first
	armed  bool      // timer will fire
	boxes  map[string]*mailbox
	unread []string // the ids of boxes without a receiver, the oldest first
	ears   map[string]*ear
}

var _ queue.Broker = (*Queue)(nil)

// New starts a queue. The caller closes it.
func New(o Options) (*Queue, error) {
	if err := o.validate(); err != nil {
		return nil, err
	}
	o = o.withDefaults()
	q := &Queue{
		opts:  o,
		log:   o.Logger,
		timer: time.NewTimer(o.LeaseTime),
		done:  make(chan struct{}),
		swept: make(chan struct{}),
		jobs:  make(map[string]*job),
		pools: make(map[string]*pool),
		boxes: make(map[string]*mailbox),
		ears:  make(map[string]*ear),
	}
	q.timer.Stop()
	go q.sweep()
	return q, nil
}

// Close ends the queue and waits for its goroutine. Those who wait for a job or
// for updates get an error that wraps queue.ErrClosed, as does every later call.
// What is in the queue is lost. It may be called twice.
func (q *Queue) Close() error {
	q.mu.Lock()
	if !q.closed {
		q.closed = true
		close(q.done)
	}
	q.mu.Unlock()
	<-q.swept
	return nil
}

// Ready implements queue.Broker.
func (q *Queue) Ready(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return fmt.Errorf("memory queue: %w", queue.ErrClosed)
	}
	return nil
}

// Len counts the jobs that wait for a worker and those that a worker has.
func (q *Queue) Len() (waiting, leased int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.jobs) - q.leases.n, q.leases.n
}

// Publish implements queue.Publisher.
func (q *Queue) Publish(ctx context.Context, msg *queuepb.Job) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if msg.GetOperation() == "" {
		return errors.New("publish: the job names no operation")
	}
	q.mu.Lock()
	sig, err := q.publish(msg)
	q.mu.Unlock()
	sig.send()
	if err != nil {
		return fmt.Errorf("publish %s: %w", msg.GetOperation(), err)
	}
	return nil
}

// publish is Publish with the mutex held.
func (q *Queue) publish(msg *queuepb.Job) (signals, error) {
	if q.closed {
		return signals{}, queue.ErrClosed
	}
	var fence uint32
	if j := q.jobs[msg.GetOperation()]; j != nil {
		if !j.cancelled {
			return q.addReply(j, msg.GetReplyTo()), nil
		}
		// It was withdrawn and its worker has not let go of it yet. That
		// delivery stays withdrawn; what it still reports is not about this job.
		fence = j.attempt
		q.drop(j)
	}
	size := sizeOf(msg)
	if len(q.jobs) >= q.opts.MaxJobs {
		return signals{}, fmt.Errorf("%w: %d jobs", queue.ErrFull, len(q.jobs))
	}
	if q.bytes+size > q.opts.MaxBytes {
		return signals{}, fmt.Errorf("%w: %d bytes in %d jobs", queue.ErrFull, q.bytes, len(q.jobs))
	}
	q.seq++
	j := &job{msg: msg, seq: q.seq, size: size, attempt: fence, fence: fence, index: notWaiting}
	q.jobs[msg.GetOperation()] = j
	q.bytes += size
	q.box(msg.GetReplyTo())
	return q.offer(j), nil
}

// Cancel implements queue.Publisher.
func (q *Queue) Cancel(_ context.Context, operation string) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return fmt.Errorf("cancel %s: %w", operation, queue.ErrClosed)
	}
	j := q.jobs[operation]
	switch {
	case j == nil || j.cancelled:
	case j.lease == nil:
		q.pool(j.msg.GetPool()).waiting.remove(j.index)
		q.drop(j)
	default:
		j.cancelled = true
		close(j.lease.cancelled)
	}
	return nil
}

// sweep ends the leases that lapse.
func (q *Queue) sweep() {
	defer close(q.swept)
	defer q.timer.Stop()
	for {
		select {
		case <-q.timer.C:
			q.expire()
		case <-q.done:
			return
		}
	}
}

// expire ends the leases that have lapsed and sets the timer for the next one.
func (q *Queue) expire() {
	for {
		q.mu.Lock()
		l := q.leases.first
		if l == nil {
			q.armed = false
			q.mu.Unlock()
			return
		}
		if left := time.Until(l.expires); left > 0 {
			q.timer.Reset(left)
			q.mu.Unlock()
			return
		}
		sig := q.giveBack(l, "fell silent")
		q.mu.Unlock()
		sig.send()
		q.log.Warn("lease lapsed", "operation", l.job.msg.GetOperation(), "worker", l.worker, "attempt", l.attempt)
	}
}
