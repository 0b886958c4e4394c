package nats_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/nats-io/nats-server/v2/server"
	natsgo "github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/protobuf/proto"

	"github.com/mettle-build/mettle/mettle/queue"
	"github.com/mettle-build/mettle/mettle/queue/nats"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// fleet opens several queues on one prefix.
func fleet(t *testing.T, b *broker, n int) []*nats.Queue {
	t.Helper()
	prefix := fmt.Sprint("fleet", queues.Add(1))
	qs := make([]*nats.Queue, n)
	for i := range qs {
		qs[i] = newQueue(t, b, func(o *nats.Options) { o.Prefix, o.Name = prefix, fmt.Sprint("process-", i) })
	}
	return qs
}

// awaitWaiting waits until so many workers wait for a job of the pool "p".
func awaitWaiting(t *testing.T, b *broker, prefix string, n int) {
	t.Helper()
	nc, err := natsgo.Connect(b.url())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for waiting := -1; waiting != n; {
		c, err := js.Consumer(ctx, prefix+"_jobs", "pool_p_1")
		if err != nil {
			t.Fatal(err)
		}
		waiting = c.CachedInfo().NumWaiting
	}
}

func closed(ch <-chan struct{}) bool {
	select {
	case <-ch:
		return true
	default:
		return false
	}
}

// An API server cancels what another one published and a third process runs.
func TestQueue_Cancel_fromAnotherProcess(t *testing.T) {
	t.Parallel()
	qs := fleet(t, newBroker(t, nil), 3)
	mustPublish(t, qs[0], "waits", "runs")
	mustLease(t, qs[2], "waits", 1)
	runs := mustLease(t, qs[2], "runs", 1)
	if err := qs[1].Cancel(t.Context(), "runs"); err != nil {
		t.Fatal(err)
	}
	if !closed(runs.Cancelled()) {
		t.Error("the worker has not been told by the time that Cancel returns")
	}
}

// A worker that was cut off when its job was cancelled learns of it when it next
// extends, and its job goes to nobody.
func TestQueue_Cancel_whileCutOff(t *testing.T) {
	t.Parallel()
	b := newBroker(t, nil)
	proxy := newProxy(t, b.url())
	prefix := fmt.Sprint("cut", queues.Add(1))
	api := newQueue(t, b, func(o *nats.Options) { o.Prefix, o.LeaseTime = prefix, 10*time.Second })
	worker := newQueue(t, b, func(o *nats.Options) {
		o.Prefix, o.LeaseTime, o.Servers = prefix, 10*time.Second, []string{proxy.url()}
	})
	mustPublish(t, api, "a")
	l := mustLease(t, worker, "a", 1)
	proxy.cut()
	if err := api.Cancel(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	if closed(l.Cancelled()) {
		t.Error("the worker knows, although it is cut off")
	}
	proxy.restore()
	if err := l.Extend(t.Context()); err != nil {
		t.Errorf("extend while the worker winds up: %v", err)
	}
	if !closed(l.Cancelled()) {
		t.Error("the worker does not know after it has extended its lease")
	}
	if err := l.Release(t.Context()); err != nil {
		t.Error(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), leaseTime/2)
	defer cancel()
	if l, err := api.Lease(ctx, []string{"p"}); err == nil {
		t.Errorf("leased %s, which is cancelled", l.Job().GetOperation())
	}
}

// A worker that was cut off for longer than the lease time finds its lease lost,
// and the one after it is not disturbed.
func TestQueue_cutOffWorkerLosesItsLease(t *testing.T) {
	t.Parallel()
	b := newBroker(t, nil)
	proxy := newProxy(t, b.url())
	prefix := fmt.Sprint("cut", queues.Add(1))
	open := func(name, server string) *nats.Queue {
		return newQueue(t, b, func(o *nats.Options) { o.Prefix, o.Name, o.Servers = prefix, name, []string{server} })
	}
	api, slow, other := open("api", b.url()), open("slow", proxy.url()), open("other", b.url())
	updates := receive(t, api)
	mustPublish(t, api, "a")
	lost := mustLease(t, slow, "a", 1)
	proxy.cut()
	next := mustLease(t, other, "a", 2)
	if u := await(t, updates, "a", queuepb.Update_REQUEUED); u.GetWorker() != "slow" || u.GetAttempt() != 1 {
		t.Errorf("the update is %v, want that slow has lost attempt 1", u)
	}
	proxy.restore()
	for name, f := range map[string]func(context.Context) error{"extend": lost.Extend, "ack": lost.Ack, "release": lost.Release} {
		if err := f(t.Context()); !errors.Is(err, queue.ErrLeaseLost) {
			t.Errorf("%s: %v, want %v", name, err, queue.ErrLeaseLost)
		}
	}
	if err := next.Ack(t.Context()); err != nil {
		t.Errorf("ack of the second attempt: %v", err)
	}
}

// The same operation in another band is the same job while a worker has it.
func TestQueue_Publish_otherPriority(t *testing.T) {
	t.Parallel()
	qs := fleet(t, newBroker(t, nil), 2)
	mustPublish(t, qs[0], "a")
	l := mustLease(t, qs[1], "a", 1)
	again := job("a")
	again.Priority, again.ReplyTo = -1, "other-api"
	if err := qs[0].Publish(t.Context(), again); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), leaseTime/2)
	defer cancel()
	if l, err := qs[0].Lease(ctx, []string{"p"}); err == nil {
		t.Errorf("leased %s, attempt %d, which another has", l.Job().GetOperation(), l.Attempt())
	}
	if err := l.Ack(t.Context()); err != nil {
		t.Error(err)
	}
}

