package operation

import (
	"cmp"
	"slices"
)

// A Listed is an operation as List tells of it.
type Listed struct {
	// Names are those by which clients know it, at most a thousand, first that
	// of its job; of one that has ended, only that.
	Names []string
	// Place orders operations by when they came to this server; it is above 0.
	Place    uint64
	Snapshot Snapshot
}

// batchSize is how many operations List takes note of without letting others in.
const batchSize = 512

// List calls visit with the operations that came after the place, those in
// flight and those that have ended not long ago, in the order in which they
// came, until it returns false. An operation that was there all the time is
// visited; others may be. Visit may call the Registry.
func (r *Registry) List(after uint64, visit func(Listed) bool) {
	for {
		batch := r.list(after)
		for _, l := range batch {
			if !visit(l) {
				return
			}
		}
		if len(batch) == 0 {
			return
		}
		after = batch[len(batch)-1].Place
	}
}

func (r *Registry) list(after uint64) []Listed {
	r.mu.Lock()
	defer r.mu.Unlock()
	var batch []Listed
	for _, e := range r.order.after(after) {
		if len(batch) == batchSize {
			break
		}
		if e.op == nil {
			continue
		}
		batch = append(batch, Listed{Place: e.seq, Snapshot: e.op.machine.snap, Names: e.op.names()})
	}
	return batch
}

// maxListed bounds Listed.Names.
const maxListed = 1000

// names are Listed.Names. The mutex is held.
func (o *Operation) names() []string {
	var all []string
	if !o.own.cancelled.Load() {
		all = append(all, o.text)
	}
	if o.machine.snap.Ended() {
		return all
	}
	for _, w := range o.others[:min(len(o.others), maxListed-1)] {
		if !w.cancelled.Load() {
			all = append(all, w.text)
		}
	}
	return all
}

// order is operations in the order in which they came. The zero order is empty.
type order struct {
	last  uint64
	all   []placed // by seq
	holes int      // how many of all have no operation any more
}

type placed struct {
	seq uint64
	op  *Operation
}

// add gives op a place.
func (o *order) add(op *Operation) uint64 {
	o.last++
	o.all = append(o.all, placed{o.last, op})
	return o.last
}

// remove frees a place.
func (o *order) remove(seq uint64) {
	i, ok := o.find(seq)
	if !ok || o.all[i].op == nil {
		return
	}
	o.all[i].op = nil
	o.holes++
	if o.holes > 1024 && o.holes > len(o.all)/2 {
		o.all = slices.DeleteFunc(o.all, func(p placed) bool { return p.op == nil })
		o.holes = 0
	}
}

// after is what comes after a place, with holes.
func (o *order) after(seq uint64) []placed {
	i, ok := o.find(seq)
	if ok {
		i++
	}
	return o.all[i:]
}

func (o *order) find(seq uint64) (int, bool) {
	return slices.BinarySearchFunc(o.all, seq, func(p placed, seq uint64) int { return cmp.Compare(p.seq, seq) })
}
