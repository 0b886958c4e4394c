package nats

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	natsgo "github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/protobuf/proto"

	"github.com/mettle-build/mettle/mettle/queue"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// fullFor is how long a full queue is given: the message of a job that has ended
// may be still there for a moment.
const fullFor = 50 * time.Millisecond

// maxConflicts bounds how often a step is tried again because somebody else
// changed the record first.
const maxConflicts = 16

// Publish implements queue.Publisher. A job that is there already, published by
// whichever API server, stays the same job and reports to both.
func (q *Queue) Publish(ctx context.Context, job *queuepb.Job) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if job.GetOperation() == "" {
		return errors.New("publish: the job names no operation")
	}
	data, err := proto.Marshal(job)
	if err != nil {
		return fmt.Errorf("publish %s: %w", job.GetOperation(), err)
	}
	// Before, so that there is no moment in which its loss would go unnoticed.
	published := q.expect(job.GetReplyTo(), job.GetOperation())
	err = q.publish(ctx, job, data)
	published(err)
	if err != nil {
		return fmt.Errorf("publish %s: %w", job.GetOperation(), err)
	}
	return nil
}

func (q *Queue) publish(ctx context.Context, job *queuepb.Job, data []byte) error {
	if err := q.ensureInbox(ctx, job.GetReplyTo()); err != nil {
		return err
	}
	m := &natsgo.Msg{Subject: q.jobSubject(job.GetPool(), band(job.GetPriority()), job.GetOperation()), Data: data}
	waited := false
	for range maxConflicts {
		err := q.try(ctx, callPublish, func(ctx context.Context) error {
			_, err := q.js.PublishMsg(ctx, m, jetstream.WithRetryAttempts(0))
			return err
		})
		full := errors.Is(err, queue.ErrFull)
		if !full && !errors.Is(err, errDuplicate) {
			return err
		}
		there, dupErr := q.duplicate(ctx, job)
		if there || dupErr != nil {
			return dupErr
		}
		if full && waited {
			return err
		}
		if full {
			waited = true
			if err := q.pause(ctx, fullFor); err != nil {
				return err
			}
		}
	}
	return errContended
}

// pause waits for a while.
func (q *Queue) pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-q.done:
		return queue.ErrClosed
	}
}

// duplicate looks after a job that is published although there is one of its
// name, and reports whether that is to stay. It has made room if not.
func (q *Queue) duplicate(ctx context.Context, job *queuepb.Job) (there bool, err error) {
	for range maxConflicts {
		m, err := q.jobMessage(ctx, job.GetOperation())
		if errors.Is(err, errNoMessage) {
			return false, nil // it has ended meanwhile
		} else if err != nil {
			return false, err
		}
		s, err := q.load(ctx, job.GetOperation())
		if err != nil {
			return false, err
		}
		if m.Sequence <= s.Cancelled || s.State == stateEnded && m.Sequence <= s.Job {
			err = q.replace(ctx, s, m.Sequence, job.GetReplyTo())
			if err == nil {
				return false, nil
			}
		} else {
			err = q.share(ctx, s, m, job.GetReplyTo())
			if err == nil {
				return true, nil
			}
		}
		if !errors.Is(err, errConflict) {
			return false, err
		}
	}
	return false, errContended
}

// replace removes the message of a job that was withdrawn while it was leased, or
// has ended. What the worker of a withdrawn one still reports is not about the
// next job of that name, which is the API server's.
func (q *Queue) replace(ctx context.Context, s stored, sequence uint64, api string) error {
	withdrawn := sequence <= s.Cancelled
	r := record{Operation: s.Operation, State: stateWaiting, Cancelled: max(s.Cancelled, sequence)}
	if withdrawn {
		r.Attempt, r.Fence = s.Attempt, s.Attempt
	}
	if _, err := q.store(ctx, r, s.revision); err != nil {
		return err
	}
	if withdrawn {
		q.tell(ctx, slices.DeleteFunc(slices.Clone(s.Replies), func(id string) bool { return id == api }), ended(s.record))
	}
	if r.Fence > 0 {
		q.fence(r.Operation, r.Fence)
	}
	return q.deleteJob(ctx, sequence)
}

