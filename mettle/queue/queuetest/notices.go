package queuetest

import (
	"context"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// listen listens to notices until the case ends.
func (s *suite) listen(id string) <-chan *queuepb.Notice {
	ch := make(chan *queuepb.Notice, 4096) // more than any case sends
	ctx, cancel := context.WithCancel(s.t.Context())
	ended := make(chan error, 1)
	go func() { ended <- s.q.ListenNotices(ctx, id, func(n *queuepb.Notice) { ch <- n }) }()
	s.t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			s.t.Errorf("listen to notices for %s: %v", id, err)
		}
	})
	return ch
}

// hear waits until each of the listeners has heard n, which is said again and
// again: one that has just begun may miss the first times.
func (s *suite) hear(n *queuepb.Notice, ears ...<-chan *queuepb.Notice) {
	s.t.Helper()
	again := time.NewTicker(50 * time.Millisecond)
	defer again.Stop()
	patience := time.After(s.o.Patience)
	for i, ear := range ears {
		for heard := false; !heard; {
			select {
			case got := <-ear:
				if heard = got.GetCancellation().GetOperation() == n.GetCancellation().GetOperation(); heard {
					equal(s.t, "notice", got, n)
				}
			case <-again.C:
				if err := s.q.Notify(s.t.Context(), n); err != nil {
					s.t.Fatalf("notify: %v", err)
				}
			case <-patience:
				s.t.Fatalf("listener %d heard nothing of %v", i, n)
			}
		}
	}
}

func cancellation(operation string) *queuepb.Notice {
	return &queuepb.Notice{About: &queuepb.Notice_Cancellation{Cancellation: &queuepb.Cancellation{Operation: operation}}}
}

func testNotices(t *testing.T, s *suite) {
	one, two := s.listen("api-1"), s.listen("api-2")
	s.hear(cancellation("a"), one, two)
	worker := &queuepb.Notice{About: &queuepb.Notice_Worker{Worker: &queuepb.WorkerState{
		Worker: "w", Pool: "p", Slots: 4, State: queuepb.WorkerState_TAKING,
		Properties: []*queuepb.Property{{Name: "OSFamily", Value: "linux"}},
	}}}
	if err := s.q.Notify(t.Context(), worker); err != nil {
		t.Fatalf("notify: %v", err)
	}
	for _, ear := range []<-chan *queuepb.Notice{one, two} {
		for {
			var got *queuepb.Notice
			select {
			case got = <-ear:
			case <-time.After(s.o.Patience):
				t.Fatal("the worker's state was not heard")
			}
			if got.GetWorker() != nil {
				equal(t, "notice", got, worker)
				break
			}
		}
	}
}

func testNoListener(t *testing.T, s *suite) {
	if err := s.q.Notify(t.Context(), cancellation("a")); err != nil {
		t.Errorf("a notice that nobody hears: %v", err)
	}
}

// testLateListener begins to listen after a worker has spoken, and has not long
// to wait until it hears of it.
func testLateListener(t *testing.T, s *suite) {
	state := func(worker string, is queuepb.WorkerState_State) *queuepb.Notice {
		return &queuepb.Notice{About: &queuepb.Notice_Worker{Worker: &queuepb.WorkerState{
			Worker: worker, Pool: "p", Slots: 1, State: is, Lifetime: durationpb.New(10 * time.Minute),
		}}}
	}
	first, second := state("stays", queuepb.WorkerState_PAUSED), state("stays", queuepb.WorkerState_TAKING)
	for _, n := range []*queuepb.Notice{state("goes", queuepb.WorkerState_TAKING), first, state("goes", queuepb.WorkerState_GONE), second} {
		if err := s.q.Notify(t.Context(), n); err != nil {
			t.Fatalf("notify: %v", err)
		}
	}
	late := s.listen("late")
	patience := time.After(s.o.Patience)
	for {
		select {
		case got := <-late:
			// What was said shortly before may be heard as well.
			if got.GetWorker().GetWorker() == "stays" && got.GetWorker().GetState() == queuepb.WorkerState_TAKING {
				equal(t, "notice", got, second)
				return
			}
		case <-patience:
			t.Fatal("a listener that began later does not hear of the worker")
		}
	}
}
