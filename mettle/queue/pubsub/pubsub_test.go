package pubsub_test

import (
	"context"
	"flag"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/mettle-build/mettle/mettle/queue"
	"github.com/mettle-build/mettle/mettle/queue/pubsub"
	"github.com/mettle-build/mettle/mettle/queue/pubsub/pubsubtest"
	"github.com/mettle-build/mettle/mettle/queue/queuetest"
)

func TestMain(m *testing.M) {
	flag.Parse()
	// Most of the tests wait for leases to lapse.
	if err := flag.Set("test.parallel", "12"); err != nil {
		panic(err)
	}
	goleak.VerifyTestMain(m)
}

// lease is short, and long enough that a busy machine does not lose it.
const lease = 3 * time.Second

const patience = 30 * time.Second

func options(s *pubsubtest.Server) pubsub.Options {
	return pubsub.Options{
		Project: "project", Prefix: "test", LeaseTime: lease, Endpoint: s.Addr,
		Pools: []string{"p"},
	}
}

func newServer(tb testing.TB) *pubsubtest.Server {
	tb.Helper()
	s, err := pubsubtest.New("localhost:0")
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := s.Close(); err != nil {
			tb.Error(err)
		}
	})
	return s
}

func newQueue(tb testing.TB, o pubsub.Options) *pubsub.Queue {
	tb.Helper()
	q, err := pubsub.New(tb.Context(), o)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := q.Close(); err != nil {
			tb.Error(err)
		}
	})
	return q
}

// A fleet is an API server and a worker, each with a queue of its own.
type fleet struct {
	queue.Publisher
	queue.Receiver
	queue.Consumer
	queue.Sender
	queue.Notifier
	queue.Listener
	api, worker *pubsub.Queue
}

func newFleet(tb testing.TB, s *pubsubtest.Server, o pubsub.Options) *fleet {
	tb.Helper()
	api, worker := newQueue(tb, o), newQueue(tb, o)
	patient := o
	patient.CallTimeout = 0
	patient.Registerer = nil
	if err := newQueue(tb, patient).Setup(tb.Context()); err != nil {
		tb.Fatal(err)
	}
	if err := worker.Listen(tb.Context()); err != nil {
		tb.Fatal(err)
	}
	return &fleet{Publisher: api, Receiver: api, Consumer: worker, Sender: worker, Notifier: worker, Listener: api, api: api, worker: worker}
}

// Cancel waits until the worker has heard of it, as the suite does not.
func (f *fleet) Cancel(ctx context.Context, operation string) error {
	n, before := f.worker.Withdrawn(operation)
	if err := f.api.Cancel(ctx, operation); err != nil {
		return err
	}
	for {
		if m, t := f.worker.Withdrawn(operation); m != n || !t.Equal(before) {
			return nil
		}
		select {
		case <-time.After(time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func TestSuite(t *testing.T) {
	queuetest.Run(t, queuetest.Options{
		New: func(t *testing.T) queuetest.Queue {
			s := newServer(t)
			o := options(s)
			o.Pools = []string{"p", "other", "third", "pool-a", "pool-b", "pool-c"}
			return newFleet(t, s, o)
		},
		// Each has a server of its own, and most of them wait for leases to lapse.
		Around: func(t *testing.T, f func(t *testing.T)) {
			t.Parallel()
			f(t)
		},
		Features: queuetest.Features{
			LeaseTime: lease, MaxAttempts: 3, Patience: patience,
			// Pub/Sub keeps no order, and the bands are three.
			Order: false,
			// It does not know equal jobs: each is delivered and reports to its own
			// server. An API server does not publish one twice while it knows of it.
			SharedDuplicates: false, DuplicatesApart: true,
		},
	})
}
