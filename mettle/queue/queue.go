// Package queue is the contract between API servers and workers: Jobs, each of
// which is leased to one worker at a time; Updates, which go to the API server
// that asked; and Notices, which all API servers hear that are up. The brokers
// are in the folders beside this file (mem, ...); each passes the suite of
// queuetest.
//
// Delivery is at least once. A job whose lease lapses or is handed back is
// delivered again with a higher attempt number, at the latest when its worker
// has been silent for the lease time. The attempt number only tells deliveries
// apart. What is bounded is how many of them may fail, by a lease that lapses or
// a worker that rejects the job: after the configured number the broker gives up
// and tells the API server by a COMPLETED Update whose status message begins with
// ReasonAttempts and names the workers. Messages must not be changed once they
// are given to a queue or taken from one.
//
// All methods are safe for concurrent use.
package queue

import (
	"context"
	"errors"

	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// The classes of errors.
var (
	// ErrClosed: the queue has been closed on this side.
	ErrClosed = errors.New("queue is closed")
	// ErrFull: the queue holds as many jobs as it may.
	ErrFull = errors.New("queue is full")
	// ErrUnavailable: the broker can't answer now; the same call may succeed later.
	ErrUnavailable = errors.New("queue is unavailable")
	// ErrRefused: the broker answers, and what it says only an operator can
	// change: a right is lacking, or what mettle setup makes is not there. Such
	// an error wraps ErrUnavailable too, because it ends when the cause does.
	ErrRefused = errors.New("refused by the broker")
	// ErrLeaseLost: the lease has lapsed, and the job may be with another worker.
	ErrLeaseLost = errors.New("lease lost")
)

// Publisher is the API server's side of the jobs.
type Publisher interface {
	// Publish makes job available to one worker of its pool. Once it returns
	// nil the job is delivered until somebody acknowledges it, it is cancelled,
	// or its attempts are used up. Where a job of that name waits already, it is
	// raised as Raiser says, by brokers that can. Errors wrap ErrFull, ErrUnavailable or ErrClosed.
	Publish(ctx context.Context, job *queuepb.Job) error
	// Cancel withdraws the job of an operation: a waiting one is dropped, a
	// leased one's worker is told. It is no error if there is none. Every API server
	// that has published the job hears of its end, by a COMPLETED Update whose
	// status is CANCELLED: its clients may still wait, and it can publish the job
	// again. It is the worker's, or where none reports, the broker's, whose
	// attempt may be 0.
	Cancel(ctx context.Context, operation string) error
}

// A Raiser is a Publisher that can make a job more urgent while it waits. API
// servers ask for that when a client joins an operation of another one. Others
// don't have it: a broker that can't reach into its queue leaves the job where
// it is, and publishing it again could be to run it twice.
type Raiser interface {
	// Raise gives the job of an operation the priority, if that is the lower
	// number, and lets it wait among the jobs of the invocation, if it comes
	// to its turn sooner there. It is no error if there is no such job; none is
	// made. Errors wrap ErrUnavailable or ErrClosed.
	Raise(ctx context.Context, operation string, priority int32, invocation string) error
}

// Consumer is the worker's side of the jobs.
type Consumer interface {
	// Lease waits for a job of one of the pools and takes it. It fails with the
	// context's error, or one that wraps ErrUnavailable or ErrClosed.
	Lease(ctx context.Context, pools []string) (Lease, error)
}

// A Lease is the right of one worker to run one job, until it is ended by Ack
// or Release, or until the worker has neither ended nor extended it for the
// queue's lease time.
type Lease interface {
	// Job is the job. It must not be changed.
	Job() *queuepb.Job
	// Attempt counts the deliveries of this job, from 1.
	Attempt() uint32
	// Extend starts the lease time anew. Where the lease is gone, the error
	// wraps ErrLeaseLost, and the worker stops at once.
	Extend(ctx context.Context) error
	// Cancelled is closed when the job has been withdrawn by Cancel.
	Cancelled() <-chan struct{}
	// Ack ends the lease and the job. It is called after the last Update was
	// sent. Where the lease is gone, the error wraps ErrLeaseLost.
	Ack(ctx context.Context) error
	// Release hands the job back, to be delivered again at once, because the
	// worker ends: no fault of the job's, so it does not bring it nearer to its
	// end.
	Release(ctx context.Context) error
	// Reject hands the job back, to be delivered again at once and if possible
	// to another worker, because this one can't run it. It counts as a failed
	// attempt, and reason, a short phrase, is in the message of the final error.
	Reject(ctx context.Context, reason string) error
}

// Sender is the worker's side of the updates.
type Sender interface {
	// SendUpdate sends u to the API server replyTo, in order with respect to
	// other updates of the same sender about the same operation. Where that
	// server is gone, the update is dropped without an error: the result is
	// in the ActionCache.
	SendUpdate(ctx context.Context, replyTo string, u *queuepb.Update) error
}

// Receiver is the API server's side of the updates.
type Receiver interface {
	// ReceiveUpdates calls handle with each update for the API server id, one
	// at a time, until ctx is done, and then returns nil. Handle must not
	// block. There is one receiver an id at a time.
	ReceiveUpdates(ctx context.Context, id string, handle func(*queuepb.Update)) error
}

// Notifier tells all API servers something.
type Notifier interface {
	// Notify tells n to every API server that listens now, at most once each,
	// and as a rule in order. It does not wait for them. Loss is possible, even
	// where nil is returned; who depends on n says it again.
	Notify(ctx context.Context, n *queuepb.Notice) error
}

// Listener is the API server's side of the notices.
type Listener interface {
	// ListenNotices calls handle with each notice, for the API server id, one at
	// a time, until ctx is done, and then returns nil. Handle must not block.
	// There is one listener an id at a time. One that begins hears soon what
	// each worker said last of itself and still holds, and may hear of more of
	// what was told shortly before.
	ListenNotices(ctx context.Context, id string, handle func(*queuepb.Notice)) error
}

// A Broker is all sides of a queue.
type Broker interface {
	Publisher
	Consumer
	Sender
	Receiver
	Notifier
	Listener
	// Ready asks the broker for a sign of life, and returns nil when it gives
	// one, otherwise an error that wraps ErrUnavailable or ErrClosed.
	Ready(ctx context.Context) error
	// Close ends this side, and waits for what it has started. Those who wait in
	// a call get an error that wraps ErrClosed. It may be called twice.
	Close() error
}

// DefaultPool is the pool of workers that declare nothing particular, for
// servers and workers that are not told of any other.
const DefaultPool = "default"

// ReasonAttempts begins the status message of the final update that a broker
// sends of its own accord when a job's attempts are used up.
const ReasonAttempts = "attempts used up"
