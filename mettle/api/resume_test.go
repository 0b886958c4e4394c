package api_test

import (
	"context"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/mettle/api"
	"github.com/mettle-build/mettle/mettle/operation"
	"github.com/mettle-build/mettle/mettle/queue"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// keepLease extends a lease until the returned function is called.
func keepLease(t *testing.T, l queue.Lease) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			select {
			case <-time.After(10 * time.Second):
				if err := l.Extend(ctx); err != nil && ctx.Err() == nil {
					t.Error(err)
				}
			case <-ctx.Done():
				return
			}
		}
	}()
	return func() {
		cancel()
		<-ended
	}
}

// An action of an hour: the client is never without news for longer than the
// keep-alive interval.
func TestStream_keepAlive(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		w := b.executeAction(b.store.action("a"))
		l := b.lease()
		b.executing(l, "w")
		stop := keepLease(t, l)
		go func() {
			time.Sleep(time.Hour)
			stop()
			b.complete(l, exit(0))
		}()
		w.want(repb.ExecutionStage_EXECUTING)
		messages, last := 0, time.Now()
		for {
			op, md := w.next()
			if silence := time.Since(last); silence > 30*time.Second {
				t.Fatalf("nothing came for %v", silence)
			}
			last = time.Now()
			if op.GetDone() {
				break
			}
			if md.GetStage() != repb.ExecutionStage_EXECUTING || md.GetPartialExecutionMetadata().GetWorker() != "w" {
				t.Fatalf("keep-alive message is %v", md)
			}
			messages++
		}
		if messages < 120 || messages > 400 {
			t.Errorf("%d messages came within the hour", messages)
		}
	})
}

func TestWaitExecution_afterDisconnect(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		w := b.executeAction(b.store.action("a", doNotCache))
		w.want(repb.ExecutionStage_QUEUED)
		l := b.lease()
		w.leave()
		w.err(codes.Canceled)
		time.Sleep(4 * time.Second)
		b.executing(l, "w")
		synctest.Wait()
		again := b.resume(w.name)
		if _, md := again.next(); md.GetStage() != repb.ExecutionStage_EXECUTING {
			t.Errorf("the resumed stream begins with %v, want the present state", md)
		}
		again.leave()
		again.err(codes.Canceled)
		b.complete(l, exit(7))
		synctest.Wait()
		// It has ended; and for a while it is still known, though nothing is cached.
		for range 2 {
			if got := b.resume(w.name).response().GetResult().GetExitCode(); got != 7 {
				t.Errorf("exit code is %d, want 7", got)
			}
		}
		b.noLease()
	})
}

// A server that restarted, or another one, knows nothing but the name.
func TestWaitExecution_afterRestart(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		d := b.store.action("a")
		start := time.Now()
		w := b.executeAction(d)
		w.want(repb.ExecutionStage_QUEUED)
		l := b.lease()
		b.stop()
		w.err(codes.Unavailable)
		if err := l.Ack(t.Context()); err != nil { // the job is lost with its server
			t.Fatal(err)
		}

		b.start(func(o *api.Options) { o.ID = "another" })
		time.Sleep(time.Second)
		again := b.resume(w.name)
		again.want(repb.ExecutionStage_QUEUED)
		if again.name != w.name {
			t.Errorf("the operation is named %s, was %s", again.name, w.name)
		}
		l = b.lease()
		if l.Job().GetOperation() != w.name || l.Job().GetReplyTo() != "another" || !l.Job().GetQueued().AsTime().Equal(start) {
			t.Errorf("the job is %v", l.Job())
		}
		b.executing(l, "w")
		again.want(repb.ExecutionStage_EXECUTING)
		b.complete(l, exit(0))
		again.response()

		// With a result in the ActionCache, nothing is queued.
		b.stop()
		b.start(nil)
		b.store.cache(d, &repb.ActionResult{StdoutRaw: []byte("cached")})
		if res := b.resume(w.name).response(); !res.GetCachedResult() || string(res.GetResult().GetStdoutRaw()) != "cached" {
			t.Errorf("response is %v", res)
		}
		b.noLease()
	})
}

