package pubsub_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	pb "cloud.google.com/go/pubsub/v2/apiv1/pubsubpb"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/mettle-build/mettle/mettle/queue"
	"github.com/mettle-build/mettle/mettle/queue/pubsub/pubsubtest"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

func job(name string) *queuepb.Job {
	return &queuepb.Job{Operation: name, ReplyTo: "api", Pool: "p"}
}

// ends receives the updates for "api", and counts how often an operation ended.
type ends struct {
	all  chan *queuepb.Update
	mu   sync.Mutex
	seen map[string]int
}

func receiveEnds(t *testing.T, q queue.Receiver) *ends {
	e := &ends{all: make(chan *queuepb.Update, 4096), seen: make(map[string]int)}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- q.ReceiveUpdates(ctx, "api", func(u *queuepb.Update) {
			if u.GetStage() == queuepb.Update_COMPLETED {
				e.mu.Lock()
				e.seen[u.GetOperation()]++
				e.mu.Unlock()
				e.all <- u
			}
		})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil && !errors.Is(err, queue.ErrClosed) {
			t.Errorf("receive updates: %v", err)
		}
	})
	return e
}

func (e *ends) next(t *testing.T, patience time.Duration) *queuepb.Update {
	t.Helper()
	select {
	case u := <-e.all:
		return u
	case <-time.After(patience):
		t.Fatal("no operation ended")
		return nil
	}
}

// work leases and ends jobs as a worker does, until ctx is done. What can't be
// reported or acknowledged is left to lapse.
func work(ctx context.Context, f *fleet) error {
	for {
		l, err := f.Lease(ctx, []string{"p"})
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, queue.ErrUnavailable):
			continue
		case err != nil:
			return err
		}
		u := &queuepb.Update{Operation: l.Job().GetOperation(), Attempt: l.Attempt(), Worker: "w", Stage: queuepb.Update_EXECUTING}
		f.SendUpdate(ctx, l.Job().GetReplyTo(), u) //nolint:errcheck // news
		u = &queuepb.Update{Operation: u.GetOperation(), Attempt: l.Attempt(), Worker: "w", Stage: queuepb.Update_COMPLETED}
		if f.SendUpdate(ctx, l.Job().GetReplyTo(), u) == nil {
			l.Ack(ctx) //nolint:errcheck // as told
		}
	}
}

// Calls fail before and after they are made, are made twice and late, and
// streams break: every operation ends, once, with the result of a worker.
func TestQueue_faults(t *testing.T) {
	t.Parallel()
	const jobs, workers = 120, 3
	for seed := range uint64(3) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			t.Parallel()
			s := newServer(t)
			o := options(s)
			o.Pools = []string{"p"}
			o.CallTimeout, o.MaxAttempts = 3*time.Second, 50
			f := newFleet(t, s, o)
			e := receiveEnds(t, f)
			for i := range jobs / 4 { // some wait already
				if err := f.Publish(t.Context(), job(fmt.Sprint(i))); err != nil {
					t.Fatal(err)
				}
			}
			s.SetFault(pubsubtest.Chaos{
				Seed: seed, Unavailable: 0.06, LoseAnswers: 0.03, Twice: 0.03, Delay: 0.03, MaxDelay: 50 * time.Millisecond,
				DropAcks: 0.02, Duplicate: 0.02,
			}.Faults())
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			var g errgroup.Group
			for range workers {
				g.Go(func() error { return work(ctx, f) })
			}
			for i := jobs / 4; i < jobs; i++ {
				for f.Publish(ctx, job(fmt.Sprint(i))) != nil && ctx.Err() == nil {
					continue // once more
				}
				if i%20 == 0 {
					s.CutStreams()
				}
			}
			for range jobs {
				u := e.next(t, 30*time.Second)
				if u.GetWorker() != "w" {
					t.Errorf("%s ended by %q: %s", u.GetOperation(), u.GetWorker(), u.GetExecuteResponse())
				}
			}
			s.SetFault(nil)
			cancel()
			if err := g.Wait(); err != nil {
				t.Error(err)
			}
			e.mu.Lock()
			defer e.mu.Unlock()
			for name, n := range e.seen {
				if n != 1 {
					t.Errorf("%s ended %d times", name, n)
				}
			}
			if len(e.seen) != jobs {
				t.Errorf("%d of %d operations ended", len(e.seen), jobs)
			}
		})
	}
}

// While the broker is away all calls fail in bounded time, and afterwards the
// same queue goes on.
func TestQueue_brokerAway(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	if err := newQueue(t, options(s)).Setup(t.Context()); err != nil {
		t.Fatal(err)
	}
	o := options(s)
	o.CallTimeout, o.LeaseTime = time.Second, 10*time.Second
	f := newFleet(t, s, o)
	e := receiveEnds(t, f)
	if err := f.Publish(t.Context(), job("before")); err != nil {
		t.Fatal(err)
	}
	held, err := f.Lease(t.Context(), []string{"p"})
	if err != nil {
		t.Fatal(err)
	}
	s.SetFault(func(string, any) pubsubtest.Fault { return pubsubtest.Fault{Before: pubsubtest.Lost()} })
	s.CutStreams()
	extended := held.Extend(t.Context()) // first, before it lapses
	_, leased := f.Lease(t.Context(), []string{"p"})
	for what, err := range map[string]error{
		"publish": f.Publish(t.Context(), job("a")), "cancel": f.api.Cancel(t.Context(), "a"),
		"send":  f.SendUpdate(t.Context(), "api", &queuepb.Update{Operation: "a"}),
		"lease": leased, "extend": extended, "setup": f.api.Setup(t.Context()),
	} {
		if !errors.Is(err, queue.ErrUnavailable) {
			t.Errorf("%s while the broker is away: %v, want %v", what, err, queue.ErrUnavailable)
		}
	}
	s.SetFault(nil)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- work(ctx, f) }()
	if err := f.Publish(t.Context(), job("after")); err != nil {
		t.Fatal(err)
	}
	got := map[string]bool{}
	for len(got) < 2 {
		got[e.next(t, 20*time.Second).GetOperation()] = true
	}
	cancel()
	if err := <-ended; err != nil || !got["before"] || !got["after"] {
		t.Errorf("ended: %v, %v", got, err)
	}
}

