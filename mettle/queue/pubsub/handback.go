package pubsub

import (
	"cmp"
	"context"
	"maps"
	"strconv"
	"strings"
	"time"

	pb "cloud.google.com/go/pubsub/v2/apiv1/pubsubpb"
	"google.golang.org/protobuf/proto"
)

// A history is what has become of the deliveries of a job before its message was
// made. It travels in the message's attributes, because the broker's own count
// begins anew with each message, and counts what was no failure.
type history struct {
	delivered uint32            // deliveries, from which attempts go on
	failed    uint32            // how many of them failed
	failures  map[string]string // attributes: who rejected the job and why
	avoid     string            // the process that rejected it last
}

// maxReason bounds the reason of a failure in bytes; the service takes 1024.
const maxReason = 500

func failureKey(attempt uint32) string { return attrFailure + strconv.FormatUint(uint64(attempt), 10) }

// parseHistory reads the attributes of a job.
func parseHistory(attributes map[string]string) (history, error) {
	h := history{failures: failuresOf(attributes), avoid: attributes[attrAvoid]}
	var err error
	if h.delivered, err = parseCount(attributes[attrDelivered]); err != nil {
		return h, err
	}
	h.failed, err = parseCount(attributes[attrFailed])
	return h, err
}

// failuresOf picks those attributes that tell of failures.
func failuresOf(attributes map[string]string) map[string]string {
	var failures map[string]string
	for key, value := range attributes {
		if strings.HasPrefix(key, attrFailure) {
			if failures == nil {
				failures = make(map[string]string)
			}
			failures[key] = value
		}
	}
	return failures
}

// parseCount reads a number that is 0 where it is left out.
func parseCount(s string) (uint32, error) {
	if s == "" {
		return 0, nil
	}
	n, err := strconv.ParseUint(s, 10, 30) // so that three of them can be added
	return uint32(n), err
}

// failuresBefore is how many deliveries have failed before this one.
func (l *lease) failuresBefore() uint32 { return l.past.failed + l.count - 1 }

// last reports whether no attempt is left if this one fails.
func (l *lease) last() bool { return l.used() >= l.q.opts.MaxAttempts }

// used is how many attempts have failed if this one does.
func (l *lease) used() int { return int(l.failuresBefore()) + 1 }

// Release implements queue.Lease: the job is published again, with a history
// that does not count this delivery as a failure, and then the message of this
// one is acknowledged. Who dies between the two leaves two messages: the job
// runs twice, or is found in the ActionCache, and ends once. Where it can't be
// published, because the worker has no right to or the broker does not answer,
// its lease is ended, which counts.
func (l *lease) Release(ctx context.Context) error {
	if err := l.check(ctx); err != nil {
		return l.explain("release", err)
	}
	if l.isCancelled() {
		return l.Ack(ctx)
	}
	l.q.metrics.released.Inc()
	// Before it can be delivered again. If it does not arrive, the next
	// delivery says it once more.
	told := l.q.sendRequeued(ctx, l.job, l.attempt, l.whose(), map[string]string{attrRun: l.token(), attrReleased: "true"})
	h := history{delivered: l.past.delivered + l.count, failed: l.failuresBefore(), failures: l.past.failures}
	return l.handBack(ctx, "release", h, told)
}

// Reject implements queue.Lease, as Release does, but the delivery counts, and
// what is to be said of it travels with the job. To this process it comes
// again at the earliest when it was put back once more, so that another one that
// waits has it before.
func (l *lease) Reject(ctx context.Context, reason string) error {
	if err := l.check(ctx); err != nil {
		return l.explain("reject", err)
	}
	if l.isCancelled() {
		return l.Ack(ctx)
	}
	l.q.metrics.rejected.Inc()
	worker := l.whose()
	h := history{delivered: l.past.delivered + l.count, failed: l.failuresBefore() + 1, avoid: l.q.id, failures: maps.Clone(l.past.failures)}
	if h.failures == nil {
		h.failures = make(map[string]string)
	}
	h.failures[failureKey(l.attempt-l.base)] = failureText(worker, "could not run it: "+reason)
	if l.last() {
		if err := l.q.endUsedUp(ctx, l.job, usedUpAt{attempt: l.attempt, worker: worker, failures: h.failures}); err != nil {
			return l.explain("reject", err)
		}
		return l.Ack(ctx)
	}
	told := l.q.sendRequeued(ctx, l.job, l.attempt, worker, map[string]string{attrRun: l.token()})
	return l.handBack(ctx, "reject", h, told)
}

