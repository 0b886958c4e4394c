package nats_test

import (
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/go-cmp/cmp"
	natsgo "github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/protobuf/proto"

	"github.com/mettle-build/mettle/mettle/queue/nats"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// awaitUnavailable is await of an end that has the client ask again.
func awaitUnavailable(t *testing.T, ch <-chan *queuepb.Update, operation string) {
	t.Helper()
	u := await(t, ch, operation, queuepb.Update_COMPLETED)
	var resp repb.ExecuteResponse
	if err := proto.Unmarshal(u.GetExecuteResponse(), &resp); err != nil {
		t.Fatal(err)
	}
	if got := code.Code(resp.GetStatus().GetCode()); got != code.Code_UNAVAILABLE {
		t.Errorf("%s ends with %v (%s), want UNAVAILABLE", operation, got, resp.GetStatus().GetMessage())
	}
}

// A broker that comes back with nothing of what it had: nobody waits for what is
// lost, and all goes on.
func TestQueue_brokerLosesAll(t *testing.T) {
	t.Parallel()
	b := newBroker(t, nil)
	same := func(o *nats.Options) {
		o.Prefix, o.Memory, o.Timeout, o.Heartbeat, o.LeaseTime = "lose", true, patience, leaseTime, 2*patience
	}
	api, worker, idle := newQueue(t, b, same), newQueue(t, b, same), newQueue(t, b, same)
	updates := receive(t, api)
	mustPublish(t, api, "runs", "ended", "waits")
	runs := mustLease(t, worker, "runs", 1)
	u := &queuepb.Update{Operation: "runs", Attempt: 1, Stage: queuepb.Update_EXECUTING}
	if err := worker.SendUpdate(t.Context(), "api", u); err != nil {
		t.Fatal(err)
	}
	await(t, updates, "runs", queuepb.Update_EXECUTING)
	ended := mustLease(t, worker, "ended", 1)
	u = &queuepb.Update{Operation: "ended", Attempt: 1, Stage: queuepb.Update_COMPLETED}
	if err := worker.SendUpdate(t.Context(), "api", u); err != nil {
		t.Fatal(err)
	}
	if err := ended.Ack(t.Context()); err != nil {
		t.Fatal(err)
	}
	await(t, updates, "ended", queuepb.Update_COMPLETED)
	waits := mustLease(t, worker, "waits", 1)
	if err := waits.Release(t.Context()); err != nil {
		t.Fatal(err)
	}

	b.stop()
	b.start(t)
	// In whichever order, and they may be told of twice.
	ends := make(map[string]bool)
	for len(ends) < 2 {
		ends[awaitEnd(t, updates).GetOperation()] = true
	}
	if d := cmp.Diff(map[string]bool{"runs": true, "waits": true}, ends); d != "" {
		t.Errorf("what has ended (-want +got):\n%s", d)
	}
	if err := runs.Ack(t.Context()); err == nil {
		t.Error("the lease of a lost job could be ended")
	}
	mustPublish(t, api, "next")
	next := mustLease(t, idle, "next", 1)
	u = &queuepb.Update{Operation: "next", Attempt: 1, Stage: queuepb.Update_COMPLETED}
	if err := idle.SendUpdate(t.Context(), "api", u); err != nil {
		t.Fatal(err)
	}
	if err := next.Ack(t.Context()); err != nil {
		t.Error(err)
	}
	await(t, updates, "next", queuepb.Update_COMPLETED)
}

// The end of a job did not arrive, although it has ended: its client is not left
// to wait.
func TestQueue_endDoesNotArrive(t *testing.T) {
	t.Parallel()
	b := newBroker(t, nil)
	api := newQueue(t, b, nil)
	updates := receive(t, api)
	mustPublish(t, api, "a")
	l := mustLease(t, api, "a", 1)
	u := &queuepb.Update{Operation: "a", Attempt: 1, Stage: queuepb.Update_EXECUTING}
	if err := api.SendUpdate(t.Context(), "api", u); err != nil {
		t.Fatal(err)
	}
	if err := l.Ack(t.Context()); err != nil { // without a word
		t.Fatal(err)
	}
	awaitUnavailable(t, updates, "a")
}

// An update that was on its way when a connection was lost comes again, also where
// later ones have been handled meanwhile.
func TestQueue_ReceiveUpdates_lostOnTheWay(t *testing.T) {
	t.Parallel()
	b := newBroker(t, nil)
	q := newQueue(t, b, func(o *nats.Options) { o.Prefix = "way" })
	send := func(operation string) {
		u := &queuepb.Update{Operation: operation, Attempt: 1, Stage: queuepb.Update_COMPLETED}
		if err := q.SendUpdate(t.Context(), "api", u); err != nil {
			t.Fatal(err)
		}
	}
	mustPublish(t, q, "a", "b") // from here on updates are kept
	send("a")
	// Somebody else gets it, and does nothing with it.
	nc, err := natsgo.Connect(b.url())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	c, err := js.Consumer(t.Context(), "way_updates", "api_api")
	if err != nil {
		t.Fatal(err)
	}
	if m, err := c.Next(); err != nil || m == nil {
		t.Fatalf("the update: %v", err)
	}
	updates := receive(t, q)
	send("b")
	await(t, updates, "b", queuepb.Update_COMPLETED)
	await(t, updates, "a", queuepb.Update_COMPLETED)
}
