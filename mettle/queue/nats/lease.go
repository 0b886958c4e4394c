package nats

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	natsgo "github.com/nats-io/nats.go"

	"github.com/mettle-build/mettle/mettle/queue"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// leaseKey names a lease among those of a Queue.
type leaseKey struct {
	operation string
	attempt   uint32
}

// A lease implements queue.Lease.
type lease struct {
	q         *Queue
	job       *queuepb.Job
	msg       *natsgo.Msg
	attempt   uint32
	name      string        // record.Lease
	cancelled chan struct{} // closed by observe

	// busy has room for one: who writes the record holds it, with or without mu.
	busy chan struct{}

	// mu guards the rest. Nothing is awaited while it is held.
	mu        sync.Mutex
	record    record // as it was last seen or written
	revision  uint64
	ended     bool // or lost
	withdrawn bool // cancelled is closed
	final     *queuepb.Update
	told      []string    // who has been sent final
	note      *time.Timer // tells the API servers of the lease, unless the worker reports before
}

// newLease makes the lease of a record that says that it is ours.
func (q *Queue) newLease(d delivery, r record, revision uint64) *lease {
	l := &lease{
		q: q, job: d.job, msg: d.msg, attempt: r.Attempt, name: r.Lease, record: r, revision: revision,
		cancelled: make(chan struct{}), busy: make(chan struct{}, 1),
	}
	q.mu.Lock()
	q.held[leaseKey{d.job.GetOperation(), r.Attempt}] = l
	q.mu.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.observe(stored{record: r, revision: revision})
	l.note = time.AfterFunc(noteAfter, l.noteClaim)
	return l
}

// Job implements queue.Lease.
func (l *lease) Job() *queuepb.Job { return l.job }

// Attempt implements queue.Lease.
func (l *lease) Attempt() uint32 { return l.attempt }

// Cancelled implements queue.Lease.
func (l *lease) Cancelled() <-chan struct{} { return l.cancelled }

// Extend implements queue.Lease.
func (l *lease) Extend(ctx context.Context) error {
	return l.do(ctx, "extend", func() error {
		if _, err := l.change(ctx, func(*record) {}); err != nil {
			return err
		}
		// Where this is lost, the job is delivered to somebody, who sees by the
		// record that it is not to be had yet.
		l.q.respond(l.msg, "+WPI")
		return nil
	})
}

// Ack implements queue.Lease.
func (l *lease) Ack(ctx context.Context) error {
	return l.do(ctx, "acknowledge", func() error {
		r, err := l.change(ctx, func(r *record) { r.State = stateEnded })
		if err != nil {
			return err
		}
		l.end()
		l.sendFinal(ctx, r)
		l.finish()
		return nil
	})
}

// Release implements queue.Lease.
func (l *lease) Release(ctx context.Context) error {
	return l.handBack(ctx, "release", func(r *record) {
		r.Released++
		r.State = stateWaiting
	})
}

// Reject implements queue.Lease.
func (l *lease) Reject(ctx context.Context, reason string) error {
	reason = strings.ToValidUTF8(reason[:min(len(reason), maxReason)], "?")
	l.q.avoid(l.job.GetOperation())
	return l.handBack(ctx, "reject", func(r *record) { r.endAttempt("could not run it: " + reason) })
}

// maxReason bounds what a record has of a reason, in bytes: it is to be a short
// phrase, and a record holds that of every attempt.
const maxReason = 1 << 10

// handBack ends the lease but not the job; end changes the record of one that has
// not been withdrawn.
func (l *lease) handBack(ctx context.Context, verb string, end func(*record)) error {
	return l.do(ctx, verb, func() error {
		r, err := l.change(ctx, func(r *record) {
			if r.cancelled() {
				r.State = stateEnded
			} else {
				end(r)
			}
		})
		if err != nil {
			return err
		}
		l.end()
		switch {
		case r.State == stateEnded:
			l.q.tell(ctx, r.Replies, ended(r))
			l.finish()
		case r.usedUp(l.q.opts.MaxAttempts):
			l.mu.Lock()
			revision := l.revision
			l.mu.Unlock()
			if err := l.q.endUsedUp(ctx, r, revision, l.msg); err != nil {
				l.q.reject(l.msg, 0) // whoever gets it next ends it
			}
		default:
			l.q.tell(ctx, r.Replies, requeued(r))
			l.giveBack(ctx)
		}
		return nil
	})
}

