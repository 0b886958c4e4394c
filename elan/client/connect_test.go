package client_test

import (
	"context"
	"net"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/mettle-build/mettle/elan/client"
)

func TestParseTargets(t *testing.T) {
	for _, tc := range []struct {
		in   string
		want []string // nil: an error
	}{
		{"localhost:7777", []string{"localhost:7777"}},
		{"grpc://localhost:7777", []string{"localhost:7777"}},
		{"dns:///elan:7777", []string{"dns:///elan:7777"}},
		{"a:1,b:2", []string{"a:1", "b:2"}},
		{"grpc://a:1, grpc://b:2", []string{"a:1", "b:2"}},
		{"", nil},
		{"a:1,", nil},
		{",a:1", nil},
		{"a:1,dns:///b:2", nil},
	} {
		t.Run(tc.in, func(t *testing.T) {
			got, err := client.ParseTargets(tc.in)
			if diff := cmp.Diff(tc.want, got); diff != "" || (err == nil) != (tc.want != nil) {
				t.Errorf("error %v, -want +got:\n%s", err, diff)
			}
		})
	}
}

// counted is a server that counts what it is asked.
type counted struct {
	healthpb.UnimplementedHealthServer
	checks atomic.Int32
	watch  *health.Server
}

func (c *counted) Check(context.Context, *healthpb.HealthCheckRequest) (*healthpb.HealthCheckResponse, error) {
	c.checks.Add(1)
	return &healthpb.HealthCheckResponse{}, nil
}

func (c *counted) Watch(r *healthpb.HealthCheckRequest, s healthpb.Health_WatchServer) error {
	return c.watch.Watch(r, s)
}

// serve serves until stop is called, which may be twice.
func (c *counted) serve(t *testing.T, addr string) (at string, stop func()) {
	t.Helper()
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	c.watch = health.NewServer()
	healthpb.RegisterHealthServer(s, c)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.Serve(l) // the calls tell
	}()
	stop = func() { s.Stop(); <-done }
	t.Cleanup(stop)
	return l.Addr().String(), stop
}

// TestConnect: a connection to servers that are not there is made all the same,
// and calls take turns with those that come.
func TestConnect(t *testing.T) {
	a, b := &counted{}, &counted{}
	addrA, stop := a.serve(t, "127.0.0.1:0")
	stop()
	addrB, stop := b.serve(t, "127.0.0.1:0")
	stop()
	conn, err := client.Connect([]string{addrA, addrB})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	probe := healthpb.NewHealthClient(conn)
	for conn.GetState() != connectivity.TransientFailure {
		if !conn.WaitForStateChange(t.Context(), conn.GetState()) {
			t.Fatal("the connection does not find out that no server is there")
		}
	}
	if _, err := probe.Check(t.Context(), &healthpb.HealthCheckRequest{}); status.Code(err) != codes.Unavailable {
		t.Errorf("without a server: %v, want UNAVAILABLE at once", err)
	}
	_, stop = b.serve(t, addrB)
	if _, err := probe.Check(t.Context(), &healthpb.HealthCheckRequest{}, grpc.WaitForReady(true)); err != nil || b.checks.Load() != 1 {
		t.Errorf("with the second server: %v, it had %d calls", err, b.checks.Load())
	}
	a.serve(t, addrA)
	for a.checks.Load() == 0 {
		if _, err := probe.Check(t.Context(), &healthpb.HealthCheckRequest{}); err != nil {
			t.Fatalf("with both servers: %v", err)
		}
	}
	stop()
	// The call by which the connection is found broken fails, and no other.
	_, _ = probe.Check(t.Context(), &healthpb.HealthCheckRequest{})
	_, _ = probe.Check(t.Context(), &healthpb.HealthCheckRequest{})
	before := a.checks.Load()
	for range 10 {
		if _, err := probe.Check(t.Context(), &healthpb.HealthCheckRequest{}); err != nil {
			t.Errorf("after the second server was killed: %v", err)
		}
	}
	if n := a.checks.Load() - before; n != 10 {
		t.Errorf("the first server had %d of 10 calls", n)
	}
}

func TestConnect_refuses(t *testing.T) {
	if _, err := client.Connect(nil); err == nil {
		t.Error("no servers: no error")
	}
	if _, err := client.Connect([]string{"dns:///%"}); err == nil {
		t.Error("no target: no error")
	}
}
