package pubsub_test

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	pb "cloud.google.com/go/pubsub/v2/apiv1/pubsubpb"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/mettle-build/mettle/mettle/queue"
	"github.com/mettle-build/mettle/mettle/queue/pubsub"
	"github.com/mettle-build/mettle/mettle/queue/pubsub/pubsubtest"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

//nolint:gochecknoglobals // a flag
var record = flag.String("record", "", "record what today's fleet makes and sends at the broker as that of this release")

// releaseDir has what fleets of each release made and sent. It never changes.
const releaseDir = "testdata/releases"

// calls are those by which a fleet makes what it needs at the broker, and leaves
// messages there, in their order.
type calls struct {
	mu            sync.Mutex
	Topics        []json.RawMessage
	Subscriptions []json.RawMessage
	Published     []json.RawMessage
}

// note keeps a call.
func (c *calls) note(_ string, req any) pubsubtest.Fault {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch r := req.(type) {
	case *pb.Topic:
		c.Topics = append(c.Topics, plain(r))
	case *pb.Subscription:
		c.Subscriptions = append(c.Subscriptions, plain(r))
	case *pb.PublishRequest:
		c.Published = append(c.Published, plain(r))
	}
	return pubsubtest.Fault{}
}

// plain is m as JSON that is always the same.
func plain(m proto.Message) json.RawMessage {
	text, err := protojson.Marshal(m)
	if err != nil {
		panic(err) // nothing in it can fail
	}
	var v any
	if err = json.Unmarshal(text, &v); err == nil {
		text, err = json.Marshal(v)
	}
	if err != nil {
		panic(err) // likewise
	}
	return text
}

// TestRecord records a release, if it is told to.
func TestRecord(t *testing.T) {
	if *record == "" {
		t.Skip("-record names no release")
	}
	path := filepath.Join(releaseDir, *record+".json")
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("%s was recorded (%v): what a release left does not change; record the next one", *record, err)
	}
	s, c := newServer(t), &calls{}
	s.SetFault(c.note)
	leave(t, s)
	s.SetFault(nil)
	text, err := json.MarshalIndent(c, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.MkdirAll(releaseDir, 0o755), os.WriteFile(path, append(text, '\n'), 0o644)); err != nil { //nolint:gosec // part of the source
		t.Fatal(err)
	}
}

// leave has a fleet send each kind of message there is: jobs of each band, that were
// handed back and rejected; updates of each stage; a cancellation and a notice.
func leave(t *testing.T, s *pubsubtest.Server) {
	t.Helper()
	o := options(s)
	o.LeaseTime = pubsub.DefaultLease
	f := newFleet(t, s, o)
	publish := func(name string, priority int32) {
		j := job(name)
		j.Priority, j.Action = priority, []byte("action")
		if err := f.Publish(t.Context(), j); err != nil {
			t.Fatal(err)
		}
	}
	take := func(name string) queue.Lease {
		publish(name, 0)
		l, err := f.Lease(t.Context(), []string{"p"})
		if err != nil || l.Job().GetOperation() != name {
			t.Fatalf("leased %v, %v, want %s", l, err, name)
		}
		tell(t, f, name, l.Attempt(), queuepb.Update_EXECUTING)
		return l
	}
	ended, rejected, released := take("ended"), take("rejected"), take("released")
	tell(t, f, "ended", 1, queuepb.Update_COMPLETED)
	err := errors.Join(ended.Ack(t.Context()), f.Cancel(t.Context(), "nobody's"),
		rejected.Reject(t.Context(), "no room"), released.Release(t.Context()))
	publish("urgent", -1)
	publish("low", 1)
	n := &queuepb.Notice{About: &queuepb.Notice_Worker{Worker: &queuepb.WorkerState{
		Worker: "worker", Pool: "p", Slots: 2, State: queuepb.WorkerState_TAKING, Lifetime: durationpb.New(patience),
	}}}
	if err = errors.Join(err, f.Notify(t.Context(), n)); err != nil {
		t.Fatal(err)
	}
}

func tell(t *testing.T, f *fleet, name string, attempt uint32, stage queuepb.Update_Stage) {
	t.Helper()
	u := &queuepb.Update{Operation: name, Attempt: attempt, Worker: "worker", Stage: stage}
	if stage == queuepb.Update_COMPLETED {
		u.ExecuteResponse = []byte("response")
	}
	if err := f.SendUpdate(t.Context(), "api", u); err != nil {
		t.Fatal(err)
	}
}

