package rpc_test

import (
	"context"
	"net"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/test/bufconn"

	"github.com/mettle-build/mettle/elan/rpc"
)

// A client that pings as often as clients may, with a call that waits for hours
// and without any, keeps its connection: gRPC's own policy answers GOAWAY
// too_many_pings.
func TestNewServer_bearsPings(t *testing.T) {
	for name, open := range map[string]bool{"with a call that waits": true, "idle": false} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := bufconn.Listen(1 << 16)
				server, health := rpc.NewServer()
				served := make(chan error, 1)
				go func() { served <- server.Serve(l) }()
				var dials atomic.Int32
				conn, err := grpc.NewClient("passthrough:///server",
					grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
						dials.Add(1)
						return l.DialContext(ctx)
					}),
					grpc.WithTransportCredentials(insecure.NewCredentials()),
					grpc.WithIdleTimeout(0),
					grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 5 * time.Second, PermitWithoutStream: true}))
				if err != nil {
					t.Fatal(err)
				}
				client := healthpb.NewHealthClient(conn)
				if open {
					stream, err := client.Watch(t.Context(), &healthpb.HealthCheckRequest{})
					if err != nil {
						t.Fatal(err)
					}
					if _, err := stream.Recv(); err != nil {
						t.Fatal(err)
					}
					ended := make(chan error, 1)
					go func() { _, err := stream.Recv(); ended <- err }()
					time.Sleep(2 * time.Hour)
					select {
					case err := <-ended:
						t.Errorf("the call ended: %v", err)
					default:
					}
					health.Shutdown() // which the call tells
					if err := <-ended; err != nil {
						t.Error(err)
					}
				} else {
					conn.Connect()
					time.Sleep(2 * time.Hour)
				}
				if _, err := client.Check(t.Context(), &healthpb.HealthCheckRequest{}); err != nil {
					t.Error(err)
				}
				if n := dials.Load(); n != 1 {
					t.Errorf("%d connections were made, want one", n)
				}
				if err := conn.Close(); err != nil {
					t.Error(err)
				}
				server.Stop()
				if err := <-served; err != nil {
					t.Error(err)
				}
			})
		})
	}
}
