package operation

// Urgency is what clients that wait for the same operation may differ in.
type Urgency struct {
	Priority   int32  // as in ExecutionPolicy: lower is more urgent
	Invocation string // as in queue's Job
}

// Raise takes in the urgency of a client that has joined w's operation, and reports whether
// its job is to be raised at once (queue.Raiser): it waits for a worker, and the
// client's priority is a lower number than those of all before, or its
// invocation is another than the last one for which this was so. Where the job
// is still on its way to the broker, Raised tells it afterwards.
func (r *Registry) Raise(w *Wait, u Urgency) bool {
	if w.op == nil {
		return false
	}
	op := w.op
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
// the operation in the meantime, if it is not what it was created with.
func (r *Registry) Raised(w *Wait) (Urgency, bool) {
	op := w.op
	r.mu.Lock()
	defer r.mu.Unlock()
	raised := op.raised
	op.raised = false
	return op.urgency, raised
}
