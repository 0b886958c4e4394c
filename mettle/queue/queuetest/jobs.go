package queuetest

import (
	"context"
	"errors"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/mettle-build/mettle/mettle/queue"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

func testArrives(t *testing.T, s *suite) {
	want := &queuepb.Job{
		Operation: "operations/1", ReplyTo: "api", InstanceName: "a/b", ActionDigest: "abc/3",
		Action: []byte{1, 2}, Command: []byte{3}, SkipCacheLookup: true, Priority: -7, Pool: "p",
		Queued: timestamppb.New(time.Unix(1, 2)), RequestMetadata: []byte("md"),
		TraceContext: map[string]string{"traceparent": "00-1-2-01"}, Timeout: durationpb.New(time.Minute),
	}
	s.publish(want)
	l := s.lease()
	equal(t, "job", l.Job(), want)
	if l.Attempt() != 1 {
		t.Errorf("first delivery is attempt %d, want 1", l.Attempt())
	}
	select {
	case <-l.Cancelled():
		t.Error("the job is cancelled, but nobody did that")
	default:
	}
	s.ack(l)
}

func testWaiting(t *testing.T, s *suite) {
	got := make(chan queue.Lease)
	go func() {
		defer close(got)
		if l, err := s.q.Lease(t.Context(), []string{"p", "other"}); err == nil {
			got <- l
		}
	}()
	s.noJob(10*time.Millisecond, "third") // lets the other begin to wait
	s.publish(job("a"))
	l, ok := <-got
	if !ok {
		t.Fatal("the waiting consumer got no job")
	}
	s.ack(l)
	s.publish(job("b"))
	s.ack(s.leaseOf("b", 1))
}

func testLeaseContext(t *testing.T, s *suite) {
	ctx, cancel := context.WithCancel(t.Context())
	got := make(chan error)
	go func() {
		_, err := s.q.Lease(ctx, []string{"p"})
		got <- err
	}()
	s.noJob(10*time.Millisecond, "other")
	cancel()
	if err := <-got; !errors.Is(err, context.Canceled) {
		t.Errorf("lease under a context that ends: %v, want %v", err, context.Canceled)
	}
	s.publish(job("a"))
	if l, err := s.q.Lease(ctx, []string{"p"}); !errors.Is(err, context.Canceled) {
		t.Errorf("lease under a context that has ended: %v, %v, want %v", l, err, context.Canceled)
	}
	s.ack(s.leaseOf("a", 1)) // nobody has had it, so it is the first attempt
}

func testPools(t *testing.T, s *suite) {
	a, b := job("a"), job("b")
	a.Pool, b.Pool = "pool-a", "pool-b"
	s.publish(a, b)
	s.noJob(10*time.Millisecond, "pool-c")
	if l := s.lease("pool-b"); l.Job().GetOperation() != "b" {
		t.Errorf("pool-b delivers %s", l.Job().GetOperation())
	}
	if l := s.lease("pool-c", "pool-a"); l.Job().GetOperation() != "a" {
		t.Errorf("pool-a delivers %s", l.Job().GetOperation())
	}
}

func testOrder(t *testing.T, s *suite) {
	if !s.o.Order {
		t.Skip("this broker keeps no order")
	}
	names := []string{"low", "a", "b", "urgent", "c", "lowest"}
	priorities := []int32{5, 0, 0, -3, 0, 1 << 30}
	for i, name := range names {
		j := job(name)
		j.Priority = priorities[i]
		s.publish(j)
	}
	s.ack(s.leaseOf("urgent", 1))
	l := s.leaseOf("a", 1)
	if err := l.Release(t.Context()); err != nil {
		t.Fatalf("release: %v", err)
	}
	for i, name := range []string{"a", "b", "c", "low", "lowest"} {
		attempt := uint32(1)
		if i == 0 {
			attempt = 2
		}
		s.ack(s.leaseOf(name, attempt))
	}
}

func testDuplicate(t *testing.T, s *suite) {
	if s.o.DuplicatesApart {
		testDuplicatesApart(t, s)
		return
	}
	s.publish(job("a"), job("a"))
	l := s.leaseOf("a", 1)
	s.publish(job("a"))
	s.noJob(10 * time.Millisecond)
	s.ack(l)
	s.noJob(10 * time.Millisecond)
	s.publish(job("a"))
	s.ack(s.leaseOf("a", 1)) // that one has ended, so this one is new
}

// testDuplicatesApart is testDuplicate for a broker that delivers both: they end once.
func testDuplicatesApart(t *testing.T, s *suite) {
	updates := s.receive("api")
	s.publish(job("a"), job("a"), job("b"))
	for range 3 {
		l := s.lease()
		if l.Attempt() != 1 {
			t.Errorf("%s is attempt %d, want 1: it is nobody else's", l.Job().GetOperation(), l.Attempt())
		}
		if l.Job().GetOperation() == "a" {
			s.send(&queuepb.Update{Operation: "a", Attempt: l.Attempt(), Stage: queuepb.Update_EXECUTING})
			s.send(&queuepb.Update{Operation: "a", Attempt: l.Attempt(), Stage: queuepb.Update_COMPLETED})
		}
		s.ack(l)
	}
	s.send(&queuepb.Update{Operation: "b", Attempt: 1, Stage: queuepb.Update_COMPLETED})
	ends := make(map[string]int)
	for ends["b"] == 0 {
		if u := s.update(updates); u.GetStage() == queuepb.Update_COMPLETED {
			ends[u.GetOperation()]++
		} else if ends[u.GetOperation()] > 0 {
			t.Errorf("%v of %s came after COMPLETED", u.GetStage(), u.GetOperation())
		}
	}
	for ends["a"] == 0 { // no order between operations
		if u := s.update(updates); u.GetStage() == queuepb.Update_COMPLETED {
			ends[u.GetOperation()]++
		}
	}
	s.noJob(10 * time.Millisecond)
	select {
	case u := <-updates:
		t.Errorf("%v of %s came after the end", u.GetStage(), u.GetOperation())
	default:
	}
}

func testPublishRaises(t *testing.T, s *suite) {
	if !s.o.Raises {
		t.Skip("this broker leaves a job where it is")
	}
	low, urgent := job("low"), job("low")
	low.Priority, urgent.Priority = 5, -5
	s.publish(low, job("a"), urgent, low)
	s.ack(s.leaseOf("low", 1))
	s.ack(s.leaseOf("a", 1))
	s.noJob(10 * time.Millisecond)
}

func testRaise(t *testing.T, s *suite) {
	r, ok := s.q.(queue.Raiser)
	if !ok {
		t.Skip("this broker raises no jobs")
	}
	raise := func(operation string, priority int32) {
		t.Helper()
		if err := r.Raise(t.Context(), operation, priority, ""); err != nil {
			t.Fatalf("raise %s: %v", operation, err)
		}
	}
	low := job("low")
	low.Priority = 5
	s.publish(low, job("a"))
	raise("low", -5)
	raise("low", 7) // is no more urgent
	raise("nothing", -5)
	l := s.leaseOf("low", 1)
	raise("low", -6) // it is with a worker
	s.ack(s.leaseOf("a", 1))
	s.ack(l)
	raise("low", -7) // it has ended
	s.noJob(10 * time.Millisecond)
}

func testManyConsumers(t *testing.T, s *suite) {
	const jobs, consumers, publishers = 400, 16, 4
	ctx, cancel := context.WithTimeout(t.Context(), s.o.Patience)
	defer cancel()
	got := make(chan string, jobs)
	var g errgroup.Group
	for range consumers {
		g.Go(func() error {
			for {
				l, err := s.q.Lease(ctx, []string{"p"})
				if errors.Is(err, context.Canceled) {
					return nil
				} else if err != nil {
					return err
				}
				if err := l.Ack(ctx); err != nil {
					return err
				}
				got <- l.Job().GetOperation()
			}
		})
	}
	for p := range publishers {
		g.Go(func() error {
			for i := p; i < jobs; i += publishers {
				if err := s.q.Publish(ctx, job(operation(i))); err != nil {
					return err
				}
			}
			return nil
		})
	}
	seen := make(map[string]bool)
	for range jobs {
		select {
		case name := <-got:
			if seen[name] {
				t.Errorf("%s was delivered twice", name)
			}
			seen[name] = true
		case <-ctx.Done():
			t.Fatalf("only %d of %d jobs came", len(seen), jobs)
		}
	}
	cancel()
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
}

func testFull(t *testing.T, s *suite) {
	if s.o.MaxJobs == 0 {
		t.Skip("too large to fill")
	}
	for i := range s.o.MaxJobs {
		s.publish(job(operation(i)))
	}
	if err := s.q.Publish(t.Context(), job("more")); !errors.Is(err, queue.ErrFull) {
		t.Fatalf("publish to a full queue: %v, want %v", err, queue.ErrFull)
	}
	s.publish(job(operation(0))) // that one is in already
	s.ack(s.lease())
	s.publish(job("more"))
}

func testNoName(t *testing.T, s *suite) {
	if err := s.q.Publish(t.Context(), job("")); err == nil {
		t.Error("a job without the name of an operation was published")
	}
}
