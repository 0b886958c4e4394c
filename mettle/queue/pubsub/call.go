package pubsub

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/mettle-build/mettle/mettle/queue"
)

// The waits between tries double from the first to the last.
const (
	firstWait = 20 * time.Millisecond
	lastWait  = 2 * time.Second
)

// backOff waits the n-th time, n from 0, some time between nothing and a bound
// that doubles. It returns false if ctx ends first.
func backOff(ctx context.Context, n int) bool {
	bound := lastWait
	if n < 8 { // 20 ms × 2⁸ is more than 2 s
		bound = min(firstWait<<n, lastWait)
	}
	return sleep(ctx, rand.N(bound)) //nolint:gosec // jitter
}

// sleep waits. It returns false if ctx ends first.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// A target is what a call does, to what, and the right that it takes.
type target struct {
	verb, resource, permission string
}

// call makes a call, again and again while the broker can't be reached, for at
// most the call timeout. Each try has a share of it, since an answer may be lost.
func (q *Queue) call(ctx context.Context, t target, f func(ctx context.Context) error) error {
	outer := ctx
	ctx, cancel := context.WithTimeout(ctx, q.opts.CallTimeout)
	defer cancel()
	for n := 0; ; n++ {
		try, stop := context.WithTimeout(ctx, max(q.opts.CallTimeout/3, time.Millisecond))
		err := f(try)
		stop()
		if err == nil {
			return nil
		}
		if !isTransient(status.Code(err)) || !backOff(ctx, n) {
			return q.classify(outer, t, err)
		}
	}
}

// isTransient reports whether the same call may succeed soon.
func isTransient(c codes.Code) bool {
	switch c {
	case codes.Unavailable, codes.Aborted, codes.Internal, codes.Unknown, codes.ResourceExhausted, codes.DeadlineExceeded:
		return true
	}
	return false
}

// classify makes an error of package queue of one of gRPC.
func (q *Queue) classify(ctx context.Context, t target, err error) error {
	switch {
	case q.isClosed():
		return fmt.Errorf("%s: %w", t.verb, queue.ErrClosed)
	case ctx.Err() != nil:
		return fmt.Errorf("%s: %w", t.verb, ctx.Err())
	}
	switch s := status.Convert(err); s.Code() {
	case codes.NotFound:
		return fmt.Errorf("%s: %w: %w: %s is not there; run mettle setup", t.verb, queue.ErrUnavailable, queue.ErrRefused, t.resource)
	case codes.PermissionDenied, codes.Unauthenticated:
		return fmt.Errorf("%s: %w: %w: the right %s on %s is lacking: %s", t.verb, queue.ErrUnavailable, queue.ErrRefused, t.permission, t.resource, s.Message())
	default:
		return fmt.Errorf("%s: %w: %s: %w", t.verb, queue.ErrUnavailable, t.resource, s.Err())
	}
}

// lock takes a lock of capacity 1, unless ctx or the queue ends before.
func (q *Queue) lock(ctx context.Context, lock chan struct{}) error {
	select {
	case lock <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-q.done:
		return queue.ErrClosed
	}
}
