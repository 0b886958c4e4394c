package operation

import (
	"sync/atomic"

	"go.opentelemetry.io/otel/trace"
)

// A Wait is for the clients that wait for an operation by one name. It stays
// readable after the Registry has forgotten the operation. It is safe for
// concurrent use.
type Wait struct {
	op        *Operation // nil: the name was cancelled before there was one
	text      string
	cancelled atomic.Bool

	// The rest is guarded by Registry.mu.
	waiters int // how many clients wait
	index   int // the place in op.others, where it is there
}

// Watch returns the newest state, and a channel that is closed once there is a
// newer one. A slow reader misses states in between, never the newest. Where the
// name was cancelled, the state is Failed with ErrCancelled, whatever becomes of
// the operation.
func (w *Wait) Watch() (*Snapshot, <-chan struct{}) {
	if w.op == nil {
		return &Snapshot{Stage: Failed, Err: ErrCancelled}, nil
	}
	v := w.op.view.Load() // first: what is set before the view changes is seen
	if w.cancelled.Load() {
		return &Snapshot{Stage: Failed, Err: ErrCancelled}, nil
	}
	return &v.Snapshot, v.changed
}

// Job is the name by which the operation was created, and that its job has.
func (w *Wait) Job() string {
	if w.op == nil {
		return w.text
	}
	return w.op.text
}

// WatchJob is Watch for the operation itself, which may go on for others when
// this wait has been cancelled.
func (w *Wait) WatchJob() (*Snapshot, <-chan struct{}) {
	if w.op == nil {
		return w.Watch()
	}
	v := w.op.view.Load()
	return &v.Snapshot, v.changed
}

// SetOrigin notes the span in which the operation was begun, for the traces of those
// who wait for it too.
func (w *Wait) SetOrigin(sc trace.SpanContext) {
	if w.op != nil {
		w.op.origin.Store(&sc)
	}
}

// Origin is what SetOrigin noted; the zero SpanContext where nobody did.
func (w *Wait) Origin() trace.SpanContext {
	if w.op == nil {
		return trace.SpanContext{}
	}
	if sc := w.op.origin.Load(); sc != nil {
		return *sc
	}
	return trace.SpanContext{}
}

// maxNames bounds the names of one operation that it is known by though nobody
// waits by them now. More are not needed: the action says what to merge with.
const maxNames = 256

// Join makes one more client wait for the operation of that name. Where merge
// is Mergeable, that may be an operation of another name that runs the same
// action. Where there is none, it is created, and the caller publishes its job
// and tells the outcome to Published. The client that no longer waits says so
// by Leave.
func (r *Registry) Join(n Name, merge Merge) (w *Wait, created bool) {
	text, key := n.String(), keyOf(n)
	r.mu.Lock()
	defer r.unlock()
	if w = r.byName[text]; r.refused(text, w) {
		return &Wait{text: text}, false
	}
	if w == nil && merge == Mergeable {
		if op := lookUp(r.inFlight, key); op != nil {
			w = r.name(op, text)
		}
	}
	if created = w == nil; created {
		w = r.create(n, text, merge)
	}
	r.join(w)
	return w, created
}

// refused reports whether a name, which is w's if there is one, was cancelled.
// The mutex is held.
func (r *Registry) refused(text string, w *Wait) bool {
	return r.cancelled.has(text) || w != nil && w.cancelled.Load()
}

// create makes an operation. The mutex is held.
func (r *Registry) create(n Name, text string, merge Merge) *Wait {
	op := &Operation{text: text, key: keyOf(n), merge: merge == Mergeable, urgency: Urgency{Priority: n.Priority}}
	op.own.op, op.own.text = op, text
	op.view.Store(&view{changed: make(chan struct{})})
	op.seq = r.order.add(op)
	r.byName[text] = &op.own
	if op.merge {
		r.inFlight[op.key] = op
	}
	r.stages[Unknown]++
	if n.SkipCacheLookup {
		r.step(op, Event{Kind: AcceptedSkip})
	} else {
		// The caller has asked the ActionCache, on behalf of the client alone.
		r.step(op, Event{Kind: Accepted})
		r.step(op, Event{Kind: CacheMiss})
	}
	return &op.own
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
func (r *Registry) Find(n Name) (*Wait, bool) {
	r.mu.Lock()
	defer r.unlock()
	text := n.String()
	w := r.byName[text]
	if r.refused(text, w) {
		return &Wait{text: text}, true
	}
	if w == nil {
		if op := r.same(n); op != nil {
			w = r.name(op, text)
		}
	}
	if w == nil {
		return nil, false
	}
	r.join(w)
	return w, true
}

// same finds an operation with another name that serves n as well. The mutex is
// held.
func (r *Registry) same(n Name) *Operation {
	key := keyOf(n)
	if op := lookUp(r.inFlight, key); op != nil {
		return op
	}
	if op := lookUp(r.finished, key); op != nil && !op.finishedAt.Before(n.Created) {
		return op
	}
	return nil
}

// name makes op known by one more name, unless it has ended. The mutex is held.
func (r *Registry) name(op *Operation, text string) *Wait {
	w := &Wait{op: op, text: text, index: len(op.others)}
	if !op.machine.snap.Ended() {
		op.others = append(op.others, w)
		r.byName[text] = w
	}
	return w
}

// unname undoes name, if it did something and forget has not. The mutex is held.
func (r *Registry) unname(w *Wait) {
	if r.byName[w.text] != w {
		return
	}
	delete(r.byName, w.text)
	others := w.op.others
	last := len(others) - 1
	others[w.index] = others[last]
	others[w.index].index = w.index
	others[last] = nil
	w.op.others = others[:last]
}

// join makes one more client wait. The mutex is held.
func (r *Registry) join(w *Wait) {
	w.waiters++
	r.step(w.op, Event{Kind: Joined})
}

// Leave makes one client fewer wait.
func (r *Registry) Leave(w *Wait) {
	r.mu.Lock()
	defer r.unlock()
	if w.waiters == 0 {
		return // it was cancelled, and counts no more
	}
	w.waiters--
	op := w.op
	r.step(op, Event{Kind: Left})
	if w.waiters == 0 && w != &op.own && (op.machine.snap.Ended() || len(op.others) > maxNames) {
		r.unname(w)
	}
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
