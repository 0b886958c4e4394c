package nats

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	natsgo "github.com/nats-io/nats.go"
	"github.com/nats-io/nuid"
	"google.golang.org/protobuf/proto"

	"github.com/mettle-build/mettle/mettle/queue"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// Lease implements queue.Consumer.
func (q *Queue) Lease(ctx context.Context, pools []string) (queue.Lease, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if len(pools) == 0 {
		return nil, errors.New("lease: no pool is named")
	}
	leave, err := q.enter()
	if err != nil {
		return nil, fmt.Errorf("lease: %w", err)
	}
	defer leave()
	l, err := q.lease(ctx, pools)
	switch {
	case err == nil:
		return l, nil
	case ctx.Err() != nil:
		return nil, ctx.Err()
	default:
		return nil, fmt.Errorf("lease: %w", err)
	}
}

func (q *Queue) lease(ctx context.Context, pools []string) (*lease, error) {
	for {
		a, err := q.pull(ctx, pools)
		if err != nil {
			return nil, err
		}
		// Once it is begun, it is carried through, within Options.Timeout: a claim
		// that was written and that nobody knows of would hold the job up.
		l, err := q.claim(context.WithoutCancel(ctx), a)
		if l != nil || err != nil {
			return l, err
		}
	}
}

// A delivery is a job as the broker sent it.
type delivery struct {
	msg      *natsgo.Msg
	job      *queuepb.Job
	sequence uint64 // of the message in the stream
	first    bool   // it has not been delivered before
}

// claim takes the job of a message. It returns nil where that is not to be had:
// it has ended, or another has it.
func (q *Queue) claim(ctx context.Context, a arrival) (*lease, error) {
	m := a.msg
	d := delivery{msg: m, job: &queuepb.Job{}, sequence: a.meta.Sequence.Stream, first: a.meta.NumDelivered == 1}
	if err := proto.Unmarshal(m.Data, d.job); err != nil || d.job.GetOperation() == "" {
		q.log.Error("a message that is no job, dropping it", "subject", m.Subject, "error", err)
		q.term(m)
		return nil, nil //nolint:nilnil // said above
	}
	if left := q.avoids(d.job.GetOperation()); left > 0 {
		q.reject(m, min(left, avoidFor/10))
		return nil, nil //nolint:nilnil // others first
	}
	// Most jobs have no record yet, so that there is no need to look.
	s := stored{record: record{Operation: d.job.GetOperation(), State: stateWaiting}}
	look, err := !d.first, error(nil)
	name := nuid.Next()
	for range maxConflicts {
		if look {
			if s, err = q.load(ctx, d.job.GetOperation()); err != nil {
				break
			}
		}
		var l *lease
		if l, err = q.claimFrom(ctx, d, s, name); err == nil || !errors.Is(err, errConflict) {
			if err != nil {
				break
			}
			return l, nil
		}
		look = true
	}
	q.reject(m, 0)
	if errors.Is(err, errConflict) {
		err = errContended
	}
	return nil, err
}

// What is to become of a delivery.
type verdict int

const (
	verdictTake  verdict = iota // lease it
	verdictDrop                 // its job has ended, or is that of the record
	verdictLater                // another has it
	verdictEnd                  // its attempts are used up
	verdictOurs                 // we have it: the first of two tries did succeed
)

// decide says what becomes of the delivery of the job with this sequence number,
// and what the record is then, given that a lease without a sign of life for
// silent has lapsed. Lapsed is the record of the delivery that has thereby ended,
// if one has.
func decide(r record, sequence uint64, name string, lapsedLease bool) (next record, v verdict, lapsed *record) {
	next = r.clone()
	switch {
	case r.State == stateLeased && r.Lease == name:
		return next, verdictOurs, nil
	case sequence <= r.Cancelled, sequence < r.Job, r.State == stateEnded && sequence == r.Job:
		return next, verdictDrop, nil
	case r.State == stateLeased && !lapsedLease && !r.cancelled():
		if r.Job != sequence {
			return next, verdictDrop, nil // the same job, published in another pool or band
		}
		return next, verdictLater, nil
	case r.State == stateEnded:
		next = record{Operation: r.Operation, Cancelled: r.Cancelled}
		if r.cancelled() { // reports on the withdrawn job may come late
			next.Attempt, next.Fence = r.Attempt, r.Attempt
		}
	case r.State == stateLeased && !r.cancelled():
		old := r.clone()
		lapsed = &old
		next.endAttempt("fell silent")
		next.Job = sequence
	case r.Job != sequence && r.Job != 0: // withdrawn since
		next.Fence, next.Released, next.History = r.Attempt, 0, nil
	}
	next.Job = sequence
	return next, verdictTake, lapsed
}

