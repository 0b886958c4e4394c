package queuetest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/protobuf/proto"

	"github.com/mettle-build/mettle/mettle/queue"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

func testAck(t *testing.T, s *suite) {
	s.publish(job("a"))
	l := s.leaseOf("a", 1)
	s.ack(l)
	s.noJob(2 * s.o.LeaseTime)
	if err := l.Ack(t.Context()); !errors.Is(err, queue.ErrLeaseLost) {
		t.Errorf("second ack: %v, want %v", err, queue.ErrLeaseLost)
	}
}

func testRelease(t *testing.T, s *suite) {
	updates := s.receive("api")
	s.publish(job("a"))
	l := s.leaseOf("a", 1)
	if err := l.Release(t.Context()); err != nil {
		t.Fatalf("release: %v", err)
	}
	start := time.Now()
	again := s.leaseOf("a", 2)
	if d := time.Since(start); d >= s.o.LeaseTime {
		t.Errorf("a released job came after %v, want at once", d)
	}
	if u := s.update(updates); u.GetStage() != queuepb.Update_REQUEUED || u.GetAttempt() != 1 || u.GetOperation() != "a" {
		t.Errorf("update on release is %v, want REQUEUED of attempt 1", u)
	}
	s.ack(again)
}

// testReleaseUncounted hands a job back more often than attempts may fail.
func testReleaseUncounted(t *testing.T, s *suite) {
	s.publish(job("a"))
	n := uint32(s.o.MaxAttempts) + 2 //nolint:gosec // a small number
	for i := range n {
		if err := s.leaseOf("a", i+1).Release(t.Context()); err != nil {
			t.Fatalf("release %d: %v", i+1, err)
		}
	}
	s.ack(s.leaseOf("a", n+1))
}

// testReject has workers say that they can't run a job, until nobody else is asked.
func testReject(t *testing.T, s *suite) {
	updates := s.receive("api")
	s.publish(job("a"))
	for i := range s.o.MaxAttempts {
		l := s.leaseOf("a", uint32(i+1)) //nolint:gosec // a small number
		s.send(&queuepb.Update{Operation: "a", Attempt: l.Attempt(), Worker: fmt.Sprintf("w%d", i), Stage: queuepb.Update_EXECUTING})
		if err := l.Reject(t.Context(), "no disk"); err != nil {
			t.Fatalf("reject: %v", err)
		}
	}
	for {
		u := s.update(updates)
		if u.GetStage() != queuepb.Update_COMPLETED {
			continue
		}
		var resp repb.ExecuteResponse
		if err := proto.Unmarshal(u.GetExecuteResponse(), &resp); err != nil {
			t.Fatalf("final update: %v", err)
		}
		msg := resp.GetStatus().GetMessage()
		for _, want := range []string{queue.ReasonAttempts, "no disk"} {
			if !strings.Contains(msg, want) {
				t.Errorf("the final error is %q, want %q in it", msg, want)
			}
		}
		break
	}
	s.noJob(2 * s.o.LeaseTime)
}

func testLapse(t *testing.T, s *suite) {
	updates := s.receive("api")
	s.publish(job("a"))
	first := s.leaseOf("a", 1)
	start := time.Now()
	s.publish(job("b"))
	s.ack(s.leaseOf("b", 1))
	again := s.leaseOf("a", 2)
	if d := time.Since(start); d < s.o.LeaseTime/2 {
		t.Errorf("the lease lapsed after %v, want about %v", d, s.o.LeaseTime)
	}
	if u := s.update(updates); u.GetStage() != queuepb.Update_REQUEUED || u.GetAttempt() != 1 {
		t.Errorf("update on a lapsed lease is %v, want REQUEUED of attempt 1", u)
	}
	if first.Attempt() != 1 {
		t.Errorf("the first lease is of attempt %d now", first.Attempt())
	}
	s.ack(again)
	s.noJob(2 * s.o.LeaseTime)
}

func testLostLease(t *testing.T, s *suite) {
	s.publish(job("a"))
	lost := s.leaseOf("a", 1)
	again := s.leaseOf("a", 2)
	for name, f := range map[string]func(context.Context) error{"extend": lost.Extend, "ack": lost.Ack, "release": lost.Release} {
		if err := f(t.Context()); !errors.Is(err, queue.ErrLeaseLost) {
			t.Errorf("%s of a lost lease: %v, want %v", name, err, queue.ErrLeaseLost)
		}
	}
	s.ack(again)
	s.noJob(2 * s.o.LeaseTime)
}

func testExtend(t *testing.T, s *suite) {
	s.publish(job("a"))
	l := s.leaseOf("a", 1)
	for range 6 {
		s.noJob(s.o.LeaseTime / 2)
		if err := l.Extend(t.Context()); err != nil {
			t.Fatalf("extend: %v", err)
		}
	}
	s.ack(l)
	s.noJob(2 * s.o.LeaseTime)
}

