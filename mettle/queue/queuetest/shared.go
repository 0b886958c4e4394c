package queuetest

import (
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/protobuf/proto"

	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// sharedJob publishes a job for two API servers, and returns what each hears.
func (s *suite) sharedJob(name string) (mine, theirs <-chan *queuepb.Update) {
	s.t.Helper()
	if !s.o.SharedDuplicates {
		s.t.Skip("each API server has a job of its own")
	}
	mine, theirs = s.receive("api"), s.receive("other-api")
	again := job(name)
	again.ReplyTo = "other-api"
	s.publish(job(name), again)
	return mine, theirs
}

// wantCancelled waits for the end of a job that was withdrawn.
func (s *suite) wantCancelled(ch <-chan *queuepb.Update) {
	s.t.Helper()
	u := s.update(ch)
	for u.GetStage() != queuepb.Update_COMPLETED {
		u = s.update(ch)
	}
	var res repb.ExecuteResponse
	if err := proto.Unmarshal(u.GetExecuteResponse(), &res); err != nil {
		s.t.Fatalf("the final update's response: %v", err)
	}
	if c := code.Code(res.GetStatus().GetCode()); c != code.Code_CANCELLED {
		s.t.Errorf("the job's end has the status %s, want CANCELLED", c)
	}
}

// testCancelTells: clients of another server may wait for a job that is withdrawn
// before a worker has it.
func testCancelTells(t *testing.T, s *suite) {
	_, theirs := s.sharedJob("a")
	if err := s.q.Cancel(t.Context(), "a"); err != nil {
		t.Fatalf("cancel: %v", err)
	}
	s.wantCancelled(theirs)
}

// testCancelLapseTells: the worker of a job that is withdrawn may never report.
func testCancelLapseTells(t *testing.T, s *suite) {
	_, theirs := s.sharedJob("a")
	s.leaseOf("a", 1)
	if err := s.q.Cancel(t.Context(), "a"); err != nil {
		t.Fatalf("cancel: %v", err)
	}
	s.noJob(3 * s.o.LeaseTime) // a broker may find out by another worker
	s.wantCancelled(theirs)
}

// testCancelReleaseTells: or hand it back.
func testCancelReleaseTells(t *testing.T, s *suite) {
	_, theirs := s.sharedJob("a")
	l := s.leaseOf("a", 1)
	if err := s.q.Cancel(t.Context(), "a"); err != nil {
		t.Fatalf("cancel: %v", err)
	}
	if err := l.Release(t.Context()); err != nil {
		t.Fatalf("release: %v", err)
	}
	s.wantCancelled(theirs)
}

// testCancelAckThenPublish: reports on the withdrawn job may come late.
func testCancelAckThenPublish(t *testing.T, s *suite) {
	s.publish(job("a"))
	old := s.lease()
	if err := s.q.Cancel(t.Context(), "a"); err != nil {
		t.Fatalf("cancel: %v", err)
	}
	s.ack(old)
	s.publish(job("a"))
	again := s.lease()
	if again.Attempt() <= old.Attempt() {
		t.Errorf("the new delivery is attempt %d, want more than that of the withdrawn one, %d", again.Attempt(), old.Attempt())
	}
	s.ack(again)
}

// testPublishedTooLate: a server may ask for a job whose worker has reported its
// end, and not yet acknowledged it.
func testPublishedTooLate(t *testing.T, s *suite) {
	if !s.o.SharedDuplicates {
		t.Skip("each API server has a job of its own")
	}
	theirs := s.receive("other-api")
	s.publish(job("a"))
	l := s.leaseOf("a", 1)
	for _, stage := range []queuepb.Update_Stage{queuepb.Update_EXECUTING, queuepb.Update_COMPLETED} {
		s.send(&queuepb.Update{Operation: "a", Attempt: 1, Worker: "w", Stage: stage})
	}
	late := job("a")
	late.ReplyTo = "other-api"
	s.publish(late)
	s.ack(l)
	for u := s.update(theirs); u.GetStage() != queuepb.Update_COMPLETED; u = s.update(theirs) {
		if u.GetStage() != queuepb.Update_EXECUTING {
			t.Fatalf("update %v, want EXECUTING or COMPLETED", u)
		}
	}
}
