package queuetest

import (
	"context"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	queuepb "github.com/mettle-build/mettle/proto/queue"
)

func testUpdates(t *testing.T, s *suite) {
	other := job("b")
	other.ReplyTo = "other-api"
	s.publish(job("a"), other)
	mine, others := s.receive("api"), s.receive("other-api")
	for range 2 {
		s.ack(s.lease()) // so that none lapses meanwhile
	}

	want := &queuepb.Update{
		Operation: "a", Attempt: 1, Worker: "w", Stage: queuepb.Update_EXECUTING,
		PartialMetadata: []byte{1}, Sent: timestamppb.New(time.Unix(3, 4)),
		StdoutStreamName: "logstreams/a", StderrStreamName: "logstreams/b",
	}
	s.send(want)
	equal(t, "update", s.update(mine), want)
	final := &queuepb.Update{Operation: "a", Attempt: 1, Worker: "w", Stage: queuepb.Update_COMPLETED, ExecuteResponse: []byte{2}}
	s.send(final)
	equal(t, "update", s.update(mine), final)

	// Many at once, about many operations: within one, the later comes later,
	// or instead.
	const n = 500
	for i := range n {
		s.send(&queuepb.Update{Operation: operation(i), Attempt: 1, Stage: queuepb.Update_EXECUTING})
		s.send(&queuepb.Update{Operation: operation(i), Attempt: 1, Stage: queuepb.Update_COMPLETED})
	}
	ended := make(map[string]bool)
	for len(ended) < n {
		u := s.update(mine)
		if ended[u.GetOperation()] {
			t.Fatalf("%v of %s came after COMPLETED", u.GetStage(), u.GetOperation())
		}
		if u.GetStage() == queuepb.Update_COMPLETED {
			ended[u.GetOperation()] = true
		}
	}
	select {
	case u := <-others:
		t.Errorf("the other API server got %v", u)
	default:
	}
}

func testUpdatesGone(t *testing.T, s *suite) {
	err := s.q.SendUpdate(t.Context(), "nobody", &queuepb.Update{Operation: "a", Attempt: 1, Stage: queuepb.Update_COMPLETED})
	if err != nil {
		t.Errorf("update to a server that is gone: %v", err)
	}
}

func testReceiveContext(t *testing.T, s *suite) {
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- s.q.ReceiveUpdates(ctx, "api", func(*queuepb.Update) {}) }()
	s.noJob(10 * time.Millisecond)
	cancel()
	select {
	case err := <-ended:
		if err != nil {
			t.Errorf("receive updates until the context ends: %v, want nil", err)
		}
	case <-time.After(s.o.Patience):
		t.Fatal("receiving did not end with the context")
	}
}

func testSlowReceiver(t *testing.T, s *suite) {
	s.publish(job("a"))
	ctx, cancel := context.WithCancel(t.Context())
	started, unblock, ended := make(chan struct{}), make(chan struct{}), make(chan error)
	var got []*queuepb.Update
	go func() {
		ended <- s.q.ReceiveUpdates(ctx, "api", func(u *queuepb.Update) {
			if len(got) == 0 {
				close(started)
				<-unblock
			}
			got = append(got, u)
			if u.GetStage() == queuepb.Update_COMPLETED {
				cancel()
			}
		})
	}()
	s.lease()
	s.send(&queuepb.Update{Operation: "first", Attempt: 1, Stage: queuepb.Update_EXECUTING})
	<-started
	for i := range 1000 {
		s.send(&queuepb.Update{Operation: "a", Attempt: 1, Stage: queuepb.Update_EXECUTING, PartialMetadata: []byte{byte(i)}})
	}
	s.send(&queuepb.Update{Operation: "a", Attempt: 1, Stage: queuepb.Update_COMPLETED})
	close(unblock)
	if err := <-ended; err != nil {
		t.Fatalf("receive updates: %v", err)
	}
	if last := got[len(got)-1]; last.GetOperation() != "a" || last.GetStage() != queuepb.Update_COMPLETED {
		t.Errorf("the last update is %v, want COMPLETED of a", last)
	}
}

func testSharedDuplicate(t *testing.T, s *suite) {
	if !s.o.SharedDuplicates {
		t.Skip("a job of this broker reports to one API server")
	}
	mine, others := s.receive("api"), s.receive("other-api")
	s.publish(job("a"))
	l := s.lease()
	s.send(&queuepb.Update{Operation: "a", Attempt: 1, Worker: "w", Stage: queuepb.Update_EXECUTING})
	if u := s.update(mine); u.GetStage() != queuepb.Update_EXECUTING {
		t.Errorf("first update is %v", u)
	}
	again := job("a")
	again.ReplyTo = "other-api"
	s.publish(again)
	if u := s.update(others); u.GetStage() != queuepb.Update_EXECUTING {
		t.Errorf("the second server is told %v, want that the job is EXECUTING", u)
	}
	s.send(&queuepb.Update{Operation: "a", Attempt: 1, Worker: "w", Stage: queuepb.Update_COMPLETED})
	for _, ch := range []<-chan *queuepb.Update{mine, others} {
		if u := s.update(ch); u.GetStage() != queuepb.Update_COMPLETED {
			t.Errorf("update is %v, want COMPLETED", u)
		}
	}
	s.ack(l)
}