func failureText(worker, what string) string {
	text := strings.ToValidUTF8(cmp.Or(worker, unknownWorker)+" "+what, "?")
	if len(text) > maxReason {
		text = strings.ToValidUTF8(text[:maxReason], "") + "…"
	}
	return text
}

// handBack ends the lease so that the job is delivered again with the history h.
func (l *lease) handBack(ctx context.Context, verb string, h history, told error) error {
	if told != nil {
		l.q.log.Debug("could not report that a job was handed back", "operation", l.job.GetOperation(), "error", told)
	}
	if err := l.q.republish(ctx, l, h); err != nil {
		l.q.log.Warn("a job that is handed back could not be published again, so it counts as an attempt", "operation", l.job.GetOperation(), "error", err)
		if err := l.q.modify(ctx, l.subscription, []string{l.current()}, 0); err != nil {
			return l.explain(verb, err)
		}
		l.end()
		return nil
	}
	l.q.mu.Lock()
	l.q.ended.put(l.message, struct{}{})
	l.q.mu.Unlock()
	l.end()
	if err := l.q.acknowledge(ctx, l.subscription, l.current()); err != nil {
		l.q.log.Warn("a job was handed back, and is delivered twice, because the lease could not be ended", "operation", l.job.GetOperation(), "error", err)
	}
	return nil
}

// republish publishes a job once more, under the same publication.
func (q *Queue) republish(ctx context.Context, l *lease, h history) error {
	data, err := proto.Marshal(l.job)
	if err != nil {
		return err
	}
	attributes := map[string]string{
		attrPool: l.pool, attrBand: l.band, attrPublication: l.publication,
		attrBase:      strconv.FormatUint(uint64(l.base), 10),
		attrDelivered: strconv.FormatUint(uint64(h.delivered), 10),
		attrFailed:    strconv.FormatUint(uint64(h.failed), 10),
		attrPublished: strconv.FormatInt(l.published.UnixNano(), 10),
	}
	if h.avoid != "" {
		attributes[attrAvoid] = h.avoid
	}
	maps.Copy(attributes, h.failures)
	return q.publishNow(ctx, q.topic("jobs"), &pb.PubsubMessage{Data: data, Attributes: attributes})
}

// putBack hands back a job that no consumer has seen, as if it had not been
// delivered. It may be called after Close.
func (q *Queue) putBack(ctx context.Context, l *lease) {
	h := history{delivered: l.past.delivered + l.count - 1, failed: l.failuresBefore(), failures: l.past.failures}
	err := q.republish(ctx, l, h)
	if err == nil {
		q.mu.Lock()
		q.ended.put(l.message, struct{}{})
		q.mu.Unlock()
		err = q.acknowledge(ctx, l.subscription, l.current())
	} else {
		err = q.modify(ctx, l.subscription, []string{l.current()}, 0)
	}
	if err != nil {
		q.log.Warn("a job that nobody waited for could not be handed back, its lease has to lapse", "operation", l.job.GetOperation(), "error", err)
	}
}

// token names this delivery in updates.
func (l *lease) token() string {
	return l.message + "/" + strconv.FormatUint(uint64(l.count), 10) + "/" + l.q.id
}

// isCancelled reports whether the job was withdrawn.
func (l *lease) isCancelled() bool {
	l.q.mu.Lock()
	defer l.q.mu.Unlock()
	return l.gone
}

// whose is the worker that has the lease, as far as its updates have told.
func (l *lease) whose() string {
	l.q.mu.Lock()
	defer l.q.mu.Unlock()
	return l.worker
}

// publishedAt is when a job was published the first time.
func publishedAt(m *pb.PubsubMessage) time.Time {
	if ns, err := strconv.ParseInt(m.GetAttributes()[attrPublished], 10, 64); err == nil {
		return time.Unix(0, ns)
	}
	return m.GetPublishTime().AsTime()
}
