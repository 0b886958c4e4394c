package pubsub

import (
	"context"
	"fmt"
	"strconv"
	"time"

	pb "cloud.google.com/go/pubsub/v2/apiv1/pubsubpb"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/mettle-build/mettle/mettle/queue"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// noticeRetention is how long notices wait for an API server that can't reach
// the broker. The service takes no less.
const noticeRetention = 10 * time.Minute

// Notify implements queue.Notifier: one message to the topic of notices.
func (q *Queue) Notify(ctx context.Context, n *queuepb.Notice) error {
	data, err := proto.Marshal(n)
	if err == nil {
		m := &pb.PubsubMessage{Data: data, Attributes: map[string]string{
			attrProcess: q.id, attrSeq: strconv.FormatInt(q.nextSeq(), 10),
		}}
		q.remember(ctx, n.GetWorker(), m)
		err = q.notices.publish(ctx, m)
	}
	if err != nil {
		return fmt.Errorf("notify: %w", err)
	}
	return nil
}

// ListenNotices implements queue.Listener, by an expiring subscription of the
// server's own that is removed when ctx is done. A second listener of the same
// id in one process is an error.
func (q *Queue) ListenNotices(ctx context.Context, id string, handle func(*queuepb.Notice)) error {
	if err := q.listenNotices(ctx, id, handle); err != nil {
		return fmt.Errorf("listen to notices for %s: %w", id, err)
	}
	return nil
}

func (q *Queue) listenNotices(ctx context.Context, id string, handle func(*queuepb.Notice)) error {
	if q.isClosed() {
		return queue.ErrClosed
	}
	if !q.claimEar(id) {
		return fmt.Errorf("there is a listener already")
	}
	defer func() {
		q.mu.Lock()
		delete(q.ears, id)
		q.mu.Unlock()
	}()
	name := q.noticeSubscription(id)
	remake := func(ctx context.Context) error {
		return q.makeSubscription(ctx, &pb.Subscription{
			Name: name, Topic: q.topic("notices"), ExpirationPolicy: soon(),
			MessageRetentionDuration: durationpb.New(noticeRetention), AckDeadlineSeconds: newsDeadline,
		})
	}
	if err := remake(ctx); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	// Where this is lost, the workers speak up by themselves before long.
	if err := q.cancels.publish(ctx, &pb.PubsubMessage{Attributes: map[string]string{attrHello: id}}); err != nil {
		q.log.Debug("could not ask for notices", "error", err)
	}
	heard := newFIFO[int64](maxRemembered)
	return q.receiveOwn(ctx, feed{
		subscription: name, remake: remake,
		handle: func(_ context.Context, m *pb.PubsubMessage) bool {
			if n := q.freshNotice(heard, m); n != nil {
				handle(n)
			}
			return true
		},
	})
}

func (q *Queue) claimEar(id string) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.ears[id] {
		return false
	}
	q.ears[id] = true
	return true
}

// freshNotice reads a notice, and returns nil if it says nothing new: it came
// before, or is a worker's and older than what was heard of that worker. heard
// is for one goroutine at a time.
func (q *Queue) freshNotice(heard *fifo[int64], m *pb.PubsubMessage) *queuepb.Notice {
	n := &queuepb.Notice{}
	if err := proto.Unmarshal(m.GetData(), n); err != nil {
		q.log.Error("a message that is no notice was dropped", "message", m.GetMessageId(), "error", err)
		return nil
	}
	key, seq := "message/"+m.GetMessageId(), int64(0)
	if w := n.GetWorker(); w != nil {
		if s, err := strconv.ParseInt(m.GetAttributes()[attrSeq], 10, 64); err == nil {
			// A process that took the name over has a clock of its own.
			key, seq = "worker/"+m.GetAttributes()[attrProcess]+"/"+w.GetWorker(), s
		}
	}
	if last, ok := heard.get(key); ok && seq <= last {
		return nil
	}
	heard.put(key, seq)
	return n
}
