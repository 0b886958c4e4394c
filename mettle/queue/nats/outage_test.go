package nats_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	natsgo "github.com/nats-io/nats.go"

	"github.com/mettle-build/mettle/mettle/queue"
	"github.com/mettle-build/mettle/mettle/queue/nats"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// patience bounds each wait for something that must come.
const patience = 30 * time.Second

func mustLease(t *testing.T, q queue.Consumer, operation string, attempt uint32) queue.Lease {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	l, err := q.Lease(ctx, []string{"p"})
	if err != nil {
		t.Fatalf("lease: %v", err)
	}
	if l.Job().GetOperation() != operation || l.Attempt() != attempt {
		t.Fatalf("leased %s, attempt %d, want %s, attempt %d", l.Job().GetOperation(), l.Attempt(), operation, attempt)
	}
	return l
}

func mustPublish(t *testing.T, q queue.Publisher, names ...string) {
	t.Helper()
	for _, name := range names {
		if err := q.Publish(t.Context(), job(name)); err != nil {
			t.Fatalf("publish %s: %v", name, err)
		}
	}
}

// receive receives the updates for "api" until the test ends.
func receive(t *testing.T, q *nats.Queue) <-chan *queuepb.Update {
	t.Helper()
	ch := make(chan *queuepb.Update, 1024) // more than any test sends
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for ctx.Err() == nil { // as an API server does
			if err := q.ReceiveUpdates(ctx, "api", func(u *queuepb.Update) { ch <- u }); errors.Is(err, queue.ErrClosed) {
				return
			}
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
	})
	return ch
}

// await is the next update of that stage about an operation.
func await(t *testing.T, ch <-chan *queuepb.Update, operation string, stage queuepb.Update_Stage) *queuepb.Update {
	t.Helper()
	timeout := time.After(patience)
	for {
		select {
		case u := <-ch:
			if u.GetOperation() == operation && u.GetStage() == stage {
				return u
			}
		case <-timeout:
			t.Fatalf("no %v of %s came", stage, operation)
		}
	}
}

// awaitEnd is the next end of whichever operation.
func awaitEnd(t *testing.T, ch <-chan *queuepb.Update) *queuepb.Update {
	t.Helper()
	timeout := time.After(patience)
	for {
		select {
		case u := <-ch:
			if u.GetStage() == queuepb.Update_COMPLETED {
				return u
			}
		case <-timeout:
			t.Fatal("no end came")
		}
	}
}

// A broker that is restarted loses neither jobs nor leases nor updates, and those
// who wait for something go on waiting.
func TestQueue_brokerRestarts(t *testing.T) {
	t.Parallel()
	b := newBroker(t, nil)
	quick := func(o *nats.Options) {
		o.Prefix, o.Timeout, o.LeaseTime, o.Heartbeat = "restart", 15*time.Second, 5*time.Second, time.Second
	}
	api, busy, idle := newQueue(t, b, quick), newQueue(t, b, quick), newQueue(t, b, quick)
	updates := receive(t, api)
	mustPublish(t, api, "running", "waiting")
	running := mustLease(t, busy, "running", 1)
	waiting := mustLease(t, idle, "waiting", 1)
	if err := waiting.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	again := mustLease(t, idle, "waiting", 2)
	waits := make(chan queue.Lease)
	go func() {
		defer close(waits)
		if l, err := idle.Lease(t.Context(), []string{"p"}); err == nil {
			waits <- l
		}
	}()

	b.stop()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := api.Publish(ctx, job("early")); err == nil {
		t.Error("published although the broker is away")
	}
	sent := make(chan error)
	go func() { sent <- api.Publish(t.Context(), job("published meanwhile")) }()
	b.start(t)
	if err := <-sent; err != nil {
		t.Errorf("publish across a restart: %v", err)
	}
	for _, held := range []queue.Lease{running, again} {
		if err := held.Extend(t.Context()); err != nil {
			t.Errorf("extend %s after a restart: %v", held.Job().GetOperation(), err)
		}
	}
	l, ok := <-waits
	if !ok || l.Job().GetOperation() != "published meanwhile" {
		t.Fatalf("the consumer that waits got %v", l.Job())
	}
	for _, held := range []queue.Lease{running, again, l} {
		name := held.Job().GetOperation()
		err := busy.SendUpdate(t.Context(), "api", &queuepb.Update{Operation: name, Attempt: held.Attempt(), Stage: queuepb.Update_COMPLETED})
		if err != nil {
			t.Errorf("report on %s: %v", name, err)
		}
		if err := held.Ack(t.Context()); err != nil {
			t.Errorf("ack of %s: %v", name, err)
		}
		await(t, updates, name, queuepb.Update_COMPLETED)
	}
}

