package api_test

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"cloud.google.com/go/longrunning/autogen/longrunningpb"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"

	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/mettle/api"
	"github.com/mettle-build/mettle/mettle/operation"
	"github.com/mettle-build/mettle/mettle/queue"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// cancel calls CancelOperation, which is to succeed.
func (b *bench) cancel(name string) {
	b.t.Helper()
	if _, err := b.ops.CancelOperation(b.t.Context(), &longrunningpb.CancelOperationRequest{Name: name}); err != nil {
		b.t.Fatalf("cancel %s: %v", name, err)
	}
}

// cancelled checks that the stream ends as one that was cancelled.
func (w *waiting) cancelled() {
	w.t.Helper()
	if got := w.response().GetStatus().GetCode(); codes.Code(got) != codes.Canceled { //nolint:gosec // a status code
		w.t.Errorf("it ended with code %v, want CANCELLED", got)
	}
}

// withdrawn checks that the worker is told, and has it report so, as workers do.
func (b *bench) withdrawn(l queue.Lease) {
	b.t.Helper()
	synctest.Wait()
	select {
	case <-l.Cancelled():
		b.result(l, &repb.ExecuteResponse{Status: &spb.Status{Code: int32(codes.Canceled)}})
		if err := l.Ack(b.t.Context()); err != nil && !errors.Is(err, queue.ErrLeaseLost) { // published again in the meantime
			b.t.Error(err)
		}
	default:
		b.t.Error("the worker was not told")
	}
}

// kept checks that the worker is not told.
func (b *bench) kept(l queue.Lease) {
	b.t.Helper()
	time.Sleep(5 * time.Second)
	synctest.Wait()
	select {
	case <-l.Cancelled():
		b.t.Error("the job was withdrawn while somebody waited")
	default:
	}
}

func TestCancelOperation(t *testing.T) {
	for label, tc := range map[string]struct{ leased, elsewhere bool }{
		"queued":                    {},
		"executing":                 {leased: true},
		"queued, by another server": {elsewhere: true},
		"executing, by another":     {leased: true, elsewhere: true},
	} {
		t.Run(label, func(t *testing.T) {
			inBubble(t, func(t *testing.T, b *bench) {
				asked := b
				if tc.elsewhere {
					asked = b.another("another")
				}
				w := b.executeAction(b.store.action("a"))
				w.want(repb.ExecutionStage_QUEUED)
				var l queue.Lease
				if tc.leased {
					l = b.lease()
					b.executing(l, "w")
					w.want(repb.ExecutionStage_EXECUTING)
				}
				start := time.Now()
				asked.cancel(w.name)
				w.cancelled()
				if took := time.Since(start); took > 100*time.Millisecond {
					t.Errorf("it took %v", took)
				}
				if tc.leased {
					b.withdrawn(l)
				}
				synctest.Wait()
				b.noLease()
				// Again, and whatever is asked by that name, on both.
				asked.cancel(w.name)
				for _, s := range []*bench{b, asked} {
					s.resume(w.name).cancelled()
					if op := s.get(w.name); !op.GetDone() {
						t.Errorf("GetOperation: %v", op)
					}
				}
				b.noLease()
				// Another client's wish to have the same is not touched.
				again := b.executeAction(b.store.action("a"))
				again.want(repb.ExecutionStage_QUEUED)
				b.complete(b.lease(), exit(0))
				again.response()
			})
		})
	}
}

// Calls that are merged have names of their own, and end by those alone.
func TestCancelOperation_merged(t *testing.T) {
	for label, elsewhere := range map[string]bool{"here": false, "by another server": true} {
		t.Run(label, func(t *testing.T) {
			inBubble(t, func(t *testing.T, b *bench) {
				asked := b
				if elsewhere {
					asked = b.another("another")
				}
				d := b.store.action("a")
				first, second, third := b.executeAction(d), b.executeAction(d), b.executeAction(d)
				first.next()
				second.next()
				third.next()
				l := b.lease()
				b.executing(l, "w")
				stop := keepLease(t, l)
				asked.cancel(first.name) // whose name the job has
				first.cancelled()
				b.kept(l)
				asked.cancel(second.name)
				second.cancelled()
				b.kept(l)
				third.want(repb.ExecutionStage_EXECUTING)
				stop()
				asked.cancel(third.name)
				third.cancelled()
				b.withdrawn(l)
				b.noLease()
			})
		})
	}
}

// What has ended stays as it was.
func TestCancelOperation_ended(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		other := b.another("another")
		d := b.store.action("a")
		w := b.executeAction(d)
		w.next()
		merged := b.executeAction(d)
		merged.next()
		b.complete(b.lease(), exit(7))
		w.response()
		merged.response()
		for _, name := range []string{w.name, merged.name} {
			b.cancel(name)
			if got := b.resume(name).response().GetResult().GetExitCode(); got != 7 {
				t.Errorf("exit code is %d, want 7", got)
			}
		}
		// Where another server knows.
		other.cancel(w.name)
		synctest.Wait()
		other.wantStage(w.name, repb.ExecutionStage_UNKNOWN)
		// Where only the ActionCache knows.
		b.store.cache(d, &repb.ActionResult{})
		other.cancel(w.name)
		if !other.resume(w.name).response().GetCachedResult() {
			t.Error("the cached result is no answer any more")
		}
	})
}

// A name that no server holds: its job is withdrawn from the broker.
func TestCancelOperation_afterRestart(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		w := b.executeAction(b.store.action("a"))
		w.next()
		l := b.lease()
		b.stop()
		b.start(func(o *api.Options) { o.ID = "new" })
		synctest.Wait()
		b.cancel(w.name)
		b.withdrawn(l)
		b.resume(w.name).cancelled()
		b.noLease()
	})
}

