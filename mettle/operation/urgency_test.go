package operation_test

import (
	"testing"

	"github.com/mettle-build/mettle/mettle/operation"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

func TestRegistry_Raise(t *testing.T) {
	r, _ := start(t, operation.RegistryOptions{})
	n := name("a")
	n.Priority = 5
	w, _ := r.Join(n, operation.Mergeable)
	urgency := func(priority int32, invocation string) operation.Urgency {
		return operation.Urgency{Priority: priority, Invocation: invocation}
	}
	if r.Raise(w, urgency(3, "x")) {
		t.Error("a job that the broker does not have was to be raised")
	}
	r.Published(w, nil)
	if u, ok := r.Raised(w); !ok || u != urgency(3, "x") {
		t.Errorf("after it was published it is to be raised to %v, %v, want 3 of x", u, ok)
	}
	if u, ok := r.Raised(w); ok {
		t.Errorf("it is to be raised to %v once more", u)
	}
	for _, tc := range []struct {
		u    operation.Urgency
		want bool
	}{
		{urgency(3, "x"), false}, // as it is
		{urgency(4, "y"), false},
		{urgency(3, "y"), true},
		{urgency(3, "y"), false},
		{urgency(2, "y"), true},
		{urgency(3, "x"), false},
	} {
		if got := r.Raise(w, tc.u); got != tc.want {
			t.Errorf("it is to be raised to %v: %v, want %v", tc.u, got, tc.want)
		}
	}
	r.Update(&queuepb.Update{Operation: n.String(), Attempt: 1, Stage: queuepb.Update_EXECUTING})
	if r.Raise(w, urgency(1, "z")) {
		t.Error("a job that a worker has was to be raised")
	}
}