func testAttempts(t *testing.T, s *suite) {
	updates := s.receive("api")
	s.publish(job("a"))
	workers := make([]string, 0, s.o.MaxAttempts)
	for i := range s.o.MaxAttempts {
		l := s.leaseOf("a", uint32(i+1)) //nolint:gosec // a small number
		workers = append(workers, "worker-"+string(rune('a'+i)))
		s.send(&queuepb.Update{Operation: "a", Attempt: l.Attempt(), Worker: workers[i], Stage: queuepb.Update_EXECUTING})
	}
	s.noJob(2 * s.o.LeaseTime)
	u := s.update(updates)
	for u.GetStage() != queuepb.Update_COMPLETED {
		u = s.update(updates)
	}
	var res repb.ExecuteResponse
	if err := proto.Unmarshal(u.GetExecuteResponse(), &res); err != nil {
		t.Fatalf("the final update's response: %v", err)
	}
	if res.GetStatus().GetCode() == 0 {
		t.Error("the response's status is OK")
	}
	msg := res.GetStatus().GetMessage()
	if !strings.HasPrefix(msg, queue.ReasonAttempts) {
		t.Errorf("message %q does not begin with %q", msg, queue.ReasonAttempts)
	}
	if slices.ContainsFunc(workers, func(w string) bool { return !strings.Contains(msg, w) }) {
		t.Errorf("message %q does not name all of %v", msg, workers)
	}
	if want := uint32(s.o.MaxAttempts); u.GetAttempt() != want { //nolint:gosec // a small number
		t.Errorf("the final update is of attempt %d, want %d", u.GetAttempt(), want)
	}
}

func testCancelWaiting(t *testing.T, s *suite) {
	s.publish(job("a"), job("b"), job("c"))
	if err := s.q.Cancel(t.Context(), "b"); err != nil {
		t.Fatalf("cancel: %v", err)
	}
	got := []string{s.lease().Job().GetOperation(), s.lease().Job().GetOperation()}
	slices.Sort(got)
	equal(t, "jobs", got, []string{"a", "c"})
	s.noJob(10 * time.Millisecond)
}

func testCancelLeased(t *testing.T, s *suite) {
	s.publish(job("a"))
	l := s.leaseOf("a", 1)
	for range 2 {
		if err := s.q.Cancel(t.Context(), "a"); err != nil {
			t.Fatalf("cancel: %v", err)
		}
	}
	select {
	case <-l.Cancelled():
	case <-time.After(s.o.Patience):
		t.Fatal("the worker was not told")
	}
	if err := l.Extend(t.Context()); err != nil {
		t.Errorf("extend while the worker winds up: %v", err)
	}
	s.ack(l)
	s.noJob(2 * s.o.LeaseTime)
}

func testCancelLapse(t *testing.T, s *suite) {
	s.publish(job("a"), job("b"))
	s.lease()
	l := s.lease()
	for _, name := range []string{"a", "b"} {
		if err := s.q.Cancel(t.Context(), name); err != nil {
			t.Fatalf("cancel: %v", err)
		}
	}
	if err := l.Release(t.Context()); err != nil {
		t.Errorf("release: %v", err)
	}
	s.noJob(3 * s.o.LeaseTime) // the other one has lapsed by then
}

func testCancelThenPublish(t *testing.T, s *suite) {
	updates := s.receive("api")
	s.publish(job("a"))
	old := s.lease()
	if err := s.q.Cancel(t.Context(), "a"); err != nil {
		t.Fatalf("cancel: %v", err)
	}
	s.publish(job("a"))
	again := s.lease()
	if again.Attempt() <= old.Attempt() {
		t.Errorf("the new delivery is attempt %d, want more than that of the withdrawn one, %d", again.Attempt(), old.Attempt())
	}
	s.send(&queuepb.Update{Operation: "a", Attempt: old.Attempt(), Worker: "old", Stage: queuepb.Update_COMPLETED})
	s.send(&queuepb.Update{Operation: "a", Attempt: again.Attempt(), Worker: "new", Stage: queuepb.Update_COMPLETED})
	if u := s.update(updates); u.GetWorker() != "new" {
		t.Errorf("update of %s, want only that of the new worker", u.GetWorker())
	}
	if err := old.Ack(t.Context()); !errors.Is(err, queue.ErrLeaseLost) {
		t.Errorf("ack of the withdrawn delivery: %v, want %v", err, queue.ErrLeaseLost)
	}
	s.ack(again)
	s.noJob(2 * s.o.LeaseTime)
}

func testCancelUnknown(t *testing.T, s *suite) {
	if err := s.q.Cancel(t.Context(), "nothing"); err != nil {
		t.Errorf("cancel of a job that is not there: %v", err)
	}
}
