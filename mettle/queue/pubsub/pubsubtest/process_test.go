package pubsubtest_test

import (
	"context"
	"fmt"
	"os"
	"testing"
	"time"

	pb "cloud.google.com/go/pubsub/v2/apiv1/pubsubpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/mettle-build/mettle/mettle/queue/pubsub/pubsubtest"
)

func TestMain(m *testing.M) {
	if pubsubtest.RunAsProcess() {
		return
	}
	os.Exit(m.Run())
}

const (
	topic        = "projects/p/topics/t"
	subscription = "projects/p/subscriptions/s"
)

// A client has a topic and a subscription at a fake.
type client struct {
	pb.PublisherClient
	pb.SubscriberClient
}

func newClient(t *testing.T, addr string) client {
	t.Helper()
	cc, err := grpc.NewClient(addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cc.Close() })
	c := client{pb.NewPublisherClient(cc), pb.NewSubscriberClient(cc)}
	if _, err := c.CreateTopic(t.Context(), &pb.Topic{Name: topic}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.CreateSubscription(t.Context(), &pb.Subscription{Name: subscription, Topic: topic}); err != nil {
		t.Fatal(err)
	}
	return c
}

func (c client) publish(t *testing.T, data string) {
	t.Helper()
	if _, err := c.Publish(t.Context(), &pb.PublishRequest{Topic: topic, Messages: []*pb.PubsubMessage{{Data: []byte(data)}}}); err != nil {
		t.Fatal(err)
	}
}

// pull is the ack id of the message of that data, which must come.
func (c client) pull(t *testing.T, data string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	res, err := c.Pull(ctx, &pb.PullRequest{Subscription: subscription, MaxMessages: 1})
	if err != nil {
		t.Fatal(err)
	}
	if len(res.GetReceivedMessages()) != 1 || string(res.GetReceivedMessages()[0].GetMessage().GetData()) != data {
		t.Fatalf("pulled %v, want %s", res, data)
	}
	return res.GetReceivedMessages()[0].GetAckId()
}

// A process is a server for whoever knows its address, and comes back empty.
func TestStart(t *testing.T) {
	p := pubsubtest.Start(t)
	c := newClient(t, p.Addr)
	c.publish(t, "a")
	c.pull(t, "a")
	p.Kill()
	p = pubsubtest.Start(t, "--addr="+p.Addr)
	c = newClient(t, p.Addr) // it knows neither the topic nor the subscription
	c.publish(t, "b")
	c.pull(t, "b")
}

// What is pulled is there for somebody else too, and acknowledging does nothing.
func TestStart_failures(t *testing.T) {
	p := pubsubtest.Start(t, "--duplicate=1", "--drop_acks=1", "--delay=1", "--max_delay=1ms")
	c := newClient(t, p.Addr)
	c.publish(t, "a")
	c.pull(t, "a")
	if _, err := c.Acknowledge(t.Context(), &pb.AcknowledgeRequest{Subscription: subscription, AckIds: []string{c.pull(t, "a")}}); err != nil {
		t.Fatal(err)
	}
	c.pull(t, "a")
}

// The same seed makes the same of the first call, the second and so on, and
// another share of one kind of failure changes nothing about the others.
func TestChaos_Faults_seed(t *testing.T) {
	run := func(c pubsubtest.Chaos) (refused, lost string) {
		f := c.Faults()
		for range 100 {
			fault := f("Pull", nil)
			refused += fmt.Sprint(fault.Before != nil, " ")
			lost += fmt.Sprint(fault.After != nil, " ")
		}
		return refused, lost
	}
	c := pubsubtest.Chaos{Seed: 1, Unavailable: 0.3, LoseAnswers: 0.3}
	refused, lost := run(c)
	c.Unavailable = 0
	if never, again := run(c); lost != again || never == refused {
		t.Errorf("with the same seed %q were lost and then %q", lost, again)
	}
	c.Seed = 2
	if _, other := run(c); lost == other {
		t.Error("another seed does the same")
	}
}
