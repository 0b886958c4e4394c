package pubsub

import (
	"context"
	"time"

	pb "cloud.google.com/go/pubsub/v2/apiv1/pubsubpb"

	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// A saying is what a worker of this process said of itself last, for listeners
// that begin later: they ask by a message to the topic of cancellations, which
// every worker's process reads.
type saying struct {
	message *pb.PubsubMessage
	until   time.Time // then it holds no more
}

// maxSayings bounds Queue.sayings: workers in one process, of which there is one
// but for tests.
const maxSayings = 1024

// remember keeps what a worker says, and sees to it that it can be asked again.
func (q *Queue) remember(ctx context.Context, w *queuepb.WorkerState, m *pb.PubsubMessage) {
	if w == nil {
		return
	}
	now := time.Now()
	q.mu.Lock()
	for name, s := range q.sayings {
		if now.After(s.until) {
			delete(q.sayings, name)
		}
	}
	gone := w.GetState() == queuepb.WorkerState_GONE
	if gone {
		delete(q.sayings, w.GetWorker())
	} else if d := w.GetLifetime().AsDuration(); d > 0 && len(q.sayings) < maxSayings {
		q.sayings[w.GetWorker()] = saying{m, now.Add(d)}
	}
	q.mu.Unlock()
	if gone {
		return
	}
	if err := q.listen(ctx); err != nil {
		q.log.Debug("can't be asked for notices yet", "error", err) // Lease says it louder
	}
}

// repeat says again what those of this process's workers say that are there. Who
// has heard it knows it by its number.
func (q *Queue) repeat(ctx context.Context) {
	now := time.Now()
	var ms []*pb.PubsubMessage
	q.mu.Lock()
	for _, s := range q.sayings {
		if now.Before(s.until) {
			ms = append(ms, &pb.PubsubMessage{Data: s.message.GetData(), Attributes: s.message.GetAttributes()})
		}
	}
	q.mu.Unlock()
	for _, m := range ms {
		if err := q.notices.publish(ctx, m); err != nil {
			q.log.Debug("could not repeat a notice", "error", err)
		}
	}
}
