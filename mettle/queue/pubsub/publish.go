package pubsub

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	pb "cloud.google.com/go/pubsub/v2/apiv1/pubsubpb"
	"google.golang.org/protobuf/proto"

	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// An operation is what an API server knows of one: what it has published of it,
// and what it has heard. Its fields are guarded by Queue.mu.
type operation struct {
	// base is what the attempts of its newest publication are counted from.
	// What is said of an attempt up to it is about one that was withdrawn.
	base uint32
	// publications are the ids of those since the operation ended last that
	// were not withdrawn.
	publications []string
	revoked      []string // those that were withdrawn, the newest of them
	withdrawn    bool     // since the last Publish
	news         news
}

const (
	// generation is what is added to attempts when an operation is published
	// after it was withdrawn, so that they never go back. It is more than a
	// publication's attempts ever are.
	generation = 1000
	// maxPublications bounds operation.publications: a job that is published
	// more often without an end has clients that come back again and again.
	maxPublications = 16
	// poolSeen is how long a pool that was there is taken to be there.
	poolSeen = time.Minute
)

// Publish implements queue.Publisher. A job whose pool has no subscription would
// be dropped by the broker: it is refused instead, with an error that wraps
// queue.ErrUnavailable. A job that is published twice is delivered twice.
func (q *Queue) Publish(ctx context.Context, job *queuepb.Job) error {
	if err := q.publish(ctx, job); err != nil {
		return fmt.Errorf("publish job %s: %w", job.GetOperation(), err)
	}
	return nil
}

func (q *Queue) publish(ctx context.Context, job *queuepb.Job) error {
	if job.GetOperation() == "" {
		return errors.New("it has no name")
	}
	band := q.opts.band(job.GetPriority())
	if err := q.seePool(ctx, q.jobSubscription(job.GetPool(), band)); err != nil {
		return err
	}
	// The first one makes the reply subscription: it hears only of what is
	// sent after it was made.
	if err := q.ensureReply(ctx, job.GetReplyTo()); err != nil {
		return err
	}
	if len(job.GetAction())+len(job.GetCommand()) > q.opts.MaxInline {
		job = proto.CloneOf(job)
		job.Action, job.Command = nil, nil // the worker reads them from the CAS
	}
	data, err := proto.Marshal(job)
	if err != nil {
		return err
	}
	publication := rand.Text()[:16]
	base := q.published(job.GetOperation(), publication)
	return q.jobs.publish(ctx, &pb.PubsubMessage{Data: data, Attributes: map[string]string{
		attrPool: token(job.GetPool()), attrBand: band, attrPublication: publication,
		attrBase: strconv.FormatUint(uint64(base), 10),
	}})
}

// published notes a publication that is about to be made, and returns what its
// attempts are counted from.
func (q *Queue) published(name, publication string) uint32 {
	q.mu.Lock()
	defer q.mu.Unlock()
	op := q.operation(name)
	if op.withdrawn {
		op.base += generation
		op.withdrawn = false
		op.news = news{}
	}
	if op.news.ended {
		op.news, op.publications = news{}, nil
	}
	if len(op.publications) == maxPublications {
		op.publications = op.publications[1:]
	}
	op.publications = append(op.publications, publication)
	return op.base
}

// operation finds or makes an operation. The mutex is held.
func (q *Queue) operation(name string) *operation {
	op, ok := q.known.get(name)
	if !ok {
		op = &operation{}
		q.known.put(name, op)
	}
	return op
}

// Cancel implements queue.Publisher. The workers that are up are told, within
// milliseconds and not before Cancel returns; each drops a job that comes to it
// later. A worker that begins later knows nothing of it: it is told when it says
// that it runs the job, by the server that has published and withdrawn it.
func (q *Queue) Cancel(ctx context.Context, name string) error {
	q.mu.Lock()
	op := q.operation(name)
	withdrawn := op.publications
	op.publications, op.withdrawn = nil, true
	q.mu.Unlock()
	err := q.cancels.publish(ctx, cancellation(name, withdrawn...))
	q.mu.Lock()
	defer q.mu.Unlock()
	if err != nil {
		op.publications = append(withdrawn, op.publications...) // for the next Cancel
		return fmt.Errorf("cancel job %s: %w", name, err)
	}
	op.revoke(withdrawn)
	return nil
}

// revoke notes what was withdrawn. The mutex is held.
func (op *operation) revoke(publications []string) {
	op.revoked = append(op.revoked, publications...)
	op.revoked = op.revoked[max(len(op.revoked)-maxPublications, 0):]
}

// cancellation is the message that withdraws publications of an operation, or
// all that were published before where it names none.
func cancellation(operation string, publications ...string) *pb.PubsubMessage {
	return &pb.PubsubMessage{Attributes: map[string]string{
		attrOperation: operation, attrWithdrawn: strings.Join(publications, ","),
	}}
}

// seePool looks whether a subscription of jobs is there, unless it was a short
// while ago.
func (q *Queue) seePool(ctx context.Context, name string) error {
	q.mu.Lock()
	seen, ok := q.pools[name]
	q.mu.Unlock()
	if ok && time.Since(seen) < poolSeen {
		return nil
	}
	err := q.call(ctx, target{"find the pool", name, "pubsub.subscriptions.get"}, func(ctx context.Context) error {
		_, err := q.subs.GetSubscription(ctx, &pb.GetSubscriptionRequest{Subscription: name})
		return err
	})
	q.mu.Lock()
	defer q.mu.Unlock()
	if err != nil {
		delete(q.pools, name)
		return err
	}
	q.pools[name] = time.Now()
	return nil
}
