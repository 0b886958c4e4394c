package operation

import "time"

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

// OldestQueued tells for each pool that operations wait for when the client of the
// one first came that has waited longest. It looks at some hundred operations
// at a time without letting others in. The caller owns the map.
func (r *Registry) OldestQueued() map[string]time.Time {
	oldest := map[string]time.Time{}
	for after, more := uint64(0), true; more; {
		after, more = r.oldestQueued(after, oldest)
	}
	return oldest
}

// oldestQueued looks at the operations that came after the place. It reports the
// place of the last one, and whether there are more that are worth a look.
func (r *Registry) oldestQueued(after uint64, oldest map[string]time.Time) (last uint64, more bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	pools := 0 // of those that operations wait for
	for _, l := range r.loads {
		if l.stages[Queued] > 0 {
			pools++
		}
	}
	for i, e := range r.order.after(after) {
		if i == batchSize {
			return last, true
		}
		if last = e.seq; e.op == nil || e.op.load == nil || e.op.machine.snap.Stage != Queued {
			continue
		}
		if _, ok := oldest[e.op.load.pool]; ok {
			continue
		}
		if n, err := ParseName(e.op.text); err == nil {
			oldest[e.op.load.pool] = n.Created
		}
		if len(oldest) >= pools {
			return last, false
		}
	}
	return last, false
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
