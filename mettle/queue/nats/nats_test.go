package nats_test

import (
	"flag"
	"fmt"
	"log/slog"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"go.uber.org/goleak"

	"github.com/mettle-build/mettle/mettle/queue/nats"
	"github.com/mettle-build/mettle/mettle/queue/queuetest"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

func TestMain(m *testing.M) {
	flag.Parse()
	// The tests wait, most of the time, for leases to lapse and servers to start.
	if err := flag.Set("test.parallel", "16"); err != nil {
		panic(err)
	}
	goleak.VerifyTestMain(m)
}

// A broker is an embedded server that can be stopped and started again.
type broker struct {
	opts server.Options
	srv  *server.Server
}

func newBroker(tb testing.TB, change func(*server.Options)) *broker {
	tb.Helper()
	b := &broker{opts: server.Options{
		Host: "127.0.0.1", Port: server.RANDOM_PORT, JetStream: true, StoreDir: tb.TempDir(), NoSigs: true, NoLog: true,
	}}
	if change != nil {
		change(&b.opts)
	}
	b.start(tb)
	b.opts.Port = b.srv.Addr().(*net.TCPAddr).Port //nolint:forcetypeassert // it listens on TCP
	tb.Cleanup(b.stop)
	return b
}

func (b *broker) start(tb testing.TB) {
	tb.Helper()
	opts := b.opts
	srv, err := server.NewServer(&opts)
	if err != nil {
		tb.Fatal(err)
	}
	srv.Start()
	b.srv = srv
	if !srv.ReadyForConnections(10 * time.Second) {
		tb.Fatal("the server does not start")
	}
}

func (b *broker) stop() {
	b.srv.Shutdown()
	b.srv.WaitForShutdown()
}

func (b *broker) url() string { return fmt.Sprintf("nats://127.0.0.1:%d", b.opts.Port) }

// queues counts the prefixes that were used, so that a case finds its queue empty.
var queues atomic.Int64 //nolint:gochecknoglobals // a counter

// leaseTime is short, for tests that wait for a lapse, and long enough for a
// slow machine to extend in half of it.
const leaseTime = time.Second

func newQueue(tb testing.TB, b *broker, change func(*nats.Options)) *nats.Queue {
	tb.Helper()
	o := nats.Options{
		Servers: []string{b.url()}, Prefix: fmt.Sprint("q", queues.Add(1)), LeaseTime: leaseTime,
		Logger: slog.New(slog.NewTextHandler(tb.Output(), &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	if change != nil {
		change(&o)
	}
	q, err := nats.New(tb.Context(), o)
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

func job(name string) *queuepb.Job {
	return &queuepb.Job{Operation: name, ReplyTo: "api", Pool: "p"}
}

func TestSuite(t *testing.T) {
	t.Parallel()
	b := newBroker(t, nil)
	const leaseTime = 2 * time.Second // some cases take more than one, on a busy machine
	queuetest.Run(t, queuetest.Options{
		New: func(t *testing.T) queuetest.Queue {
			return newQueue(t, b, func(o *nats.Options) { o.MaxJobs, o.LeaseTime = 1000, leaseTime })
		},
		// They wait for leases to lapse, most of the time.
		Around: func(t *testing.T, f func(*testing.T)) {
			t.Parallel()
			f(t)
		},
		Features: queuetest.Features{
			// The suite's priorities come in an order that the bands keep.
			LeaseTime: leaseTime, MaxAttempts: 3, Order: true, SharedDuplicates: true, MaxJobs: 1000,
			Patience: 20 * time.Second,
		},
	})
}
