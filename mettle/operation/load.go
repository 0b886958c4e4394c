package operation

// A Load is how many operations of a pool are in flight.
type Load struct{ Queued, Executing int }

// load counts the operations of one pool, of which there are some.
type load struct {
	pool   string
	stages [Completed]int
	all    int
}

// Assign says which pool's workers w's operation, which Join created, is for. It
// is called once, before Published.
func (r *Registry) Assign(w *Wait, pool string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	op := w.op
	if op == nil || op.load != nil || op.machine.snap.Ended() {
		return
	}
	stage := op.machine.snap.Stage
	l := r.loads[pool]
	if l == nil {
		l = &load{pool: pool}
		r.loads[pool] = l
	}
	op.load = l
	l.stages[stage]++
	l.all++
}

// Loads counts the operations in flight by the pools that they are assigned to.
// The caller owns the map.
func (r *Registry) Loads() map[string]Load {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make(map[string]Load, len(r.loads))
	for pool, l := range r.loads {
		out[pool] = Load{Queued: l.stages[Queued], Executing: l.stages[Executing]}
	}
	return out
}

// QueuedFor lists the jobs of the operations that wait for a worker of the pool.
func (r *Registry) QueuedFor(pool string) []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	l := r.loads[pool]
	if l == nil || l.stages[Queued] == 0 {
		return nil
	}
	jobs := make([]string, 0, l.stages[Queued])
	for _, e := range r.order.after(0) {
		if e.op != nil && e.op.load == l && e.op.machine.snap.Stage == Queued {
			jobs = append(jobs, e.op.text)
		}
	}
	return jobs
}

// count counts that op has come from one stage to another. The mutex is held.
func (r *Registry) count(op *Operation, before, after Stage) {
	if before >= Completed || before == after {
		return
	}
	r.stages[before]--
	if after < Completed {
		r.stages[after]++
	}
	l := op.load
	if l == nil {
		return
	}
	l.stages[before]--
	if after < Completed {
		l.stages[after]++
		return
	}
	op.load = nil
	if l.all--; l.all == 0 {
		delete(r.loads, l.pool)
	}
}