// restore makes the calls of a release again, and has jobs be there as they were in the
// end: each in its last message, and none that has ended.
func (c *calls) restore(t *testing.T, s *pubsubtest.Server) {
	t.Helper()
	conn, err := grpc.NewClient(s.Addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	publisher, subscriber := pb.NewPublisherClient(conn), pb.NewSubscriberClient(conn)
	for _, text := range c.Topics {
		_, err := publisher.CreateTopic(t.Context(), parse(t, text, &pb.Topic{}))
		must(t, err)
	}
	for _, text := range c.Subscriptions {
		_, err := subscriber.CreateSubscription(t.Context(), parse(t, text, &pb.Subscription{}))
		must(t, err)
	}
	last := map[string]*pb.PubsubMessage{}
	c.each(t, func(topic string, m *pb.PubsubMessage) {
		if strings.HasSuffix(topic, "-jobs") {
			last[c.operation(t, m)] = m
		}
	})
	c.each(t, func(topic string, m *pb.PubsubMessage) {
		if strings.HasSuffix(topic, "-jobs") && (!proto.Equal(last[c.operation(t, m)], m) || c.operation(t, m) == "ended") {
			return
		}
		_, err := publisher.Publish(t.Context(), &pb.PublishRequest{Topic: topic, Messages: []*pb.PubsubMessage{m}})
		must(t, err)
	})
}

// each tells of all messages that were published.
func (c *calls) each(t *testing.T, f func(topic string, m *pb.PubsubMessage)) {
	t.Helper()
	for _, text := range c.Published {
		r := parse(t, text, &pb.PublishRequest{})
		for _, m := range r.GetMessages() {
			f(r.GetTopic(), m)
		}
	}
}

// operation is which one a job is of.
func (c *calls) operation(t *testing.T, m *pb.PubsubMessage) string {
	t.Helper()
	j := &queuepb.Job{}
	must(t, proto.Unmarshal(m.GetData(), j))
	return j.GetOperation()
}

func parse[M proto.Message](t *testing.T, text json.RawMessage, m M) M {
	t.Helper()
	must(t, protojson.Unmarshal(text, m))
	return m
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestRelease: a fleet of today takes over what one of each release has made and left,
// with and without mettle setup in between.
func TestRelease(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob(releaseDir + "/*.json")
	if err != nil || len(files) == 0 {
		t.Fatalf("no release is recorded: %v", err)
	}
	for _, path := range files {
		name := strings.TrimSuffix(filepath.Base(path), ".json")
		for _, setup := range []bool{false, true} {
			t.Run(name+map[bool]string{true: ",setup"}[setup], func(t *testing.T) {
				t.Parallel()
				text, err := os.ReadFile(path)
				must(t, err)
				c := &calls{}
				must(t, json.Unmarshal(text, c))
				s := newServer(t)
				c.restore(t, s)
				takeOver(t, s, setup)
			})
		}
	}
}

// takeOver is the life of a fleet that comes upon what was left.
func takeOver(t *testing.T, s *pubsubtest.Server, setup bool) {
	t.Helper()
	o := options(s)
	o.LeaseTime = pubsub.DefaultLease
	if setup {
		o.MaxAttempts = 4 // so that there is something to change
		must(t, newQueue(t, o).Setup(t.Context()))
		made := s.Calls()
		must(t, newQueue(t, o).Setup(t.Context()))
		if again := s.Calls(); again["UpdateSubscription"] != made["UpdateSubscription"] || made["UpdateSubscription"] == 0 {
			t.Errorf("setup changed %d subscriptions, and then %d more", made["UpdateSubscription"], again["UpdateSubscription"]-made["UpdateSubscription"])
		}
	}
	api, worker := newQueue(t, o), newQueue(t, o)
	f := &fleet{Publisher: api, Receiver: api, Consumer: worker, Sender: worker, Notifier: worker, Listener: api, api: api, worker: worker}
	e := receiveEnds(t, f)
	if u := e.next(t, patience); u.GetOperation() != "ended" || string(u.GetExecuteResponse()) != "response" {
		t.Errorf("the end that was left arrives as %v", u)
	}
	want := map[string]uint32{"urgent": 1, "low": 1, "rejected": 2, "released": 2}
	got := map[string]uint32{}
	for range want {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		l, err := worker.Lease(ctx, []string{"p"})
		cancel()
		if err != nil {
			t.Fatalf("after %v: %v", got, err)
		}
		name := l.Job().GetOperation()
		got[name] = l.Attempt()
		if string(l.Job().GetAction()) != "action" {
			t.Errorf("job %s has lost its action: %v", name, l.Job())
		}
		tell(t, f, name, l.Attempt(), queuepb.Update_COMPLETED)
		must(t, l.Ack(t.Context()))
		if u := e.next(t, patience); u.GetOperation() != name || u.GetAttempt() != l.Attempt() {
			t.Errorf("the end of %s is told as %v", name, u)
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("leased, with attempts (-want +got):\n%s", diff)
	}
}
