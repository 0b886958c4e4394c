package mem

import (
	"context"
	"fmt"
	"slices"
	"strings"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/rpc/code"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/mettle-build/mettle/mettle/queue"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// A mailbox is what one API server has yet to hear. Its fields are guarded by
// Queue.mu.
type mailbox struct {
	id        string
	receiving bool
	pending   []*queuepb.Update
	place     map[string]int // the index into pending, by operation
	spare     []*queuepb.Update
	wake      chan struct{} // of capacity 1: a token says that pending is not empty
}

// maxUnread bounds the mailboxes of API servers that have not begun, or have
// ceased, to receive.
const maxUnread = 16

// signals are what is to be sent once the mutex is free. The zero signals are
// none.
type signals struct {
	waiter *waiter
	box    *mailbox
	more   []*mailbox
}

func (s signals) send() {
	if s.waiter != nil {
		s.waiter.ready <- struct{}{} // never blocks: its one signal, capacity 1
	}
	if s.box != nil {
		s.box.notify()
	}
	for _, b := range s.more {
		b.notify()
	}
}

func (b *mailbox) notify() {
	select {
	case b.wake <- struct{}{}:
	default: // there is a token
	}
}

// SendUpdate implements queue.Sender. It never blocks.
func (q *Queue) SendUpdate(ctx context.Context, replyTo string, u *queuepb.Update) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	q.mu.Lock()
	sig, err := q.sendUpdate(replyTo, u)
	q.mu.Unlock()
	sig.send()
	if err != nil {
		return fmt.Errorf("send update about %s to %s: %w", u.GetOperation(), replyTo, err)
	}
	return nil
}

// sendUpdate is SendUpdate with the mutex held.
func (q *Queue) sendUpdate(replyTo string, u *queuepb.Update) (signals, error) {
	if q.closed {
		return signals{}, queue.ErrClosed
	}
	j := q.jobs[u.GetOperation()]
	if j != nil {
		if u.GetAttempt() <= j.fence {
			return signals{}, nil
		}
		if l := j.lease; l != nil && l.attempt == u.GetAttempt() {
			l.worker = u.GetWorker()
			j.news = u
		}
	}
	box, err := q.post(replyTo, u)
	sig := signals{box: box}
	if j == nil {
		return sig, err
	}
	for _, id := range j.replies {
		if id == replyTo {
			continue
		}
		b, e := q.post(id, u)
		if e != nil {
			err = e
		}
		if b != nil {
			sig.more = append(sig.more, b)
		}
	}
	return sig, err
}

// tell posts an update of the broker's own to all who want to know of j. The
// mutex is held.
func (q *Queue) tell(j *job, u *queuepb.Update) signals { return q.tellAllBut("", j, u) }

// tellAllBut is tell for all but one API server.
func (q *Queue) tellAllBut(not string, j *job, u *queuepb.Update) signals {
	u.Sent = timestamppb.Now()
	var sig signals
	for _, id := range append([]string{j.msg.GetReplyTo()}, j.replies...) {
		if id == not && not != "" {
			continue
		}
		// What does not fit is dropped: the receiver is far behind, and a worker's
		// next report or the client's WaitExecution makes up for it.
		if b, _ := q.post(id, u); b != nil {
			sig.more = append(sig.more, b)
		}
	}
	return sig
}

// post puts u into a mailbox, and returns it if it is to be notified. Where
// there is an update about the same operation already, only that of the newer
// attempt stays, or the later of the two; nothing comes after COMPLETED. The
// mutex is held.
func (q *Queue) post(id string, u *queuepb.Update) (*mailbox, error) {
	b := q.boxes[id]
	if b == nil {
		return nil, nil //nolint:nilnil // that server is gone; the contract says to drop it
	}
	final := u.GetStage() == queuepb.Update_COMPLETED
	if i, ok := b.place[u.GetOperation()]; ok {
		if old := b.pending[i]; old.GetStage() != queuepb.Update_COMPLETED && u.GetAttempt() >= old.GetAttempt() {
			b.pending[i] = u
		}
		return nil, nil //nolint:nilnil // the mailbox was notified of the one before
	}
	if len(b.pending) >= q.opts.MaxUpdates {
		if final {
			return nil, fmt.Errorf("%w: it has %d updates to fetch", queue.ErrUnavailable, len(b.pending))
		}
		return nil, nil //nolint:nilnil // progress may be dropped
	}
	b.place[u.GetOperation()] = len(b.pending)
	b.pending = append(b.pending, u)
	return b, nil
}

