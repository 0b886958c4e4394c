package api_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/mettle-build/mettle/mettle/api"
	"github.com/mettle-build/mettle/mettle/queue"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// another is a second server over the same storage and queue.
func (b *bench) another(id string) *bench {
	b.t.Helper()
	other := &bench{t: b.t, store: b.store, jobs: b.jobs}
	b.t.Cleanup(func() { other.stop() })
	other.start(func(o *api.Options) { o.ID = id })
	return other
}

// restart ends servers at once, and starts them again as API servers are: with
// ids that they never had.
func restart(servers ...*bench) {
	for _, b := range servers {
		b.stop()
	}
	for i, b := range servers {
		b.start(func(o *api.Options) { o.ID = fmt.Sprintf("restarted-%d", i) })
	}
}

// All API servers restart at once. What workers run goes on, what waits goes on
// waiting, and clients that come back, to whichever server, miss nothing. Nothing
// is run twice.
func TestRestart_allServers(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		other := b.another("another")
		running := b.executeAction(b.store.action("running", doNotCache))
		running.want(repb.ExecutionStage_QUEUED)
		l := b.lease()
		b.executing(l, "w")
		running.want(repb.ExecutionStage_EXECUTING)
		ending := other.executeAction(b.store.action("ending"))
		ending.want(repb.ExecutionStage_QUEUED)
		ends := b.lease()
		waits := other.executeAction(b.store.action("waiting", doNotCache))
		waits.want(repb.ExecutionStage_QUEUED)
		stop := keepLease(t, l)

		restart(b, other)
		for _, w := range []*waiting{running, ending, waits} {
			w.err(codes.Unavailable)
		}
		// One ends while nobody listens: its result is in the ActionCache.
		b.store.cache(b.store.action("ending"), exit(0).GetResult())
		b.complete(ends, exit(0))

		// To the server that did not have it before.
		again := other.resume(running.name)
		again.want(repb.ExecutionStage_EXECUTING)
		if !b.resume(ending.name).response().GetCachedResult() {
			t.Error("what has ended is not cached")
		}
		later := b.resume(waits.name)
		later.want(repb.ExecutionStage_QUEUED)
		time.Sleep(10 * time.Minute)
		stop()
		b.complete(l, exit(3))
		if got := again.response().GetResult().GetExitCode(); got != 3 {
			t.Errorf("exit code is %d, want 3", got)
		}
		l = b.lease()
		if l.Job().GetOperation() != waits.name || l.Attempt() != 1 {
			t.Errorf("leased %s, attempt %d, want the first one of %s", l.Job().GetOperation(), l.Attempt(), waits.name)
		}
		b.complete(l, exit(4))
		if got := later.response().GetResult().GetExitCode(); got != 4 {
			t.Errorf("exit code is %d, want 4", got)
		}
		synctest.Wait()
		b.noLease()
	})
}

// apart is a broker that does not know equal jobs, as Pub/Sub is: one that is
// published twice is delivered twice.
type apart struct {
	*jobs
	published map[string]int
}

func (a *apart) Publish(ctx context.Context, job *queuepb.Job) error {
	j := proto.CloneOf(job)
	a.mu.Lock()
	a.published[job.GetOperation()]++
	j.Operation = fmt.Sprintf("%s#%d", job.GetOperation(), a.published[job.GetOperation()])
	a.mu.Unlock()
	return a.jobs.Publish(ctx, j)
}

func (a *apart) Cancel(ctx context.Context, operation string) error {
	a.mu.Lock()
	n := a.published[operation]
	a.mu.Unlock()
	var errs []error
	for i := range n {
		errs = append(errs, a.jobs.Cancel(ctx, fmt.Sprintf("%s#%d", operation, i+1)))
	}
	return errors.Join(errs...)
}

// apartLease is a lease whose job has the name that it was published by.
type apartLease struct{ queue.Lease }