// A waiting job that is published again with more urgency is run with that, once,
// and the API server that asked first is not left to wait.
func TestQueue_Publish_moreUrgent(t *testing.T) {
	t.Parallel()
	qs := fleet(t, newBroker(t, nil), 3)
	updates := receive(t, qs[0])
	late, other, again := job("a"), job("b"), job("a")
	late.Priority, again.Priority, again.ReplyTo = 1, -1, "other-api"
	for i, j := range []*queuepb.Job{late, other, again} {
		if err := qs[i%2].Publish(t.Context(), j); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"a", "b"} {
		if err := mustLease(t, qs[2], name, 1).Ack(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), leaseTime/2)
	defer cancel()
	if l, err := qs[2].Lease(ctx, []string{"p"}); err == nil {
		t.Errorf("leased %s, attempt %d, a second time", l.Job().GetOperation(), l.Attempt())
	}
	awaitUnavailable(t, updates, "a")
}

// A job that a worker rejects goes to another one, even if the first asks before.
func TestLease_Reject_othersFirst(t *testing.T) {
	t.Parallel()
	b := newBroker(t, nil)
	const prefix = "reject"
	qs := make([]*nats.Queue, 3)
	for i := range qs {
		// No lease lapses while it is being arranged who waits.
		qs[i] = newQueue(t, b, func(o *nats.Options) { o.Prefix, o.LeaseTime = prefix, 2*patience })
	}
	mustPublish(t, qs[0], "a")
	l := mustLease(t, qs[1], "a", 1)
	got := make(chan int, 2)
	var workers sync.WaitGroup
	ctx, cancel := context.WithCancel(t.Context())
	defer workers.Wait()
	defer cancel()
	for i, q := range qs[1:] {
		workers.Go(func() {
			if l, err := q.Lease(ctx, []string{"p"}); err == nil {
				got <- i
				_ = l.Ack(ctx) // there is no more to do
			}
		})
		awaitWaiting(t, b, prefix, i+1)
	}
	if err := l.Reject(t.Context(), "no disk"); err != nil {
		t.Fatal(err)
	}
	if i := <-got; i != 1 {
		t.Error("the worker that has rejected the job got it again, although another one waits")
	}
}

// A response that the broker can't pass on is made smaller, or said to be too large.
func TestQueue_SendUpdate_tooLarge(t *testing.T) {
	t.Parallel()
	q := newQueue(t, newBroker(t, func(o *server.Options) { o.MaxPayload = 64 << 10 }), nil)
	mustPublish(t, q, "a") // from here on updates are kept
	updates := receive(t, q)
	big := bytes.Repeat([]byte("x"), 100<<10)
	for _, tc := range []struct {
		name   string
		result *repb.ActionResult
		want   string // part of the status's message
	}{
		{"contents that are in the CAS too", &repb.ActionResult{ExitCode: 7, StdoutRaw: big, StdoutDigest: &repb.Digest{Hash: "h"}}, ""},
		{"contents that are not", &repb.ActionResult{ExitCode: 7, StdoutRaw: big}, "more than"},
	} {
		data, err := proto.Marshal(&repb.ExecuteResponse{Result: tc.result})
		if err != nil {
			t.Fatal(err)
		}
		u := &queuepb.Update{Operation: "a", Attempt: 1, Stage: queuepb.Update_COMPLETED, ExecuteResponse: data}
		if err := q.SendUpdate(t.Context(), "api", u); err != nil {
			t.Fatalf("%s: %v", tc.name, err)
		}
		var got repb.ExecuteResponse
		if err := proto.Unmarshal(await(t, updates, "a", queuepb.Update_COMPLETED).GetExecuteResponse(), &got); err != nil {
			t.Fatal(err)
		}
		msg := got.GetStatus().GetMessage()
		if tc.want == "" && (msg != "" || got.GetResult().GetExitCode() != 7) || !strings.Contains(msg, tc.want) {
			t.Errorf("%s: got %v", tc.name, &got)
		}
	}
}

