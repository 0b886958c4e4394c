package mem_test

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/mettle-build/mettle/mettle/queue"
	"github.com/mettle-build/mettle/mettle/queue/mem"
	"github.com/mettle-build/mettle/mettle/queue/queuetest"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func newQueue(tb testing.TB, o mem.Options) *mem.Queue {
	tb.Helper()
	q, err := mem.New(o)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := q.Close(); err != nil {
			tb.Error(err)
		}
	})
	return q
}

func job(name string) *queuepb.Job {
	return &queuepb.Job{Operation: name, ReplyTo: "api", Pool: "p"}
}

func TestSuite(t *testing.T) {
	queuetest.Run(t, queuetest.Options{
		New:    func(t *testing.T) queuetest.Queue { return newQueue(t, mem.Options{MaxJobs: 1000}) },
		Around: synctest.Test,
		Features: queuetest.Features{
			LeaseTime: 30 * time.Second, MaxAttempts: 3, Order: true, SharedDuplicates: true, Raises: true, MaxJobs: 1000,
			Patience: 10 * time.Minute,
		},
	})
}

func TestNew_refusesNegativeLimits(t *testing.T) {
	for _, o := range []mem.Options{{LeaseTime: -1}, {MaxAttempts: -1}, {MaxJobs: -1}, {MaxBytes: -1}, {MaxUpdates: -1}} {
		if q, err := mem.New(o); err == nil {
			q.Close()
			t.Errorf("New(%+v) succeeded", o)
		}
	}
}

func TestQueue_Publish_boundsBytes(t *testing.T) {
	q := newQueue(t, mem.Options{MaxBytes: 100_000})
	big := job("big")
	big.Command = make([]byte, 90_000)
	if err := q.Publish(t.Context(), big); err != nil {
		t.Fatal(err)
	}
	second := job("second")
	second.Action = make([]byte, 20_000)
	if err := q.Publish(t.Context(), second); !errors.Is(err, queue.ErrFull) {
		t.Fatalf("publish past MaxBytes: %v, want %v", err, queue.ErrFull)
	}
	if err := q.Cancel(t.Context(), "big"); err != nil {
		t.Fatal(err)
	}
	if err := q.Publish(t.Context(), second); err != nil {
		t.Errorf("publish after the big job is gone: %v", err)
	}
}