func (l apartLease) Job() *queuepb.Job {
	j := proto.CloneOf(l.Lease.Job())
	j.Operation, _, _ = strings.Cut(j.GetOperation(), "#")
	return j
}

// The client that comes back through another server, over a broker that delivers
// duplicates: it gets one end, and cancelling reaches every worker.
func TestRestart_duplicatesApart(t *testing.T) {
	for label, cancelled := range map[string]bool{"it ends": false, "it is cancelled": true} {
		t.Run(label, func(t *testing.T) {
			inBubble(t, func(t *testing.T, b *bench) {
				broker := &apart{jobs: b.jobs, published: make(map[string]int)}
				start := func(b *bench, id string) {
					b.stop()
					b.start(func(o *api.Options) { o.ID, o.Jobs = id, broker })
				}
				start(b, "one")
				w := b.executeAction(b.store.action("a"))
				w.want(repb.ExecutionStage_QUEUED)
				first := apartLease{b.lease()}
				start(b, "two")
				other := b.another("three")
				start(other, "three")
				w.err(codes.Unavailable)
				again := other.resume(w.name)
				again.want(repb.ExecutionStage_QUEUED)
				second := apartLease{b.lease()}
				if second.Job().GetOperation() != w.name || second.Job().GetReplyTo() != "three" {
					t.Fatalf("the second job is %v", second.Job())
				}
				b.executing(second, "v")
				again.want(repb.ExecutionStage_EXECUTING)
				if cancelled {
					b.cancel(w.name)
					again.cancelled()
					b.withdrawn(first)
					b.withdrawn(second)
				} else {
					b.complete(first, exit(1)) // for a server that is gone
					b.complete(second, exit(2))
					if got := again.response().GetResult().GetExitCode(); got != 2 {
						t.Errorf("exit code is %d, want 2", got)
					}
				}
				synctest.Wait()
				b.noLease()
			})
		})
	}
}

// Somebody looks at an operation through another server for a while, and goes.
// The client that has waited all the time keeps what it waits for, be it by
// that name or by another one.
func TestWaitExecution_elsewhereForAWhile(t *testing.T) {
	for label, merged := range map[string]bool{"the first client stays": false, "a merged client stays": true} {
		t.Run(label, func(t *testing.T) {
			inBubble(t, func(t *testing.T, b *bench) {
				other := b.another("another")
				d := b.store.action("a")
				w := b.executeAction(d)
				w.want(repb.ExecutionStage_QUEUED)
				l := b.lease()
				b.executing(l, "w")
				w.want(repb.ExecutionStage_EXECUTING)
				stays := w
				if merged {
					stays = b.executeAction(d)
					stays.want(repb.ExecutionStage_EXECUTING)
					w.leave()
				}
				stop := keepLease(t, l)
				visitor := other.resume(w.name)
				visitor.want(repb.ExecutionStage_EXECUTING)
				time.Sleep(90 * time.Second)
				visitor.leave()
				time.Sleep(time.Hour)
				stop()
				select {
				case <-l.Cancelled():
					t.Error("the job was withdrawn")
				default:
				}
				b.complete(l, exit(3))
				if got := stays.response().GetResult().GetExitCode(); got != 3 {
					t.Errorf("exit code is %d, want 3", got)
				}
				b.noLease()
			})
		})
	}
}

// Both of two servers are asked for the same action: each has it run, or finds
// the result of the other (package worker), and each client gets its own.
func TestExecute_sameActionOnTwoServers(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		other := b.another("another")
		d := b.store.action("a")
		one, two := b.executeAction(d), other.executeAction(d)
		one.want(repb.ExecutionStage_QUEUED)
		two.want(repb.ExecutionStage_QUEUED)
		first := b.lease()
		if !first.Job().GetQueued().IsValid() {
			t.Error("the job does not say when it was queued, by which workers know that it has waited")
		}
		b.complete(first, exit(0))
		cached := exit(0)
		cached.CachedResult = true
		b.complete(b.lease(), cached)
		one.response()
		two.response()
		b.noLease()
	})
}
