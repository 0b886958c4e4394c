package api_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc/codes"

	"github.com/mettle-build/mettle/mettle/api"
	"github.com/mettle-build/mettle/mettle/queue"
	"github.com/mettle-build/mettle/mettle/queue/mem"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// jobs is a queue some of whose calls fail.
type jobs struct {
	*mem.Queue
	mu   sync.Mutex
	err  error
	wait chan struct{} // where not nil, Publish waits for it
	last string        // the operation of the last job
	n    int
}

func (j *jobs) Publish(ctx context.Context, job *queuepb.Job) error {
	j.mu.Lock()
	err, wait := j.err, j.wait
	if j.last != job.GetOperation() {
		j.last = job.GetOperation()
		j.n++
	}
	j.mu.Unlock()
	if wait != nil {
		select {
		case <-wait:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if err != nil {
		return err
	}
	return j.Queue.Publish(ctx, job)
}

func (j *jobs) Cancel(ctx context.Context, operation string) error {
	j.mu.Lock()
	err := j.err
	j.mu.Unlock()
	if err != nil {
		return err
	}
	return j.Queue.Cancel(ctx, operation)
}

func (j *jobs) fail(err error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.err = err
}

// hold makes Publish wait until ch is closed.
func (j *jobs) hold(ch chan struct{}) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.wait = ch
}

// published counts the jobs that Publish was called for, again and again as one.
func (j *jobs) published() int {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.n
}

func TestExecute_publishFails(t *testing.T) {
	for name, tc := range map[string]struct {
		err  error
		code codes.Code
	}{
		"away":    {queue.ErrUnavailable, codes.Unavailable},
		"refused": {fmt.Errorf("%w: %w", queue.ErrUnavailable, queue.ErrRefused), codes.Unavailable},
		"full":    {queue.ErrFull, codes.ResourceExhausted},
		"unknown": {errors.New("odd"), codes.Unavailable},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, b *bench) {
				d := b.store.action("a")
				b.jobs.fail(tc.err)
				b.executeAction(d).err(tc.code)
				b.jobs.fail(nil)
				w := b.executeAction(d)
				w.want(repb.ExecutionStage_QUEUED)
				b.complete(b.lease(), exit(0))
				w.response()
			})
		})
	}
}

// A broker that never answers: the client hears something at once, and of the
// failure in the end; so does one that was merged.
func TestExecute_publishHangs(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		d := b.store.action("a")
		b.jobs.wait = make(chan struct{})
		first, second := b.executeAction(d), b.executeAction(d)
		first.next()
		second.next()
		first.err(codes.Unavailable)
		second.err(codes.Unavailable)
		if n := b.jobs.published(); n != 1 {
			t.Errorf("%d jobs were published", n)
		}
	})
}

// A broker that is away for a while stalls a build: its client is told again and
// again that the action is looked at, and then that it is queued.
func TestExecute_brokerAwayForAWhile(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		begun := time.Now()
		b.jobs.fail(queue.ErrUnavailable)
		w := b.executeAction(b.store.action("a"))
		for range 3 {
			w.want(repb.ExecutionStage_CACHE_CHECK)
		}
		if since := time.Since(begun); since < 30*time.Second {
			t.Errorf("three messages came within %v", since)
		}
		b.jobs.fail(nil)
		w.want(repb.ExecutionStage_QUEUED)
		b.complete(b.lease(), exit(0))
		w.response()
	})
}

// A client need not wait for the broker where the operator has to do something,
// nor a server that shuts down.
func TestExecute_brokerIsNotWaitedFor(t *testing.T) {
	for name, tc := range map[string]struct {
		err error
		do  func(b *bench)
	}{
		"refused":  {fmt.Errorf("%w: %w", queue.ErrUnavailable, queue.ErrRefused), func(*bench) {}},
		"shutdown": {queue.ErrUnavailable, func(b *bench) { b.server.Shutdown() }},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, b *bench) {
				begun := time.Now()
				b.jobs.fail(tc.err)
				w := b.executeAction(b.store.action("a"))
				tc.do(b)
				w.err(codes.Unavailable)
				if since := time.Since(begun); since > time.Second {
					t.Errorf("the stream ended after %v", since)
				}
			})
		})
	}
}

// explodes is a broker that panics once.
type explodes struct {
	*jobs
	once sync.Once
}

func (e *explodes) Publish(ctx context.Context, job *queuepb.Job) error {
	e.once.Do(func() { panic("the broker is broken") })
	return e.jobs.Publish(ctx, job)
}

// A panic while an operation is begun leaves none behind for others to wait for.
func TestExecute_publishPanics(t *testing.T) {
	inBubble(t, func(_ *testing.T, b *bench) {
		b.stop()
		b.start(func(o *api.Options) { o.Jobs = &explodes{jobs: b.jobs} })
		d := b.store.action("a")
		b.executeAction(d).err(codes.Internal)
		w := b.executeAction(d)
		w.want(repb.ExecutionStage_QUEUED)
		b.complete(b.lease(), exit(3))
		w.response()
	})
}
