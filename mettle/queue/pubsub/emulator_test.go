package pubsub_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	pb "cloud.google.com/go/pubsub/v2/apiv1/pubsubpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/mettle-build/mettle/mettle/queue"
	"github.com/mettle-build/mettle/mettle/queue/pubsub/pubsubtest"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// Where the broker does not count deliveries, the API server does: a job that
// ends its workers, each in a process that knows nothing of the others, ends.
func TestQueue_attempts_notCountedByBroker(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	s.Lack(pubsubtest.Lacks{DeadLetters: true})
	o := options(s)
	f := newFleet(t, s, o)
	e := receiveEnds(t, f)
	if err := f.Publish(t.Context(), job("a")); err != nil {
		t.Fatal(err)
	}
	names := []string{"one", "two", "three", "four"}
	var last queue.Lease
	for _, name := range names {
		worker := newQueue(t, o)
		last = leaseBy(t, worker, 1)
		executing(t, worker, last, name) // and then it falls silent
	}
	want := "attempts used up: attempt 1: one fell silent; attempt 2: two fell silent; attempt 3: three fell silent"
	if got := message(t, e.next(t, patience)); got != want {
		t.Errorf("message is %q, want %q", got, want)
	}
	select {
	case <-last.Cancelled():
	case <-t.Context().Done():
		t.Fatal("the worker with one delivery too many was not told")
	}
	if err := last.Ack(t.Context()); err != nil {
		t.Error(err)
	}
}

// Where the broker does not filter, who reads a subscription takes what is its own.
func TestQueue_notFilteredByBroker(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	s.Lack(pubsubtest.Lacks{Filters: true, DeadLetters: true, Updates: true})
	o := options(s)
	o.Pools = []string{"p", "other"}
	f := newFleet(t, s, o)
	o.MaxAttempts = 7 // so that there would be something to change
	if err := newQueue(t, o).Setup(t.Context()); err != nil {
		t.Errorf("setup again: %v", err)
	}
	e := receiveEnds(t, f)
	others := job("b")
	others.Pool, others.ReplyTo, others.Priority = "other", "another-api", -1
	if err := errors.Join(f.Publish(t.Context(), job("a")), f.Publish(t.Context(), others)); err != nil {
		t.Fatal(err)
	}
	for _, want := range []*queuepb.Job{others, job("a")} {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		l, err := f.Lease(ctx, []string{want.GetPool()})
		cancel()
		if err != nil {
			t.Fatal(err)
		}
		if got := l.Job().GetOperation(); got != want.GetOperation() {
			t.Errorf("the pool %s delivers %s", want.GetPool(), got)
		}
		u := &queuepb.Update{Operation: l.Job().GetOperation(), Attempt: 1, Worker: "w", Stage: queuepb.Update_COMPLETED}
		if err := errors.Join(f.SendUpdate(t.Context(), want.GetReplyTo(), u), l.Ack(t.Context())); err != nil {
			t.Fatal(err)
		}
	}
	if u := e.next(t, patience); u.GetOperation() != "a" || len(e.all) > 0 {
		t.Errorf("%s ended, and %d others: want a only, the other is another server's", u.GetOperation(), len(e.all))
	}
}

// A worker of a pool that nobody has set up makes its subscription, or says what
// is to be done.
func TestQueue_Lease_newPool(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	o := options(s)
	f := newFleet(t, s, o)
	s.SetFault(func(_ string, req any) pubsubtest.Fault {
		if r, ok := req.(*pb.Subscription); ok && strings.Contains(r.GetName(), "-jobs-new-") {
			return pubsubtest.Fault{Before: status.Error(codes.PermissionDenied, "no")}
		}
		return pubsubtest.Fault{}
	})
	if _, err := f.Lease(t.Context(), []string{"new"}); !errors.Is(err, queue.ErrRefused) || !strings.Contains(err.Error(), "run mettle setup --pools new") {
		t.Errorf("lease from a pool that is not there: %v, want %v, run mettle setup --pools new", err, queue.ErrRefused)
	}
	j := job("a")
	j.Pool = "new"
	if err := f.Publish(t.Context(), j); !errors.Is(err, queue.ErrRefused) || !strings.Contains(err.Error(), "run mettle setup") {
		t.Errorf("publish to a pool that the broker would drop it for: %v, want %v", err, queue.ErrRefused)
	}
	s.SetFault(nil)
	leased := make(chan error, 1)
	go func() {
		l, err := f.Lease(t.Context(), []string{"new"})
		if err == nil {
			err = l.Ack(t.Context())
		}
		leased <- err
	}()
	for f.Publish(t.Context(), j) != nil && t.Context().Err() == nil {
		continue // until the worker has made it
	}
	if err := <-leased; err != nil {
		t.Error(err)
	}
	o.Pools = append(o.Pools, "new")
	if err := newQueue(t, o).Setup(t.Context()); err != nil {
		t.Error(err)
	}
}

// A worker takes jobs also where there are as many subscriptions as there may be,
// and it gets none to hear of cancellations.
func TestQueue_Lease_noSubscriptionsLeft(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	o := options(s)
	api := newQueue(t, o)
	if err := errors.Join(api.Setup(t.Context()), api.Publish(t.Context(), job("a"))); err != nil {
		t.Fatal(err)
	}
	s.SetFault(func(method string, _ any) pubsubtest.Fault {
		if method == "CreateSubscription" {
			return pubsubtest.Fault{Before: status.Error(codes.ResourceExhausted, "10000 are enough")}
		}
		return pubsubtest.Fault{}
	})
	o.CallTimeout = 3 * time.Second
	if err := leaseBy(t, newQueue(t, o), 1).Ack(t.Context()); err != nil {
		t.Error(err)
	}
	s.SetFault(nil)
}
