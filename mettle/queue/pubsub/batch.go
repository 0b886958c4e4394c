package pubsub

import (
	"context"
	"fmt"

	pb "cloud.google.com/go/pubsub/v2/apiv1/pubsubpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/mettle-build/mettle/mettle/queue"
)

// A batcher makes calls that take many things at a time: messages to be
// published to one topic, or deliveries of one subscription to be acknowledged.
// Nothing waits for a batch to fill: a thing goes at once where fewer than
// maxCalls calls are under way, and with all that have come meanwhile where not.
type batcher[T any] struct {
	q    *Queue
	in   chan *outgoing[T] // of capacity maxBatch: one batch may wait
	call func(ctx context.Context, things []T) error
}

const (
	// maxCalls bounds the calls under way for each topic and subscription.
	maxCalls = 4
	// maxBatch bounds the things of a call; the service takes 1000 messages.
	maxBatch = 500
)

// outgoing is a thing and the answer to the one who waits for it.
type outgoing[T any] struct {
	thing T
	size  int        // in bytes
	done  chan error // of capacity 1, for the one answer
}

// start runs what makes the calls. It returns false where the queue is closed.
func (b *batcher[T]) start() bool {
	for range maxCalls {
		if !b.q.start(b.run) {
			return false
		}
	}
	return true
}

// do returns once the call with thing has been made, or with an error of package
// queue's classes, after which it may have been made or not.
func (b *batcher[T]) do(ctx context.Context, thing T, size int) error {
	if size > maxMessage {
		return fmt.Errorf("a message of %d bytes is more than the %d that Pub/Sub takes", size, maxMessage)
	}
	if b.q.isClosed() {
		return queue.ErrClosed
	}
	o := &outgoing[T]{thing: thing, size: size, done: make(chan error, 1)}
	select {
	case b.in <- o:
	case <-ctx.Done():
		return ctx.Err()
	case <-b.q.done:
		return queue.ErrClosed
	}
	select {
	case err := <-o.done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	case <-b.q.done:
		return queue.ErrClosed
	}
}

// run makes calls until ctx is done.
func (b *batcher[T]) run(ctx context.Context) {
	var left *outgoing[T] // did not fit into the batch before
	for {
		first := left
		left = nil
		if first == nil {
			select {
			case first = <-b.in:
			case <-ctx.Done():
				return
			}
		}
		batch, size := []*outgoing[T]{first}, first.size
		for more := true; more && len(batch) < maxBatch; {
			select {
			case o := <-b.in:
				if size += o.size; size > maxMessage {
					left, more = o, false
				} else {
					batch = append(batch, o)
				}
			default:
				more = false
			}
		}
		b.send(ctx, batch)
		if ctx.Err() != nil {
			return
		}
	}
}

// send makes one call, and answers those who wait for it.
func (b *batcher[T]) send(ctx context.Context, batch []*outgoing[T]) {
	things := make([]T, len(batch))
	for i, o := range batch {
		things[i] = o.thing
	}
	err := b.call(ctx, things)
	if len(batch) > 1 && isFault(err) { // of one of them, and the others must not pay
		for _, o := range batch {
			b.send(ctx, []*outgoing[T]{o})
		}
		return
	}
	for _, o := range batch {
		o.done <- err
	}
}

// isFault reports whether what was asked for is at fault.
func isFault(err error) bool {
	c := status.Code(err)
	return c == codes.InvalidArgument || c == codes.FailedPrecondition
}

// A publisher publishes to one topic.
type publisher struct {
	batcher[*pb.PubsubMessage]
}

func (q *Queue) newPublisher(topic string) *publisher {
	p := &publisher{batcher[*pb.PubsubMessage]{
		q: q, in: make(chan *outgoing[*pb.PubsubMessage], maxBatch),
		call: func(ctx context.Context, messages []*pb.PubsubMessage) error {
			return q.publishNow(ctx, topic, messages...)
		},
	}}
	p.start()
	return p
}

// publish returns once the broker has msg, or with an error of package queue's
// classes, after which the broker may have it or not.
func (p *publisher) publish(ctx context.Context, msg *pb.PubsubMessage) error {
	return p.do(ctx, msg, proto.Size(msg))
}

// publishNow publishes in one call, also while the queue closes.
func (q *Queue) publishNow(ctx context.Context, topic string, messages ...*pb.PubsubMessage) error {
	return q.call(ctx, target{"publish", topic, "pubsub.topics.publish"}, func(ctx context.Context) error {
		_, err := q.topics.Publish(ctx, &pb.PublishRequest{Topic: topic, Messages: messages})
		return err
	})
}

// acknowledge ends deliveries: together with others of the same subscription,
// and in a call of its own where the queue closes.
func (q *Queue) acknowledge(ctx context.Context, subscription, ackID string) error {
	q.mu.Lock()
	b := q.acks[subscription]
	isNew := b == nil
	if isNew {
		b = &batcher[string]{
			q: q, in: make(chan *outgoing[string], maxBatch),
			call: func(ctx context.Context, ackIDs []string) error {
				return q.acknowledgeNow(ctx, subscription, ackIDs...)
			},
		}
		q.acks[subscription] = b
	}
	q.mu.Unlock()
	if isNew && !b.start() || q.isClosed() {
		return q.acknowledgeNow(ctx, subscription, ackID)
	}
	return b.do(ctx, ackID, len(ackID))
}

func (q *Queue) acknowledgeNow(ctx context.Context, subscription string, ackIDs ...string) error {
	return q.callLease(ctx, target{"acknowledge", subscription, "pubsub.subscriptions.consume"}, func(ctx context.Context) error {
		return q.subs.Acknowledge(ctx, &pb.AcknowledgeRequest{Subscription: subscription, AckIds: ackIDs})
	})
}