// share has a job report to one more API server, and tells that one how far it
// has come.
func (q *Queue) share(ctx context.Context, s stored, m *jetstream.RawStreamMsg, api string) error {
	var job queuepb.Job
	if err := proto.Unmarshal(m.Data, &job); err != nil {
		return fmt.Errorf("the job in the queue: %w", err)
	}
	r := s.clone()
	if r.State == stateEnded { // of an earlier job of the name
		r = record{Operation: r.Operation, State: stateWaiting, Cancelled: r.Cancelled}
	}
	if api != job.GetReplyTo() && r.addReply(api) {
		if _, err := q.store(ctx, r, s.revision); err != nil {
			return err
		}
	}
	if r.State != stateLeased || r.Job != m.Sequence {
		return nil
	}
	q.notify(ctx, r)
	q.watch(api, r.Operation, r.Attempt)
	if r.Worker == "" || api == "" {
		return nil
	}
	return q.post(ctx, []string{api}, &queuepb.Update{
		Operation: r.Operation, Attempt: r.Attempt, Worker: r.Worker, Stage: queuepb.Update_EXECUTING,
	})
}

// Cancel implements queue.Publisher.
func (q *Queue) Cancel(ctx context.Context, operation string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	err := errConflict
	for i := 0; i < maxConflicts && errors.Is(err, errConflict); i++ {
		err = q.cancel(ctx, operation)
	}
	switch {
	case errors.Is(err, errConflict):
		err = errContended
	case err == nil:
		q.unexpect(operation)
		return nil
	}
	return fmt.Errorf("cancel %s: %w", operation, err)
}

func (q *Queue) cancel(ctx context.Context, operation string) error {
	m, err := q.jobMessage(ctx, operation)
	if errors.Is(err, errNoMessage) {
		return nil
	} else if err != nil {
		return err
	}
	s, err := q.load(ctx, operation)
	if err != nil {
		return err
	}
	leased := s.State == stateLeased && s.Job == m.Sequence
	if m.Sequence > s.Cancelled {
		r := s.clone()
		r.Cancelled = m.Sequence
		if !leased {
			r.State, r.Replies, r.History = stateWaiting, nil, nil
		}
		if _, err := q.store(ctx, r, s.revision); err != nil {
			return err
		}
	}
	if leased {
		q.notify(ctx, s.record)
		return nil // its worker ends it, or whoever comes across it when it lapses
	}
	if err := q.deleteJob(ctx, m.Sequence); err != nil {
		return err
	}
	return q.tellOfEnd(ctx, s.record, m)
}

// tellOfEnd tells those who have published a job that was withdrawn before a
// worker had it.
func (q *Queue) tellOfEnd(ctx context.Context, r record, m *jetstream.RawStreamMsg) error {
	var job queuepb.Job
	if err := proto.Unmarshal(m.Data, &job); err != nil {
		return fmt.Errorf("the job in the queue: %w", err)
	}
	if r.State == stateEnded { // of an earlier job of the name
		r.Replies = nil
	}
	r.Operation = job.GetOperation()
	r.addReply(job.GetReplyTo())
	q.tell(ctx, r.Replies, ended(r))
	return nil
}

// notifyTimeout bounds the wait for a worker to look at a record: it may have
// gone, and it finds out when it next extends the lease.
const notifyTimeout = 500 * time.Millisecond

// notify has the holder of a lease look at its record, and waits until it has. It
// is no error where it does not answer.
func (q *Queue) notify(ctx context.Context, r record) {
	ctx, stop := context.WithTimeout(ctx, notifyTimeout)
	defer stop()
	if _, err := q.nc.RequestWithContext(ctx, q.workerSubject(r.Holder), []byte(r.Operation)); err != nil {
		q.log.Debug("the holder of a lease could not be told", "operation", r.Operation, "worker", r.Worker, "error", err)
	}
}

// jobMessage finds the message of a job, whichever pool it is of. Where there is
// none, the error wraps errNoMessage.
func (q *Queue) jobMessage(ctx context.Context, operation string) (m *jetstream.RawStreamMsg, err error) {
	err = q.try(ctx, callFindJob, func(ctx context.Context) (err error) {
		m, err = q.jobs.GetLastMsgForSubject(ctx, q.anyJobSubject(operation))
		return err
	})
	return m, err
}

// deleteJob removes the message of a job, which may be gone already.
func (q *Queue) deleteJob(ctx context.Context, sequence uint64) error {
	err := q.try(ctx, callDeleteJob, func(ctx context.Context) error { return q.jobs.DeleteMsg(ctx, sequence) })
	if errors.Is(err, errNoMessage) {
		return nil
	}
	return err
}

// maxFences bounds Queue.fences. There is one for each operation that was
// withdrawn and asked for again before its worker had let go, until it ends.
const maxFences = 1 << 16

// fence has updates of an operation be dropped that are about an attempt up to
// this one.
func (q *Queue) fence(operation string, attempt uint32) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.fences) >= maxFences {
		for old := range q.fences { // any
			delete(q.fences, old)
			break
		}
	}
	q.fences[operation] = attempt
}
