package pubsub

import (
	"context"
	"fmt"
	"maps"
	"strconv"
	"strings"
	"sync"

	pb "cloud.google.com/go/pubsub/v2/apiv1/pubsubpb"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/rpc/code"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/mettle-build/mettle/mettle/queue"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// SendUpdate implements queue.Sender. A result that is larger than Pub/Sub's
// messages goes without its inlined output, which is in the CAS, or else as an
// error that says so.
func (q *Queue) SendUpdate(ctx context.Context, replyTo string, u *queuepb.Update) error {
	var more map[string]string
	q.mu.Lock()
	for _, l := range q.leases {
		if l.job.GetOperation() == u.GetOperation() && l.attempt == u.GetAttempt() {
			l.worker = u.GetWorker()
			more = map[string]string{attrRun: l.token(), attrPublication: l.publication}
			if l.uncounted {
				more[attrUncounted] = "true"
			}
		}
	}
	q.mu.Unlock()
	return q.send(ctx, replyTo, u, more)
}

// send publishes an update with some more attributes.
func (q *Queue) send(ctx context.Context, replyTo string, u *queuepb.Update, more map[string]string) error {
	if replyTo == "" {
		return nil
	}
	attributes := map[string]string{attrReplyTo: token(replyTo), attrSeq: strconv.FormatInt(q.nextSeq(), 10)}
	maps.Copy(attributes, more)
	data, err := marshalUpdate(u)
	if err == nil {
		err = q.updates.publish(ctx, &pb.PubsubMessage{Data: data, Attributes: attributes})
	}
	if err != nil {
		return fmt.Errorf("send update about %s to %s: %w", u.GetOperation(), replyTo, err)
	}
	return nil
}

// maxUpdate bounds an update in bytes; the attributes come on top.
const maxUpdate = maxMessage - 4096

// marshalUpdate makes bytes of u, at most maxUpdate of them.
func marshalUpdate(u *queuepb.Update) ([]byte, error) {
	if proto.Size(u) <= maxUpdate {
		return proto.Marshal(u)
	}
	var res repb.ExecuteResponse
	if err := proto.Unmarshal(u.GetExecuteResponse(), &res); err != nil {
		return nil, fmt.Errorf("the response: %w", err)
	}
	size := len(u.GetExecuteResponse())
	if r := res.GetResult(); r != nil {
		if r.GetStdoutDigest() != nil {
			r.StdoutRaw = nil
		}
		if r.GetStderrDigest() != nil {
			r.StderrRaw = nil
		}
		for _, f := range r.GetOutputFiles() {
			f.Contents = nil
		}
	}
	small := &queuepb.Update{Operation: u.GetOperation(), Attempt: u.GetAttempt(), Worker: u.GetWorker(), Stage: u.GetStage(), Sent: u.GetSent()}
	var err error
	if small.ExecuteResponse, err = proto.Marshal(&res); err != nil {
		return nil, err
	}
	if proto.Size(small) > maxUpdate {
		small.ExecuteResponse, err = proto.Marshal(&repb.ExecuteResponse{Status: &spb.Status{
			Code:    int32(code.Code_RESOURCE_EXHAUSTED),
			Message: fmt.Sprintf("the action's result of %d bytes is larger than a message of the queue, %d bytes", size, maxUpdate),
		}})
		if err != nil {
			return nil, err
		}
	}
	return proto.Marshal(small)
}

// sendRequeued tells that an attempt has ended without a result, with some more
// attributes.
func (q *Queue) sendRequeued(ctx context.Context, job *queuepb.Job, attempt uint32, worker string, more map[string]string) error {
	return q.send(ctx, job.GetReplyTo(), &queuepb.Update{
		Operation: job.GetOperation(), Attempt: attempt, Worker: worker, Stage: queuepb.Update_REQUEUED, Sent: timestamppb.Now(),
	}, more)
}

// usedUpAt is what is known of a job where its attempts are used up.
type usedUpAt struct {
	attempt  uint32            // the last one
	worker   string            // who had it
	failures map[string]string // attributes of the job
}

// endUsedUp tells that a job will not be delivered any more. The API server adds
// the workers that it has heard of.
func (q *Queue) endUsedUp(ctx context.Context, job *queuepb.Job, at usedUpAt) error {
	message := fmt.Sprintf("%s: it was delivered %d times, and no worker has ended it", queue.ReasonAttempts, q.opts.MaxAttempts)
	if at.worker != "" {
		message += "; the last one was " + at.worker
	}
	response, err := usedUp(message)
	if err != nil {
		return err
	}
	more := map[string]string{attrReason: reasonAttempts}
	maps.Copy(more, at.failures)
	return q.send(ctx, job.GetReplyTo(), &queuepb.Update{
		Operation: job.GetOperation(), Attempt: at.attempt, Worker: at.worker,
		Stage: queuepb.Update_COMPLETED, ExecuteResponse: response, Sent: timestamppb.Now(),
	}, more)
}

// endWithdrawn tells that a job was withdrawn before a worker had it.
func (q *Queue) endWithdrawn(ctx context.Context, job *queuepb.Job, attempt uint32) error {
	response, err := proto.Marshal(&repb.ExecuteResponse{Status: &spb.Status{Code: int32(code.Code_CANCELLED), Message: "the job was withdrawn"}})
	if err != nil {
		return err
	}
	return q.send(ctx, job.GetReplyTo(), &queuepb.Update{
		Operation: job.GetOperation(), Attempt: attempt, Stage: queuepb.Update_COMPLETED, ExecuteResponse: response, Sent: timestamppb.Now(),
	}, nil)
}

// reasonAttempts is the value of attrReason of what endUsedUp sends.
const reasonAttempts = "attempts"

func usedUp(message string) ([]byte, error) {
	return proto.Marshal(&repb.ExecuteResponse{Status: &spb.Status{
		// The action may be what ends its workers, so it is not UNAVAILABLE:
		// that would invite the client to try for ever.
		Code: int32(code.Code_INTERNAL), Message: strings.ToValidUTF8(message, "?"),
	}})
}

// ensureReply makes the reply subscription of an API server, the first time.
func (q *Queue) ensureReply(ctx context.Context, id string) error {
	if id == "" || q.hasReply(id) {
		return nil
	}
	if err := q.lock(ctx, q.making); err != nil {
		return err
	}
	defer func() { <-q.making }()
	if q.hasReply(id) {
		return nil
	}
	if err := q.makeReply(ctx, id); err != nil {
		return err
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if _, ok := q.replies[id]; !ok {
		q.replies[id] = false
	}
	return nil
}

func (q *Queue) hasReply(id string) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	_, ok := q.replies[id]
	return ok
}

func (q *Queue) makeReply(ctx context.Context, id string) error {
	return q.makeSubscription(ctx, &pb.Subscription{
		Name: q.replySubscription(id), Topic: q.topic("updates"), Filter: replyFilter(id),
		ExpirationPolicy: soon(), MessageRetentionDuration: shortRetention(), AckDeadlineSeconds: newsDeadline,
	})
}

// ReceiveUpdates implements queue.Receiver. Updates that came for id since its
// first Publish are waiting. It serves the dead-letter subscription as well,
// which all API servers share. When ctx is done the reply subscription is
// removed. A second receiver of the same id in one process is an error.
func (q *Queue) ReceiveUpdates(ctx context.Context, id string, handle func(*queuepb.Update)) error {
	if err := q.receiveUpdates(ctx, id, handle); err != nil {
		return fmt.Errorf("receive updates for %s: %w", id, err)
	}
	return nil
}

func (q *Queue) receiveUpdates(ctx context.Context, id string, handle func(*queuepb.Update)) error {
	if q.isClosed() {
		return queue.ErrClosed
	}
	if err := q.ensureReply(ctx, id); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	q.mu.Lock()
	receiving := q.replies[id]
	q.replies[id] = true
	q.mu.Unlock()
	if receiving {
		return fmt.Errorf("there is a receiver already")
	}
	defer func() {
		q.mu.Lock()
		delete(q.replies, id)
		q.mu.Unlock()
	}()
	return q.receiveOwn(ctx, feed{
		subscription: q.replySubscription(id),
		remake:       func(ctx context.Context) error { return q.makeReply(ctx, id) },
		handle: func(_ context.Context, m *pb.PubsubMessage) bool {
			if m.GetAttributes()[attrReplyTo] != token(id) {
				return true // an emulator's, without filters
			}
			if u := q.takeIn(m); u != nil {
				handle(u)
			}
			return true
		},
	}, feed{subscription: q.deadSubscription(), handle: q.bury})
}

// receiveOwn handles what comes by a subscription of this process's own, and by
// others, until ctx is done or the queue is closed; then it removes the first.
func (q *Queue) receiveOwn(ctx context.Context, own feed, others ...feed) error {
	bound, cancel := context.WithCancel(ctx)
	var parts sync.WaitGroup
	parts.Go(func() {
		select {
		case <-q.done:
			cancel()
		case <-bound.Done():
		}
	})
	for _, f := range others {
		parts.Go(func() { q.receive(bound, f) })
	}
	q.receive(bound, own)
	cancel()
	parts.Wait()
	if q.isClosed() && ctx.Err() == nil {
		return queue.ErrClosed
	}
	// The server is going: nobody else reads it.
	last, stop := context.WithTimeout(context.WithoutCancel(ctx), closeTimeout)
	defer stop()
	q.dropSubscription(last, own.subscription)
	return nil
}

// bury ends a job that came to the dead-letter topic: no worker was up that
// could have ended it when its attempts were used up.
func (q *Queue) bury(ctx context.Context, m *pb.PubsubMessage) bool {
	l, err := q.newLease("", &pb.ReceivedMessage{Message: m})
	if err != nil {
		q.log.Error("a dead letter that is no job was dropped", "message", m.GetMessageId(), "error", err)
		return true
	}
	q.metrics.dead.Inc()
	q.log.Warn("a job came by the dead-letter topic", "operation", l.job.GetOperation())
	at := usedUpAt{attempt: l.base + l.past.delivered + deliveriesOf(m, uint32(q.opts.MaxAttempts)), failures: l.past.failures} //nolint:gosec // small
	if err := q.endUsedUp(ctx, l.job, at); err != nil {
		q.log.Warn("could not end a job", "operation", l.job.GetOperation(), "error", err)
		return false
	}
	return true
}

// deliveriesOf is how often a dead letter was delivered: the service says so.
func deliveriesOf(m *pb.PubsubMessage, otherwise uint32) uint32 {
	if n, err := parseCount(m.GetAttributes()["CloudPubSubDeadLetterSourceDeliveryCount"]); err == nil && n > 0 {
		return n
	}
	return otherwise
}