// box finds or makes the mailbox of an API server. The mutex is held.
func (q *Queue) box(id string) *mailbox {
	b := q.boxes[id]
	if b == nil {
		b = &mailbox{id: id, place: make(map[string]int), wake: make(chan struct{}, 1)}
		q.boxes[id] = b
		q.unread = append(q.unread, id)
		if len(q.unread) > maxUnread {
			delete(q.boxes, q.unread[0])
			q.unread = slices.Delete(q.unread, 0, 1)
		}
	}
	return b
}

// withdrawn is the end of a job that was withdrawn, and of which no worker
// reports.
func withdrawn(j *job) *queuepb.Update {
	data, err := proto.Marshal(&repb.ExecuteResponse{Status: &spb.Status{Code: int32(code.Code_CANCELLED), Message: "the job was withdrawn"}})
	if err != nil { // it is all of our own making
		return nil
	}
	return &queuepb.Update{
		Operation: j.msg.GetOperation(), Attempt: j.attempt, Stage: queuepb.Update_COMPLETED, ExecuteResponse: data,
	}
}

// addReply has j report to one more API server, and tells that one how far j
// has come. The mutex is held.
func (q *Queue) addReply(j *job, id string) signals {
	q.box(id)
	if id != j.msg.GetReplyTo() && !slices.Contains(j.replies, id) {
		if len(j.replies) == maxReplies {
			j.replies = slices.Delete(j.replies, 0, 1)
		}
		j.replies = append(j.replies, id)
	}
	if j.news == nil {
		return signals{}
	}
	b, _ := q.post(id, j.news) // dropped rather than refused: the server is far behind
	return signals{box: b}
}

// ReceiveUpdates implements queue.Receiver. Updates that came for id since its
// first Publish are waiting. A second receiver of the same id is an error.
func (q *Queue) ReceiveUpdates(ctx context.Context, id string, handle func(*queuepb.Update)) error {
	q.mu.Lock()
	if q.closed {
		q.mu.Unlock()
		return fmt.Errorf("receive updates for %s: %w", id, queue.ErrClosed)
	}
	b := q.box(id)
	if b.receiving {
		q.mu.Unlock()
		return fmt.Errorf("receive updates for %s: there is a receiver already", id)
	}
	b.receiving = true
	q.unread = slices.DeleteFunc(q.unread, func(s string) bool { return s == id })
	q.mu.Unlock()
	defer q.unreceive(b)

	for {
		for _, u := range q.fetch(b) {
			if ctx.Err() != nil {
				return nil
			}
			handle(u)
		}
		select {
		case <-b.wake:
		case <-ctx.Done():
			return nil
		case <-q.done:
			return fmt.Errorf("receive updates for %s: %w", id, queue.ErrClosed)
		}
	}
}

// fetch takes what is in b. The slice is good until the next fetch.
func (q *Queue) fetch(b *mailbox) []*queuepb.Update {
	q.mu.Lock()
	defer q.mu.Unlock()
	us := b.pending
	clear(b.spare)
	b.pending, b.spare = b.spare[:0], us
	clear(b.place)
	return us
}

// unreceive drops b: its API server has gone.
func (q *Queue) unreceive(b *mailbox) {
	q.mu.Lock()
	defer q.mu.Unlock()
	delete(q.boxes, b.id)
}

// usedUp is the final update of a job whose last attempt was l.
func usedUp(j *job, l *lease) *queuepb.Update {
	res := &repb.ExecuteResponse{Status: &spb.Status{
		// The action may be what ends its workers, so it is not UNAVAILABLE:
		// that would invite the client to try for ever.
		Code:    int32(code.Code_INTERNAL),
		Message: fmt.Sprintf("%s: %s", queue.ReasonAttempts, strings.Join(j.failures, "; ")),
	}}
	data, err := proto.Marshal(res)
	if err != nil { // a worker's name that is not UTF-8
		res.Status.Message = queue.ReasonAttempts
		data, _ = proto.Marshal(res)
	}
	return &queuepb.Update{
		Operation:       j.msg.GetOperation(),
		Attempt:         l.attempt,
		Worker:          l.worker,
		Stage:           queuepb.Update_COMPLETED,
		ExecuteResponse: data,
	}
}