// A lease that was given to a consumer whose context ends at the same moment
// has not been delivered: nobody else waits for it to lapse.
func TestQueue_Lease_cancelledAtHandOff(t *testing.T) {
	for i := range 200 {
		synctest.Test(t, func(t *testing.T) {
			q := newQueue(t, mem.Options{})
			got := make(chan queue.Lease, 1)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			go func() {
				l, _ := q.Lease(ctx, []string{"p"})
				got <- l
			}()
			synctest.Wait()
			go cancel()
			if err := q.Publish(t.Context(), job("a")); err != nil {
				t.Fatal(err)
			}
			want := uint32(1)
			if l := <-got; l != nil {
				want = 2
				if err := l.Release(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			start := time.Now()
			l, err := q.Lease(t.Context(), []string{"p"})
			if err != nil {
				t.Fatal(err)
			}
			if d := time.Since(start); d > 0 {
				t.Fatalf("run %d: the job came after %v", i, d)
			}
			if l.Attempt() != want {
				t.Fatalf("run %d: attempt is %d, want %d", i, l.Attempt(), want)
			}
			if err := l.Ack(t.Context()); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func TestQueue_SendUpdate_fullMailbox(t *testing.T) {
	q := newQueue(t, mem.Options{MaxUpdates: 2})
	if err := q.Publish(t.Context(), job("a")); err != nil {
		t.Fatal(err)
	}
	send := func(name string, stage queuepb.Update_Stage) error {
		return q.SendUpdate(t.Context(), "api", &queuepb.Update{Operation: name, Attempt: 1, Stage: stage})
	}
	for _, name := range []string{"a", "b", "c", "d"} {
		if err := send(name, queuepb.Update_EXECUTING); err != nil {
			t.Errorf("progress of %s: %v, want it dropped where there is no room", name, err)
		}
	}
	if err := send("c", queuepb.Update_COMPLETED); !errors.Is(err, queue.ErrUnavailable) {
		t.Errorf("result into a full mailbox: %v, want %v", err, queue.ErrUnavailable)
	}
	if err := send("a", queuepb.Update_COMPLETED); err != nil {
		t.Errorf("result that replaces a waiting update: %v", err)
	}
}

// An older attempt's report never replaces one of a newer attempt, and nothing
// replaces a result, while they wait to be fetched.
func TestQueue_SendUpdate_coalesces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newQueue(t, mem.Options{})
		if err := q.Publish(t.Context(), job("x")); err != nil {
			t.Fatal(err)
		}
		for _, u := range []*queuepb.Update{
			{Operation: "old", Attempt: 2, Stage: queuepb.Update_EXECUTING},
			{Operation: "old", Attempt: 1, Stage: queuepb.Update_COMPLETED},
			{Operation: "final", Attempt: 1, Stage: queuepb.Update_COMPLETED},
			{Operation: "final", Attempt: 2, Stage: queuepb.Update_EXECUTING},
			{Operation: "newer", Attempt: 1, Stage: queuepb.Update_EXECUTING},
			{Operation: "newer", Attempt: 1, Stage: queuepb.Update_COMPLETED},
		} {
			if err := q.SendUpdate(t.Context(), "api", u); err != nil {
				t.Fatal(err)
			}
		}
		var got []string
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go func() {
			synctest.Wait()
			cancel()
		}()
		err := q.ReceiveUpdates(ctx, "api", func(u *queuepb.Update) {
			got = append(got, fmt.Sprintf("%s %d %s", u.GetOperation(), u.GetAttempt(), u.GetStage()))
		})
		if err != nil {
			t.Fatal(err)
		}
		if g, want := strings.Join(got, ", "), "old 2 EXECUTING, final 1 COMPLETED, newer 1 COMPLETED"; g != want {
			t.Errorf("got %s, want %s", g, want)
		}
	})
}

func TestQueue_ReceiveUpdates_oneReceiver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newQueue(t, mem.Options{})
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		ended := make(chan error)
		go func() { ended <- q.ReceiveUpdates(ctx, "api", func(*queuepb.Update) {}) }()
		synctest.Wait()
		if err := q.ReceiveUpdates(t.Context(), "api", func(*queuepb.Update) {}); err == nil {
			t.Error("a second receiver was let in")
		}
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

func TestQueue_Close(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newQueue(t, mem.Options{})
		if err := q.Publish(t.Context(), job("a")); err != nil {
			t.Fatal(err)
		}
		held, err := q.Lease(t.Context(), []string{"p"})
		if err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 2)
		go func() {
			_, err := q.Lease(t.Context(), []string{"p"})
			ended <- err
		}()
		go func() { ended <- q.ReceiveUpdates(t.Context(), "api", func(*queuepb.Update) {}) }()
		synctest.Wait()
		for range 2 {
			if err := q.Close(); err != nil {
				t.Fatal(err)
			}
		}
		errs := []error{<-ended, <-ended, q.Publish(t.Context(), job("b")), q.Cancel(t.Context(), "a"), held.Ack(t.Context())}
		errs = append(errs, q.SendUpdate(t.Context(), "api", &queuepb.Update{Operation: "a", Attempt: 1}))
		_, err = q.Lease(t.Context(), []string{"p"})
		errs = append(errs, err, q.ReceiveUpdates(t.Context(), "api", func(*queuepb.Update) {}))
		for i, err := range errs {
			if !errors.Is(err, queue.ErrClosed) {
				t.Errorf("call %d: %v, want %v", i, err, queue.ErrClosed)
			}
		}
	})
}

// 200,000 queued jobs with a kilobyte of Action and Command each stay far under
// a gibibyte.
func TestQueue_memoryOfQueuedJobs(t *testing.T) {
	if testing.Short() {
		t.Skip("takes 400 MB")
	}
	const n = 200_000
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	q := newQueue(t, mem.Options{})
	for i := range n {
		j := job(fmt.Sprintf("operations/%064d/%d", i, i))
		j.Action, j.Command = make([]byte, 150), make([]byte, 850)
		j.Priority = int32(i % 7) //nolint:gosec // small
		if err := q.Publish(t.Context(), j); err != nil {
			t.Fatal(err)
		}
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	each := int64(after.HeapAlloc-before.HeapAlloc) / n //nolint:gosec // the heap has grown
	t.Logf("%d bytes a queued job", each)
	if waiting, leased := q.Len(); waiting != n || leased != 0 {
		t.Errorf("Len is %d waiting, %d leased", waiting, leased)
	}
	if each > 1<<30/n {
		t.Errorf("%d bytes a queued job, want under %d", each, 1<<30/n)
	}
	runtime.KeepAlive(q)
}

func BenchmarkQueue(b *testing.B) {
	queuetest.Bench(b, func(b *testing.B) queuetest.Queue { return newQueue(b, mem.Options{}) })
}

// A job waits where it was last published for: the pool of before may have gone,
// and the API server that asks now has heard of another.
func TestPublish_inAnotherPool(t *testing.T) {
	for label, leased := range map[string]bool{"while it waits": false, "while it is leased": true} {
		t.Run(label, func(t *testing.T) {
			q := newQueue(t, mem.Options{})
			publish(t, q, job("a"))
			var first queue.Lease
			if leased {
				first = lease(t, q)
			}
			again := job("a")
			again.Pool, again.ReplyTo = "other", "another"
			publish(t, q, again)
			if leased {
				if err := first.Release(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			l, err := q.Lease(ctx, []string{"other"})
			if err != nil {
				t.Fatal(err)
			}
			ack(t, l)
			if waiting, leased := q.Len(); waiting+leased != 0 {
				t.Errorf("%d jobs wait and %d are leased, want none", waiting, leased)
			}
		})
	}
}
