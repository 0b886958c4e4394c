package pubsub

import (
	"context"
	"slices"
	"strings"
	"time"

	pb "cloud.google.com/go/pubsub/v2/apiv1/pubsubpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// A withdrawal is what a worker knows of the cancellations of an operation. Its
// fields are guarded by Queue.mu.
type withdrawal struct {
	publications []string
	// before is set by servers that did not publish the job: all of the
	// operation that were published before are withdrawn.
	before time.Time
}

const (
	maxWithdrawn = 2 * maxPublications
	// clockSkew is how far apart the broker's clocks may be. A job that is
	// withdrawn by mistake is worse than one that is run for nothing.
	clockSkew = time.Second
)

func (w *withdrawal) covers(publication string, published time.Time) bool {
	return w != nil && (slices.Contains(w.publications, publication) || published.Before(w.before))
}

// listen begins to hear of cancellations, the first time.
func (q *Queue) listen(ctx context.Context) error {
	if q.hears() {
		return nil
	}
	if err := q.lock(ctx, q.making); err != nil {
		return err
	}
	defer func() { <-q.making }()
	if q.hears() {
		return nil
	}
	name := q.cancelSubscription()
	remake := func(ctx context.Context) error {
		return q.makeSubscription(ctx, &pb.Subscription{Name: name, Topic: q.topic("cancel"), ExpirationPolicy: soon(), MessageRetentionDuration: shortRetention(), AckDeadlineSeconds: newsDeadline})
	}
	switch err := remake(ctx); {
	case status.Code(err) == codes.ResourceExhausted:
		// A project has 10,000 subscriptions. Better to run in vain what was
		// withdrawn than not to run at all.
		q.log.Error("there is no subscription to be had for cancellations, so what is withdrawn runs to its end here", "error", err)
	case err != nil:
		return err
	}
	q.mu.Lock()
	q.listening = true
	q.mu.Unlock()
	q.start(func(ctx context.Context) {
		q.receive(ctx, feed{subscription: name, remake: remake, handle: q.hearCancel})
	})
	return nil
}

func (q *Queue) hears() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.listening
}

// hearCancel takes in a cancellation, or what an API server that has begun to
// listen to notices asks of workers.
func (q *Queue) hearCancel(_ context.Context, m *pb.PubsubMessage) bool {
	if m.GetAttributes()[attrHello] != "" {
		q.start(q.repeat) // cancellations don't wait for it
		return true
	}
	name := m.GetAttributes()[attrOperation]
	q.mu.Lock()
	defer q.mu.Unlock()
	w, ok := q.withdrawn.get(name)
	if !ok {
		w = &withdrawal{}
		q.withdrawn.put(name, w)
	}
	if ids := m.GetAttributes()[attrWithdrawn]; ids == "" {
		if t := m.GetPublishTime().AsTime().Add(-clockSkew); t.After(w.before) {
			w.before = t
		}
	} else {
		w.publications = append(w.publications, strings.Split(ids, ",")...)
		w.publications = w.publications[max(len(w.publications)-maxWithdrawn, 0):]
	}
	for _, l := range q.leases {
		if l.job.GetOperation() == name && w.covers(l.publication, l.published) {
			l.cancel()
		}
	}
	return true
}