// A client that moved to another server: the job is that one's from then on.
func TestTakeover(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		other := b.another("another")
		w := b.executeAction(b.store.action("a"))
		w.next()
		l := b.lease()
		b.executing(l, "w")
		stop := keepLease(t, l)
		w.leave()
		moved := other.resume(w.name)
		moved.want(repb.ExecutionStage_EXECUTING)
		time.Sleep(10 * time.Minute) // longer than abandonment takes
		b.kept(l)
		stop()
		other.cancel(w.name)
		moved.cancelled()
		b.withdrawn(l)
	})
}

// A takeover that was not heard of is said again.
func TestTakeover_lost(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		deaf := &bench{t: t, store: b.store, jobs: b.jobs}
		t.Cleanup(func() { deaf.stop() })
		ears := &plugged{jobs: b.jobs}
		deaf.start(func(o *api.Options) { o.ID, o.Notices = "deaf", ears })
		w := deaf.executeAction(b.store.action("a"))
		w.next()
		l := b.lease()
		deaf.executing(l, "w")
		stop := keepLease(t, l)
		ears.plug(true)
		w.leave()
		moved := b.resume(w.name)
		moved.want(repb.ExecutionStage_EXECUTING)
		time.Sleep(time.Second)
		ears.plug(false)
		time.Sleep(10 * time.Minute) // longer than abandonment takes
		b.kept(l)
		stop()
		b.complete(l, exit(4))
		if got := moved.response().GetResult().GetExitCode(); got != 4 {
			t.Errorf("exit code is %d, want 4", got)
		}
	})
}

// plugged is a queue whose notices are not heard while it is plugged.
type plugged struct {
	*jobs
	deaf atomic.Bool
}

func (p *plugged) plug(deaf bool) { p.deaf.Store(deaf) }

func (p *plugged) ListenNotices(ctx context.Context, id string, handle func(*queuepb.Notice)) error {
	return p.jobs.ListenNotices(ctx, id, func(n *queuepb.Notice) {
		if !p.deaf.Load() {
			handle(n)
		}
	})
}

// A job that is withdrawn though clients of another server wait for it, such as
// where a takeover was not heard of, is published again.
func TestWithdrawal_ofAnothersJob(t *testing.T) {
	for label, leased := range map[string]bool{"waiting": false, "leased": true} {
		t.Run(label, func(t *testing.T) {
			inBubble(t, func(t *testing.T, b *bench) {
				w := b.executeAction(b.store.action("a", doNotCache))
				w.next()
				b.stop()
				w.err(codes.Unavailable)
				b.start(func(o *api.Options) { o.ID = "one" })
				one := b.resume(w.name)
				one.want(repb.ExecutionStage_QUEUED)
				other := b.another("two")
				two := other.resume(w.name)
				two.want(repb.ExecutionStage_QUEUED)
				var l queue.Lease
				if leased {
					l = b.lease()
					b.executing(l, "w")
					two.want(repb.ExecutionStage_EXECUTING)
				}
				if err := b.jobs.Cancel(t.Context(), w.name); err != nil {
					t.Fatal(err)
				}
				if leased {
					b.withdrawn(l)
				} else if err := b.jobs.Notify(t.Context(), withdrawal(w.name, "someone")); err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				l = b.lease()
				b.executing(l, "v")
				b.complete(l, exit(3))
				for _, c := range []*waiting{one, two} {
					if got := c.response().GetResult().GetExitCode(); got != 3 {
						t.Errorf("exit code is %d, want 3", got)
					}
				}
				synctest.Wait()
				b.noLease()
			})
		})
	}
}

// A client that cancels what the storage holds up hears of it all the same.
func TestCancelOperation_beforeItIsQueued(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		b.store.delay = time.Hour
		w := b.executeAction(b.store.action("a"))
		w.next()
		ctx, stop := context.WithTimeout(t.Context(), time.Second)
		defer stop()
		_, err := b.ops.CancelOperation(ctx, &longrunningpb.CancelOperationRequest{Name: w.name})
		if err != nil {
			t.Log("the storage holds up the question whether it has ended:", err)
		}
		w.cancelled()
		b.noLease()
	})
}

func TestCancelOperation_refuses(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		for label, tc := range map[string]struct {
			name string
			code codes.Code
		}{
			"absent":  {"", codes.InvalidArgument},
			"foreign": {"operations/8cf2f5a8", codes.NotFound},
		} {
			_, cancelErr := b.ops.CancelOperation(t.Context(), &longrunningpb.CancelOperationRequest{Name: tc.name})
			_, getErr := b.ops.GetOperation(t.Context(), &longrunningpb.GetOperationRequest{Name: tc.name})
			_, waitErr := b.ops.WaitOperation(t.Context(), &longrunningpb.WaitOperationRequest{Name: tc.name})
			for _, err := range []error{cancelErr, getErr, waitErr} {
				wantCode(t, label, err, tc.code)
			}
		}
		_, err := b.ops.DeleteOperation(t.Context(), &longrunningpb.DeleteOperationRequest{Name: "operations/x"})
		wantCode(t, "delete", err, codes.Unimplemented)
		// A broker that is away: the client may try again.
		b.jobs.fail(queue.ErrUnavailable)
		n := operation.NewName(operation.Name{Action: digest.Of(digest.SHA256, []byte("x"))})
		_, err = b.ops.CancelOperation(t.Context(), &longrunningpb.CancelOperationRequest{Name: n.String()})
		wantCode(t, "broker away", err, codes.Unavailable)
	})
}
