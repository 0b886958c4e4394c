package pubsub_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	pb "cloud.google.com/go/pubsub/v2/apiv1/pubsubpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/mettle-build/mettle/mettle/queue"
	"github.com/mettle-build/mettle/mettle/queue/pubsub"
	"github.com/mettle-build/mettle/mettle/queue/pubsub/pubsubtest"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

func TestQueue_Setup_again(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	o := options(s)
	for range 2 {
		if err := newQueue(t, o).Setup(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	calls := s.Calls()
	subscriptions := 3*len(o.Pools) + 1
	if calls["CreateTopic"] != 5 || calls["CreateSubscription"] != subscriptions || calls["UpdateSubscription"] != 0 {
		t.Errorf("two times Setup: %v, want 5 topics and %d subscriptions made once, and nothing changed", calls, subscriptions)
	}

	o.LeaseTime, o.Pools = 30*time.Second, append(o.Pools, "new")
	var changed []string
	s.SetFault(func(method string, req any) pubsubtest.Fault {
		if r, ok := req.(*pb.UpdateSubscriptionRequest); ok {
			changed = append(changed, strings.Join(r.GetUpdateMask().GetPaths(), ","))
		}
		return pubsubtest.Fault{}
	})
	if err := newQueue(t, o).Setup(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.SetFault(nil)
	if got, want := strings.Join(changed, " "), strings.TrimSpace(strings.Repeat("ack_deadline_seconds ", subscriptions-1)); got != want {
		t.Errorf("with another lease Setup changed %q, want %q", got, want)
	}
	if n := s.Calls()["CreateSubscription"]; n != subscriptions+3 {
		t.Errorf("%d subscriptions made, want the new pool's three more than %d", n, subscriptions)
	}
}

func TestQueue_Setup_wrongFilter(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	o := options(s)
	q := newQueue(t, o)
	s.SetFault(func(method string, req any) pubsubtest.Fault {
		if r, ok := req.(*pb.Subscription); ok && strings.HasSuffix(r.GetName(), "-p-low") {
			r.Filter = `attributes.x = "y"`
		}
		return pubsubtest.Fault{}
	})
	if err := q.Setup(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.SetFault(nil)
	if err := q.Setup(t.Context()); err == nil || !strings.Contains(err.Error(), "test-jobs-p-low") || !strings.Contains(err.Error(), "delete it") {
		t.Errorf("setup over a subscription with another filter: %v, want its name and what to do", err)
	}
}

func TestQueue_Setup_namesRights(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	q := newQueue(t, options(s))
	s.SetFault(func(method string, _ any) pubsubtest.Fault {
		switch method {
		case "CreateTopic", "GetSubscription":
			return pubsubtest.Fault{Before: status.Error(codes.PermissionDenied, "no")}
		}
		return pubsubtest.Fault{}
	})
	err := q.Setup(t.Context())
	for _, want := range []string{
		"pubsub.topics.create on projects/project/topics/test-jobs",
		"pubsub.topics.create on projects/project/topics/test-cancel",
		"pubsub.subscriptions.get on projects/project/subscriptions/test-dead",
		"pubsub.subscriptions.get on projects/project/subscriptions/test-jobs-p-urgent",
	} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("setup without rights: %v, want %q in it", err, want)
		}
	}
	s.SetFault(nil)
}

// Without Setup all fail at once and say what to do.
func TestQueue_notSetUp(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	q := newQueue(t, options(s))
	_, leased := q.Lease(t.Context(), []string{"p"})
	for what, err := range map[string]error{
		"publish": q.Publish(t.Context(), job("a")), "cancel": q.Cancel(t.Context(), "a"), "lease": leased,
		"send":    q.SendUpdate(t.Context(), "api", &queuepb.Update{Operation: "a"}),
		"receive": q.ReceiveUpdates(t.Context(), "api", func(*queuepb.Update) {}),
	} {
		if !errors.Is(err, queue.ErrUnavailable) || !strings.Contains(err.Error(), "run mettle setup") {
			t.Errorf("%s: %v, want %v, run mettle setup", what, err, queue.ErrUnavailable)
		}
	}
	if err := q.Setup(t.Context()); err != nil {
		t.Fatal(err)
	}
	nobody := job("b")
	nobody.Pool = "nobody's"
	if err := q.Publish(t.Context(), nobody); !errors.Is(err, queue.ErrUnavailable) {
		t.Errorf("publish to a pool that the broker would drop it for: %v, want %v", err, queue.ErrUnavailable)
	}
}

func TestQueue_Close(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	f := newFleet(t, s, options(s))
	if err := f.Publish(t.Context(), job("a")); err != nil {
		t.Fatal(err)
	}
	held, err := f.Lease(t.Context(), []string{"p"})
	if err != nil {
		t.Fatal(err)
	}
	pulling := make(chan struct{}, 64)
	s.SetFault(func(method string, _ any) pubsubtest.Fault {
		if method == "Pull" || method == "StreamingPull" {
			pulling <- struct{}{}
		}
		return pubsubtest.Fault{}
	})
	ended := make(chan error, 2)
	go func() {
		_, err := f.Lease(t.Context(), []string{"p"})
		ended <- err
	}()
	go func() { ended <- f.ReceiveUpdates(t.Context(), "api", func(*queuepb.Update) {}) }()
	for range 8 { // three that look, three that wait, two streams
		<-pulling
	}
	for _, q := range []*pubsub.Queue{f.api, f.worker, f.worker} {
		if err := q.Close(); err != nil {
			t.Fatal(err)
		}
	}
	errs := []error{<-ended, <-ended, f.Publish(t.Context(), job("b")), f.api.Cancel(t.Context(), "a"), held.Ack(t.Context()), held.Extend(t.Context())}
	errs = append(errs, f.SendUpdate(t.Context(), "api", &queuepb.Update{Operation: "a", Attempt: 1}))
	_, err = f.Lease(t.Context(), []string{"p"})
	errs = append(errs, err, f.ReceiveUpdates(t.Context(), "api", func(*queuepb.Update) {}))
	for i, err := range errs {
		if !errors.Is(err, queue.ErrClosed) {
			t.Errorf("call %d: %v, want %v", i, err, queue.ErrClosed)
		}
	}
}

// An API server that leaves takes its subscription with it, and so does a worker.
func TestQueue_leavesNothing(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	f := newFleet(t, s, options(s))
	if err := f.Publish(t.Context(), job("a")); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := f.ReceiveUpdates(ctx, "api", func(*queuepb.Update) {}); err != nil {
		t.Fatal(err)
	}
	if err := f.worker.Close(); err != nil {
		t.Fatal(err)
	}
	if n := s.Calls()["DeleteSubscription"]; n != 2 {
		t.Errorf("%d subscriptions were removed, want those for updates and cancellations", n)
	}
}

func TestQueue_ReceiveUpdates_oneReceiver(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	f := newFleet(t, s, options(s))
	receiveEnds(t, f)
	deadline, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for s.Calls()["StreamingPull"] < 3 { // the first one's two, and the worker's
		select {
		case <-time.After(time.Millisecond):
		case <-deadline.Done():
			t.Fatal("the first receiver does not receive")
		}
	}
	if err := f.ReceiveUpdates(t.Context(), "api", func(*queuepb.Update) {}); err == nil {
		t.Error("a second receiver was let in")
	}
}

// Of what waits, the more urgent goes first, from all pools.
func TestQueue_Lease_bands(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	o := options(s)
	o.Pools, o.LeaseTime = []string{"p", "pool-a"}, 60*time.Second
	f := newFleet(t, s, o)
	for i, priority := range []int32{7, 0, -3, 1, -1, 0} {
		j := job(fmt.Sprint(i))
		j.Priority, j.Pool = priority, []string{"p", "pool-a"}[i%2]
		if err := f.Publish(t.Context(), j); err != nil {
			t.Fatal(err)
		}
	}
	var got []string
	for range 6 {
		l, err := f.Lease(t.Context(), []string{"p", "pool-a"})
		if err != nil {
			t.Fatal(err)
		}
		p := l.Job().GetPriority()
		got = append(got, map[bool]string{p < 0: "urgent", p == 0: "normal", p > 0: "low"}[true])
		if err := l.Ack(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if g, want := strings.Join(got, " "), "urgent urgent normal normal low low"; g != want {
		t.Errorf("leased %s, want %s", g, want)
	}
}

// What an action costs in calls, as the README says.
func TestQueue_cost(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	o := options(s)
	o.OneBand, o.LeaseTime = true, 60*time.Second
	f := newFleet(t, s, o)
	e := receiveEnds(t, f)
	run := func(name string) {
		if err := f.Publish(t.Context(), job(name)); err != nil {
			t.Fatal(err)
		}
		l, err := f.Lease(t.Context(), []string{"p"})
		if err != nil {
			t.Fatal(err)
		}
		for _, stage := range []queuepb.Update_Stage{queuepb.Update_EXECUTING, queuepb.Update_COMPLETED} {
			if err := f.SendUpdate(t.Context(), "api", &queuepb.Update{Operation: name, Attempt: 1, Worker: "w", Stage: stage}); err != nil {
				t.Fatal(err)
			}
		}
		if err := l.Ack(t.Context()); err != nil {
			t.Fatal(err)
		}
		e.next(t, patience)
	}
	run("first") // makes what is made once
	before := s.Calls()
	const n = 20
	for i := range n {
		run(fmt.Sprint(i))
	}
	after := s.Calls()
	for method, most := range map[string]int{
		"Publish": 3, "Pull": 1, "Acknowledge": 1, "StreamingPull.send": 2, "StreamingPull.receive": 2,
		"ModifyAckDeadline": 0, "GetSubscription": 0, "CreateSubscription": 0, "StreamingPull": 0,
	} {
		actions := n
		if strings.HasPrefix(method, "StreamingPull.") {
			actions++ // what the stream is told of the first action may be counted late
		}
		if got := after[method] - before[method]; got > most*actions {
			t.Errorf("%d calls of %s for %d actions, want at most %d each", got, method, n, most)
		}
	}
}
