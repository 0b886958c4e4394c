package pubsub

import (
	"context"
	"time"

	pb "cloud.google.com/go/pubsub/v2/apiv1/pubsubpb"
	"google.golang.org/protobuf/proto"

	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// deliver looks at a message of a subscription of jobs, and gives it to a
// consumer that waits. What needs no consumer, is dealt with in a task: what
// was withdrawn or has ended is acknowledged, and what was delivered too often
// is ended.
func (q *Queue) deliver(s *source, m *pb.ReceivedMessage) {
	l, err := q.newLease(s.subscription, m)
	if err != nil {
		// Nobody can ever read it.
		q.log.Error("a message that is no job was dropped", "subscription", s.subscription, "message", m.GetMessage().GetMessageId(), "error", err)
		q.dropMessage(l)
		return
	}
	if l.pool != token(s.pool) || l.band != s.band {
		// Of a subscription without a filter: an emulator's. It comes by its
		// own subscription as well, with the same id.
		q.start(func(ctx context.Context) {
			if err := q.acknowledge(ctx, l.subscription, l.current()); err != nil {
				q.log.Debug("could not drop another subscription's job", "subscription", l.subscription, "error", err)
			}
		})
		return
	}
	q.mu.Lock()
	l.count = q.count(l, m.GetDeliveryAttempt())
	l.attempt = l.base + l.past.delivered + l.count
	verdict := q.judge(l)
	if verdict == fit {
		q.supersede(l)
		q.leases[l.message] = l
		q.give(s, l)
	}
	q.mu.Unlock()
	switch verdict {
	case needless:
		q.dropMessage(l)
	case revoked:
		q.start(func(ctx context.Context) {
			// Its server may not be the one that has withdrawn it.
			if err := q.endWithdrawn(ctx, l.job, l.attempt); err != nil {
				q.log.Warn("could not tell of a job that was withdrawn", "operation", l.job.GetOperation(), "error", err)
			}
			q.ackNow(ctx, l)
		})
	case unwelcome:
		q.start(func(ctx context.Context) { q.putBack(ctx, l) })
	case worn:
		q.metrics.usedUp.Inc()
		q.log.Warn("the attempts of a job are used up", "operation", l.job.GetOperation(), "attempts", q.opts.MaxAttempts)
		q.start(func(ctx context.Context) {
			// If it fails, the message comes again. This delivery is no attempt.
			if err := q.endUsedUp(ctx, l.job, usedUpAt{attempt: l.attempt - 1, failures: l.past.failures}); err != nil {
				q.log.Warn("could not end a job", "operation", l.job.GetOperation(), "error", err)
				return
			}
			q.ackNow(ctx, l)
		})
	case fit:
		if l.attempt-l.base > 1 {
			q.metrics.redelivered.Inc()
			q.log.Info("a job is delivered again", "operation", l.job.GetOperation(), "attempt", l.attempt)
			q.start(func(ctx context.Context) {
				if err := q.sendRequeued(ctx, l.job, l.attempt-1, "", nil); err != nil {
					q.log.Debug("could not report that a job was requeued", "operation", l.job.GetOperation(), "error", err)
				}
			})
		}
	}
}

// newLease reads a message. With an error the lease is only good to be dropped.
func (q *Queue) newLease(subscription string, m *pb.ReceivedMessage) (*lease, error) {
	msg := m.GetMessage()
	attributes := msg.GetAttributes()
	l := &lease{
		q: q, subscription: subscription, message: msg.GetMessageId(), ackID: m.GetAckId(),
		pool: attributes[attrPool], band: attributes[attrBand],
		publication: attributes[attrPublication], published: publishedAt(msg),
		job: &queuepb.Job{}, cancelled: make(chan struct{}), uncounted: m.GetDeliveryAttempt() == 0,
		// The broker's clock has started already, at most some round trips ago.
		until: time.Now().Add(q.opts.LeaseTime - q.opts.LeaseTime/10),
	}
	var err error
	if l.base, err = parseCount(attributes[attrBase]); err != nil {
		return l, err
	}
	if l.past, err = parseHistory(attributes); err != nil {
		return l, err
	}
	return l, proto.Unmarshal(msg.GetData(), l.job)
}

// count is the number of a delivery of a message: the broker's where it counts, and in any
// case more than that of the one before in this process. The mutex is held.
func (q *Queue) count(l *lease, byBroker int32) uint32 {
	here, _ := q.delivered.get(l.message)
	if old := q.leases[l.message]; old != nil && old.ackID == l.ackID {
		here-- // the same delivery came twice
	}
	n := max(here+1, uint32(max(byBroker, 0))) //nolint:gosec // not negative
	q.delivered.put(l.message, n)
	return n
}

// What becomes of a message.
type verdict int

const (
	fit       verdict = iota // it is leased
	needless                 // it is acknowledged and forgotten
	revoked                  // so it is, and its server hears of it: it was withdrawn
	worn                     // its attempts are used up
	twice                    // the same delivery is here already
	unwelcome                // it is put back: this process could not run it
)

// judge decides. A delivery of what runs here already, because the broker
// delivers twice at times, only takes the place of the older one: what ends the
// lease now ends this one too. The mutex is held.
func (q *Queue) judge(l *lease) verdict {
	if _, ok := q.ended.get(l.message); ok {
		return needless
	}
	if old := q.leases[l.message]; old != nil && old.valid() {
		if old.ackID != l.ackID {
			old.ackID, old.until = l.ackID, l.until
			q.metrics.twice.Inc()
		}
		return twice
	}
	if w, _ := q.withdrawn.get(l.job.GetOperation()); w.covers(l.publication, l.published) {
		return revoked
	}
	switch {
	case l.used() > q.opts.MaxAttempts:
		return worn
	case l.past.avoid == q.id:
		return unwelcome
	}
	return fit
}

// supersede ends the leases here that l takes the place of: those of an operation
// that was withdrawn before it was published anew. Leases that have lapsed are
// forgotten. The mutex is held.
func (q *Queue) supersede(l *lease) {
	for id, old := range q.leases {
		switch {
		case !old.valid():
			delete(q.leases, id)
		case old.job.GetOperation() == l.job.GetOperation() && old.base < l.base:
			old.over = true
			old.cancel()
			delete(q.leases, id)
			q.ended.put(old.message, struct{}{})
		}
	}
}

// dropMessage acknowledges a message that nobody needs.
func (q *Queue) dropMessage(l *lease) {
	q.start(func(ctx context.Context) { q.ackNow(ctx, l) })
}

func (q *Queue) ackNow(ctx context.Context, l *lease) {
	q.mu.Lock()
	q.ended.put(l.message, struct{}{})
	q.mu.Unlock()
	if err := q.acknowledge(ctx, l.subscription, l.current()); err != nil {
		q.log.Warn("could not acknowledge a job that has ended", "operation", l.job.GetOperation(), "error", err)
	}
}