// do runs f while nobody else changes the lease, if it is still good.
func (l *lease) do(ctx context.Context, what string, f func() error) error {
	err := l.hold(ctx)
	if err == nil {
		if l.isEnded() {
			err = queue.ErrLeaseLost
		} else {
			err = f()
		}
		l.letGo()
	}
	if err != nil {
		return fmt.Errorf("%s lease of %s, attempt %d: %w", what, l.job.GetOperation(), l.attempt, err)
	}
	return nil
}

func (l *lease) hold(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	select {
	case l.busy <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-l.q.done:
		return queue.ErrClosed
	}
}

func (l *lease) letGo() { <-l.busy }

func (l *lease) isEnded() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.ended
}

// change writes the record that f makes of what there is, and returns it. The
// lease is held. Where the record is another's, the error wraps
// queue.ErrLeaseLost.
func (l *lease) change(ctx context.Context, f func(*record)) (record, error) {
	for range maxConflicts {
		l.mu.Lock()
		next, revision := l.record.clone(), l.revision
		l.mu.Unlock()
		f(&next)
		written, err := l.q.store(ctx, next, revision)
		if err == nil {
			l.mu.Lock()
			l.record, l.revision = next, written
			l.mu.Unlock()
			return next, nil
		}
		if !errors.Is(err, errConflict) {
			return record{}, err
		}
		s, err := l.q.load(ctx, l.job.GetOperation())
		if err != nil {
			return record{}, err
		}
		if s.State == next.State && s.State != stateLeased && s.Lease == l.name && s.Job == next.Job && s.Attempt == next.Attempt {
			// The first of two tries did succeed.
			l.mu.Lock()
			l.record, l.revision = s.record, s.revision
			l.mu.Unlock()
			return s.record, nil
		}
		l.mu.Lock()
		lost := !l.observe(s)
		l.mu.Unlock()
		if lost {
			l.q.metrics.lost.Inc()
			l.end()
			return record{}, queue.ErrLeaseLost
		}
	}
	return record{}, errContended
}

// observe takes note of the record, and reports whether it still is this lease's.
// The mutex is held.
func (l *lease) observe(s stored) bool {
	if s.State != stateLeased || s.Lease != l.name {
		return false
	}
	if s.revision >= l.revision {
		l.record, l.revision = s.record, s.revision
	}
	if s.cancelled() && !l.withdrawn {
		l.withdrawn = true
		close(l.cancelled)
	}
	return true
}

// end makes the lease one that can do nothing more.
func (l *lease) end() {
	l.mu.Lock()
	l.ended = true
	l.note.Stop()
	l.mu.Unlock()
	key := leaseKey{l.job.GetOperation(), l.attempt}
	l.q.mu.Lock()
	if l.q.held[key] == l {
		delete(l.q.held, key)
	}
	l.q.mu.Unlock()
}

// finish removes the message of a job whose record says that it has ended. That is
// not waited for: where it is lost, the message is delivered again and dropped.
func (l *lease) finish() { l.q.respond(l.msg, "+ACK") }

// giveBack has the message delivered again, and waits until the broker is about to:
// it is the next of its band. Where that fails, it comes after a lease time.
func (l *lease) giveBack(ctx context.Context) {
	err := l.q.try(ctx, callHandBack, func(ctx context.Context) error {
		_, err := l.q.nc.RequestWithContext(ctx, l.msg.Reply, []byte("-NAK"))
		return err
	})
	if err != nil {
		l.q.log.Warn("a job that is handed back has to wait for a lease time", "operation", l.job.GetOperation(), "error", err)
	}
}

// onNote looks at the record of a lease, because somebody says that it has
// changed, and answers when that is done.
func (q *Queue) onNote(ctx context.Context, m *natsgo.Msg) {
	for _, l := range q.leasesOf(string(m.Data)) {
		s, err := q.load(ctx, l.job.GetOperation())
		if err != nil {
			q.log.Warn("could not look at the record of a lease", "operation", l.job.GetOperation(), "error", err)
			return
		}
		l.mu.Lock()
		ours := l.observe(s)
		l.mu.Unlock()
		if !ours {
			q.log.Debug("a lease is lost, its worker learns it when it next extends it", "operation", l.job.GetOperation())
		}
	}
	if m.Reply != "" {
		_ = m.Respond(nil) // who asked does not depend on it
	}
}
