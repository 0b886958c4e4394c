package pubsub

import (
	"fmt"
	"strconv"
	"strings"

	pb "cloud.google.com/go/pubsub/v2/apiv1/pubsubpb"
	"google.golang.org/protobuf/proto"

	"github.com/mettle-build/mettle/mettle/queue"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// news is what was heard last of an operation. Pub/Sub gives no order, and may
// deliver twice; so what is older than what was heard is dropped here. Ordering
// keys would do that too, one message at a time and slower.
type news struct {
	attempt uint32
	stage   queuepb.Update_Stage
	seq     int64
	ended   bool
	workers []heard
}

// heard is a worker that was heard of.
type heard struct {
	attempt uint32
	worker  string
}

// maxWorkers bounds news.workers.
const maxWorkers = 8

// rank orders the stages within an attempt.
func rank(s queuepb.Update_Stage) int {
	switch s {
	case queuepb.Update_EXECUTING:
		return 1
	case queuepb.Update_REQUEUED:
		return 2
	case queuepb.Update_COMPLETED:
		return 3
	default:
		return 0
	}
}

// fresh reads an update, and returns nil if it says nothing new.
func (q *Queue) fresh(m *pb.PubsubMessage) *queuepb.Update {
	u := &queuepb.Update{}
	if err := proto.Unmarshal(m.GetData(), u); err != nil {
		q.log.Error("a message that is no update was dropped", "message", m.GetMessageId(), "error", err)
		return nil
	}
	seq, err := strconv.ParseInt(m.GetAttributes()[attrSeq], 10, 64)
	if err != nil {
		seq = 0 // of somebody else's making; its stage says enough
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	op := q.operation(u.GetOperation())
	n := &op.news
	if n.ended || u.GetAttempt() <= op.base {
		return nil
	}
	n.hear(u)
	if u.GetStage() == queuepb.Update_COMPLETED {
		n.ended = true
		return n.final(u, m.GetAttributes()[attrReason] == reasonAttempts, op.base)
	}
	switch old, r := rank(n.stage), rank(u.GetStage()); {
	case u.GetAttempt() < n.attempt:
		return nil
	case u.GetAttempt() > n.attempt:
	case r < old || (r == old && seq <= n.seq):
		return nil
	}
	n.attempt, n.stage, n.seq = u.GetAttempt(), u.GetStage(), seq
	return u
}

// hear notes who has an attempt.
func (n *news) hear(u *queuepb.Update) {
	if u.GetWorker() == "" || len(n.workers) == maxWorkers {
		return
	}
	for _, h := range n.workers {
		if h.attempt == u.GetAttempt() {
			return
		}
	}
	n.workers = append(n.workers, heard{u.GetAttempt(), u.GetWorker()})
}

// final is the end of an operation. A result is one whichever delivery it is of:
// its worker acknowledges the job next, and then nobody else might ever end it.
// So it is passed on as if it were of the newest attempt.
func (n *news) final(u *queuepb.Update, byBroker bool, base uint32) *queuepb.Update {
	u.Attempt = max(u.GetAttempt(), n.attempt)
	if !byBroker {
		return u
	}
	parts := make([]string, 0, maxWorkers)
	for a := base + 1; a <= u.GetAttempt() && len(parts) < maxWorkers; a++ {
		worker := "a worker that had not reported"
		for _, h := range n.workers {
			if h.attempt == a {
				worker = h.worker
			}
		}
		parts = append(parts, fmt.Sprintf("attempt %d: %s did not end it", a, worker))
	}
	if response, err := usedUp(fmt.Sprintf("%s: %s", queue.ReasonAttempts, strings.Join(parts, "; "))); err == nil {
		u.ExecuteResponse = response
	}
	return u
}
