package rpc_test

import (
	"context"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/mettle-build/mettle/elan/rpc"
)

// A served is a server on a line of its own, that can be told to end.
type served struct {
	line  *bufconn.Listener
	end   context.CancelFunc
	ended chan error
}

// startServed has a server answer with a health of its own, which says more than that
// the server is there.
func startServed(t *testing.T, delay time.Duration) *served {
	t.Helper()
	ctx, end := context.WithCancel(t.Context())
	s := &served{line: bufconn.Listen(64 << 10), end: end, ended: make(chan error, 1)}
	server := grpc.NewServer()
	h := health.NewServer()
	healthpb.RegisterHealthServer(server, h)
	go func() {
		s.ended <- rpc.Serve(ctx, server, rpc.ServeOptions{Listener: s.line, Health: h, Delay: delay, Grace: time.Minute})
	}()
	return s
}

// dialServed is a client of several servers, by what they are called: it stays with the
// first that it can connect to.
func dialServed(t *testing.T, servers map[string]*served, names ...string) healthpb.HealthClient {
	t.Helper()
	r := manual.NewBuilderWithScheme("lines")
	var addrs []resolver.Address
	for _, name := range names {
		addrs = append(addrs, resolver.Address{Addr: name})
	}
	r.InitialState(resolver.State{Addresses: addrs})
	conn, err := grpc.NewClient("lines:///", grpc.WithResolvers(r), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) { return servers[addr].line.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return healthpb.NewHealthClient(conn)
}

// TestServe_delay: a server that is told to end says so, and takes new connections and
// calls for as long as balancers need to hear of it.
func TestServe_delay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := startServed(t, 10*time.Second)
		servers := map[string]*served{"a": s}
		check := func(want healthpb.HealthCheckResponse_ServingStatus) {
			t.Helper()
			resp, err := dialServed(t, servers, "a").Check(t.Context(), &healthpb.HealthCheckRequest{})
			if err != nil || resp.GetStatus() != want {
				t.Errorf("a new connection is told %v, %v; want %v", resp.GetStatus(), err, want)
			}
		}
		check(healthpb.HealthCheckResponse_SERVING)
		s.end()
		synctest.Wait()
		check(healthpb.HealthCheckResponse_NOT_SERVING)
		time.Sleep(9 * time.Second)
		check(healthpb.HealthCheckResponse_NOT_SERVING)
		time.Sleep(2 * time.Second)
		if err := <-s.ended; err != nil {
			t.Error(err)
		}
		if _, err := dialServed(t, servers, "a").Check(t.Context(), &healthpb.HealthCheckRequest{}); status.Code(err) != codes.Unavailable {
			t.Errorf("after its end: %v, want UNAVAILABLE", err)
		}
	})
}

// TestServe_movesClients: what clients ask for while their server ends is done there or
// by another: they are told to connect anew, and no call fails.
func TestServe_movesClients(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		servers := map[string]*served{"a": startServed(t, 0), "b": startServed(t, 0)}
		client := dialServed(t, servers, "a", "b")
		var calls sync.WaitGroup
		for i := range 8 {
			calls.Go(func() {
				for range 200 {
					if _, err := client.Check(t.Context(), &healthpb.HealthCheckRequest{}); err != nil {
						t.Errorf("client %d: %v", i, err)
						return
					}
					time.Sleep(time.Duration(1+i) * time.Millisecond)
				}
			})
		}
		time.Sleep(500*time.Millisecond + 1)
		servers["a"].end()
		if err := <-servers["a"].ended; err != nil {
			t.Error(err)
		}
		calls.Wait()
		resp, err := client.Check(t.Context(), &healthpb.HealthCheckRequest{})
		if err != nil || resp.GetStatus() != healthpb.HealthCheckResponse_SERVING {
			t.Errorf("in the end the client is told %v, %v; want the other server's SERVING", resp.GetStatus(), err)
		}
		servers["b"].end()
		if err := <-servers["b"].ended; err != nil {
			t.Error(err)
		}
	})
}
