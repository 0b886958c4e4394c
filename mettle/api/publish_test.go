package api_test

import (
	"errors"
	"fmt"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc/codes"

	"github.com/mettle-build/mettle/mettle/queue"
)

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