// While the broker is away, every call ends within its bound, with an error that
// says that it is worth trying again.
func TestQueue_brokerAway(t *testing.T) {
	t.Parallel()
	b := newBroker(t, nil)
	q := newQueue(t, b, func(o *nats.Options) { o.Timeout = 4 * time.Second })
	mustPublish(t, q, "a")
	l := mustLease(t, q, "a", 1)
	b.stop()
	var calls sync.WaitGroup
	for name, f := range map[string]func(context.Context) error{
		"publish": func(ctx context.Context) error { return q.Publish(ctx, job("b")) },
		"cancel":  func(ctx context.Context) error { return q.Cancel(ctx, "a") },
		"lease": func(ctx context.Context) error {
			_, err := q.Lease(ctx, []string{"p"})
			return err
		},
		"extend": l.Extend, "ack": l.Ack, "release": l.Release, "ready": q.Ready,
		"send": func(ctx context.Context) error {
			return q.SendUpdate(ctx, "api", &queuepb.Update{Operation: "a", Attempt: 1, Stage: queuepb.Update_COMPLETED})
		},
		"receive": func(ctx context.Context) error { return q.ReceiveUpdates(ctx, "x", func(*queuepb.Update) {}) },
	} {
		calls.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			if err := f(ctx); !errors.Is(err, queue.ErrUnavailable) {
				t.Errorf("%s: %v, want %v", name, err, queue.ErrUnavailable)
			}
		})
	}
	calls.Wait()
	b.start(t)
	// The job was neither lost nor ended by the calls that failed.
	deadline := time.Now().Add(patience)
	for l.Extend(t.Context()) != nil && time.Now().Before(deadline) {
		time.Sleep(10 * time.Millisecond) // until it is connected again; each call waits for a while itself
	}
	if err := l.Ack(t.Context()); err != nil {
		t.Errorf("ack after the broker is back: %v", err)
	}
}

func TestNew_noBroker(t *testing.T) {
	t.Parallel()
	o := nats.Options{Servers: []string{"nats://127.0.0.1:1"}, Timeout: 200 * time.Millisecond}
	if _, err := nats.New(t.Context(), o); !errors.Is(err, queue.ErrUnavailable) {
		t.Errorf("New without a broker: %v, want %v", err, queue.ErrUnavailable)
	}
}

// Where a pool has no worker left, the API server itself finds out that one has
// died, and in the end that the attempts are used up.
func TestQueue_lastWorkerDies(t *testing.T) {
	t.Parallel()
	b := newBroker(t, nil)
	same := func(o *nats.Options) { o.Prefix, o.MaxAttempts = "last", 2 }
	api := newQueue(t, b, same)
	updates := receive(t, api)
	nc, err := natsgo.Connect(b.url())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	notes, err := nc.SubscribeSync("last.notes.api")
	if err != nil {
		t.Fatal(err)
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	mustPublish(t, api, "a")
	for attempt := uint32(1); attempt <= 2; attempt++ {
		worker := newQueue(t, b, func(o *nats.Options) {
			same(o)
			o.Name = fmt.Sprint("worker-", attempt)
		})
		mustLease(t, worker, "a", attempt)
		if attempt == 1 {
			// By and by the API server is told that it is leased,
			if _, err := notes.NextMsg(patience); err != nil {
				t.Fatal(err)
			}
		} else {
			// unless the worker itself has reported.
			u := &queuepb.Update{Operation: "a", Attempt: attempt, Stage: queuepb.Update_EXECUTING}
			if err := worker.SendUpdate(t.Context(), "api", u); err != nil {
				t.Fatal(err)
			}
		}
		if err := worker.Close(); err != nil {
			t.Fatal(err)
		}
		stage := queuepb.Update_REQUEUED
		if attempt == 2 {
			stage = queuepb.Update_COMPLETED
		}
		if u := await(t, updates, "a", stage); u.GetAttempt() != attempt {
			t.Errorf("%v is of attempt %d, want %d", stage, u.GetAttempt(), attempt)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*leaseTime)
	defer cancel()
	if l, err := api.Lease(ctx, []string{"p"}); err == nil {
		t.Errorf("leased %s, attempt %d, although its attempts are used up", l.Job().GetOperation(), l.Attempt())
	}
}