// claimFrom is claim, given the record.
func (q *Queue) claimFrom(ctx context.Context, d delivery, s stored, name string) (*lease, error) {
	left := q.leftOf(s)
	next, v, lapsed := decide(s.record, d.sequence, name, left <= 0)
	if v == verdictTake && next.usedUp(q.opts.MaxAttempts) {
		v = verdictEnd
	}
	added := next.addReply(d.job.GetReplyTo())
	switch v {
	case verdictOurs:
		return q.newLease(d, s.record, s.revision), nil
	case verdictDrop:
		if s.State == stateLeased && s.Job == d.sequence && s.cancelled() {
			if left > 0 { // its worker reports
				q.reject(d.msg, left)
				return nil, nil //nolint:nilnil // said at claim
			}
			return nil, q.lapse(ctx, s)
		}
		if added {
			if err := q.redirect(ctx, d, next, s); err != nil {
				return nil, err
			}
		}
		q.term(d.msg)
		return nil, nil //nolint:nilnil // said at claim
	case verdictLater:
		q.reject(d.msg, left)
		return nil, nil //nolint:nilnil // said at claim
	case verdictEnd:
		return nil, q.endUsedUp(ctx, next, s.revision, d.msg)
	case verdictTake:
	}
	next.State, next.Attempt, next.Lease, next.Holder, next.Worker = stateLeased, next.Attempt+1, name, q.id, q.opts.Name
	revision, err := q.store(ctx, next, s.revision)
	if err != nil {
		return nil, err
	}
	if lapsed != nil {
		q.metrics.lapsed.Inc()
		q.log.Warn("lease lapsed", "operation", lapsed.Operation, "worker", lapsed.Worker, "attempt", lapsed.Attempt)
		q.tell(ctx, next.Replies, requeued(*lapsed))
	}
	q.metrics.leases.Inc()
	if next.Attempt > next.Fence+1 {
		q.metrics.redelivered.Inc()
	}
	return q.newLease(d, next, revision), nil
}

// redirect sees to it that the API server of a message that is dropped hears of the
// job's end: the job was published again, by another one and with another priority,
// and it is that message of it which was or is being run. Next is the record with
// this API server in it.
func (q *Queue) redirect(ctx context.Context, d delivery, next record, s stored) error {
	switch {
	case d.sequence <= s.Cancelled, d.sequence == s.Job:
		return nil
	case s.State != stateEnded:
		_, err := q.store(ctx, next, s.revision)
		return err
	default:
		api := d.job.GetReplyTo()
		return q.post(ctx, []string{api}, failed(next, unavailable("it was run for another API server; the result may be in the ActionCache")))
	}
}

// leftOf is how long until a lease lapses, by its record. A small rest counts for
// nothing: the broker's clock has run out already if it delivers the job again.
func (q *Queue) leftOf(s stored) time.Duration {
	if s.revision == 0 || s.State != stateLeased {
		return 0
	}
	q.mu.Lock()
	grace := q.graceUntil
	q.mu.Unlock()
	// Clocks that differ delay a job by no more than a lease time.
	left := min(max(q.clock.until(s.written.Add(q.opts.LeaseTime)), time.Until(grace)), q.opts.LeaseTime)
	if left < q.opts.LeaseTime/4 {
		return 0
	}
	return left
}

// endUsedUp ends a job whose attempts are used up, and says so. The message is
// nil where somebody else found out than the one to whom the job was delivered.
func (q *Queue) endUsedUp(ctx context.Context, r record, revision uint64, m *natsgo.Msg) error {
	// Telling comes first: who crashes in between is followed by another who
	// tells it again, and for the API server nothing comes after COMPLETED.
	if err := q.post(ctx, r.Replies, usedUp(r)); err != nil {
		return err
	}
	r.State = stateEnded
	if _, err := q.store(ctx, r, revision); err != nil {
		return err
	}
	q.metrics.usedUp.Inc()
	q.log.Error("the attempts of a job are used up", "operation", r.Operation, "attempt", r.Attempt, "history", r.History)
	if m != nil {
		q.term(m)
		return nil
	}
	return q.deleteJob(ctx, r.Job)
}

// The acknowledgements of a message. That of a lost one is that the message comes
// again, and then its record tells what to do.

// reject has the message delivered again after a while.
func (q *Queue) reject(m *natsgo.Msg, after time.Duration) {
	body := "-NAK"
	if after > 0 {
		body += ` {"delay": ` + strconv.FormatInt(after.Nanoseconds(), 10) + `}`
	}
	q.respond(m, body)
}

// term has the message removed.
func (q *Queue) term(m *natsgo.Msg) { q.respond(m, "+TERM") }

func (q *Queue) respond(m *natsgo.Msg, body string) {
	if err := q.nc.Publish(m.Reply, []byte(body)); err != nil {
		q.log.Debug("a message could not be acknowledged", "subject", m.Subject, "body", body, "error", err)
	}
}