// With skip_cache_lookup, only a result of the operation itself, or of a later
// one, answers for it.
func TestWaitExecution_skipCacheLookup(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		d := b.store.action("a")
		start := time.Now()
		result := func(queued time.Time) *repb.ActionResult {
			return &repb.ActionResult{ExecutionMetadata: &repb.ExecutedActionMetadata{QueuedTimestamp: timestamppb.New(queued)}}
		}
		w := b.execute(&repb.ExecuteRequest{ActionDigest: d, SkipCacheLookup: true})
		w.want(repb.ExecutionStage_QUEUED)
		b.lease()
		b.stop()
		b.start(nil)
		b.store.cache(d, result(start.Add(-time.Second)))
		time.Sleep(time.Minute)
		again := b.resume(w.name)
		again.want(repb.ExecutionStage_QUEUED)
		l := b.lease() // the first delivery has lapsed
		if !l.Job().GetSkipCacheLookup() {
			t.Error("the job does not say skip_cache_lookup")
		}
		b.complete(l, exit(0))
		again.response()

		b.stop()
		b.start(nil)
		b.store.cache(d, result(start))
		if !b.resume(w.name).response().GetCachedResult() {
			t.Error("the operation's own result did not answer for it")
		}
	})
}

// A merged client's own name finds the execution, while it runs and afterwards.
func TestWaitExecution_merged(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		d := b.store.action("a")
		first, second := b.executeAction(d), b.executeAction(d)
		first.next()
		second.next()
		if first.name == second.name {
			t.Error("two calls have one name")
		}
		second.leave()
		l := b.lease()
		b.executing(l, "w")
		synctest.Wait()
		b.resume(second.name).want(repb.ExecutionStage_EXECUTING)
		b.complete(l, exit(5))
		first.response()
		time.Sleep(time.Second)
		if got := b.resume(second.name).response().GetResult().GetExitCode(); got != 5 {
			t.Errorf("exit code is %d, want 5", got)
		}
		b.noLease()
	})
}

func TestWaitExecution_refuses(t *testing.T) {
	gone := operation.NewName(operation.Name{Action: digest.Of(digest.SHA256, []byte("gone"))}).String()
	failed := operation.NewName(operation.Name{Instance: "actions/failed", Action: digest.Of(digest.SHA256, []byte("gone"))})
	for name, tc := range map[string]struct {
		name string
		code codes.Code
	}{
		"empty":               {"", codes.NotFound},
		"of failed actions":   {failed.String(), codes.NotFound},
		"foreign":             {"operations/8cf2f5a8-cc3b-4b1c-a6c8-7a43d0ee4de6", codes.NotFound},
		"long":                {"operations/v1/" + strings.Repeat("x/", 5000), codes.NotFound},
		"of an action no one": {gone, codes.FailedPrecondition},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, b *bench) {
				b.resume(tc.name).err(tc.code)
			})
		})
	}
}

// Two clients of one execution: one leaves, and the other gets the result.
func TestMerge_oneLeaves(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		d := b.store.action("a")
		first, second := b.executeAction(d), b.executeAction(d)
		first.next()
		second.next()
		first.leave()
		l := b.lease()
		b.executing(l, "w")
		stop := keepLease(t, l)
		time.Sleep(10 * time.Minute) // longer than abandonment takes
		select {
		case <-l.Cancelled():
			t.Error("the job was withdrawn while somebody waited")
		default:
		}
		stop()
		b.complete(l, exit(0))
		second.response()
		if n := b.jobs.published(); n != 1 {
			t.Errorf("%d jobs were published", n)
		}
	})
}

func TestMerge_not(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		d := b.store.action("a", doNotCache)
		first, second := b.executeAction(d), b.executeAction(d)
		b.complete(b.lease(), exit(0))
		b.complete(b.lease(), exit(0))
		first.response()
		second.response()
		// What has ended is not merged with.
		e := b.store.action("b")
		for range 2 {
			w := b.executeAction(e)
			b.complete(b.lease(), exit(1))
			w.response()
		}
	})
}

// When nobody has waited for AbandonAfter, the job is withdrawn, wherever it is.
func TestAbandon(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		w := b.executeAction(b.store.action("a"))
		w.want(repb.ExecutionStage_QUEUED)
		l := b.lease()
		waiting := b.executeAction(b.store.action("b"))
		waiting.want(repb.ExecutionStage_QUEUED)
		stop := keepLease(t, l)
		w.leave()
		waiting.leave()
		time.Sleep(4 * time.Minute)
		select {
		case <-l.Cancelled():
			t.Fatal("withdrawn too early")
		default:
		}
		b.resume(waiting.name).next() // somebody does wait for that one
		time.Sleep(time.Minute)
		synctest.Wait()
		select {
		case <-l.Cancelled():
		default:
			t.Error("the job was not withdrawn")
		}
		stop()
		if err := l.Ack(t.Context()); err != nil {
			t.Fatal(err)
		}
		b.complete(b.lease(), exit(0))
		// The abandoned one can be resumed all the same.
		again := b.resume(w.name)
		again.want(repb.ExecutionStage_QUEUED)
		b.complete(b.lease(), exit(0))
		again.response()
	})
}

