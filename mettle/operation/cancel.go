package operation

import (
	"time"

	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// Hold is what a Registry has to do with a name.
type Hold uint8

// Whether an operation is known by the name.
const (
	NotHeld  Hold = iota
	Held          // it is, and is in flight
	HasEnded      // it is, and has ended
)

// Cancel ends the wait of all clients that wait by that name, here, and of those
// that come back with it in the next minutes. The operation itself ends, and its
// job is withdrawn, unless somebody waits for it by another name. One that has
// ended stays as it is. Unless the name is NotHeld, all is seen to.
func (r *Registry) Cancel(n Name) Hold {
	text := n.String()
	r.mu.Lock()
	defer r.unlock()
	w := r.byName[text]
	if w == nil {
		if op := r.same(n); op != nil && op.machine.snap.Ended() {
			return HasEnded
		}
		r.forbid(text)
		return NotHeld
	}
	op := w.op
	switch {
	case w.cancelled.Load():
		return Held
	case op.machine.snap.Ended():
		return HasEnded
	}
	r.forbid(text)
	w.cancelled.Store(true)
	for ; w.waiters > 0; w.waiters-- {
		r.step(op, Event{Kind: Left})
	}
	if op.machine.Waiters() == 0 {
		r.step(op, Event{Kind: Cancelled})
		return Held
	}
	r.show(op)
	if w != &op.own && len(op.others) > maxNames {
		r.unname(w) // that it is cancelled is remembered all the same
	}
	return Held
}

// Uncancel undoes Cancel of a name that was NotHeld: its operation has ended,
// elsewhere.
func (r *Registry) Uncancel(n Name) {
	text := n.String()
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.byName[text] == nil {
		r.cancelled.remove(text)
	}
}

// Holds reports whether n, or what it was merged with, is in flight here, has
// ended here not long ago, or was cancelled.
func (r *Registry) Holds(n Name) bool {
	text := n.String()
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.byName[text] != nil || r.cancelled.has(text) || r.same(n) != nil
}

// Cancelled reports whether Cancel was called for n lately.
func (r *Registry) Cancelled(n Name) bool {
	text := n.String()
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.cancelled.has(text)
}

// Withdrawn tells that somebody else has withdrawn the job of u's operation, and
// where u is that of a worker, which attempt has ended so. Clients that wait for
// the operation see a Failed Snapshot with ErrWithdrawn, and begin anew.
func (r *Registry) Withdrawn(u *queuepb.Update) {
	r.tell(u.GetOperation(), Event{Kind: Withdrawn, Update: u})
}

// TakenOver tells that another API server looks after the job of that name, so
// that it is not withdrawn when nobody waits for it here any more.
func (r *Registry) TakenOver(job string) { r.tell(job, Event{Kind: TakenOver}) }

// Elsewhere reports whether another API server looks after the job of w's
// operation, which is in flight: it withdraws the job when nobody waits there any
// more, and does not know who waits here.
func (r *Registry) Elsewhere(w *Wait) bool {
	if w.op == nil {
		return false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return w.op.machine.elsewhere && !w.op.machine.snap.Ended()
}

// TookOver tells that this API server looks after the job of that name again.
func (r *Registry) TookOver(job string) { r.tell(job, Event{Kind: TookOver}) }

func (r *Registry) tell(job string, e Event) {
	r.mu.Lock()
	defer r.unlock()
	if op := r.job(job); op != nil {
		r.step(op, e)
	}
}

// maxCancelled and maxCancelledBytes bound the names that are remembered as
// cancelled: with what the sets take beside, some 25 MB.
const (
	maxCancelled      = 1 << 16
	maxCancelledBytes = 16 << 20
)

// forbid remembers a name as cancelled. The mutex is held.
func (r *Registry) forbid(text string) {
	due := time.Now().Add(r.opts.KeepFinished)
	r.cancelled.add(text, due)
	r.arm(due)
}

// names is a set of names that forgets each when it is due. The zero set is
// empty.
type names struct {
	set   map[string]uint64 // where in queue it is, by dueName.seq
	queue []dueName         // the next one due is first; some are not in set any more
	bytes int               // of the names in queue
	seq   uint64
}

type dueName struct {
	text string
	due  time.Time
	seq  uint64
}

func (s *names) has(text string) bool {
	_, ok := s.set[text]
	return ok
}

// add puts text in. One that is there stays due when it was.
func (s *names) add(text string, due time.Time) {
	if s.has(text) {
		return
	}
	if s.set == nil {
		s.set = make(map[string]uint64)
	}
	for len(s.queue) > 0 && (len(s.queue) >= maxCancelled || s.bytes+len(text) > maxCancelledBytes) {
		s.drop()
	}
	s.seq++
	s.set[text] = s.seq
	s.queue = append(s.queue, dueName{text, due, s.seq})
	s.bytes += len(text)
}

// remove takes text out.
func (s *names) remove(text string) { delete(s.set, text) }

// drop forgets the oldest.
func (s *names) drop() {
	first := s.queue[0]
	if s.set[first.text] == first.seq { // it was not added again since
		delete(s.set, first.text)
	}
	s.bytes -= len(first.text)
	s.queue[0] = dueName{}
	s.queue = s.queue[1:]
}

// expire forgets what is due.
func (s *names) expire(now time.Time) {
	for len(s.queue) > 0 && !s.queue[0].due.After(now) {
		s.drop()
	}
}

// due is when there is something to expire; zero: nothing.
func (s *names) due() time.Time {
	if len(s.queue) == 0 {
		return time.Time{}
	}
	return s.queue[0].due
}
