// Package mem is the broker inside one process: what `mettle dual` uses, and
// what the tests of everything around queues use. It keeps every promise of
// package queue, and loses its jobs with the process: a client's WaitExecution
// brings them back, since operation names describe themselves.
//
// A published job goes straight to a waiting consumer of its pool, the one that
// has waited the shortest, whose caches are the warmest. Where none waits, it
// waits. It costs no goroutine: one timer serves all leases, because the lease
// that was taken or extended first is the first to lapse.
//
// Who is next when a consumer comes:
//
//   - the lowest priority, strictly, though of one invocation no more than 64
//     priorities are told apart at a time;
//   - within it the invocation that has the fewest workers of the pool, and of
//     several the one that has waited the longest for one. So those who want
//     workers come to have equally many, however many jobs each has queued: a
//     job counts for as long as it runs, which needs no estimate, as virtual
//     times would; and what an invocation did not use it is not owed later.
//     Whoever has come is served in turn, so nobody starves;
//   - within that the job whose time in the queue and expected time are the
//     longest together. That is the longest of those that came together, which
//     a build should not end with; and a job is overtaken only by those that
//     came later by less than they take longer, so the short ones get their
//     turn too. A job of unknown length is as if it took no time;
//   - and then the one that was published first.
//
// A job that an equal one with a lower priority number is published for, or
// raised by, gets that priority. One that a second invocation wants, at the same
// priority, waits in the shorter of their lines: the few jobs of a small build
// do not wait with a large one's because it happens to want them too.
//
// It does not look for the consumer that has run something with the same inputs:
// all slots of a process link from one store and read Directories from one
// cache, and what a slot has for itself are empty directories. Building and removing a root of 500 files in 50 directories took
// 115.1 ms where two slots had one root each and 115.4 ms where they had both in
// turn (BenchmarkAffinity in mettle/worker/inputroot).
//
// A job that is published again by another API server stays the same job, and
// from then on reports to both, and waits where it was last published for: the pool
// of before may have gone. A mailbox holds, for each operation, only the
// newest update that its API server has not fetched.
//
// It does not survive a restart, and does not reach other processes.
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
	epoch time.Time     // from which job.due counts
	timer *time.Timer   // fires when the oldest lease may have lapsed
	done  chan struct{} // closed by Close
	swept chan struct{} // closed when the goroutine has ended

	// mu guards everything below. Nothing is sent while it is held.
	mu      sync.Mutex
	closed  bool
	jobs    map[string]*job // by operation, waiting and leased
	bytes   int64           // the sum of the jobs' sizes
	seq     uint64          // counts publications
	turns   uint64          // counts when somebody came or got a worker: see share
	pools   map[string]*pool
	leases  leaseList // the first to lapse first
	armed   bool      // timer will fire
	boxes   map[string]*mailbox
	unread  []string // the ids of boxes without a receiver, the oldest first
	ears    map[string]*ear
	sayings map[string]saying // by worker
	fences  fences
}

var (
	_ queue.Broker = (*Queue)(nil)
	_ queue.Raiser = (*Queue)(nil)
)

// New starts a queue. The caller closes it.
func New(o Options) (*Queue, error) {
	if err := o.validate(); err != nil {
		return nil, err
	}
	o = o.withDefaults()
	q := &Queue{
		opts:    o,
		log:     o.Logger,
		epoch:   time.Now(),
		timer:   time.NewTimer(o.LeaseTime),
		done:    make(chan struct{}),
		swept:   make(chan struct{}),
		jobs:    make(map[string]*job),
		pools:   make(map[string]*pool),
		boxes:   make(map[string]*mailbox),
		ears:    make(map[string]*ear),
		sayings: make(map[string]saying),
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
	var sig signals
	if j := q.jobs[msg.GetOperation()]; j != nil {
		if !j.cancelled {
			q.raise(j, msg.GetPriority(), msg.GetInvocation())
			sig = q.addReply(j, msg.GetReplyTo())
			sig.waiter = q.move(j, msg.GetPool())
			return sig, nil
		}
		// It was withdrawn and its worker has not let go of it yet. That
		// delivery stays withdrawn; what it still reports is not about this job.
		fence = j.attempt
		q.drop(j)
		sig = q.tellAllBut(msg.GetReplyTo(), j, withdrawn(j))
	}
	j := newJob(msg, time.Since(q.epoch))
	if len(q.jobs) >= q.opts.MaxJobs {
		return sig, fmt.Errorf("%w: %d jobs", queue.ErrFull, len(q.jobs))
	}
	if q.bytes+j.size > q.opts.MaxBytes {
		return sig, fmt.Errorf("%w: %d bytes in %d jobs", queue.ErrFull, q.bytes, len(q.jobs))
	}
	q.seq++
	fence = max(fence, q.fences.take(msg.GetOperation()))
	j.seq, j.attempt, j.fence = q.seq, fence, fence
	q.jobs[msg.GetOperation()] = j
	q.bytes += j.size
	q.box(msg.GetReplyTo())
	sig.waiter = q.offer(j).waiter
	return sig, nil
}

// move has j wait in another pool from now on, and returns who gets it there. The
// mutex is held; the caller signals once it is not.
func (q *Queue) move(j *job, pool string) *waiter {
	if j.pool == pool {
		return nil
	}
	if j.line == nil { // a worker has it; this is for when it is handed back
		j.pool = pool
		return nil
	}
	q.pool(j.pool).remove(j)
	j.pool = pool
	return q.offer(j).waiter
}

// Raise implements queue.Raiser.
func (q *Queue) Raise(ctx context.Context, operation string, priority int32, invocation string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return fmt.Errorf("raise %s: %w", operation, queue.ErrClosed)
	}
	if j := q.jobs[operation]; j != nil && !j.cancelled {
		q.raise(j, priority, invocation)
	}
	return nil
}

// raise gives j the priority, if that is the more urgent one, and has it wait in
// the line of the invocation, where that is so or the line is the shorter one.
// The mutex is held.
func (q *Queue) raise(j *job, priority int32, invocation string) {
	if priority > j.priority || priority == j.priority && invocation == j.invocation {
		return
	}
	if j.line == nil { // a worker has it; this is for when it is handed back
		if priority < j.priority {
			j.priority, j.invocation = priority, invocation
		}
		return
	}
	p := q.pool(j.pool)
	s := p.share(invocation, &q.turns)
	if priority == j.priority {
		if l := s.line(priority); l != nil && len(l.jobs)+1 >= len(j.line.jobs) {
			return
		}
		if len(j.line.jobs) == 1 {
			p.tidy(s)
			return
		}
	}
	p.remove(j)
	j.priority, j.invocation = priority, invocation
	p.add(j, s)
}

// Cancel implements queue.Publisher.
func (q *Queue) Cancel(_ context.Context, operation string) error {
	q.mu.Lock()
	sig, err := q.cancel(operation)
	q.mu.Unlock()
	sig.send()
	return err
}

// cancel is Cancel with the mutex held.
func (q *Queue) cancel(operation string) (signals, error) {
	if q.closed {
		return signals{}, fmt.Errorf("cancel %s: %w", operation, queue.ErrClosed)
	}
	j := q.jobs[operation]
	switch {
	case j == nil || j.cancelled:
		return signals{}, nil
	case j.lease == nil:
		q.pool(j.pool).remove(j)
		j.cancelled = true
		q.drop(j)
		return q.tell(j, withdrawn(j)), nil
	}
	j.cancelled = true
	close(j.lease.cancelled)
	return signals{}, nil
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
