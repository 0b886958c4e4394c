package nats_test

import (
	"context"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/mettle-build/mettle/mettle/queue/nats"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// listen listens to notices until the test ends.
func listen(t *testing.T, q *nats.Queue, id string) <-chan *queuepb.Notice {
	t.Helper()
	ch := make(chan *queuepb.Notice, 1024) // more than any test sends
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- q.ListenNotices(ctx, id, func(n *queuepb.Notice) { ch <- n }) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("listen: %v", err)
		}
	})
	return ch
}

func says(worker string, running int32, state queuepb.WorkerState_State, lifetime time.Duration) *queuepb.Notice {
	return &queuepb.Notice{About: &queuepb.Notice_Worker{Worker: &queuepb.WorkerState{
		Worker: worker, Pool: "p", Slots: 4, Running: running, State: state, Lifetime: durationpb.New(lifetime),
	}}}
}

func hears(t *testing.T, ch <-chan *queuepb.Notice, want *queuepb.Notice) {
	t.Helper()
	select {
	case got := <-ch:
		if d := cmp.Diff(want, got, protocmp.Transform()); d != "" {
			t.Errorf("notice (-want +got):\n%s", d)
		}
	case <-time.After(patience):
		t.Fatalf("did not hear %v", want)
	}
}

// An API server that starts knows the workers at once: it does not wait until
// each speaks up again. What holds no more is not repeated, and nobody else hears
// again what he has heard.
func TestQueue_ListenNotices_late(t *testing.T) {
	t.Parallel()
	b := newBroker(t, nil)
	qs := fleet(t, b, 4)
	early := listen(t, qs[0], "early")
	notify := func(q *nats.Queue, n *queuepb.Notice) {
		if err := q.Notify(t.Context(), n); err != nil {
			t.Fatal(err)
		}
	}
	// Until it is known that the first one listens.
	hello := says("first", 0, queuepb.WorkerState_TAKING, time.Nanosecond)
	for heard := false; !heard; {
		notify(qs[1], hello)
		select {
		case <-early:
			heard = true
		case <-time.After(20 * time.Millisecond):
		}
	}
	newest := says("a", 2, queuepb.WorkerState_TAKING, time.Hour)
	notify(qs[1], says("a", 1, queuepb.WorkerState_TAKING, time.Hour))
	notify(qs[1], newest)
	notify(qs[1], says("gone", 0, queuepb.WorkerState_TAKING, time.Hour))
	notify(qs[1], says("gone", 0, queuepb.WorkerState_GONE, time.Hour))
	notify(qs[1], says("brief", 0, queuepb.WorkerState_TAKING, time.Nanosecond))
	last := says("last", 0, queuepb.WorkerState_DRAINING, 0)
	notify(qs[1], last)

	var heard []string
	for len(heard) < 6 {
		select {
		case n := <-early:
			if n.GetWorker().GetWorker() != "first" {
				heard = append(heard, n.GetWorker().GetWorker())
			}
		case <-time.After(patience):
			t.Fatalf("the first listener has heard of %v only", heard)
		}
	}
	late := listen(t, qs[2], "late")
	hears(t, late, newest)
	notify(qs[1], last)
	hears(t, late, last)
	hears(t, early, last)
	if d := cmp.Diff([]string{"a", "a", "gone", "gone", "brief", "last"}, heard); d != "" {
		t.Errorf("the first listener heard (-want +got):\n%s", d)
	}
}

// A listener whose connection was lost hears what it has missed.
func TestQueue_ListenNotices_cutOff(t *testing.T) {
	t.Parallel()
	b := newBroker(t, nil)
	proxy := newProxy(t, b.url())
	worker := newQueue(t, b, func(o *nats.Options) { o.Prefix = "ears" })
	api := newQueue(t, b, func(o *nats.Options) { o.Prefix, o.Servers = "ears", []string{proxy.url()} })
	one, two := says("a", 1, queuepb.WorkerState_TAKING, time.Hour), says("a", 2, queuepb.WorkerState_PAUSED, time.Hour)
	if err := worker.Notify(t.Context(), one); err != nil {
		t.Fatal(err)
	}
	ears := listen(t, api, "api")
	hears(t, ears, one)
	proxy.cut()
	if err := worker.Notify(t.Context(), two); err != nil {
		t.Fatal(err)
	}
	proxy.restore()
	hears(t, ears, two)
}

func TestQueue_ListenNotices_oneListener(t *testing.T) {
	t.Parallel()
	q := newQueue(t, newBroker(t, nil), nil)
	if err := q.Notify(t.Context(), says("a", 1, queuepb.WorkerState_TAKING, time.Hour)); err != nil {
		t.Fatal(err)
	}
	hears(t, listen(t, q, "api"), says("a", 1, queuepb.WorkerState_TAKING, time.Hour)) // it listens
	if err := q.ListenNotices(t.Context(), "api", func(*queuepb.Notice) {}); err == nil {
		t.Error("a second listener was let in")
	}
}
