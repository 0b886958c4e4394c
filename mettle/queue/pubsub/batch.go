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

// A batcher publishes to one topic. Nothing waits for a batch to fill: a
// message goes at once where fewer than maxPublishing calls are under way, and
// with all that have come meanwhile where not.
type batcher struct {
	q     *Queue
	topic string
	in    chan *outgoing // of capacity maxBatch: one batch may wait
}

const (
	// maxPublishing bounds the calls under way for each topic.
	maxPublishing = 4
	// maxBatch bounds the messages of a call; the service takes 1000.
	maxBatch = 500
)

// outgoing is a message and the answer to its publisher.
type outgoing struct {
	msg  *pb.PubsubMessage
	size int
	done chan error // of capacity 1, for the one answer
}

func (q *Queue) newBatcher(topic string) *batcher {
	b := &batcher{q: q, topic: topic, in: make(chan *outgoing, maxBatch)}
	for range maxPublishing {
		q.start(b.run)
	}
	return b
}

// publish returns once the broker has msg, or with an error of package queue's
// classes, after which the broker may have it or not.
func (b *batcher) publish(ctx context.Context, msg *pb.PubsubMessage) error {
	o := &outgoing{msg: msg, size: proto.Size(msg), done: make(chan error, 1)}
	if o.size > maxMessage {
		return fmt.Errorf("a message of %d bytes is more than the %d that Pub/Sub takes", o.size, maxMessage)
	}
	if b.q.isClosed() {
		return queue.ErrClosed
	}
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

// run publishes until ctx is done.
func (b *batcher) run(ctx context.Context) {
	var left *outgoing // did not fit into the batch before
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
		batch, size := []*outgoing{first}, first.size
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

// send publishes a batch, and answers its publishers.
func (b *batcher) send(ctx context.Context, batch []*outgoing) {
	req := &pb.PublishRequest{Topic: b.topic, Messages: make([]*pb.PubsubMessage, len(batch))}
	for i, o := range batch {
		req.Messages[i] = o.msg
	}
	refused := false
	err := b.q.call(ctx, target{"publish", b.topic, "pubsub.topics.publish"}, func(ctx context.Context) error {
		_, err := b.q.topics.Publish(ctx, req)
		refused = status.Code(err) == codes.InvalidArgument
		return err
	})
	if refused && len(batch) > 1 { // one of them is at fault, and the others must not pay
		for _, o := range batch {
			b.send(ctx, []*outgoing{o})
		}
		return
	}
	for _, o := range batch {
		o.done <- err
	}
}