// Setup may be run again, and changes what is there.
func TestSetup(t *testing.T) {
	t.Parallel()
	b := newBroker(t, nil)
	o := nats.Options{Servers: []string{b.url()}, Prefix: "setup", MustExist: true, Timeout: patience}
	if _, err := nats.New(t.Context(), o); err == nil || !strings.Contains(err.Error(), "mettle setup") {
		t.Errorf("New where there is nothing: %v, want that it says what to run", err)
	}
	for _, max := range []int{100, 200} {
		o.MaxJobs = max
		if err := nats.Setup(t.Context(), o, "p", "other"); err != nil {
			t.Fatal(err)
		}
	}
	q, err := nats.New(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	if err := q.Ready(t.Context()); err != nil {
		t.Errorf("ready: %v", err)
	}
}

// Setup by somebody who may not names the right.
func TestSetup_lacksRights(t *testing.T) {
	t.Parallel()
	b := newBroker(t, func(o *server.Options) {
		o.Users = []*server.User{{Username: "u", Password: "p", Permissions: &server.Permissions{
			Publish: &server.SubjectPermission{Deny: []string{"$JS.API.STREAM.CREATE.>"}},
		}}}
	})
	o := nats.Options{Servers: []string{b.url()}, User: "u", Password: "p", Timeout: time.Second}
	err := nats.Setup(t.Context(), o)
	if err == nil || !strings.Contains(err.Error(), "$JS.API.STREAM.CREATE.mettle_jobs") || !strings.Contains(strings.ToLower(err.Error()), "permissions violation") {
		t.Errorf("setup without rights: %v, want that it names the right", err)
	}
	o.Password = "wrong"
	if err := nats.Setup(t.Context(), o); err == nil || !strings.Contains(strings.ToLower(err.Error()), "authorization") {
		t.Errorf("setup with a wrong password: %v", err)
	}
}

func TestQueue_Close(t *testing.T) {
	t.Parallel()
	b := newBroker(t, nil)
	q := newQueue(t, b, nil)
	mustPublish(t, q, "a")
	held := mustLease(t, q, "a", 1)
	ended := make(chan error, 2)
	go func() {
		_, err := q.Lease(t.Context(), []string{"p"})
		ended <- err
	}()
	go func() { ended <- q.ReceiveUpdates(t.Context(), "api", func(*queuepb.Update) {}) }()
	for range 2 {
		if err := q.Close(); err != nil {
			t.Fatal(err)
		}
	}
	errs := []error{<-ended, <-ended, q.Publish(t.Context(), job("b")), q.Cancel(t.Context(), "a"), held.Ack(t.Context()), held.Extend(t.Context())}
	_, err := q.Lease(t.Context(), []string{"p"})
	errs = append(errs, err, q.ReceiveUpdates(t.Context(), "api", func(*queuepb.Update) {}), q.Ready(t.Context()))
	for i, err := range errs {
		if !errors.Is(err, queue.ErrClosed) {
			t.Errorf("call %d: %v, want %v", i, err, queue.ErrClosed)
		}
	}
}

func TestQueue_ReceiveUpdates_oneReceiver(t *testing.T) {
	t.Parallel()
	q := newQueue(t, newBroker(t, nil), nil)
	mustPublish(t, q, "a")
	updates := receive(t, q)
	err := q.SendUpdate(t.Context(), "api", &queuepb.Update{Operation: "a", Attempt: 1, Stage: queuepb.Update_EXECUTING})
	if err != nil {
		t.Fatal(err)
	}
	await(t, updates, "a", queuepb.Update_EXECUTING) // it receives
	if err := q.ReceiveUpdates(t.Context(), "api", func(*queuepb.Update) {}); err == nil {
		t.Error("a second receiver was let in")
	}
}