// An acknowledgement that got lost brings the job back to a worker that knows
// that it has ended: it does not run again.
func TestLease_Ack_lost(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	o := options(s)
	o.CallTimeout = time.Second
	f := newFleet(t, s, o)
	// By a patient one: a call that is made again publishes again.
	if err := newQueue(t, options(s)).Publish(t.Context(), job("a")); err != nil {
		t.Fatal(err)
	}
	l, err := f.Lease(t.Context(), []string{"p"})
	if err != nil {
		t.Fatal(err)
	}
	acked := make(chan struct{}, 16)
	s.SetFault(func(method string, _ any) pubsubtest.Fault {
		if method != "Acknowledge" {
			return pubsubtest.Fault{}
		}
		acked <- struct{}{}
		return pubsubtest.Fault{Before: pubsubtest.Lost()}
	})
	if err := l.Ack(t.Context()); !errors.Is(err, queue.ErrUnavailable) {
		t.Fatalf("ack: %v, want %v", err, queue.ErrUnavailable)
	}
	s.SetFault(nil)
	before := s.Calls()["Acknowledge"]
	ctx, cancel := context.WithTimeout(t.Context(), 3*lease)
	defer cancel()
	if l, err := f.Lease(ctx, []string{"p"}); err == nil {
		t.Errorf("leased %s, attempt %d, though it has ended", l.Job().GetOperation(), l.Attempt())
	}
	if s.Calls()["Acknowledge"] == before {
		t.Error("it was not acknowledged when it came again")
	}
}

// A subscription with exactly-once delivery tells that a delivery is over.
func TestLease_brokerSaysLost(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	f := newFleet(t, s, options(s))
	if err := f.Publish(t.Context(), job("a")); err != nil {
		t.Fatal(err)
	}
	l, err := f.Lease(t.Context(), []string{"p"})
	if err != nil {
		t.Fatal(err)
	}
	s.SetFault(func(string, any) pubsubtest.Fault {
		return pubsubtest.Fault{Before: status.Error(codes.FailedPrecondition, "PERMANENT_FAILURE_INVALID_ACK_ID")}
	})
	for what, err := range map[string]error{"extend": l.Extend(t.Context()), "ack": l.Ack(t.Context())} {
		if !errors.Is(err, queue.ErrLeaseLost) {
			t.Errorf("%s: %v, want %v", what, err, queue.ErrLeaseLost)
		}
	}
	s.SetFault(nil)
}

// A job that no worker of ours ends, because none is up or all are of a version
// that does not, ends by the dead-letter topic.
func TestQueue_deadLetter(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	f := newFleet(t, s, options(s))
	e := receiveEnds(t, f)
	if err := f.Publish(t.Context(), job("a")); err != nil {
		t.Fatal(err)
	}
	cc, err := grpc.NewClient(s.Addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	raw := pb.NewSubscriberClient(cc)
	name := "projects/project/subscriptions/test-jobs-p-normal"
	for len(e.all) == 0 {
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		res, err := raw.Pull(ctx, &pb.PullRequest{Subscription: name, MaxMessages: 1})
		cancel()
		if err != nil && status.Code(err) != codes.DeadlineExceeded {
			t.Fatal(err)
		}
		for _, m := range res.GetReceivedMessages() {
			if _, err := raw.ModifyAckDeadline(t.Context(), &pb.ModifyAckDeadlineRequest{Subscription: name, AckIds: []string{m.GetAckId()}}); err != nil {
				t.Fatal(err)
			}
		}
	}
	u := e.next(t, patience)
	var res repb.ExecuteResponse
	if err := proto.Unmarshal(u.GetExecuteResponse(), &res); err != nil {
		t.Fatal(err)
	}
	if msg := res.GetStatus().GetMessage(); u.GetOperation() != "a" || !strings.HasPrefix(msg, queue.ReasonAttempts) {
		t.Errorf("%s ended with %q", u.GetOperation(), msg)
	}
}

// A job that comes when its consumer has left goes to another worker.
func TestQueue_Lease_surplus(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	f := newFleet(t, s, options(s))
	pulling := make(chan struct{}, 64)
	s.SetFault(func(method string, _ any) pubsubtest.Fault {
		if method == "Pull" {
			pulling <- struct{}{}
		}
		return pubsubtest.Fault{}
	})
	ctx, cancel := context.WithCancel(t.Context())
	left := make(chan struct{})
	go func() {
		defer close(left)
		f.Lease(ctx, []string{"p"}) //nolint:errcheck // it ends with the context
	}()
	for range 6 { // three that look and three that wait
		<-pulling
	}
	cancel()
	<-left
	if err := f.Publish(t.Context(), job("a")); err != nil {
		t.Fatal(err)
	}
	other := newQueue(t, options(s))
	ctx, cancel = context.WithTimeout(t.Context(), patience)
	defer cancel()
	l, err := other.Lease(ctx, []string{"p"})
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Ack(t.Context()); err != nil {
		t.Error(err)
	}
}
