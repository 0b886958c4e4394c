package operation

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

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

// withdrawTimeout bounds one call of Withdrawer.Cancel.
const withdrawTimeout = 10 * time.Second

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
	byName      map[string]*Operation
	inFlight    map[mergeKey]*Operation // those that others may be merged with
	finished    map[mergeKey]*Operation // the newest that has ended
	abandoned   list                    // nobody waits; the next one due is first
	ended       list                    // the oldest is first
	endedBytes  int64
	stages      [Failed + 1]int // how many operations in flight are where
	withdrawals []string        // the jobs to be withdrawn by Run
	due         time.Time       // when timer fires; zero: it does not
}

// mergeKey is what operations have in common that one execution can serve. The
// platform and the timeout are part of the Action.
type mergeKey struct {
	instance string
	action   digest.Digest
	skip     bool
}

// An Operation is one execution, and whoever waits for it. It stays readable
// after the Registry has forgotten it. It is safe for concurrent use.
type Operation struct {
	text  string
	key   mergeKey
	merge bool
	view  atomic.Pointer[view]

	// The rest is guarded by Registry.mu.
	machine    Machine
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

// Watch returns the newest state, and a channel that is closed once there is a
// newer one. A slow reader misses states in between, never the newest.
func (o *Operation) Watch() (*Snapshot, <-chan struct{}) {
	v := o.view.Load()
	return &v.Snapshot, v.changed
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
		byName:   make(map[string]*Operation),
		inFlight: make(map[mergeKey]*Operation),
		finished: make(map[mergeKey]*Operation),
	}
	r.timer.Stop()
	return r, nil
}

// Join makes one more client wait for the operation of that name. Where merge
// is Mergeable, that may be an operation of another name that runs the same
// action. Where there is none, it is created, and the caller publishes its job
// and tells the outcome to Published. The client that no longer waits says so
// by Leave.
func (r *Registry) Join(n Name, merge Merge) (op *Operation, created bool) {
	text, key := n.String(), keyOf(n)
	r.mu.Lock()
	op = r.byName[text]
	if op == nil && merge == Mergeable {
		op = lookUp(r.inFlight, key)
	}
	if created = op == nil; created {
		op = &Operation{text: text, key: key, merge: merge == Mergeable, urgency: Urgency{Priority: n.Priority}}
		op.view.Store(&view{changed: make(chan struct{})})
		r.byName[text] = op
		if op.merge {
			r.inFlight[key] = op
		}
		r.stages[Unknown]++
		if n.SkipCacheLookup {
			r.step(op, Event{Kind: AcceptedSkip})
		} else {
			// The caller has asked the ActionCache, on behalf of the client alone.
			r.step(op, Event{Kind: Accepted})
			r.step(op, Event{Kind: CacheMiss})
		}
	}
	r.step(op, Event{Kind: Joined})
	r.unlock()
	return op, created
}

// Urgency is what clients that wait for the same operation may differ in.
type Urgency struct {
	Priority   int32  // as in ExecutionPolicy: lower is more urgent
	Invocation string // as in queue's Job
}

// Raise takes in the urgency of a client that has joined op, and reports whether
// its job is to be raised at once (queue.Raiser): it waits for a worker, and the
// client's priority is a lower number than those of all before, or its
// invocation is another than the last one for which this was so. Where the job
// is still on its way to the broker, Raised tells it afterwards.
func (r *Registry) Raise(op *Operation, u Urgency) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	have := &op.urgency
	if op.machine.snap.Stage != Queued || u.Priority > have.Priority || u == *have {
		return false
	}
	*have = u
	op.raised = !op.machine.published
	return !op.raised
}

// Raised is to be called after Published: the urgency of clients that have joined
// op in the meantime, if it is not what op was created with.
func (r *Registry) Raised(op *Operation) (Urgency, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	raised := op.raised
	op.raised = false
	return op.urgency, raised
}

// Merge says whether an operation may be merged with others.
type Merge uint8

// Do_not_cache makes an Action NotMergeable.
const (
	NotMergeable Merge = iota
	Mergeable
)

// Find makes one more client wait for the operation of that name, or for one
// that it was or would have been merged with: the same action, in flight, or
// ended after the name was given. The client that no longer waits says so by
// Leave.
func (r *Registry) Find(n Name) (*Operation, bool) {
	text, key := n.String(), keyOf(n)
	r.mu.Lock()
	defer r.unlock()
	op := r.byName[text]
	if op == nil {
		op = lookUp(r.inFlight, key)
	}
	if op == nil {
		if op = lookUp(r.finished, key); op != nil && op.finishedAt.Before(n.Created) {
			op = nil
		}
	}
	if op == nil {
		return nil, false
	}
	r.step(op, Event{Kind: Joined})
	return op, true
}

func keyOf(n Name) mergeKey {
	return mergeKey{instance: n.Instance, action: n.Action, skip: n.SkipCacheLookup}
}

// lookUp finds what k may be merged with. A client that wants no cached result
// may not join one whose job may be answered from the cache when it is
// delivered again; the other way round is fine.
func lookUp(m map[mergeKey]*Operation, k mergeKey) *Operation {
	op := m[k]
	if op == nil && !k.skip {
		k.skip = true
		op = m[k]
	}
	return op
}

// Leave makes one client fewer wait for op.
func (r *Registry) Leave(op *Operation) {
	r.mu.Lock()
	r.step(op, Event{Kind: Left})
	r.unlock()
}

// Published tells what became of the Publish of op's job. After an error op is
// forgotten, and whoever waits for it sees a Failed Snapshot with that error.
func (r *Registry) Published(op *Operation, err error) {
	e := Event{Kind: Published}
	if err != nil {
		e = Event{Kind: PublishFailed, Err: err}
	}
	r.mu.Lock()
	r.step(op, e)
	r.unlock()
}

// Update takes in an update of a worker or the broker. One about an operation
// that nobody knows changes nothing. It does not block.
func (r *Registry) Update(u *queuepb.Update) {
	r.mu.Lock()
	if op := r.byName[u.GetOperation()]; op != nil {
		r.step(op, Event{Kind: Updated, Update: u})
	}
	r.unlock()
}

// Name is the name under which op was created, and by which its job is known.
func (o *Operation) Name() string { return o.text }

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

// withdraw withdraws the jobs that are to be.
func (r *Registry) withdraw(ctx context.Context) {
	r.mu.Lock()
	names := r.withdrawals
	r.withdrawals = nil
	r.mu.Unlock()
	for _, name := range names {
		ctx, cancel := context.WithTimeout(ctx, withdrawTimeout)
		if err := r.opts.Jobs.Cancel(ctx, name); err != nil {
			r.opts.Logger.Warn("job not withdrawn", "operation", name, "error", err)
		}
		cancel()
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
	r.due = time.Time{}
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
