package api_test

import (
	"context"
	"errors"
	"io"
	"net"
	"sync/atomic"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/proto"

	"github.com/mettle-build/mettle/mettle/api"
	"github.com/mettle-build/mettle/mettle/platform"
	"github.com/mettle-build/mettle/mettle/queue"
	"github.com/mettle-build/mettle/mettle/queue/mem"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// serve serves a fresh server over loopback TCP, beside a trivial unary service
// that is the floor of what gRPC allows.
func serve(b *testing.B, store *storage, q *mem.Queue) *grpc.ClientConn {
	b.Helper()
	platforms, err := platform.New(platform.Options{})
	if err != nil {
		b.Fatal(err)
	}
	s, err := api.New(api.Options{ID: "api", Store: store, Actions: store, Jobs: q, Updates: q, Platforms: platforms})
	if err != nil {
		b.Fatal(err)
	}
	l, err := (&net.ListenConfig{}).Listen(b.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	g := grpc.NewServer()
	s.Register(g)
	grpc_health_v1.RegisterHealthServer(g, health.NewServer())
	ctx, cancel := context.WithCancel(b.Context())
	ended := make(chan struct{}, 2)
	go func() { g.Serve(l); ended <- struct{}{} }() //nolint:errcheck // ends with Stop
	go func() { s.Run(ctx); ended <- struct{}{} }() //nolint:errcheck // ends with ctx
	conn, err := grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		conn.Close()
		cancel()
		g.Stop()
		<-ended
		<-ended
	})
	return conn
}

func newQueue(b *testing.B) *mem.Queue {
	b.Helper()
	q, err := mem.New(mem.Options{})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { q.Close() })
	return q
}

// drain executes an action and reads the stream to its end.
func drain(ctx context.Context, c repb.ExecutionClient, req *repb.ExecuteRequest) error {
	st, err := c.Execute(ctx, req)
	if err != nil {
		return err
	}
	done := false
	for {
		op, err := st.Recv()
		if errors.Is(err, io.EOF) && done {
			return nil
		}
		if err != nil {
			return err
		}
		done = op.GetDone()
	}
}

// parallel runs f from 16 goroutines a CPU.
func parallel(b *testing.B, f func() error) {
	b.SetParallelism(8)
	b.ReportAllocs()
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if err := f(); err != nil {
				b.Error(err)
				return
			}
		}
	})
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "calls/s")
}

func BenchmarkExecute(b *testing.B) {
	b.Run("floor: unary call", func(b *testing.B) {
		c := grpc_health_v1.NewHealthClient(serve(b, newStorage(), newQueue(b)))
		parallel(b, func() error {
			_, err := c.Check(b.Context(), &grpc_health_v1.HealthCheckRequest{})
			return err
		})
	})
	b.Run("cached", func(b *testing.B) {
		store := newStorage()
		d := store.action("a")
		store.cache(d, &repb.ActionResult{OutputFiles: []*repb.OutputFile{{Path: "bazel-out/k8/bin/a.o", Digest: d}}})
		c := repb.NewExecutionClient(serve(b, store, newQueue(b)))
		parallel(b, func() error { return drain(b.Context(), c, &repb.ExecuteRequest{ActionDigest: d}) })
	})
	b.Run("cached, handler alone", func(b *testing.B) {
		store := newStorage()
		d := store.action("a")
		store.cache(d, &repb.ActionResult{OutputFiles: []*repb.OutputFile{{Path: "bazel-out/k8/bin/a.o", Digest: d}}})
		platforms, err := platform.New(platform.Options{})
		if err != nil {
			b.Fatal(err)
		}
		q := newQueue(b)
		s, err := api.New(api.Options{ID: "api", Store: store, Actions: store, Jobs: q, Updates: q, Platforms: platforms})
		if err != nil {
			b.Fatal(err)
		}
		st := discard{ctx: b.Context()}
		b.ReportAllocs()
		for b.Loop() {
			if err := s.Execute(&repb.ExecuteRequest{ActionDigest: d}, st); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("instant workers", func(b *testing.B) { benchInstant(b) })
}

// benchInstant measures from Execute to the result, of workers that need no time.
func benchInstant(b *testing.B) {
	store, q := newStorage(), newQueue(b)
	response, err := proto.Marshal(&repb.ExecuteResponse{Result: &repb.ActionResult{}})
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(b.Context())
	worked := make(chan error, 4)
	for range cap(worked) {
		go func() { worked <- instant(ctx, q, response) }()
	}
	b.Cleanup(func() {
		cancel()
		for range cap(worked) {
			if err := <-worked; !errors.Is(err, context.Canceled) {
				b.Error(err)
			}
		}
	})
	actions := make([]*repb.Digest, 512)
	for i := range actions {
		actions[i] = store.action(string(rune('a'+i%26))+string(rune('a'+i/26)), doNotCache)
	}
	var next atomic.Int64
	c := repb.NewExecutionClient(serve(b, store, q))
	parallel(b, func() error {
		d := actions[int(next.Add(1))%len(actions)]
		return drain(b.Context(), c, &repb.ExecuteRequest{ActionDigest: d})
	})
}

// instant is a worker that needs no time.
func instant(ctx context.Context, q queue.Consumer, response []byte) error {
	sender := q.(queue.Sender) //nolint:forcetypeassert // the memory queue
	for {
		l, err := q.Lease(ctx, []string{queue.DefaultPool})
		if err != nil {
			return err
		}
		for _, stage := range []queuepb.Update_Stage{queuepb.Update_EXECUTING, queuepb.Update_COMPLETED} {
			u := &queuepb.Update{Operation: l.Job().GetOperation(), Attempt: 1, Worker: "w", Stage: stage}
			if stage == queuepb.Update_COMPLETED {
				u.ExecuteResponse = response
			}
			if err := sender.SendUpdate(ctx, l.Job().GetReplyTo(), u); err != nil {
				return err
			}
		}
		if err := l.Ack(ctx); err != nil {
			return err
		}
	}
}
