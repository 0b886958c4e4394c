package pubsub_test

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	pb "cloud.google.com/go/pubsub/v2/apiv1/pubsubpb"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/mettle-build/mettle/mettle/queue"
	"github.com/mettle-build/mettle/mettle/queue/pubsub"
	"github.com/mettle-build/mettle/mettle/queue/pubsub/pubsubtest"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// leaseBy is a lease by one of several workers, of the wanted attempt.
func leaseBy(t *testing.T, q *pubsub.Queue, attempt uint32) queue.Lease {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	l, err := q.Lease(ctx, []string{"p"})
	if err != nil {
		t.Fatal(err)
	}
	if l.Attempt() != attempt {
		t.Fatalf("leased attempt %d, want %d", l.Attempt(), attempt)
	}
	return l
}

// executing says who has a lease.
func executing(t *testing.T, q *pubsub.Queue, l queue.Lease, worker string) {
	t.Helper()
	u := &queuepb.Update{Operation: l.Job().GetOperation(), Attempt: l.Attempt(), Worker: worker, Stage: queuepb.Update_EXECUTING}
	if err := q.SendUpdate(t.Context(), l.Job().GetReplyTo(), u); err != nil {
		t.Fatal(err)
	}
}

func message(t *testing.T, u *queuepb.Update) string {
	t.Helper()
	var res repb.ExecuteResponse
	if err := proto.Unmarshal(u.GetExecuteResponse(), &res); err != nil {
		t.Fatal(err)
	}
	return res.GetStatus().GetMessage()
}

// The final error says of each attempt that failed who had it and how it failed,
// whichever process it was in, and leaves out what was handed back.
func TestLease_Reject_history(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	o := options(s)
	f := newFleet(t, s, o)
	e := receiveEnds(t, f)
	if err := f.Publish(t.Context(), job("a")); err != nil {
		t.Fatal(err)
	}
	other := newQueue(t, o)
	l := leaseBy(t, f.worker, 1)
	executing(t, f.worker, l, "one")
	if err := l.Reject(t.Context(), "no disk"); err != nil {
		t.Fatal(err)
	}
	l = leaseBy(t, other, 2)
	executing(t, other, l, "two")
	if err := l.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	l = leaseBy(t, other, 3)
	executing(t, other, l, "three") // and then it falls silent
	l = leaseBy(t, f.worker, 4)
	executing(t, f.worker, l, "four")
	if err := l.Reject(t.Context(), strings.Repeat("long ", 1000)+"\xff"); err != nil {
		t.Fatal(err)
	}
	got := message(t, e.next(t, patience))
	want := "attempts used up: attempt 1: one could not run it: no disk; attempt 3: three fell silent; attempt 4: four could not run it: long long"
	if !strings.HasPrefix(got, want) || len(got) > 2000 {
		t.Errorf("message is %q, want it to begin with %q", got, want)
	}
}

