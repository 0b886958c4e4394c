// Package noop is workers that run nothing: each leases a job, says that it runs,
// says that it has ended, and acknowledges it, as a worker does whose actions
// take no time. What is left is what API servers and queues cost by themselves,
// which `mettle bench fleet` measures; its only caller is mettle's main.
//
// They report when a job was published, where the API server's Publisher is
// Stamped, and when it was leased, by ExecutedActionMetadata's queued_timestamp
// and worker_start_timestamp: what is between the two is the hand-off, if a
// worker was idle.
package noop

import (
	"context"
	"errors"
	"fmt"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/mettle-build/mettle/mettle/queue"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// Queue is what the workers need of a broker.
type Queue interface {
	queue.Consumer
	queue.Sender
}

// Run runs so many workers of queue.DefaultPool, which go by one name, until ctx
// is done, and returns nil then; or until one of them meets an error other than
// a lost lease, and returns that.
func Run(ctx context.Context, q Queue, workers int) error {
	g, ctx := errgroup.WithContext(ctx)
	for range workers {
		g.Go(func() error { return work(ctx, q) })
	}
	if err := g.Wait(); err != nil && ctx.Err() == nil || errors.Is(err, queue.ErrClosed) {
		return fmt.Errorf("simulated worker: %w", err)
	}
	return nil
}

func work(ctx context.Context, q Queue) error {
	for {
		l, err := q.Lease(ctx, []string{queue.DefaultPool})
		if err != nil {
			return unlessDone(ctx, err)
		}
		if err := handle(ctx, q, l); err != nil && !errors.Is(err, queue.ErrLeaseLost) {
			return unlessDone(ctx, err)
		}
	}
}

// unlessDone is err, or nil where it comes of the end of ctx.
func unlessDone(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// name is that of all these workers.
const name = "noop"

// handle does with a job what a worker does, but for running it.
func handle(ctx context.Context, q queue.Sender, l queue.Lease) error {
	leased := timestamppb.Now()
	job := l.Job()
	send := func(u *queuepb.Update) error {
		u.Operation, u.Attempt, u.Worker, u.Sent = job.GetOperation(), l.Attempt(), name, leased
		return q.SendUpdate(ctx, job.GetReplyTo(), u)
	}
	if err := send(&queuepb.Update{Stage: queuepb.Update_EXECUTING}); err != nil {
		return err
	}
	response, err := proto.Marshal(&repb.ExecuteResponse{Result: &repb.ActionResult{ExecutionMetadata: &repb.ExecutedActionMetadata{
		Worker: name, QueuedTimestamp: job.GetQueued(), WorkerStartTimestamp: leased, WorkerCompletedTimestamp: leased,
	}}})
	if err != nil {
		return err
	}
	if err := send(&queuepb.Update{Stage: queuepb.Update_COMPLETED, ExecuteResponse: response}); err != nil {
		return err
	}
	return l.Ack(ctx)
}

// Stamped is a Publisher whose jobs say when they were published, and not when
// the client asked.
type Stamped struct{ queue.Publisher }

// Publish implements queue.Publisher. It changes job.
func (s Stamped) Publish(ctx context.Context, job *queuepb.Job) error {
	job.Queued = timestamppb.Now()
	return s.Publisher.Publish(ctx, job)
}
