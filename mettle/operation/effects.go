package operation

import (
	"slices"
	"time"
)

// step feeds e to op's machine and does what follows from it, short of I/O. The
// mutex is held.
func (r *Registry) step(op *Operation, e Event) {
	before := op.machine.snap.Stage
	effects := op.machine.Step(e)
	if effects == 0 {
		return
	}
	r.count(op, before, op.machine.snap.Stage)
	if effects.Has(Notify) {
		r.show(op)
	}
	if effects.Has(Withdraw) {
		r.withdrawals = append(r.withdrawals, withdrawal{op.text, time.Now().Add(r.opts.KeepFinished)})
	}
	if effects.Has(StartTimer) {
		op.due = time.Now().Add(r.opts.AbandonAfter)
		r.abandoned.add(op)
		r.arm(op.due)
	}
	if effects.Has(StopTimer) {
		r.abandoned.remove(op)
	}
	if effects.Has(Retire) {
		r.retire(op)
	}
	if effects.Has(Forget) {
		r.forget(op)
	}
}

// show has all who watch op look again. The mutex is held.
func (r *Registry) show(op *Operation) {
	old := op.view.Swap(&view{Snapshot: op.machine.snap, changed: make(chan struct{})})
	close(old.changed)
}

// retire keeps op, which has ended, for those who ask for it later. The mutex
// is held.
func (r *Registry) retire(op *Operation) {
	r.unmerge(op)
	for _, w := range slices.Backward(op.others) { // unname moves only what was seen
		if w.waiters == 0 {
			r.unname(w) // its action finds op, if it comes back
		}
	}
	op.finishedAt = time.Now()
	op.due = op.finishedAt.Add(r.opts.KeepFinished)
	r.ended.add(op)
	r.endedBytes += op.bytes()
	if op.merge {
		r.finished[op.key] = op
	}
	for r.ended.n > r.opts.MaxFinished || r.endedBytes > r.opts.MaxFinishedBytes {
		r.forget(r.ended.first)
	}
	if r.ended.first != nil {
		r.arm(r.ended.first.due)
	}
}

// forget makes op one that nobody can find. The mutex is held.
func (r *Registry) forget(op *Operation) {
	r.unmerge(op)
	if r.byName[op.text] == &op.own {
		delete(r.byName, op.text)
		r.order.remove(op.seq)
	}
	for _, w := range op.others {
		delete(r.byName, w.text)
	}
	op.others = nil
	if r.finished[op.key] == op {
		delete(r.finished, op.key)
	}
	if r.ended.remove(op) {
		r.endedBytes -= op.bytes()
	}
}

// unmerge makes op one that nobody is merged with any more. The mutex is held.
func (r *Registry) unmerge(op *Operation) {
	if r.inFlight[op.key] == op {
		delete(r.inFlight, op.key)
	}
}

// bytes is what a finished operation counts for.
func (o *Operation) bytes() int64 {
	return int64(len(o.machine.snap.Response) + len(o.machine.snap.Metadata))
}

// list is a list of operations, linked through them. An operation is in one
// list at a time.
type list struct {
	first, last *Operation
	n           int
}

func (l *list) add(o *Operation) {
	o.prev, o.next = l.last, nil
	if l.last == nil {
		l.first = o
	} else {
		l.last.next = o
	}
	l.last = o
	l.n++
}

// remove takes o out, and reports whether it was in the list. It must not be in
// another one.
func (l *list) remove(o *Operation) bool {
	if l.first != o && o.prev == nil {
		return false
	}
	if o.prev == nil {
		l.first = o.next
	} else {
		o.prev.next = o.next
	}
	if o.next == nil {
		l.last = o.prev
	} else {
		o.next.prev = o.prev
	}
	o.prev, o.next = nil, nil
	l.n--
	return true
}