// A worker that dies after it has published a job again, and before it has
// acknowledged, leaves it twice. It ends once, and its attempts are not used up.
func TestLease_Release_diesInBetween(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	o := options(s)
	o.MaxAttempts = 2
	f := newFleet(t, s, o)
	e := receiveEnds(t, f)
	if err := f.Publish(t.Context(), job("a")); err != nil {
		t.Fatal(err)
	}
	dies := newQueue(t, o)
	l := leaseBy(t, dies, 1)
	s.SetFault(func(method string, _ any) pubsubtest.Fault { return pubsubtest.Fault{Drop: method == "Acknowledge"} })
	if err := l.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.SetFault(nil)
	if err := dies.Close(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		l := leaseBy(t, f.worker, 2)
		u := &queuepb.Update{Operation: "a", Attempt: l.Attempt(), Worker: "w", Stage: queuepb.Update_COMPLETED}
		if err := f.SendUpdate(t.Context(), "api", u); err != nil {
			t.Fatal(err)
		}
		if err := l.Ack(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if u := e.next(t, patience); u.GetWorker() != "w" {
		t.Errorf("ended by %q", u.GetWorker())
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*lease)
	defer cancel()
	if l, err := f.Lease(ctx, []string{"p"}); err == nil {
		t.Errorf("leased %s, attempt %d, though it has ended", l.Job().GetOperation(), l.Attempt())
	}
	if len(e.all) > 0 {
		t.Error("it ended twice")
	}
}

// A worker that may not publish jobs hands them back all the same, and they count.
func TestLease_Release_noRight(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	f := newFleet(t, s, options(s))
	if err := f.Publish(t.Context(), job("a")); err != nil {
		t.Fatal(err)
	}
	l := leaseBy(t, f.worker, 1)
	s.SetFault(func(_ string, req any) pubsubtest.Fault {
		if r, ok := req.(*pb.PublishRequest); ok && strings.HasSuffix(r.GetTopic(), "-jobs") {
			return pubsubtest.Fault{Before: status.Error(codes.PermissionDenied, "no")}
		}
		return pubsubtest.Fault{}
	})
	if err := l.Release(t.Context()); err != nil {
		t.Errorf("release: %v", err)
	}
	s.SetFault(nil)
	if err := leaseBy(t, f.worker, 2).Ack(t.Context()); err != nil {
		t.Error(err)
	}
}

// A job that a worker could not run goes to another one that waits, though it
// has waited less.
func TestLease_Reject_otherWorker(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	o := options(s)
	f := newFleet(t, s, o)
	if err := f.Publish(t.Context(), job("a")); err != nil {
		t.Fatal(err)
	}
	l := leaseBy(t, f.worker, 1)
	type got struct {
		by string
		l  queue.Lease
	}
	leases := make(chan got, 2)
	ctx, cancel := context.WithCancel(t.Context())
	wait := func(by string, q *pubsub.Queue) <-chan struct{} {
		const normal = "projects/project/subscriptions/test-jobs-p-normal"
		before, ended := s.Waiting(normal), make(chan struct{})
		go func() {
			defer close(ended)
			if l, err := q.Lease(ctx, []string{"p"}); err == nil {
				leases <- got{by, l}
			}
		}()
		for s.Waiting(normal) == before {
			time.Sleep(time.Millisecond)
		}
		return ended
	}
	mine := wait("the same", f.worker)
	others := wait("another", newQueue(t, o))
	if err := l.Reject(t.Context(), "no disk"); err != nil {
		t.Fatal(err)
	}
	g := <-leases
	if g.by != "another" || g.l.Attempt() != 2 {
		t.Errorf("leased by %s, attempt %d, want another, attempt 2", g.by, g.l.Attempt())
	}
	if err := g.l.Ack(t.Context()); err != nil {
		t.Error(err)
	}
	cancel()
	<-mine
	<-others
}

// What comes for a consumer that has left is put back, however often, and is the
// first attempt of the one who has it at last.
func TestQueue_Lease_surplusIsNoAttempt(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	o := options(s)
	o.MaxAttempts, o.OneBand = 1, true
	f := newFleet(t, s, o)
	if err := f.Publish(t.Context(), job("a")); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		q := newQueue(t, o)
		pulling, left := make(chan struct{}, 16), make(chan struct{})
		s.SetFault(func(method string, _ any) pubsubtest.Fault {
			if method == "Pull" {
				pulling <- struct{}{}
				<-left
			}
			return pubsubtest.Fault{}
		})
		ctx, cancel := context.WithCancel(t.Context())
		go func() {
			defer close(left)
			q.Lease(ctx, []string{"p"}) //nolint:errcheck // it ends with the context
		}()
		<-pulling
		published := s.Calls()["Publish"]
		cancel()
		for s.Calls()["Publish"] == published {
			time.Sleep(time.Millisecond) // until it is put back
		}
		s.SetFault(nil)
		if err := q.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if err := leaseBy(t, f.worker, 1).Ack(t.Context()); err != nil {
		t.Error(err)
	}
}

// A worker that begins after a job was withdrawn knows nothing of that, and is
// told as soon as it says that it runs it.
func TestQueue_Cancel_workerBeginsLater(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	o := options(s)
	api := newQueue(t, o)
	if err := api.Setup(t.Context()); err != nil {
		t.Fatal(err)
	}
	e := receiveEnds(t, api)
	if err := errors.Join(api.Publish(t.Context(), job("a")), api.Cancel(t.Context(), "a")); err != nil {
		t.Fatal(err)
	}
	worker := newQueue(t, o)
	l := leaseBy(t, worker, 1)
	select {
	case <-l.Cancelled():
		t.Fatal("it knew already")
	default:
	}
	executing(t, worker, l, "w")
	select {
	case <-l.Cancelled():
	case <-time.After(patience):
		t.Fatal("the worker was not told")
	}
	if err := l.Ack(t.Context()); err != nil {
		t.Error(err)
	}
	// The same name again is another job.
	if err := api.Publish(t.Context(), job("a")); err != nil {
		t.Fatal(err)
	}
	again := leaseBy(t, worker, 1001)
	u := &queuepb.Update{Operation: "a", Attempt: again.Attempt(), Worker: "w", Stage: queuepb.Update_COMPLETED}
	if err := errors.Join(worker.SendUpdate(t.Context(), "api", u), again.Ack(t.Context())); err != nil {
		t.Fatal(err)
	}
	if u := e.next(t, patience); u.GetWorker() != "w" {
		t.Errorf("ended by %q", u.GetWorker())
	}
}

// One API server publishes and another one cancels: the worker that has the job
// is told. What is younger than the clocks may differ by is spared.
func TestQueue_Cancel_byAnotherServer(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	o := options(s)
	o.LeaseTime = 20 * time.Second
	f := newFleet(t, s, o)
	if err := f.Publish(t.Context(), job("a")); err != nil {
		t.Fatal(err)
	}
	l := leaseBy(t, f.worker, 1)
	other := newQueue(t, o)
	for told := false; !told; {
		if err := other.Cancel(t.Context(), "a"); err != nil {
			t.Fatal(err)
		}
		select {
		case <-l.Cancelled():
			told = true
		case <-time.After(100 * time.Millisecond): // again, until the job is old enough
		case <-t.Context().Done():
			t.Fatal("the worker was not told")
		}
	}
	// Handed back by somebody who has not heard, it is as old as it was.
	if err := l.Release(t.Context()); err != nil {
		t.Error(err)
	}
}

// What is delivered to a process that has it already does not run again there,
// and ends with what runs.
func TestQueue_Lease_deliveredTwice(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	o := options(s)
	o.OneBand = true
	reg := prometheus.NewRegistry()
	api := newQueue(t, o)
	if err := errors.Join(api.Setup(t.Context()), api.Publish(t.Context(), job("a"))); err != nil {
		t.Fatal(err)
	}
	o.Registerer = reg
	worker := newQueue(t, o)
	var twice atomic.Bool
	twice.Store(true)
	s.SetFault(func(method string, _ any) pubsubtest.Fault {
		return pubsubtest.Fault{Duplicate: method == "Pull" && twice.Swap(false)}
	})
	l := leaseBy(t, worker, 1)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		_, err := worker.Lease(ctx, []string{"p"})
		ended <- err
	}()
	const name = "mettle_pubsub_delivered_twice_total"
	for !hasCounted(t, reg, name) {
		time.Sleep(time.Millisecond)
	}
	for range 3 { // it goes on for longer than the lease
		time.Sleep(lease / 2)
		if err := l.Extend(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Ack(t.Context()); err != nil {
		t.Error(err)
	}
	if n := s.Unacked("projects/project/subscriptions/test-jobs-p-normal"); n > 0 {
		t.Errorf("%d messages are left", n)
	}
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("a second lease: %v, want %v", err, context.Canceled)
	}
}

// hasCounted reports whether a counter is above 0.
func hasCounted(t *testing.T, reg *prometheus.Registry, name string) bool {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == name && f.GetMetric()[0].GetCounter().GetValue() > 0 {
			return true
		}
	}
	return false
}
