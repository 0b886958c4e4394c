package operation

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/trace"

	"github.com/mettle-build/mettle/elan/digest"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// Withdrawer takes jobs back; it is the part of queue.Publisher that a Registry
// needs.
type Withdrawer interface {
	Cancel(ctx context.Context, operation string) error
}

// RegistryOptions are the settings of a Registry.
type RegistryOptions struct {
	// Jobs is told of the operations that nobody waits for any more. Required.
	Jobs Withdrawer
	// AbandonAfter is how long an operation goes on while nobody waits for it.
	// Default 5 min.
	AbandonAfter time.Duration
	// KeepFinished is how long a finished operation can still be found.
	// Default 5 min.
	KeepFinished time.Duration
	// MaxFinished and MaxFinishedBytes bound the finished operations that are
	// kept, by their number and by the size of their responses; the oldest go
	// first. Defaults 4,096 and 16 MiB.
	MaxFinished      int
	MaxFinishedBytes int64
	// Logger is told of withdrawals. Default: none.
	Logger *slog.Logger
}

// Registry holds the operations of one API server: those in flight, as many as
// the broker takes jobs, and for a while those that have ended. It is safe for
// concurrent use. Nothing that it does waits for a client or for the broker,
// except Run.
type Registry struct {
	opts  RegistryOptions
	wake  chan struct{} // of capacity 1: a token says that withdrawals is not empty
	timer *time.Timer   // fires when something may be due

	// mu guards everything below, and the Machines.
	mu          sync.Mutex
	byName      map[string]*Wait        // also by the names of merged clients
	inFlight    map[mergeKey]*Operation // those that others may be merged with
	finished    map[mergeKey]*Operation // the newest that has ended
	abandoned   list                    // nobody waits; the next one due is first
	ended       list                    // the oldest is first
	endedBytes  int64
	stages      [Failed + 1]int  // how many operations in flight are where
	loads       map[string]*load // by pool
	withdrawals []withdrawal     // of jobs, by Run
	failed      []withdrawal     // to be tried again at retryAt
	retryAt     time.Time
	cancelled   names     // by which nobody may wait
	order       order     // all that are in byName by their first name
	due         time.Time // when timer fires; zero: it does not
}

// mergeKey is what operations have in common that one execution can serve. The
// platform and the timeout are part of the Action.
type mergeKey struct {
	instance string
	action   digest.Digest
	skip     bool
}

// An Operation is one execution, and whoever waits for it.
type Operation struct {
	text  string
	key   mergeKey
	merge bool
	view  atomic.Pointer[view]
	// origin is of the trace in which it was begun. nil: none.
	origin atomic.Pointer[trace.SpanContext]

	// The rest is guarded by Registry.mu.
	own        Wait    // that by text
	others     []*Wait // those by the names of merged clients
	seq        uint64  // the place in Registry.order
	machine    Machine
	load       *load     // that it counts in; nil once it has ended
	urgency    Urgency   // the greatest of those who wait
	raised     bool      // the broker has yet to hear of urgency
	due        time.Time // when it is abandoned or forgotten, if it is in a list
	finishedAt time.Time
	prev, next *Operation
}

// view is a Snapshot and what is closed when there is a newer one.
type view struct {
	Snapshot
	changed chan struct{}
}

// NewRegistry makes a Registry. The caller runs it by Run.
func NewRegistry(o RegistryOptions) (*Registry, error) {
	if o.Jobs == nil {
		return nil, errors.New("operation registry: Jobs are missing")
	}
	if o.AbandonAfter < 0 || o.KeepFinished < 0 || o.MaxFinished < 0 || o.MaxFinishedBytes < 0 {
		return nil, errors.New("operation registry: a negative limit")
	}
	if o.AbandonAfter == 0 {
		o.AbandonAfter = 5 * time.Minute
	}
	if o.KeepFinished == 0 {
		o.KeepFinished = 5 * time.Minute
	}
	if o.MaxFinished == 0 {
		o.MaxFinished = 4096
	}
	if o.MaxFinishedBytes == 0 {
		o.MaxFinishedBytes = 16 << 20
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	r := &Registry{
		opts:     o,
		wake:     make(chan struct{}, 1),
		timer:    time.NewTimer(o.AbandonAfter),
		byName:   make(map[string]*Wait),
		inFlight: make(map[mergeKey]*Operation),
		finished: make(map[mergeKey]*Operation),
		loads:    make(map[string]*load),
	}
	r.timer.Stop()
	return r, nil
}

// Published tells what became of the Publish of the job of w's operation, which
// Join created. After an error the operation is forgotten, and whoever waits for
// it sees a Failed Snapshot with that error.
func (r *Registry) Published(w *Wait, err error) {
	e := Event{Kind: Published}
	if err != nil {
		e = Event{Kind: PublishFailed, Err: err}
	}
	r.mu.Lock()
	r.step(w.op, e)
	r.unlock()
}

// Update takes in an update of a worker or the broker. One about an operation
// that nobody knows changes nothing. It does not block.
func (r *Registry) Update(u *queuepb.Update) {
	r.mu.Lock()
	if op := r.job(u.GetOperation()); op != nil {
		r.step(op, Event{Kind: Updated, Update: u})
	}
	r.unlock()
}

// job finds the operation whose job has that name. The mutex is held.
func (r *Registry) job(name string) *Operation {
	if w := r.byName[name]; w != nil && w == &w.op.own {
		return w.op
	}
	return nil
}

// Counts tells how many operations wait for a worker and how many are with one.
func (r *Registry) Counts() (queued, running int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.stages[Queued], r.stages[Executing]
}

// Run does what takes time: it abandons, forgets and withdraws, until ctx is
// done, and then returns nil. There is one Run at a time.
func (r *Registry) Run(ctx context.Context) error {
	defer r.timer.Stop()
	for {
		select {
		case <-r.timer.C:
			r.expire()
		case <-r.wake:
		case <-ctx.Done():
			return nil
		}
		r.withdraw(ctx)
	}
}

// expire does what is due and sets the timer for what is due next.
func (r *Registry) expire() {
	r.mu.Lock()
	defer r.unlock()
	now := time.Now()
	for op := r.abandoned.first; op != nil && !op.due.After(now); op = r.abandoned.first {
		r.abandoned.remove(op)
		r.step(op, Event{Kind: Abandoned})
	}
	for op := r.ended.first; op != nil && !op.due.After(now); op = r.ended.first {
		r.forget(op)
	}
	r.cancelled.expire(now)
	r.due = time.Time{}
	r.retry(now)
	if due := r.cancelled.due(); !due.IsZero() {
		r.arm(due)
	}
	for _, op := range []*Operation{r.abandoned.first, r.ended.first} {
		if op != nil {
			r.arm(op.due)
		}
	}
}

// arm has the timer fire at due, or before. The mutex is held.
func (r *Registry) arm(due time.Time) {
	if r.due.IsZero() || due.Before(r.due) {
		r.due = due
		r.timer.Reset(time.Until(due))
	}
}

// unlock frees the mutex, and then wakes Run if it has something to do.
func (r *Registry) unlock() {
	wake := len(r.withdrawals) > 0
	r.mu.Unlock()
	if wake {
		select {
		case r.wake <- struct{}{}:
		default: // there is a token
		}
	}
}
