package pubsub_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/mettle-build/mettle/mettle/queue"
	"github.com/mettle-build/mettle/mettle/queue/pubsub/pubsubtest"
)

// Ready asks only where nothing else has told, and believes no older answer
// once something has failed.
func TestQueue_Ready(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	o := options(s)
	o.CallTimeout = time.Second
	q := newQueue(t, o)
	if err := q.Ready(t.Context()); !errors.Is(err, queue.ErrUnavailable) || !strings.Contains(err.Error(), "run mettle setup") {
		t.Errorf("ready without setup: %v, want %v, run mettle setup", err, queue.ErrUnavailable)
	}
	if err := q.Setup(t.Context()); err != nil {
		t.Fatal(err)
	}
	before := s.Calls()["GetTopic"]
	for range 3 {
		if err := q.Ready(t.Context()); err != nil {
			t.Errorf("ready: %v", err)
		}
	}
	if n := s.Calls()["GetTopic"]; n != before {
		t.Errorf("ready asked %d times though the broker had just answered", n-before)
	}
	refuse := func(code codes.Code) func(string, any) pubsubtest.Fault {
		return func(string, any) pubsubtest.Fault {
			return pubsubtest.Fault{Before: status.Error(code, "no")}
		}
	}
	s.SetFault(refuse(codes.Unavailable))
	if err := q.Cancel(t.Context(), "a"); err == nil {
		t.Error("cancel while the broker is away: no error")
	}
	if err := q.Ready(t.Context()); !errors.Is(err, queue.ErrUnavailable) {
		t.Errorf("ready while the broker is away: %v, want %v", err, queue.ErrUnavailable)
	}
	s.SetFault(refuse(codes.PermissionDenied))
	if err := q.Ready(t.Context()); err != nil {
		t.Errorf("ready of one who may not look: %v", err)
	}
	s.SetFault(nil)
	if err := q.Close(); err != nil {
		t.Fatal(err)
	}
	if err := q.Ready(t.Context()); !errors.Is(err, queue.ErrClosed) {
		t.Errorf("ready of a closed queue: %v, want %v", err, queue.ErrClosed)
	}
}
