package pubsub

import (
	"cmp"
	"context"
	"fmt"
	"slices"
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
	runs    []run
}

// run is one delivery that was heard of.
type run struct {
	attempt     uint32 // from the base
	token       string // names it; empty where the sender is of an older version
	publication string
	worker      string
	released    bool // so it was no failure
}

// maxRuns bounds news.runs, and maxNamed those that a message names. The former
// is more than maxUncounted deliveries of an operation that was published twice.
const (
	maxRuns  = 256
	maxNamed = 8
)

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

// takeIn reads an update, has what runs in vain withdrawn, and returns nil if the
// update says nothing new.
func (q *Queue) takeIn(m *pb.PubsubMessage) *queuepb.Update {
	u, vain := q.fresh(m)
	if vain != nil {
		q.start(func(ctx context.Context) {
			if err := q.cancels.publish(ctx, vain); err != nil {
				q.log.Warn("could not withdraw a job that runs in vain", "operation", vain.GetAttributes()[attrOperation], "error", err)
			}
		})
	}
	return u
}

// fresh reads an update, and returns nil if it says nothing new, and a
// cancellation where the job should not run.
func (q *Queue) fresh(m *pb.PubsubMessage) (u *queuepb.Update, vain *pb.PubsubMessage) {
	u = &queuepb.Update{}
	if err := proto.Unmarshal(m.GetData(), u); err != nil {
		q.log.Error("a message that is no update was dropped", "message", m.GetMessageId(), "error", err)
		return nil, nil
	}
	seq, err := strconv.ParseInt(m.GetAttributes()[attrSeq], 10, 64)
	if err != nil {
		seq = 0 // of somebody else's making; its stage says enough
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	op := q.operation(u.GetOperation())
	n := &op.news
	publication := m.GetAttributes()[attrPublication]
	switch {
	case publication != "" && slices.Contains(op.revoked, publication):
		// Its worker began after the cancellation, or has missed it.
		if u.GetStage() == queuepb.Update_EXECUTING {
			vain = cancellation(u.GetOperation(), publication)
		}
		return nil, vain
	case n.ended || u.GetAttempt() <= op.base:
		return nil, nil
	}
	tooMany := n.hear(u, m.GetAttributes(), op.base, q.opts)
	switch {
	case u.GetStage() == queuepb.Update_COMPLETED:
		defer n.end()
		return n.final(u, m.GetAttributes(), op.base), nil
	case tooMany:
		defer n.end()
		q.metrics.usedUp.Inc()
		q.log.Warn("the attempts of a job are used up, and the broker has not counted them", "operation", u.GetOperation())
		op.revoke([]string{publication})
		return n.tooMany(u, op.base), cancellation(u.GetOperation(), publication)
	case !n.newer(u, seq):
		return nil, nil
	}
	n.attempt, n.stage, n.seq = u.GetAttempt(), u.GetStage(), seq
	return u, nil
}

// newer reports whether u is of a later attempt, stage or time than what was
// heard last.
func (n *news) newer(u *queuepb.Update, seq int64) bool {
	if u.GetAttempt() != n.attempt {
		return u.GetAttempt() > n.attempt
	}
	old, r := rank(n.stage), rank(u.GetStage())
	return r > old || (r == old && seq > n.seq)
}

// end forgets what is of no use any more.
func (n *news) end() { n.ended, n.runs = true, nil }

// hear notes who has an attempt, and what became of it. It returns whether that
// is one too many: the broker, which should have counted that, does not count or
// has begun anew. The service may do so, and emulators do not count at all.
func (n *news) hear(u *queuepb.Update, attributes map[string]string, base uint32, o Options) bool {
	if u.GetStage() != queuepb.Update_EXECUTING && attributes[attrRun] == "" {
		return false // of the broker's making
	}
	r := n.run(attributes[attrRun], u.GetAttempt()-base)
	isNew := r == nil
	if isNew {
		if len(n.runs) == maxRuns {
			return true
		}
		n.runs = append(n.runs, run{attempt: u.GetAttempt() - base, token: attributes[attrRun], publication: attributes[attrPublication]})
		r = &n.runs[len(n.runs)-1]
	}
	if u.GetWorker() != "" {
		r.worker = u.GetWorker()
	}
	r.released = r.released || attributes[attrReleased] != ""
	if !isNew || r.token == "" || r.released {
		return false
	}
	failed := 0
	for _, old := range n.runs[:len(n.runs)-1] {
		if old.publication == r.publication && !old.released {
			failed++
		}
	}
	if attributes[attrUncounted] != "" {
		return failed >= o.MaxAttempts
	}
	return failed >= int(o.deadLetterAttempts())
}

// run is the one of that token, or of that attempt where there is none.
func (n *news) run(token string, attempt uint32) *run {
	for i := range n.runs {
		if r := &n.runs[i]; r.token == token && (token != "" || r.attempt == attempt) {
			return r
		}
	}
	return nil
}

// tooMany makes the end of an operation of the update that says that there is
// one delivery too many of it.
func (n *news) tooMany(u *queuepb.Update, base uint32) *queuepb.Update {
	n.runs = n.runs[:len(n.runs)-1] // that one is none
	for i := range n.runs {
		n.runs[i].attempt = uint32(i + 1) //nolint:gosec // few; where nobody counts each says 1
	}
	last := &queuepb.Update{
		Operation: u.GetOperation(), Stage: queuepb.Update_COMPLETED, Sent: u.GetSent(),
		Attempt: base + uint32(len(n.runs)), //nolint:gosec // few
	}
	return n.final(last, map[string]string{attrReason: reasonAttempts}, base)
}

// final is the end of an operation. A result is one whichever delivery it is of:
// its worker acknowledges the job next, and then nobody else might ever end it.
// So it is passed on as if it were of the newest attempt.
func (n *news) final(u *queuepb.Update, attributes map[string]string, base uint32) *queuepb.Update {
	u.Attempt = max(u.GetAttempt(), n.attempt)
	if attributes[attrReason] != reasonAttempts {
		return u
	}
	failures := failuresOf(attributes)
	var parts []string
	for a := u.GetAttempt() - base; a > 0 && len(parts) < maxNamed; a-- {
		if text := n.failure(a, failures[failureKey(a)]); text != "" {
			parts = append(parts, fmt.Sprintf("attempt %d: %s", a, text))
		}
	}
	slices.Reverse(parts)
	if response, err := usedUp(fmt.Sprintf("%s: %s", queue.ReasonAttempts, strings.Join(parts, "; "))); err == nil {
		u.ExecuteResponse = response
	}
	return u
}

// failure says how an attempt has failed, by what travelled with the job or what
// was heard of it. Empty: it did not.
func (n *news) failure(attempt uint32, travelled string) string {
	if travelled != "" {
		return travelled
	}
	worker := ""
	for _, r := range n.runs {
		if r.attempt == attempt {
			if r.released {
				return ""
			}
			worker = r.worker
		}
	}
	return cmp.Or(worker, unknownWorker) + " fell silent"
}

// unknownWorker stands for one that has not said its name.
const unknownWorker = "a worker that had not reported"
