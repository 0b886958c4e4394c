package nats

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	natsgo "github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/genproto/googleapis/rpc/code"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/mettle-build/mettle/mettle/queue"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// SendUpdate implements queue.Sender. The update is stored at the broker when it
// returns, or dropped, if no API server of that name has been there lately.
func (q *Queue) SendUpdate(ctx context.Context, replyTo string, u *queuepb.Update) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	q.mu.Lock()
	l := q.held[leaseKey{u.GetOperation(), u.GetAttempt()}]
	q.mu.Unlock()
	apis := []string{replyTo}
	if l != nil {
		apis = append(apis, l.reporting(ctx, u)...)
	}
	slices.Sort(apis)
	if err := q.post(ctx, slices.Compact(apis), u); err != nil {
		return fmt.Errorf("send update about %s to %s: %w", u.GetOperation(), replyTo, err)
	}
	return nil
}

// reporting takes note of what the worker reports, and returns the API servers
// that want to know beside the one that asked.
func (l *lease) reporting(ctx context.Context, u *queuepb.Update) []string {
	l.mu.Lock()
	known, ended := l.record.Worker != "", l.ended
	l.mu.Unlock()
	if name := u.GetWorker(); !known && !ended && name != "" && l.hold(ctx) == nil {
		name = strings.ToValidUTF8(name[:min(len(name), maxWorkerName)], "?")
		if _, err := l.change(ctx, func(r *record) { r.Worker = name }); err != nil {
			l.q.log.Debug("the worker's name is not in the record", "operation", u.GetOperation(), "error", err)
		}
		l.letGo()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.note.Stop() // this report says as much
	if u.GetStage() == queuepb.Update_COMPLETED {
		l.final, l.told = u, slices.Clone(l.record.Replies)
	}
	return slices.Clone(l.record.Replies)
}

// sendFinal sends the final update to those who have come to want it since it was
// sent to the others.
func (l *lease) sendFinal(ctx context.Context, r record) {
	l.mu.Lock()
	final := l.final
	apis := slices.DeleteFunc(slices.Clone(r.Replies), func(api string) bool { return slices.Contains(l.told, api) })
	l.mu.Unlock()
	if final != nil && len(apis) > 0 {
		l.q.tell(ctx, apis, final)
	}
}

// tell is post where it does no harm that an update does not arrive.
func (q *Queue) tell(ctx context.Context, apis []string, u *queuepb.Update) {
	if err := q.post(ctx, apis, u); err != nil {
		q.log.Warn("an update could not be sent", "operation", u.GetOperation(), "stage", u.GetStage(), "error", err)
	}
}

// post stores an update for each of apis.
func (q *Queue) post(ctx context.Context, apis []string, u *queuepb.Update) error {
	data, err := q.marshalUpdate(u)
	if err != nil {
		return err
	}
	for _, api := range apis {
		m := &natsgo.Msg{Subject: q.updateSubject(api, u.GetOperation()), Data: data}
		err = errors.Join(err, q.try(ctx, callUpdate, func(ctx context.Context) error {
			_, err := q.js.PublishMsg(ctx, m, jetstream.WithRetryAttempts(0))
			return err
		}))
	}
	return err
}

// requeued says that the delivery that r is about has ended without an end of its job.
func requeued(r record) *queuepb.Update {
	return &queuepb.Update{
		Operation: r.Operation, Attempt: r.Attempt, Worker: r.Worker, Stage: queuepb.Update_REQUEUED, Sent: timestamppb.Now(),
	}
}

// usedUp is the final update of a job whose attempts are used up.
func usedUp(r record) *queuepb.Update {
	return failed(r, &spb.Status{
		// The action may be what ends its workers, so it is not UNAVAILABLE:
		// that would invite the client to try for ever.
		Code:    int32(code.Code_INTERNAL),
		Message: strings.ToValidUTF8(queue.ReasonAttempts+": "+strings.Join(r.History, "; "), "?"),
	})
}

// ended is the final update of a job that was withdrawn, and of which no worker
// reports.
func ended(r record) *queuepb.Update {
	return failed(r, &spb.Status{Code: int32(code.Code_CANCELLED), Message: "the job was withdrawn"})
}

func failed(r record, status *spb.Status) *queuepb.Update {
	u := &queuepb.Update{
		Operation: r.Operation, Attempt: r.Attempt, Worker: r.Worker, Stage: queuepb.Update_COMPLETED, Sent: timestamppb.Now(),
	}
	u.ExecuteResponse, _ = proto.Marshal(&repb.ExecuteResponse{Status: status}) // never fails: its text is UTF-8
	return u
}

// pullExpiry is how long one request for updates lasts. One that the broker has
// lost is found out, and made anew, in half of that.
const pullExpiry = 8 * time.Second

// ReceiveUpdates implements queue.Receiver. Updates that came for id since its
// first Publish are waiting, and those that come while the broker is away. A
// result may come twice, after a connection was lost.
func (q *Queue) ReceiveUpdates(ctx context.Context, id string, handle func(*queuepb.Update)) error {
	leave, err := q.enter()
	if err == nil {
		defer leave()
		err = q.receive(ctx, id, handle)
	}
	if err == nil || ctx.Err() != nil {
		return nil
	}
	return fmt.Errorf("receive updates for %s: %w", id, err)
}

func (q *Queue) receive(ctx context.Context, id string, handle func(*queuepb.Update)) error {
	if ctx.Err() != nil {
		return nil
	}
	if !q.begin(q.receiving, id) {
		return errors.New("there is a receiver already")
	}
	defer q.end(q.receiving, id)
	consumer, lost, err := q.inbox(ctx, id)
	if err != nil {
		return err
	}
	messages, err := consumer.Messages(jetstream.WithMessagesErrOnMissingHeartbeat(false),
		jetstream.PullExpiry(pullExpiry), jetstream.PullHeartbeat(pullExpiry/4))
	if err != nil {
		return q.classify(err)
	}
	defer messages.Stop()

	ctx, cancel := context.WithCancel(ctx)
	var beside sync.WaitGroup
	beside.Go(func() { q.look(ctx, id) })
	if lost {
		beside.Go(func() { q.audit(ctx, id) })
	}
	defer func() {
		cancel()
		beside.Wait()
	}()
	stop := q.onClose(cancel)
	defer stop()
	for {
		m, err := messages.Next(jetstream.NextContext(ctx))
		select {
		case <-q.done:
			return queue.ErrClosed
		default:
		}
		if err != nil {
			return q.classify(err)
		}
		if ctx.Err() != nil {
			return nil // this one comes again to the next receiver
		}
		if u := q.accept(m, id); u != nil {
			handle(u)
		}
		if err := m.Ack(); err != nil { // it comes again
			q.log.Debug("an update could not be acknowledged", "error", err)
		}
	}
}

// onClose has f called when the Queue is closed, until stop.
func (q *Queue) onClose(f func()) (stop func()) {
	stopped, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		select {
		case <-q.done:
			f()
		case <-stopped:
		}
	}()
	return func() {
		close(stopped)
		<-ended
	}
}