// Workers that take the job and fall silent: the client hears of it in the end.
func TestAttempts_usedUp(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		w := b.executeAction(b.store.action("a"))
		for _, worker := range []string{"w1", "w2", "w3"} {
			l := b.lease()
			b.executing(l, worker)
			for w.want(repb.ExecutionStage_EXECUTING).GetPartialExecutionMetadata().GetWorker() != worker {
				t.Log("the one before, to keep the stream alive")
			}
		}
		s := w.response().GetStatus()
		if codes.Code(s.GetCode()) == codes.OK || !strings.HasPrefix(s.GetMessage(), queue.ReasonAttempts) { //nolint:gosec // a status code
			t.Errorf("status is %v", s)
		}
		for _, worker := range []string{"w1", "w2", "w3"} {
			if !strings.Contains(s.GetMessage(), worker) {
				t.Errorf("message %q does not name %s", s.GetMessage(), worker)
			}
		}
	})
}

// The attempt is a fencing number: what a worker says whose lease has lapsed
// changes nothing.
func TestAttempts_lateReport(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		w := b.executeAction(b.store.action("a"))
		old := b.lease()
		b.executing(old, "old")
		w.want(repb.ExecutionStage_EXECUTING)
		l := b.lease() // when the first has lapsed
		w.want(repb.ExecutionStage_QUEUED)
		b.executing(l, "new")
		w.want(repb.ExecutionStage_EXECUTING)
		b.result(old, exit(99))
		b.report(old, &queuepb.Update{Stage: queuepb.Update_EXECUTING, Worker: "old"})
		synctest.Wait()
		b.complete(l, exit(0))
		if got := w.response().GetResult().GetExitCode(); got != 0 {
			t.Errorf("exit code is %d, of the attempt that had lapsed", got)
		}
	})
}

// A client that does not read holds up neither the worker nor another client.
func TestSlowClient(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		d := b.store.action("a")
		slow, quick := b.executeAction(d), b.executeAction(d)
		slow.next()
		quick.next()
		l := b.lease()
		big := make([]byte, 0, 1<<15)
		for i := range 200 { // far more than what flow control lets through unread
			big = append(big[:0], 0x0a) // ExecutedActionMetadata.worker
			big = append(big, 0x80, 0x40)
			big = append(big, strings.Repeat(string(rune('a'+i%26)), 1<<13)...)
			b.report(l, &queuepb.Update{Stage: queuepb.Update_EXECUTING, Worker: "w", PartialMetadata: append([]byte(nil), big...)})
			if md := quick.want(repb.ExecutionStage_EXECUTING); len(md.GetPartialExecutionMetadata().GetWorker()) != 1<<13 {
				t.Fatalf("update %d is %v", i, md)
			}
		}
		b.complete(l, exit(0))
		quick.response()
		// And when it reads at last, it gets to the end.
		slow.response()
	})
}

func TestShutdown(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		queued := b.executeAction(b.store.action("a"))
		queued.next()
		done := b.executeAction(b.store.action("b"))
		done.next()
		b.lease()
		l := b.lease()
		b.server.Shutdown()
		b.server.Shutdown()
		b.complete(l, exit(0)) // while the streams are ending
		done.response()
		queued.err(codes.Unavailable)
		b.executeAction(b.store.action("c")).err(codes.Unavailable)
		b.resume(queued.name).err(codes.Unavailable)
	})
}

// A server that is told to end cuts the streams of what goes on elsewhere: nothing has
// failed, and its operator need not read a line about each.
func TestShutdown_quiet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log syncBuffer
		b := newBench(t, func(o *api.Options) { o.Logger = slog.New(slog.NewTextHandler(&log, nil)) })
		queued := b.executeAction(b.store.action("a"))
		queued.next()
		b.server.Shutdown()
		queued.err(codes.Unavailable)
		b.executeAction(b.store.action("c")).err(codes.Unavailable)
		synctest.Wait()
		if got := log.String(); strings.Contains(got, "fault of the servers") {
			t.Errorf("the log says %s", got)
		}
	})
}

func TestRun_endsWithQueue(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		w := b.executeAction(b.store.action("a"))
		w.next()
		if err := b.jobs.Close(); err != nil {
			t.Fatal(err)
		}
		w.err(codes.Unavailable)
	})
}

// A client's own deadline ends its stream, and nothing else.
func TestClientDeadline(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		d := b.store.action("a")
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		st, err := b.client.Execute(ctx, &repb.ExecuteRequest{ActionDigest: d})
		if err != nil {
			t.Fatal(err)
		}
		w := &waiting{t: t, stream: st}
		w.next()
		l := b.lease()
		stop := keepLease(t, l)
		w.err(codes.DeadlineExceeded)
		again := b.resume(w.name)
		again.next()
		stop()
		b.complete(l, exit(0))
		again.response()
	})
}