// begin enters an API server into a set, unless it is there.
func (q *Queue) begin(set map[string]bool, id string) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if set[id] {
		return false
	}
	set[id] = true
	return true
}

func (q *Queue) end(set map[string]bool, id string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	delete(set, id)
}

// accept reads an update. It returns nil where it is not to be handled.
func (q *Queue) accept(m jetstream.Msg, api string) *queuepb.Update {
	var u queuepb.Update
	if err := proto.Unmarshal(m.Data(), &u); err != nil {
		q.log.Error("a message that is no update, dropping it", "subject", m.Subject(), "error", err)
		return nil
	}
	final := u.GetStage() == queuepb.Update_COMPLETED
	if u.GetStage() == queuepb.Update_EXECUTING {
		q.watch(api, u.GetOperation(), u.GetAttempt())
	}
	if meta, err := m.Metadata(); !final && err == nil && meta.NumDelivered > 1 {
		return nil // the connection was lost; by now there may be later news
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if fence, ok := q.fences[u.GetOperation()]; ok && u.GetAttempt() <= fence {
		return nil // a report on a withdrawn job of that name
	}
	if final {
		delete(q.fences, u.GetOperation())
		delete(q.watched, u.GetOperation())
		delete(q.published, u.GetOperation())
	}
	return &u
}
